"""Kernels for NVIDIA GPUs, written in Triton. Importing any module of this folder imports triton."""
