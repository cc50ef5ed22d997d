"""The `dpllm` command: one file a command, with its options and its work. `main.py` is the entry point."""
