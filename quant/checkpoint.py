"""The weights of a model as transformers 5 loads them: which stored tensor becomes which parameter.

One function states each rule. What transformers would initialise at random, or cannot load, is refused before any work.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpllm.base.errors import InputError
from dpllm.quant.config import CONFIG, read_config, refusing
from dpllm.quant.source import ModelSource

log = logging.getLogger("dpllm")

# Types, as safetensors spells them. transformers casts all but the first kind when it loads a model in float32.
KEPT_TYPES = ("BF16", "F16", "F32")
FLOAT8_TYPES = ("F8_E4M3", "F8_E5M2")
CAST_TYPES = ("F64", "I8", "I16", "I32", "I64", "U8", "BOOL")
# Methods of quantization_config whose matrices are float8 values with scales that multiply them.
FLOAT8_METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors")
SCALES = ("_scale_inv", "_scale")  # what follows the name of a float8 matrix in the name of its scales


class Checkpoint:
    """The parameters of a model by the names that transformers' module gives them.

    source: the stored tensors. config: transformers' configuration object. skeleton: transformers' module, without
    data. tied: whether the head multiplies with the embedding.
    """

    def __init__(self, source: ModelSource):
        """Reads the configuration and matches names, shapes and types.

        No weight is read, except to compare an embedding with a head that config.json says are one matrix.
        Raises InputError for a configuration, a tensor or a combination of both that transformers does not load.
        """
        self.source, self.path = source, source.path
        self.config = read_config(self.path)
        self.skeleton = build_skeleton(self.config, self.path)
        self._shapes = {n: list(t.shape) for n, t in self.skeleton.state_dict().items()}
        self._method = quantization_method(source.config, self.path)
        self._present = frozenset(source.names())
        self._stored = match_names(source, self._shapes, self.skeleton.base_model_prefix)
        self.tied = self._tie()
        self._check_complete()
        self._scales = {n: scale for n in self._stored if (scale := self._scale_of(n))}
        for name in self._stored:
            self._check_layout(name)

    def names(self) -> Iterator[str]:
        """All parameters. The head is left out where it is tied to the embedding."""
        return iter(self._stored)

    def shape(self, name: str) -> list[int]:
        """A parameter's shape."""
        return self._shapes[name]

    def dtype(self, name: str) -> str:
        """The type in which `read` returns a parameter, as safetensors spells it ("BF16")."""
        stored = self.source.dtype(self._stored[name])
        return stored if stored in KEPT_TYPES else "F32"

    def read(self, name: str) -> Tensor:
        """One parameter in its stored type, or in float32 where that is neither float32, float16 nor bfloat16.

        Float8 values are multiplied with their scales. Raises InputError for values that are not finite in float32.
        """
        stored = self._stored[name]
        tensor = self.source.read(stored)
        if self.source.dtype(stored) in KEPT_TYPES:
            return tensor
        scale = self._scales.get(name)
        tensor = tensor.float() if scale is None else dequantise(tensor, self.source.read(scale))
        if not torch.isfinite(tensor).all():
            raise InputError(
                f"{self.path}: tensor '{stored}' holds values beyond float32; such a model cannot be used."
            )
        return tensor

    def unused(self) -> list[str]:
        """The stored tensors that are not part of the model."""
        used = {*self._stored.values(), *self._scales.values()}
        return sorted(self._present - used)

    @property
    def bytes_read(self) -> int:
        """Tensor bytes read so far."""
        return self.source.bytes_read

    # -- rules -------------------------------------------------------------------------------------------

    def _tie(self) -> bool:
        """Lets a tied head and its embedding share one stored tensor. Returns whether they do.

        Where config.json ties them, either of them may be stored. If both are stored with other values, the head is its
        own.
        """
        if not self.config.tie_word_embeddings:
            return False
        for head, embedding in self.skeleton.all_tied_weights_keys.items():
            ours, theirs = self._stored.get(head), self._stored.get(embedding)
            if ours and theirs and not torch.equal(*(self.source.read(n).float() for n in (ours, theirs))):
                log.warning(
                    "note: %s ties '%s' to '%s', but the weights hold different values for the two. The stored head is "
                    "used.",
                    self.path / CONFIG, head, embedding,
                )  # fmt: skip
                return False
            if ours and not theirs:
                self._stored[embedding] = ours
            self._stored.pop(head, None)
            del self._shapes[head]
        return True

    def _check_complete(self) -> None:
        """Raises InputError where a parameter is not stored, which transformers would fill with random numbers."""
        missing = [n for n in self._shapes if n not in self._stored]
        if not missing:
            return
        name = missing[0]
        others = f" ({len(missing) - 1} more are missing too)" if len(missing) > 1 else ""
        if self._method:
            raise InputError(
                f"{self.path} is quantised by '{self._method}' and has no tensor '{name}'{others}; dpllm reads such "
                "checkpoints only as float8 values with scales. Give the original checkpoint."
            )
        if shard := self.source.listed.get(name):
            raise InputError(
                f"{self.path / shard} has no tensor '{name}'{others}, although the index lists it there. Copy the "
                "model again."
            )
        raise InputError(
            f"{self.path} has no tensor '{name}'{others}, which its config.json calls for. Copy it again."
        )

    def _scale_of(self, name: str) -> str | None:
        """The stored tensor with the scales of a float8 parameter; None for a parameter without scales.

        Raises InputError for scales that dpllm does not apply.
        """
        stored = self._stored[name]
        found = [stored + suffix for suffix in SCALES if stored + suffix in self._present]
        float8 = self.source.dtype(stored) in FLOAT8_TYPES
        if not self._method:
            if float8 and found:
                raise InputError(
                    f"{self.path}: '{stored}' is stored as float8 with scales in '{found[0]}', but config.json has no "
                    "quantization_config that says so. Restore the config.json that belongs to these weights."
                )
            return None
        if float8 != (len(found) == 1) or f"{stored}_zero_point" in self._present:
            raise InputError(
                f"{self.path} is quantised by '{self._method}', and '{stored}' is not float8 values with one tensor of "
                "scales; dpllm does not read it. Give the original checkpoint."
            )
        if found:
            self._check_scales(stored, found[0])
        return found[0] if found else None

    def _check_scales(self, stored: str, scale: str) -> None:
        """Raises InputError unless the scales are one number, or a grid that config.json describes."""
        shape, grid = self.source.shape(stored), self.source.shape(scale)
        block = self.source.config["quantization_config"].get("weight_block_size")
        if self.source.dtype(scale) not in KEPT_TYPES or not (
            math.prod(grid) == 1 or tiles(shape, grid, block)
        ):
            raise InputError(
                f"{self.path} is quantised by '{self._method}', and the scales '{scale}' are {grid} values of type "
                f"{self.source.dtype(scale)} for a matrix of {shape}; dpllm does not apply them. Give the original "
                "checkpoint."
            )

    def _check_layout(self, name: str) -> None:
        """Raises InputError unless a stored tensor has the parameter's shape and a type that can be read."""
        stored = self._stored[name]
        shape, kind = self.source.shape(stored), self.source.dtype(stored)
        if shape != self._shapes[name]:
            raise InputError(
                f"{self.path}: tensor '{stored}' has shape {shape}, config.json implies {self._shapes[name]}. Restore "
                "the config.json that belongs to these weights."
            )
        if kind not in (*KEPT_TYPES, *FLOAT8_TYPES, *CAST_TYPES):
            raise InputError(
                f"{self.path}: tensor '{stored}' is stored as {kind}, which dpllm does not read. Give the model in "
                "float32, float16, bfloat16 or float8."
            )


