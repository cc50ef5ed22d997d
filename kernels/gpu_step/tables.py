"""What a decode step reads from device memory at fixed addresses, so that a step captured once serves every cache,
target and policy of its kind: addresses of keys, values and estimators, thresholds, and the few numbers that change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Places in CacheTable.request.
TOKEN, POSITION, SINCE, OBSERVE, SPARE = range(5)
ALL, CONTEXT_ONLY = 1, 2  # values of OBSERVE: what is to be learnt from the step before; 0: nothing

# Places in PolicyTable.state. CONTEXT, WEIGHTS and MEANS are three numbers each (calib/runtime/token_sensitivity.py).
MULTIPLIER, OFFSET, CONTEXT, CORRECTION, TARGET, RATE, LIMIT, LOG_TOTAL, ENTROPY, BIAS, WEIGHTS, MEANS, GAIN = (
    0, 1, 2, 5, 6, 7, 8, 9, 10, 11, 12, 15, 18,
)  # fmt: skip
STATE = 19

MAX_FED = 8  # groups whose signals are of one vector, at most: the matrices of two sub-blocks
MAX_STEPS = 8  # thresholds of a group, at most
PARTS = 32  # of a signal, at least: what one warp adds up at once
NEVER = torch.iinfo(torch.int64).max  # the price of a width that is not held; no limit to a token's

NONE, WEIGHTED, ESTIMATED = "none", "weighted", "estimated"  # kinds of a PolicyTable


@dataclass
class CacheTable:
    """Where a cache's pairs lie.

    address: int64 [L, 2], of a layer's keys and values, flat in slots of D elements. start: int64, length: int32,
    both [L, KVH], in slots, when the table was written. request: int64 [5]: the token, its position, tokens decoded
    since the table was written, what is to be learnt from the step before, and what the token may cost beyond seed
    widths. k, v: the tensors themselves, [slots, D] a layer.
    """

    address: Tensor
    start: Tensor
    length: Tensor
    request: Tensor
    dtype: torch.dtype
    k: Sequence[Tensor] = ()
    v: Sequence[Tensor] = ()

    @classmethod
    def empty(cls, layers: int, kv_heads: int, dtype: torch.dtype, device: torch.device) -> CacheTable:
        """A table that no cache has been written to."""

        def zeros(*shape: int, kind: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=kind, device=device)

        heads, request = (layers, kv_heads), zeros(SPARE + 1)
        request[SPARE] = NEVER
        return cls(zeros(layers, 2), zeros(*heads), zeros(*heads, kind=torch.int32), request, dtype)

    def places(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Where a layer's pairs lie, as kernels ask for it: address [2], start [KVH], length [KVH], request."""
        return self.address[layer], self.start[layer], self.length[layer], self.request

    def write(self, k: Sequence[Tensor], v: Sequence[Tensor], start: Tensor, length: Tensor) -> None:
        """Points the table to other pairs. Raises ValueError where they are stored in another precision."""
        if k[0].dtype != self.dtype:
            raise ValueError(f"the step was made for a cache of {self.dtype}, not {k[0].dtype}.")
        self.k, self.v = ([t.flatten(0, -2) for t in tensors] for tensors in (k, v))
        pairs = [[a.data_ptr(), b.data_ptr()] for a, b in zip(self.k, self.v, strict=True)]
        assert self.address.device.type == "cpu" or all(a % 16 == 0 for pair in pairs for a in pair)
        self.address.copy_(torch.tensor(pairs))
        self.start.copy_(start)
        self.length.copy_(length)


@dataclass(frozen=True)
class Heads:
    """What a layer's attention makes of its products. dim: D. norms: weights [D] of the norms of q and k, with eps.
    rope: cos, sin float32 [D / 2] of the position. window: pairs attended to at most; 0: all."""

    dim: int
    eps: float
    norms: tuple[Tensor, Tensor] | None = None
    rope: tuple[Tensor, Tensor] | None = None
    window: int = 0


