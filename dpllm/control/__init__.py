"""Holding a target while text is generated."""
