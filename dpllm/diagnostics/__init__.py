"""Diagnostics: checks that the kernels compute correctly on this machine."""
