"""The decoder as calibration sees it.

dpllm.model.decoder.Decoder fulfils this protocol. calib/ may not import that module, because calib/ lies below it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from dpllm.kernels.backend import Backend

if TYPE_CHECKING:
    from typing_extensions import Self


class CalibrationGroup(Protocol):
    """Matrices read together, with one width for each token.

    index: the group's place in the decoder. weight: as the backend prepared it, or a dense [N, K] tensor.
    weights: N * K. bytes_at: bytes that one pass reads at width seed_bits, seed_bits + 1, ...
    """

    name: str
    index: int
    weight: Any
    seed_bits: int
    resident_bits: int
    weights: int
    bytes_at: tuple[int, ...]

    @property
    def dense(self) -> bool:
        """Whether the group was never quantised."""
        ...


Select = Callable[[CalibrationGroup, Tensor], Tensor]  # (group, x [T, K]) -> widths [T]
Observe = Callable[[CalibrationGroup, Tensor, Tensor], None]  # (group, x [T, K], y [T, N])


class CalibrationDecoder(Protocol):
    """A decoder that calibration can run. Calibration changes nothing in it."""

    backend: Backend
    dtype: torch.dtype
    device: torch.device
    head: Any
    recompute: bool

    @property
    def groups(self) -> Sequence[CalibrationGroup]:
        """Every group, in the order in which a token passes them."""
        ...

    @property
    def layers(self) -> Sequence[Any]:
        """The decoder layers: groups qkv, o, gate_up, down and the weights input_norm, post_norm [hidden]."""
        ...

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings [T, hidden] of token ids int64 [T], in a new tensor."""
        ...

    def forward(
        self,
        ids: Tensor,
        *,
        select: Select | None = None,
        observe: Observe | None = None,
        embedded: Tensor | None = None,
    ) -> Tensor:
        """Next-token logits float32 [T, vocab] of one sequence, differentiable where gradients are on."""
        ...

    def with_backend(self, backend: Backend, *, recompute: bool | None = None) -> Self:
        """A decoder over the same weights that computes with another backend."""
        ...