def build_skeleton(config: Any, path: Path) -> Any:
    """Returns transformers' module of a configuration, on the meta device: names and shapes, without memory.

    Raises InputError for a configuration of which transformers makes no module.
    """
    from transformers import AutoModelForCausalLM

    config._attn_implementation, config.dtype = "sdpa", torch.float32
    with refusing(path / CONFIG), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def match_names(source: ModelSource, shapes: Mapping[str, Any], prefix: str) -> dict[str, str]:
    """Finds the stored tensor of each parameter: {parameter: stored name}, in the order of `shapes`.

    A checkpoint of the base model leaves out the prefix ("model"), which its parameters have in the whole model. Stored
    tensors that are not parameters are left out. Raises InputError where two stored tensors are one parameter.
    """
    found: dict[str, str] = {}
    for stored in source.names():
        name = parameter_name(stored, shapes, prefix)
        if name not in shapes:
            continue
        if name in found:
            raise InputError(
                f"{source.path} holds '{name}' twice, as '{found[name]}' and '{stored}'. Remove one of them."
            )
        found[name] = stored
    return {name: found[name] for name in shapes if name in found}


def parameter_name(stored: str, parameters: Mapping[str, Any], prefix: str) -> str:
    """The parameter that transformers fills with a stored tensor, or the stored name if there is none."""
    without = re.sub(f"^{prefix}.", "", stored, count=1)
    if stored.startswith(prefix) and without in parameters:
        return without
    return f"{prefix}.{stored}" if f"{prefix}.{stored}" in parameters else stored


def quantization_method(config: Mapping[str, Any], path: Path) -> str | None:
    """The method of a checkpoint with float8 matrices; None where config.json says that nothing is quantised.

    Raises InputError for any other method.
    """
    given = config.get("quantization_config")
    if given is None:
        return None
    method = given.get("quant_method") if isinstance(given, dict) else given
    if method not in FLOAT8_METHODS:
        raise InputError(
            f"{path} is quantised by '{method}', which dpllm does not read. Give the original checkpoint."
        )
    return str(method)


def tiles(shape: list[int], grid: list[int], block: Any) -> bool:
    """Whether a grid [n, k] of scales divides a matrix [N, K] into equal blocks.

    block: the size [N/n, K/k] that config.json states; None if it states none. A side shorter than its block has one.
    """
    if (
        len(shape) != 2
        or len(grid) != 2
        or not all(n and size % n == 0 for size, n in zip(shape, grid, strict=True))
    ):
        return False
    if block is None:
        return True
    sides = [size // n for size, n in zip(shape, grid, strict=True)]
    if not isinstance(block, list) or len(block) != 2 or not all(type(b) is int for b in block):
        return False
    return all(s == b or (n == 1 and s < b) for s, b, n in zip(sides, block, grid, strict=True))


def dequantise(values: Tensor, scales: Tensor) -> Tensor:
    """Multiplies a float8 matrix [N, K] with a grid of scales [n, k], n and k dividing N and K. Returns float32 [N, K].

    scales: also one number in any shape. Each scale belongs to a block of N/n rows and K/k columns.
    """
    if scales.numel() == 1:
        return values.float() * scales.float().reshape(())
    (rows, columns), (n, k) = values.shape, scales.shape
    blocks = values.float().reshape(n, rows // n, k, columns // k)
    return (blocks * scales.float()[:, None, :, None]).reshape(rows, columns)
