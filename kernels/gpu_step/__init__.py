"""The GPU's decode step: its tables in device memory, and the definition of its kernels in torch."""
