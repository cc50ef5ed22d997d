"""Refines the nested codes and tables of k-means against the loss.

k-means handles every weight separately, but the loss depends on a layer's output. So the error of row n at width b is
e^T H e here, with e = w_n - q_n(b) and H = sum over tokens of s_t x_t x_t^T, where s_t is the mean squared loss
gradient of the layer's outputs at token t (GuidedQuant, arXiv:2505.07004, equation 8, one group of outputs). As in
GuidedQuant's LNQ (algorithm 2), two steps alternate:

* codes: a sweep of coordinate descent over columns. LNQ has one width. Here all widths share a code, and each weight
  takes the parent code with the smallest sum over widths of `balance`^b times the error of the code's b-bit prefix.
  Codes stay nested, because every width reads a prefix of the same code. With a small balance the seed width chooses
  freely and the other widths split its codes; this costs wide widths more than it gains at narrow ones (docs/log.md).
* tables: with codes fixed, each width's table is a separate least-squares problem. Conjugate gradients from the current
  table need one product with H per step; forming the normal equations would scatter N K^2 terms.

Products with H between these steps may be rounded to bfloat16, where the processor multiplies that faster. The error
before and after all steps is computed in float32, and what has become worse is taken back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dpllm.base.errors import InputError
from dpllm.kernels.cpu.library import multiplies_bfloat16
from dpllm.kernels.weight import MAX_TABLE_BITS, derived_table
from dpllm.quant.descent import BLOCK_COLUMNS, DescentSteps, steps_for

BLOCK_WEIGHTS = {"cpu": 1 << 17, "cuda": 1 << 24}  # weights refined at a time; limits memory (working_bytes)
DAMPING = 1e-4  # of H's mean diagonal, added to the diagonal: weights of inputs that never occurred keep their values


@dataclass(frozen=True)
class RefineOptions:
    """Options of the refinement.

    codes: change codes as well as tables. rounds: of codes and tables in turn. table_steps: of conjugate gradients, per
    round. balance: weight of a width's error relative to the next narrower width's.
    """

    codes: bool = True
    rounds: int = 4
    table_steps: int = 1
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


def refine(
    matrix: NestedMatrix,
    hessian: Tensor,
    options: RefineOptions = RefineOptions(),
    steps: DescentSteps | None = None,
) -> NestedMatrix:
    """Finds better tables and codes, of the same size.

    hessian: float32 [K, K], symmetric, with a non-negative diagonal; it is scaled and damped here. steps: None chooses
    those of the Hessian's device. If only tables change, no width's error rises. If codes change too, the balanced sum
    over widths does not rise in any table. Raises InputError for a Hessian that has the wrong shape, is not finite, or
    has a negative diagonal.
    """
    h = _usable(hessian, matrix.weight.shape[1])
    products = _Products(h, h.bfloat16() if h.device.type == "cpu" and multiplies_bfloat16() else None)
    share, steps = matrix.share, steps or steps_for(h.device)
    step = max(1, BLOCK_WEIGHTS.get(h.device.type, 1 << 17) // (share * matrix.weight.shape[1]))
    parts = []
    for first in range(0, len(matrix.weight) // share, step):
        tables, rows = slice(first, first + step), slice(first * share, (first + step) * share)
        block = NestedMatrix(
            matrix.weight[rows].to(h.device), matrix.scale[rows].to(h.device), matrix.codes[rows].to(h.device),
            {b: t[tables].to(h.device) for b, t in matrix.tables.items()}, matrix.parent_bits,
        )  # fmt: skip
        parts.append(_refine_block(block, products, options, steps))
    return replace(
        matrix,
        codes=torch.cat([p.codes.cpu() for p in parts]),
        tables={b: torch.cat([p.tables[b].cpu() for p in parts]) for b in matrix.tables},
    )


def working_bytes(rows: int, columns: int, widths: int) -> int:
    """Bytes that refining an [N, K] matrix takes on the CPU, apart from Hessian, weights and codes."""
    block = min(rows * columns, max(BLOCK_WEIGHTS["cpu"], columns))
    return 6 * columns**2 + block * (16 * widths + 16)


def multiply_adds(rows: int, columns: int, widths: int, options: RefineOptions = RefineOptions()) -> int:
    """Multiply-adds of the products with H, which are most of the work if rows are long."""
    codes = 1.5 if options.codes else 0
    return int(rows * columns**2 * widths * (options.rounds * (codes + options.table_steps + 1) + 1))


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


@dataclass(frozen=True)
class _Products:
    """Products with H. hessian: float32 [K, K]; rounded: the same in bfloat16, or None if it is not faster."""

    hessian: Tensor
    rounded: Tensor | None

    def exact(self, x: Tensor) -> Tensor:
        """x [..., K] times H."""
        return (x.view(-1, x.shape[-1]) @ self.hessian).view(x.shape)

    def quick(self, x: Tensor) -> Tensor:
        """The same, perhaps rounded."""
        if self.rounded is None:
            return self.exact(x)
        return (x.view(-1, x.shape[-1]).bfloat16() @ self.rounded).float().view(x.shape)


def _refine_block(
    block: NestedMatrix, products: _Products, options: RefineOptions, steps: DescentSteps
) -> NestedMatrix:
    free = min(block.parent_bits, MAX_TABLE_BITS)
    if options.codes:
        m = replace(block, codes=block.codes >> (block.parent_bits - free), parent_bits=free)
        found = _with_codes(m, products, options, steps)
        return _with_derived_bits(found, block.parent_bits) if block.parent_bits > free else found
    m = replace(block, codes=block.codes >> (block.parent_bits - free), parent_bits=free)
    state = _State(m, products, steps)
    before, old = state.errors(), state.tables
    state.refit(options.rounds * options.table_steps)
    state.tables = torch.where((state.errors() <= before)[:, :, None], state.tables, old)
    return replace(block, tables=state.stored(m.tables))


def _with_codes(
    m: NestedMatrix, products: _Products, options: RefineOptions, steps: DescentSteps
) -> NestedMatrix:
    """New codes and tables, except in tables whose balanced error would rise."""
    state = _State(m, products, steps)
    widths = torch.arange(len(m.tables), device=m.codes.device)
    root = options.balance ** (widths / 2)
    before, old = state.errors(), state.tables
    for _ in range(options.rounds):
        state.sweep(root)
        state.refit(options.table_steps)
    better = ((state.errors() - before) * root.square()).sum(1) <= 0
    state.tables = torch.where(better[:, None, None], state.tables, old)
    codes = torch.where(better.repeat_interleave(m.share)[:, None], state.codes, m.codes)
    return replace(m, codes=codes, tables=state.stored(m.tables))


class _State:
    """Codes and tables of a block of rows under refinement, with their errors.

    tables: [T, B, 2^P] of float16 values. error: [N, B, K], value minus weight, in units of the row's scale.
    pull: [N, B, K], error times H, perhaps rounded.
    """

    def __init__(self, m: NestedMatrix, products: _Products, steps: DescentSteps):
        self.weight, self.codes = m.weight.contiguous(), m.codes.clone()
        self.squares = (
            m.scale.square().contiguous()
        )  # errors of the rows of one table add up in units of the output
        self.products, self.steps, self.parent_bits = products, steps, m.parent_bits
        self.widths = sorted(m.tables)
        count = len(m.tables[self.widths[0]])
        self.tables = torch.zeros(count, len(self.widths), 2**m.parent_bits, device=m.codes.device)
        for i, bits in enumerate(self.widths):
            self.tables[:, i, : 2**bits] = m.tables[bits].float()
        self.error: Tensor
        self.pull: Tensor
        self._look_up()

    def stored(self, tables: dict[int, Tensor]) -> dict[int, Tensor]:
        """The tables as they are stored: float16, of the widths in `tables`."""
        return {bits: self.tables[:, i, : 2**bits].half() for i, bits in enumerate(sorted(tables))}

    def errors(self) -> Tensor:
        """The error e^T H e of each table and width, [T, B], with float32 products."""
        each = (self.error * self.products.exact(self.error)).sum(2) * self.squares[:, None]
        return each.view(len(self.tables), -1, len(self.widths)).sum(1)

    def sweep(self, root: Tensor) -> None:
        """Updates the code of every weight once.

        The effect of a changed column on later columns is added at once within a block of columns, and by one product
        for the columns after the block.
        """
        h, columns = self.products.hessian, self.codes.shape[1]
        span = [2 ** (self.parent_bits - bits) for bits in self.widths]
        leaf = torch.stack(
            [self.tables[:, i, : 2**b].repeat_interleave(span[i], 1) for i, b in enumerate(self.widths)], 1
        )
        flat = self.pull.view(-1, columns)
        for first in range(0, columns, BLOCK_COLUMNS):
            last = min(first + BLOCK_COLUMNS, columns)
            change = self.steps.descend(
                weight=self.weight, codes=self.codes, error=self.error, pull=self.pull, hessian=h, leaf=leaf,
                root=root, first=first, last=last,
            )  # fmt: skip
            flat[:, last:].addmm_(change.view(-1, last - first), h[first:last, last:])
        self.pull = self.products.quick(self.error)

    def refit(self, count: int) -> None:
        """Moves all tables towards the best ones for the present codes, by preconditioned conjugate gradients."""
        diagonal = self.products.hessian.diagonal().expand_as(self.error).contiguous()
        jacobi = self._sums(diagonal)
        jacobi = torch.where(jacobi > 0, 1 / jacobi, 0)  # a code without weights keeps its value
        residual, found = -self._sums(self.pull), self.tables
        direction = jacobi * residual
        rz = (residual * direction).sum(2)
        for _ in range(count):
            image = self._sums(self.products.quick(self.steps.values(self.codes, direction)))
            length = _ratio(rz, (direction * image).sum(2))[:, :, None]
            found, residual = found + length * direction, residual - length * image
            z, last = jacobi * residual, rz
            rz = (residual * z).sum(2)
            direction = z + _ratio(rz, last)[:, :, None] * direction
        self.tables = found.clamp(-65504, 65504).half().float()
        self._look_up()

    def _sums(self, values: Tensor) -> Tensor:
        return self.steps.sums(self.codes, values, self.squares, self.tables.shape)

    def _look_up(self) -> None:
        self.error = self.steps.values(self.codes, self.tables).sub_(self.weight[:, None])
        self.pull = self.products.quick(self.error)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is not positive."""
    return torch.where(b > 0, a / torch.where(b > 0, b, 1), 0)


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
