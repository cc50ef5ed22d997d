"""Refines the nested codes and tables of k-means against the loss.

k-means handles every weight separately, but the loss depends on a layer's output. So the error of row n at width b is
e^T H e here, with e = w_n - q_n(b) and H = sum over tokens of s_t x_t x_t^T, where s_t is the mean squared loss
gradient of the layer's outputs at token t (GuidedQuant, arXiv:2505.07004, equation 8, one group of outputs). As in
GuidedQuant's LNQ (algorithm 2), two steps alternate, and neither can raise the error:

* tables: with codes fixed, each width's table is a separate least-squares problem. Conjugate gradients from the current
  table need one product with H per step; forming the normal equations would scatter N K^2 terms.
* codes: cyclic coordinate descent over columns. LNQ has one width. Here all widths share a code, and each weight takes
  the parent code with the smallest sum over widths of `balance`^b times the error of the code's b-bit prefix. Codes
  stay nested, because every width reads a prefix of the same code. With a small balance the seed width chooses freely
  and the other widths split its codes; this costs wide widths more than it gains at narrow ones (docs/log.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dpllm.base.errors import InputError
from dpllm.kernels.weight import MAX_TABLE_BITS, derived_table

BLOCK_WEIGHTS = {"cpu": 1 << 22, "cuda": 1 << 24}  # weights refined at a time; limits memory (working_bytes)
BLOCK_COLUMNS = 64  # columns between two products with the remaining part of H
DAMPING = 1e-4  # of H's mean diagonal, added to the diagonal: weights of inputs that never occurred keep their values


@dataclass(frozen=True)
class RefineOptions:
    """Options of the refinement.

    codes: change codes as well as tables. rounds: of codes and tables in turn. sweeps: over all columns, per round.
    table_steps: of conjugate gradients. balance: weight of a width's error relative to the next narrower width's.
    """

    codes: bool = True
    rounds: int = 2
    sweeps: int = 2
    table_steps: int = 4
    balance: float = 2.0


@dataclass(frozen=True)
class NestedMatrix:
    """A quantised matrix before packing: the b-bit weight is scale[n] * tables[b][n // share, code >> (parent - b)].

    weight: float32 [N, K], the original divided by `scale`. scale: float32 [N]; 0 for a row of zeros.
    codes: uint8 [N, K] of parent_bits. tables: {b: float16 [N / share, 2^b]} for the widths up to 6.
    """

    weight: Tensor
    scale: Tensor
    codes: Tensor
    tables: dict[int, Tensor]
    parent_bits: int

    @property
    def share(self) -> int:
        """Rows per table."""
        return len(self.weight) // len(next(iter(self.tables.values())))

    def error(self, bits: int) -> Tensor:
        """Quantised minus original weight, float32 [N, K], in units of the row's scale. bits: a width up to 6."""
        index = (self.codes >> (self.parent_bits - bits)).long()
        return self.tables[bits].float().repeat_interleave(self.share, 0).gather(1, index) - self.weight


def output_error(matrix: NestedMatrix, hessian: Tensor, bits: int) -> Tensor:
    """The error e^T H e of every row at this width, float32 [N]. hessian: float32 [K, K]."""
    e = matrix.error(bits) * matrix.scale[:, None]
    return (e * (e @ hessian)).sum(1)


def refine(matrix: NestedMatrix, hessian: Tensor, options: RefineOptions = RefineOptions()) -> NestedMatrix:
    """Finds better tables and codes, of the same size.

    hessian: float32 [K, K], symmetric, with a non-negative diagonal; it is scaled and damped here. If only tables
    change, no width's error rises. If codes change too, the balanced sum over widths does not rise. Raises InputError
    for a Hessian that has the wrong shape, is not finite, or has a negative diagonal.
    """
    h = _usable(hessian, matrix.weight.shape[1])
    share = matrix.share
    step = max(1, BLOCK_WEIGHTS.get(h.device.type, 1 << 22) // (share * matrix.weight.shape[1]))
    parts = []
    for first in range(0, len(matrix.weight) // share, step):
        tables, rows = slice(first, first + step), slice(first * share, (first + step) * share)
        block = NestedMatrix(
            matrix.weight[rows].to(h.device), matrix.scale[rows].to(h.device), matrix.codes[rows].to(h.device),
            {b: t[tables].to(h.device) for b, t in matrix.tables.items()}, matrix.parent_bits,
        )  # fmt: skip
        parts.append(_refine_block(block, h, options))
    return replace(
        matrix,
        codes=torch.cat([p.codes.cpu() for p in parts]),
        tables={b: torch.cat([p.tables[b].cpu() for p in parts]) for b in matrix.tables},
    )


def working_bytes(rows: int, columns: int, widths: int) -> int:
    """Bytes that refining an [N, K] matrix takes on the CPU, apart from Hessian, weights and codes."""
    block = min(rows * columns, max(BLOCK_WEIGHTS["cpu"], columns))
    return 4 * columns**2 + block * (12 * widths + 16)


def multiply_adds(rows: int, columns: int, widths: int, options: RefineOptions = RefineOptions()) -> int:
    """Multiply-adds of the products with H, which are most of the work if rows are long."""
    tables = options.table_steps + 2
    codes = 1.5 * options.sweeps + 2 if options.codes else 0
    return int(rows * columns**2 * widths * (options.rounds if options.codes else 1) * (tables + codes))


def _usable(hessian: Tensor, columns: int) -> Tensor:
    """The Hessian scaled to a mean diagonal of 1, and damped; the identity if it is zero."""
    if hessian.shape != (columns, columns):
        raise InputError(f"a Hessian of shape {list(hessian.shape)} does not fit {columns} columns.")
    mean = hessian.diagonal().mean()
    if not torch.isfinite(hessian).all() or not torch.isfinite(mean):
        raise InputError("a layer's Hessian holds NaN or infinite values. Give other calibration text.")
    if (hessian.diagonal() < 0).any():
        raise InputError("a layer's Hessian has a negative diagonal: it is not a sum of squares.")
    if mean == 0:
        return torch.eye(columns, device=hessian.device)
    h = hessian / mean
    h.diagonal().add_(DAMPING)
    return h


def _refine_block(block: NestedMatrix, h: Tensor, options: RefineOptions) -> NestedMatrix:
    tables_at = lambda m: {b: _refit(m, h, b, options.table_steps) for b in m.tables}  # noqa: E731
    if not options.codes:
        return replace(block, tables=tables_at(block))
    free = min(block.parent_bits, MAX_TABLE_BITS)
    m = replace(block, codes=block.codes >> (block.parent_bits - free), parent_bits=free)
    for _ in range(options.rounds):
        m = replace(m, codes=_descend(m, h, options))
        m = replace(m, tables=tables_at(m))
    return _with_derived_bits(m, block.parent_bits) if block.parent_bits > free else m


def _refit(m: NestedMatrix, h: Tensor, bits: int, steps: int) -> Tensor:
    """The best table of one width for the present codes: float16 [T, 2^bits].

    It runs preconditioned conjugate gradients on the normal equations of all tables at once. A table whose error would
    rise by rounding to float16 stays.
    """
    old = m.tables[bits].float()
    count, size = old.shape
    owner = torch.arange(len(m.weight), device=h.device) // m.share
    index = (m.codes >> (m.parent_bits - bits)).long() + (owner * size)[:, None]
    scale = m.scale[:, None]

    def gather(table: Tensor) -> Tensor:  # [T, C] -> [N, K]
        return table.reshape(-1)[index] * scale

    def scatter(values: Tensor) -> Tensor:  # its transpose
        flat = torch.zeros(count * size, device=h.device)
        return flat.index_add_(0, index.reshape(-1), (values * scale).reshape(-1)).view(count, size)

    def pull(table: Tensor) -> tuple[Tensor, Tensor]:  # (half the gradient, each table's error)
        e = gather(table) - target
        eh = e @ h
        return eh, (e * eh).sum(1).view(count, -1).sum(1)

    target = m.weight * scale
    jacobi = scatter(h.diagonal() * scale)
    jacobi = torch.where(jacobi > 0, 1 / jacobi, 0)  # a code without weights keeps its value
    gradient, before = pull(old)
    residual = -scatter(gradient)
    found, z = old.clone(), jacobi * residual
    direction, rz = z, (residual * z).sum(1)
    for _ in range(steps):
        image = scatter(gather(direction) @ h)
        length = _ratio(rz, (direction * image).sum(1))[:, None]
        found, residual = found + length * direction, residual - length * image
        z, last = jacobi * residual, rz
        rz = (residual * z).sum(1)
        direction = z + _ratio(rz, last)[:, None] * direction
    new = found.clamp(-65504, 65504).half()
    better = pull(new.float())[1] <= before
    return torch.where(better[:, None], new, m.tables[bits])


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is not positive."""
    return torch.where(b > 0, a / torch.where(b > 0, b, 1), 0)


def _descend(m: NestedMatrix, h: Tensor, options: RefineOptions) -> Tensor:
    """Codes uint8 [N, K] after `sweeps` of coordinate descent on the balanced error of all widths."""
    state = _Descent(m, options.balance)
    before = state.loss(h)
    for _ in range(options.sweeps):
        state.sweep(h)
    kept = state.loss(h) <= before  # rounding in a nearly singular H must not make a row worse
    return torch.where(kept[:, None], state.codes.T, m.codes)


class _Descent:
    """Coordinate descent on one block of rows, stored columns first, so that a step reads contiguous memory.

    codes: uint8 [K, N]; error: float32 [B, K, N], all widths; leaf: [B, N, 2^P], each width's value per parent code.
    """

    def __init__(self, m: NestedMatrix, balance: float):
        self.weight = m.weight.T.contiguous()
        self.codes = m.codes.T.contiguous()
        widths = sorted(m.tables)
        rows = [m.tables[b].float().repeat_interleave(m.share, 0) for b in widths]
        self.leaf = torch.stack(
            [t.repeat_interleave(2 ** (m.parent_bits - b), 1) for b, t in zip(widths, rows, strict=True)]
        )
        root = [balance ** ((b - widths[0]) / 2) for b in widths]
        self.root = torch.tensor(root, device=m.weight.device)[:, None]
        self.scaled = [t * r for t, r in zip(rows, root, strict=True)]
        self.error = torch.stack([m.error(b).T for b in widths])

    def loss(self, h: Tensor) -> Tensor:
        """The balanced error of each row, float32 [N]."""
        return ((self.error * (h @ self.error)).sum(1) * self.root**2).sum(0)

    def sweep(self, h: Tensor) -> None:
        """Updates every column once.

        The effect of a changed column on later columns is added at once within a block of columns, and by one product
        for the columns after the block.
        """
        columns = len(self.codes)
        pull = h @ self.error  # [B, K, N]: half the gradient
        for first in range(0, columns, BLOCK_COLUMNS):
            last = min(first + BLOCK_COLUMNS, columns)
            here, change = pull[:, first:last], torch.empty_like(self.error[:, first:last])
            for j in range(first, last):
                i = j - first
                best = self._best_code(j, here[:, i] / h[j, j])
                self.codes[j] = best
                value = self.leaf.gather(2, best.expand(len(self.leaf), -1)[:, :, None])[:, :, 0]
                change[:, i] = value - self.weight[j] - self.error[:, j]
                self.error[:, j] += change[:, i]
                here[:, i + 1 :].addcmul_(h[j, j + 1 : last, None], change[:, i, None])
            pull[:, last:] += h[last:, first:last] @ change

    def _best_code(self, column: int, step: Tensor) -> Tensor:
        """The parent codes int64 [N] whose prefixes lie nearest to each width's optimum for this column."""
        optimum = (self.error[:, column] + self.weight[column] - step) * self.root  # [B, N]
        cost = (self.scaled[0] - optimum[0, :, None]).square_()
        for table, goal in zip(self.scaled[1:], optimum[1:], strict=True):
            nearer = (table - goal[:, None]).square_().view(len(cost), cost.shape[1], -1)
            cost = nearer.add_(cost[:, :, None]).view(len(cost), -1)
        return cost.argmin(1)


def _with_derived_bits(m: NestedMatrix, parent_bits: int) -> NestedMatrix:
    """Adds the widths above 6, bit by bit: each weight takes the nearer of two derived values.

    Derived tables need ascending centres, and refined tables may not be ascending.
    """
    table = m.tables[MAX_TABLE_BITS].float()
    up, down = table.cummax(1).values, table.flip(1).cummin(1).values.flip(1)
    centres = ((up + down) / 2).half()
    codes = m.codes.long()
    for bits in range(MAX_TABLE_BITS + 1, parent_bits + 1):
        rows = derived_table(centres, bits).float().repeat_interleave(m.share, 0)
        low, high = rows.gather(1, codes * 2), rows.gather(1, codes * 2 + 1)
        codes = codes * 2 + ((m.weight - low).abs() > (m.weight - high).abs())
    return replace(
        m, codes=codes.to(torch.uint8), tables=m.tables | {MAX_TABLE_BITS: centres}, parent_bits=parent_bits
    )
