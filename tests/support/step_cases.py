"""Random inputs of a decode step's kernels: caches of given runs, tables of policies."""

from __future__ import annotations

import torch
from torch import Tensor

from dpllm.kernels.gpu_step import tables
from dpllm.kernels.gpu_step.tables import PARTS, STATE, CacheTable, PolicyTable, Site

CPU = torch.device("cpu")
HALF = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 2e-6}  # rounding of a type, and a little
UNTOUCHED = 7.0  # what slots hold that nothing was written to


def fill(lengths: list[int], group: int, dim: int, dtype: torch.dtype, room: int = 3) -> tuple[Tensor, ...]:
    """(q [H, D], k, v [slots, D], start int64, length int32 [KVH]) with `room` slots after each run."""
    rng = torch.Generator().manual_seed(sum(lengths) + dim)
    sizes = torch.tensor(lengths)
    start = (sizes + room).cumsum(0) - sizes - room
    q, k, v = (
        torch.randn(n, dim, generator=rng).to(dtype)
        for n in (len(lengths) * group, *[int((sizes + room).sum())] * 2)
    )
    for t in (k, v):  # slack holds anything; it must not be read
        for s, n in zip(start.tolist(), lengths, strict=True):
            t[s + n : s + n + room] = float("nan")
    return q, k, v, start, sizes.int()


def attention_exact(q: Tensor, k: Tensor, v: Tensor, start: Tensor, length: Tensor, scale: float) -> Tensor:
    """float64 [H, D]."""
    out, group = torch.zeros(q.shape, dtype=torch.float64), len(q) // len(start)
    for h, (s, n) in enumerate(zip(start.tolist(), length.tolist(), strict=True)):
        if n:
            rows = slice(h * group, (h + 1) * group)
            score = q[rows].double() @ k[s : s + n].double().T * scale
            out[rows] = score.softmax(-1) @ v[s : s + n].double()
    return out


def cache_of(
    lengths: list[int], group: int, dim: int, dtype: torch.dtype, since: int
) -> tuple[Tensor, CacheTable]:
    """(q [H, D], a table of one layer whose runs have grown by `since` tokens, the next pair still to come)."""
    grown = [n + since + 1 for n in lengths]
    q, k, v, start, _ = fill(grown, group, dim, dtype)
    if dtype == torch.float16:
        k.fill_(UNTOUCHED), v.fill_(UNTOUCHED)
    table = CacheTable.empty(1, len(lengths), dtype, CPU)
    table.write([k], [v], start[None], torch.tensor([lengths]))
    table.request[tables.SINCE] = since
    return q, table


def table_with_state() -> Tensor:
    """A state in which every number is another."""
    state = torch.zeros(STATE)
    state[tables.MULTIPLIER], state[tables.OFFSET], state[tables.CORRECTION] = 1.25, 0.2, 0.1
    state[tables.TARGET], state[tables.RATE], state[tables.LIMIT], state[tables.BIAS] = 3.3, 0.5, 0.2, 0.4
    state[tables.WEIGHTS : tables.WEIGHTS + 3] = torch.tensor([0.3, -0.2, 0.1])
    state[tables.MEANS : tables.MEANS + 3] = torch.tensor([0.1, -2.0, 0.5])
    state[tables.GAIN] = 1.5
    return state


def policy_table(columns: list[int], kind: str = tables.NONE, parts: int = PARTS) -> PolicyTable:
    """A table of groups of so many columns: widths differ from group to group for an input of unit size."""
    rng = torch.Generator().manual_seed(len(columns))
    shares = torch.arange(1, len(columns) + 1) / sum(range(1, len(columns) + 1))
    table = PolicyTable.empty(shares.tolist(), columns[0], CPU, parts)
    table.kind = kind
    table.state.copy_(table_with_state())
    table.probe.copy_(torch.randn(columns[0], generator=rng) * 0.05)
    if kind == tables.NONE:
        return table
    table.base.fill_(2)
    if kind == tables.WEIGHTED:
        share = 0.25 ** torch.arange(len(columns))[:, None].float()
        thresholds = torch.tensor([0.08 * 4**i for i in range(6)]) * torch.tensor(columns)[:, None] * share
        table.compare(thresholds.float())
        return table
    # Every second group has a projection, of another number of rows each; odd ones exceed their threshold.
    estimators = [
        (torch.randn(3 + 40 * g, k, generator=rng) / k**0.5).half() if g % 2 == 0 else None
        for g, k in enumerate(columns)
    ]
    size = [
        (3 + 40 * g) ** 0.5 if e is not None else 0.5 * k**0.5 + 1
        for g, (e, k) in enumerate(zip(estimators, columns, strict=True))
    ]
    table.rows.copy_(torch.tensor([0 if e is None else len(e) for e in estimators]))
    table.line.copy_(torch.tensor([[0.5, 1.0] if e is None else [1.0, 0.0] for e in estimators]))
    thresholds = torch.tensor([[s * (2.0 if g in (0, 1) else 0.3)] for g, s in enumerate(size)])
    table.point(estimators)
    table.compare(thresholds)
    return table


def limit(table: PolicyTable, left: int) -> None:
    """The table's tokens may still spend so much: a step costs 100 more in each group and width."""
    groups = len(table.bits)
    extra = 100 * torch.arange(1, 6).cumsum(0) + 10 * torch.arange(groups)[:, None]
    table.limit(extra, 400.0 * torch.arange(groups, 0, -1), 1.5)
    table.left.fill_(-1)
    table.left[0] = left


def site_of(*groups: int, first: bool = False, columns: int = 0) -> Site:
    """A vector of the signals of these groups; of so many columns where the signals are weighted sums."""
    diagonals = None
    if columns:
        drawn = [torch.rand(columns, generator=torch.Generator().manual_seed(g)) for g in groups]
        diagonals = torch.stack(drawn).half()
    return Site(groups, torch.tensor(groups or (0,), dtype=torch.int32), first, diagonals)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_signals(table, other, site, rtol=1e-4):
    """The same sums, and nothing in other groups' places."""
    assert torch.allclose(table.signals.sum(1), other.signals.sum(1), rtol=rtol)
    for g in range(len(table.bits)):
        assert bool(table.signals[g].any()) == (g in site.groups)
