"""Reads GGUF files, the models of llama.cpp, as if each were a Hugging Face model directory."""
