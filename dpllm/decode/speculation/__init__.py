"""Speculative decoding: where drafts come from, which are used, and how long they are."""
