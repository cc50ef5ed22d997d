"""The steps of the refinement that look at single weights: table values, sums over codes, and coordinate descent.

The torch functions here are the definition, for any device. On the CPU the native kernels compute the same
(kernels/cpu/quantising.py). Shapes: a matrix has N rows, K columns, T tables and B widths from the seed width to the
parent width P. Tables are [T, B, 2^P], of which width b uses the first 2^b entries.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dpllm.kernels.cpu.quantising import quantiser_kernels

BLOCK_COLUMNS = 64  # columns between two products with the remaining part of H


class DescentSteps(Protocol):
    """The three steps. All floats are float32, and codes are uint8 [N, K]."""

    def values(self, codes: Tensor, tables: Tensor) -> Tensor:
        """Looks up every weight's value at each width: [N, B, K]."""
        ...

    def sums(self, codes: Tensor, values: Tensor, scale: Tensor, shape: torch.Size) -> Tensor:
        """Sums scale[n] * values[n, b, k] over the weights of each code. shape: of the tables, which is returned."""
        ...

    def descend(
        self, *, weight: Tensor, codes: Tensor, error: Tensor, pull: Tensor, hessian: Tensor, leaf: Tensor,
        root: Tensor, first: int, last: int,
    ) -> Tensor:  # fmt: skip
        """Gives each weight of a block of columns the best parent code, column after column.

        weight: [N, K]. error: [N, B, K], value minus weight; pull: [N, B, K], error times hessian [K, K], up to date at
        the columns first to last - 1. leaf: [T, B, 2^P], each width's value per parent code. root: [B], the square root
        of each width's part in the sum. Codes and errors are updated in place; the pull is not. Returns the change of
        the error, [N, B, last - first].
        """
        ...


class TorchSteps:
    """The definition of the steps, on any device."""

    def values(self, codes: Tensor, tables: Tensor) -> Tensor:
        """Looks up every weight's value at each width: [N, B, K]."""
        return self._rows(tables, len(codes)).gather(2, _prefixes(codes, tables.shape))

    def sums(self, codes: Tensor, values: Tensor, scale: Tensor, shape: torch.Size) -> Tensor:
        """Sums scale[n] * values[n, b, k] over the weights of each code."""
        rows = torch.zeros(len(codes), *shape[1:], device=codes.device)
        rows.scatter_add_(2, _prefixes(codes, shape), values * scale[:, None, None])
        return rows.view(shape[0], -1, *shape[1:]).sum(1)

    def descend(
        self, *, weight: Tensor, codes: Tensor, error: Tensor, pull: Tensor, hessian: Tensor, leaf: Tensor,
        root: Tensor, first: int, last: int,
    ) -> Tensor:  # fmt: skip
        """Gives each weight of a block of columns the best parent code, column after column."""
        here = (
            pull[:, :, first:last].permute(1, 2, 0).contiguous()
        )  # [B, S, N]: a step reads contiguous memory
        change = torch.empty_like(here)
        values = self._rows(leaf, len(codes)).transpose(0, 1)  # [B, N, 2^P]
        scaled = values * root[:, None, None]
        for i, j in enumerate(range(first, last)):
            optimum = (error[:, :, j].T + weight[:, j] - here[:, i] / hessian[j, j]) * root[:, None]
            best = (scaled - optimum[:, :, None]).square_().sum(0).argmin(1)
            codes[:, j] = best
            found = values.gather(2, best.expand(len(values), -1)[:, :, None])[:, :, 0] - weight[:, j]
            change[:, i] = found - error[:, :, j].T
            error[:, :, j] = found.T
            here[:, i + 1 :].addcmul_(hessian[j, j + 1 : last, None], change[:, i, None])
        return change.permute(2, 0, 1).contiguous()

    @staticmethod
    def _rows(tables: Tensor, rows: int) -> Tensor:
        return tables.repeat_interleave(rows // len(tables), 0)


def _prefixes(codes: Tensor, shape: torch.Size) -> Tensor:
    """The codes of every width, int64 [N, B, K]. shape: of the tables."""
    down = torch.arange(shape[1] - 1, -1, -1, device=codes.device)
    return codes[:, None].long() >> down[:, None]


def steps_for(device: torch.device, threads: int = 0) -> DescentSteps:
    """Returns the native steps on the CPU, where the library is built, and torch's otherwise.

    threads: of the native steps, at most; 0: every usable core.
    """
    native = quantiser_kernels(threads) if device.type == "cpu" else None
    return native or TorchSteps()
