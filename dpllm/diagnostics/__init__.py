"""Diagnostics: whether the kernels compute correctly on this machine."""
