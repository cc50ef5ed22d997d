"""Control while text is generated: holds time per token, or bits per query, at a target."""
