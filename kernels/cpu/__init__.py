"""Native kernels for CPUs: the time of a product follows the planes it reads.

`src/` is a C++ library with a plain C interface, built with the package and loaded with ctypes; it knows
nothing of Python or torch. `library.py` declares that interface, `functions.py` wraps it in the signatures
of kernels/reference.py, `step.py` describes a whole decode step to it.
"""
