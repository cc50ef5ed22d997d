"""Precision policies: each chooses how many bits of a group's weights a token reads."""
