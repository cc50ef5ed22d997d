"""Tables that a GPU decode step reads from device memory at fixed addresses.

They hold the addresses of keys, values and estimators, thresholds, and the few numbers that change. Because the step
reads these tables, a step that was captured once serves every cache, target and policy of its kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Indices into CacheTable.request.
TOKEN, POSITION, SINCE, OBSERVE, SPARE = range(5)
ALL, CONTEXT_ONLY = 1, 2  # values of OBSERVE: what to learn from the previous step; 0: nothing

# Indices into PolicyTable.state. CONTEXT, WEIGHTS and MEANS have three numbers each (token_sensitivity.py).
MULTIPLIER, OFFSET, CONTEXT, CORRECTION, TARGET, RATE, LIMIT, LOG_TOTAL, ENTROPY, BIAS, WEIGHTS, MEANS, GAIN = (
    0, 1, 2, 5, 6, 7, 8, 9, 10, 11, 12, 15, 18,
)  # fmt: skip
STATE = 19

MAX_FED = 8  # the most groups that read one vector: the matrices of two sub-blocks
MAX_STEPS = 8  # the most thresholds of a group
PARTS = 32  # the fewest parts of a signal: as many as one warp adds at once
# The cost of a width that is not resident, and what a token without a limit may spend.
NEVER = torch.iinfo(torch.int64).max

NONE, WEIGHTED, ESTIMATED = "none", "weighted", "estimated"  # kinds of a PolicyTable


@dataclass
class CacheTable:
    """The place of a cache's pairs in device memory, and the request for one token.

    address: int64 [L, 2], the addresses of a layer's keys and values, flat in slots of D elements. start: int64,
    length: int32, both [L, KVH], in slots, when the table was written. request: int64 [5]: the token, its position, the
    number of tokens decoded since the table was written, what to learn from the previous step, and what the token may
    cost beyond seed widths. k, v: the tensors, [slots, D] for each layer.
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
        """Returns a table without a cache."""

        def zeros(*shape: int, kind: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=kind, device=device)

        heads, request = (layers, kv_heads), zeros(SPARE + 1)
        request[SPARE] = NEVER
        return cls(zeros(layers, 2), zeros(*heads), zeros(*heads, kind=torch.int32), request, dtype)

    def places(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns the arguments of kernels for a layer's pairs: address [2], start [KVH], length [KVH], request [5]."""
        return self.address[layer], self.start[layer], self.length[layer], self.request

    def write(self, k: Sequence[Tensor], v: Sequence[Tensor], start: Tensor, length: Tensor) -> None:
        """Points the table to other pairs. Raises ValueError where they have another dtype."""
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
    """The shapes and constants of one layer's attention.

    dim: D. norms: the weights [D] of the norms of q and k, which use eps. rope: cos and sin, float32 [D / 2], of the
    position. window: the most pairs that a token attends to; 0: all."""

    dim: int
    eps: float
    norms: tuple[Tensor, Tensor] | None = None
    rope: tuple[Tensor, Tensor] | None = None
    window: int = 0


@dataclass
class PolicyTable:
    """The rule for widths: bits[g] = base[g] + the number of thresholds[g] that the group's signal exceeds.

    kind: NONE: bits are fixed. WEIGHTED: the signal is m * sum_k d_k x_k^2, where m is the token's multiplier. The
    kernel that produces x writes the sum to signals[g] in parts (see Site), and the group's product decides. ESTIMATED:
    the signal is line[g, 0] * s + line[g, 1], where s = ||G x|| with G = estimators[g] float16 [k, K] (rows[g] = k), or
    s = ||x|| where the group has no estimator (rows[g] = 0).

    Under WEIGHTED, what a token may cost is limited. Each group in turn limits m to (left[g] / rest[g]) ** gain, then
    reads the widest width, up to the chosen one, whose cost extra[g] does not exceed left[g]. left[g + 1] is what
    remains after that cost.

    bits, base, rows: int32 [G]. signals: float32 [G, P]. thresholds: float32 [G, 8], infinite after the last. left:
    int64 [G + 1]. extra: int64 [G, 8], the cost of each width beyond the base, ascending. rest: float32 [G], what this
    group and later ones usually cost. line: float32 [G, 2]. address: int64 [G], the addresses of the estimators. state:
    float32 [19]. share: float32 [G], each group's share of all weights. probe: float32 [K], over group 0's input.
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
        """Returns a table of kind NONE without a limit.

        shares: each group's share of all weights. columns: K of group 0. parts: the number of parts of a signal."""

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
        """Removes the limit of what a token may cost: every width is free."""
        self.left.fill_(NEVER)
        self.extra.zero_()
        self.rest.fill_(1.0)
        self.state[GAIN] = 1.0

    def limit(self, extra: Tensor, rest: Tensor, gain: float) -> None:
        """Sets the costs of widths and the pace of spending. extra: int64 [G, steps]. rest: float32 [G]."""
        self.extra.fill_(NEVER)
        self.extra[:, : extra.shape[1]] = extra.to(self.extra.device)
        self.rest.copy_(rest)
        self.state[GAIN] = gain

    def compare(self, thresholds: Tensor) -> None:
        """Sets the thresholds with which signals are compared, float32 [G, steps]."""
        steps = thresholds.shape[1]
        assert steps <= MAX_STEPS
        self.thresholds[:, :steps] = thresholds
        self.thresholds[:, steps:] = torch.inf

    def point(self, estimators: list[Tensor | None]) -> None:
        """Sets the estimators (float16, contiguous) and writes their addresses. The table keeps them alive."""
        for e in estimators:
            assert e is None or (e.dtype == torch.float16 and e.is_contiguous())
        self.estimators = estimators
        self.address.copy_(torch.tensor([0 if e is None else e.data_ptr() for e in estimators]))


@dataclass(frozen=True)
class Site:
    """A vector that the step produces, and the groups that compute their signals from it.

    ids: int32 [E], the groups, on the device. diagonals: float16 [E, K], d of these groups, at a fixed address; None
    where signals are not weighted sums.
    """

    groups: tuple[int, ...]
    ids: Tensor
    first: bool = False  # whether it is group 0's input, which also gives the token's multiplier
    diagonals: Tensor | None = None
