"""What is made with csm_jax from end to end: each folder is one recipe, and its README.md has the commands.

Torchtune installs a package of this name as well: this file makes the project's own come first.
"""
