"""The demo voice: a small CSM and a small Mimi, trained from nothing; README.md has the commands."""
