"""All operations of the GPU decode step (dpllm/decode/gpu_step.py), which kernels/step_reference.py defines."""

from dpllm.kernels.triton.attention import attend
from dpllm.kernels.triton.products import chosen_gemv
from dpllm.kernels.triton.select import estimate
from dpllm.kernels.triton.small_ops import finish, norm, observe, silu_mul

__all__ = ["attend", "chosen_gemv", "estimate", "finish", "norm", "observe", "silu_mul"]
