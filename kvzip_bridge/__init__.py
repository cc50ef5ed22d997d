"""The KV cache: storage the decoder writes to, and what decides which pairs stay."""