@dataclass
class PolicyTable:
    """How widths are chosen: bits[g] = base[g] + number of thresholds[g] that the group's signal exceeds.

    kind: NONE: bits stand. WEIGHTED: the signal is m * sum_k d_k x_k^2, m the token's multiplier; the sum is that of
    signals[g], which whatever makes x leaves there part by part (Site), and the group's product decides. ESTIMATED: it
    is line[g, 0] * s + line[g, 1], s = ||G x|| with G = estimators[g] float16 [k, K] (rows[g] = k) or, without one
    (rows[g] = 0), ||x||.

    Where it is WEIGHTED, what a token may cost is limited: each group in turn keeps m to
    (left[g] / rest[g]) ** gain, then reads the widest width up to its own whose price extra[g] is left, and pays it:
    left[g + 1] is what remains.

    bits, base, rows: int32 [G]. signals: float32 [G, P]. thresholds: float32 [G, 8], infinite behind the last. left:
    int64 [G + 1]. extra: int64 [G, 8], of each width beyond the base, ascending. rest: float32 [G]. line: float32
    [G, 2]. address: int64 [G] of the estimators. state: float32 [19]. share: float32 [G], each group's part of all
    weights. probe: float32 [K] over group 0's input.
    """

    bits: Tensor
    base: Tensor
    signals: Tensor
    thresholds: Tensor
    left: Tensor
    extra: Tensor
    rest: Tensor
    rows: Tensor
    line: Tensor
    address: Tensor
    state: Tensor
    share: Tensor
    probe: Tensor
    kind: str = NONE
    estimators: list[Tensor | None] = field(default_factory=list)

    @classmethod
    def empty(
        cls, shares: Sequence[float], columns: int, device: torch.device, parts: int = PARTS
    ) -> PolicyTable:
        """A table for groups of these parts of all weights, group 0 reading so many columns. parts: of a signal."""

        def zeros(*shape: int, kind: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=kind, device=device)

        g, real, wide = len(shares), torch.float32, torch.int64
        table = cls(
            bits=zeros(g), base=zeros(g), signals=zeros(g, parts, kind=real),
            thresholds=zeros(g, MAX_STEPS, kind=real), left=zeros(g + 1, kind=wide),
            extra=zeros(g, MAX_STEPS, kind=wide), rest=zeros(g, kind=real), rows=zeros(g), line=zeros(g, 2, kind=real),
            address=zeros(g, kind=wide), state=zeros(STATE, kind=real),
            share=torch.tensor(shares, dtype=real, device=device), probe=zeros(columns, kind=real),
        )  # fmt: skip
        table.unlimited()
        return table

    def unlimited(self) -> None:
        """From now on a token may cost anything: every width is free."""
        self.left.fill_(NEVER)
        self.extra.zero_()
        self.rest.fill_(1.0)
        self.state[GAIN] = 1.0

    def limit(self, extra: Tensor, rest: Tensor, gain: float) -> None:
        """Prices and pace of what tokens may cost from now on. extra: int64 [G, steps]. rest: float32 [G]."""
        self.extra.fill_(NEVER)
        self.extra[:, : extra.shape[1]] = extra.to(self.extra.device)
        self.rest.copy_(rest)
        self.state[GAIN] = gain

    def compare(self, thresholds: Tensor) -> None:
        """Signals are compared with these from now on, float32 [G, steps]."""
        steps = thresholds.shape[1]
        assert steps <= MAX_STEPS
        self.thresholds[:, :steps] = thresholds
        self.thresholds[:, steps:] = torch.inf

    def point(self, estimators: list[Tensor | None]) -> None:
        """Writes the addresses of estimators (float16, contiguous), which are kept alive."""
        for e in estimators:
            assert e is None or (e.dtype == torch.float16 and e.is_contiguous())
        self.estimators = estimators
        self.address.copy_(torch.tensor([0 if e is None else e.data_ptr() for e in estimators]))


@dataclass(frozen=True)
class Site:
    """A vector of the step and the groups whose signal is of it. ids: int32 [E] on the device.

    diagonals: float16 [E, K], d of these groups, at a fixed address; None where signals are no weighted sums.
    """

    groups: tuple[int, ...]
    ids: Tensor
    first: bool = False  # whether it is group 0's input, from which the token's multiplier comes
    diagonals: Tensor | None = None
