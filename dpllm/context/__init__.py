"""Contexts: texts that are read once, whose KV cache is pruned, and that are asked often."""
