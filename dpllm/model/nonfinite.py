"""Logits that are not finite: an error that names the first layer at fault and the cause.

The check costs one look at the logits. Only where it fails are the blocks computed again, with an eye on every group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dpllm.base.errors import InputError
from dpllm.calib.decoder_protocol import CalibrationGroup

Choose = Callable[[Any, Tensor], Tensor]  # (group, x [T, K]) -> int32 [T]
PAIRS = ("qkv", "k_proj", "v_proj")  # ends of the names of groups that make keys or values


class Blocks(Protocol):
    """The decoder as this module sees it: dpllm.model.decoder.Decoder, which imports this module."""

    dtype: torch.dtype
    kv_dtype: torch.dtype

    @property
    def layers(self) -> Sequence[Any]:
        """The decoder's blocks, in their order."""
        ...

    def block(
        self, layer: Any, x: Tensor, rope: tuple[Tensor, Tensor], cache: Any, select: Any, observe: Any
    ) -> Tensor:
        """Computes one layer's output [T, hidden]."""
        ...


def all_finite(x: Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    if not x.numel():
        return True
    return all(math.isfinite(float(end)) for end in torch.aminmax(x.detach()))


def check_logits(logits: Tensor, explain: Callable[[], InputError]) -> None:
    """Raises what `explain` returns unless every logit is finite."""
    if not all_finite(logits):
        raise explain()


@torch.no_grad()
def fault(
    decoder: Blocks, x: Tensor, rope: tuple[Tensor, Tensor], cache: Any, select: Choose | None
) -> InputError:
    """Computes the blocks again and returns the error that names the first number that is not finite.

    x: [T, hidden], embedded tokens. rope: as `Decoder.rope` returns it. cache: a KVCache as it was before these tokens,
    whose pairs are written again; or None. select: chooses the same widths again; None reads every resident plane.
    """
    return InputError(
        f"the model computes NaN or infinite logits. {_cause(decoder, x, rope, cache, select)}. {_advice(decoder)}."
    )


def _cause(decoder: Blocks, x: Tensor, rope: tuple[Tensor, Tensor], cache: Any, select: Choose | None) -> str:
    if not all_finite(x):
        return "The embedding of a token is not finite"
    for layer in decoder.layers:
        watch = _Watch(decoder, layer)
        before, x = x, decoder.block(layer, x, rope, cache, select, watch)
        if watch.found:
            return watch.found
        if not all_finite(x):
            return f"The sum after layer {layer.index} is not finite: it exceeds {_name(x.dtype)}, from {_size(before)}"
    return f"The head's product is not finite: it exceeds {_name(x.dtype)}, from {_size(x)}"


class _Watch:
    """Sees the inputs and outputs of one layer's groups, and keeps the first fault as a sentence."""

    def __init__(self, decoder: Blocks, layer: Any):
        self.decoder, self.layer = decoder, layer
        self.found = ""
        self._pairs = ""  # what is known of the layer's keys and values

    def __call__(self, group: CalibrationGroup, x: Tensor, y: Tensor) -> None:
        """See Observe in decoder.py."""
        if self.found:
            return
        if not all_finite(x):
            self.found = self._input(group)
        elif not all_finite(y):
            self.found = f"The product of '{group.name}' is not finite, from {_size(x)} in {_name(x.dtype)}"
        elif group.name.endswith(PAIRS):
            held, largest = self.decoder.kv_dtype, float(y.abs().max())
            if largest > torch.finfo(held).max:
                self._pairs = (
                    f": queries, keys or values reach {largest:.3g}, and a cache of {_name(held)} holds "
                    f"{torch.finfo(held).max:.5g}"
                )

    def _input(self, group: CalibrationGroup) -> str:
        """The fault where a group's input is not finite, though all before it is."""
        if group is self.layer.o:
            return f"The attention of layer {self.layer.index} is not finite{self._pairs}"
        if group is self.layer.down:
            return f"The product of gate and up in layer {self.layer.index} is not finite"
        return f"The norm before '{group.name}' is not finite"


def _size(x: Tensor) -> str:
    return f"activations of up to {float(x.abs().max()):.3g}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _advice(decoder: Blocks) -> str:
    if decoder.dtype == torch.float16:
        return "float16 is too narrow for this model: run it on the CPU, or load it with dtype=torch.bfloat16"
    if decoder.kv_dtype == torch.float16:
        return "Load the model without kv_dtype, or with kv_dtype=torch.float32"
    return "The model cannot be used as it is: get an intact checkpoint, or quantise it again"
