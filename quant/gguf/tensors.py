"""Reads the tensors of GGUF files by their names in the Hugging Face model, one at a time."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import torch

from dpllm.base.errors import InputError
from dpllm.quant.gguf.config import Part
from dpllm.quant.gguf.families import PERMUTED
from dpllm.quant.gguf.types import dense_dtype, dequantized


class GgufTensors:
    """The tensors in one file; offers what `quant.source.TensorFile` does. `bytes_read` counts stored bytes."""

    def __init__(self, path: Path, parts: dict[str, Part], *, head: int, permuted: bool):
        """head: values per attention head. permuted: whether the order of rows that `Part.change` names is undone."""
        self.path, self.bytes_read = path, 0
        self._parts, self._head, self._permuted = parts, head, permuted
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """Names of the tensors in the file."""
        return list(self._parts)

    def layout(self, name: str) -> tuple[list[int], str]:
        """A tensor's (shape, dtype name) as `read` gives it."""
        stored = self._parts[name].stored
        return list(stored.shape), dense_dtype(stored.kind)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, dequantised to float32; float16 and bfloat16 stay. Raises InputError if the file is cut off."""
        part = self._parts[name]
        try:
            raw = np.fromfile(self.path, np.uint8, part.stored.nbytes, offset=part.stored.offset)
        except OSError as e:
            raise InputError(f"{self.path} cannot be read: {e.strerror or e}. Restore the file.") from None
        if len(raw) != part.stored.nbytes:
            raise InputError(f"{self.path} was cut off while it was in use. Download it again.")
        with self._lock:
            self.bytes_read += len(raw)
        with np.errstate(all="ignore"):  # the caller refuses values that are not finite
            tensor = dequantized(raw, part.stored.shape, part.stored.kind)
        return unpermuted(tensor, self._head) if self._permuted and part.change == PERMUTED else tensor


def unpermuted(tensor: torch.Tensor, head: int) -> torch.Tensor:
    """Rows of queries or keys in the order that transformers rotates: the halves of a head, not neighbours.

    tensor: [heads * head, ..].
    """
    return tensor.unflatten(0, (-1, head // 2, 2)).transpose(1, 2).flatten(0, 2).contiguous()
