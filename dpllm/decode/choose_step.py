"""Chooses the fastest decode step that a decoder supports."""

from __future__ import annotations

from dpllm.decode.cpu_step import NativeStep
from dpllm.decode.gpu_step import GpuStep
from dpllm.model.decoder import Decoder


def fast_step(decoder: Decoder) -> NativeStep | GpuStep | None:
    """The quickest way this decoder has to decode one token; None: operation by operation."""
    return NativeStep.of(decoder) or GpuStep.of(decoder)
