"""Native kernels for CPUs, whose products take time in proportion to the planes that they read.

`src/` is a C++ library with a plain C interface, built with the package and loaded with ctypes; it does not depend on
Python or torch. `library.py` declares that interface. `kernels.py` wraps the interface in the signatures of
kernels/reference.py. `step.py` declares the structures that describe a whole decode step.
"""
