"""The GPU decode step: its tables in device memory, and the torch definition of its kernels."""
