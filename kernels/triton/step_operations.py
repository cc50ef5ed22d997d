"""All operations of the GPU decode step (dpllm/decode/gpu_step.py). kernels/gpu_step/definition.py defines them."""

from dpllm.kernels.triton.attention import attend
from dpllm.kernels.triton.norm_silu_finish import finish, norm, observe, silu_mul
from dpllm.kernels.triton.products import chosen_gemv
from dpllm.kernels.triton.select import estimate

__all__ = ["attend", "chosen_gemv", "estimate", "finish", "norm", "observe", "silu_mul"]
