"""Conversations as training data: read, checked, tokenised into shards, packed into rows."""
