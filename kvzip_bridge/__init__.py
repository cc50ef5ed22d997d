"""The KV cache: the storage that the decoder writes to, and the policies that decide which pairs stay in it."""
