"""The structures of a whole decode step, as src/step.h declares them, in ctypes."""

from __future__ import annotations

import ctypes
from functools import partial

from dpllm.kernels.cpu.library import Handle, Int, Long, Matrix, Pointer

MAX_ROWS = 16  # kMaxRows of step.h: the largest number of tokens of one step
Float = ctypes.c_float
Choose = ctypes.CFUNCTYPE(Int, Int, Pointer)  # (group, float32 input) -> planes to read; 0 stops the step


class Group(ctypes.Structure):
    """Matrices that are stacked and share one decision."""

    __slots__ = ()
    _fields_ = (("weight", Matrix), ("index", Int), ("weights", Long), ("bytes_at", Pointer))


class Layer(ctypes.Structure):
    """The weights of one decoder block."""

    __slots__ = ()
    _fields_ = (
        ("input_norm", Pointer), ("post_norm", Pointer), ("q_norm", Pointer), ("k_norm", Pointer),
        ("qkv", Group * 3), ("gate_up", Group * 2), ("o", Group), ("down", Group),
        ("qkv_groups", Int), ("gate_up_groups", Int), ("window", Int), ("uses_rope", Int),
    )  # fmt: skip


class Table(ctypes.Structure):
    """The embedding or the head, stored as int8 with scales, as float32, or as planes."""

    __slots__ = ()
    _fields_ = (
        ("int8", Pointer),
        ("scale", Pointer),
        ("dense", Pointer),
        ("planes", Matrix),
        ("planes_bits", Int),
    )


class Model(ctypes.Structure):
    """All weights and constants that a step reads."""

    __slots__ = ()
    _fields_ = (
        ("layers", Int), ("hidden", Int), ("intermediate", Int), ("heads", Int), ("kv_heads", Int),
        ("head_dim", Int), ("vocab", Int), ("groups", Int), ("eps", Float), ("rope_scale", Float),
        ("inv_freq", Pointer), ("norm", Pointer), ("embedding", Table), ("head", Table), ("layer", Pointer),
    )  # fmt: skip


class Selection(ctypes.Structure):
    """The rule by which a step chooses widths: fixed, thresholds on a weighted square of the input, or a callback."""

    __slots__ = ()
    _fields_ = (
        ("fixed", Pointer), ("diagonal", Pointer), ("thresholds", Pointer),
        ("steps", Int), ("seed", Int), ("probe", Pointer), ("correction", Pointer), ("offset", Float),
        ("limit", Float), ("choose", Choose), ("extra", Pointer), ("allowance", Long),
        ("rest", Pointer), ("gain", Float),
    )  # fmt: skip


class Cache(ctypes.Structure):
    """The runs of each head in each layer's flat pairs. k and v point to one pointer for each layer."""

    __slots__ = ()
    _fields_ = (
        ("k", Pointer),
        ("v", Pointer),
        ("start", Pointer),
        ("length", Pointer),
        ("storage", Int),
    )


class Request(ctypes.Structure):
    """The tokens of one step, and the memory for their logits and chosen widths."""

    __slots__ = ()
    _fields_ = (
        ("rows", Int), ("position", Int), ("tokens", Pointer), ("logits", Pointer), ("bits", Pointer),
        ("greedy", Pointer), ("read_bits", Pointer), ("read_bytes", Long),
    )  # fmt: skip


class StepRunner:
    """A model handed to the library, whose steps several threads may run: the library serves them in turn.

    The caller keeps every tensor that `model` points to alive. run: runs one step, given references to a Selection, a
    Cache and a Request; it returns 0, or another number where a callback stopped the step. It is the library's function
    itself, because a Python function around it would cost time at every token.
    """

    def __init__(self, handle: Handle, model: Model):
        self.handle, self.model = handle, model
        self.step = handle.lib.dpllm_step_open(handle.context, ctypes.byref(model))
        self.run = partial(handle.lib.dpllm_step_rows, self.step)

    def __del__(self) -> None:
        if getattr(self, "step", None):
            self.handle.lib.dpllm_step_close(self.step)
