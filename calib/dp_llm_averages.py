"""Stage 2 of DP-LLM (arXiv:2508.06041): finds by gradient descent how many planes each group reads on average.

p = seed + sigmoid(z) (B - seed). A group's output is interpolated between the two widths around p. The loss is
cross entropy + alpha (mean p - target)^2, and only z is trained. Interpolating the two outputs equals interpolating
the two matrices, so a step costs one product forward and two backward per group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpllm.base.progress import Progress, no_progress
from dpllm.calib.decoder_protocol import CalibrationDecoder, CalibrationGroup


@dataclass(frozen=True)
class AveragesOptions:
    """Options of the descent on z.

    steps: of Adam, one sequence of `length` tokens each. learning_rate: at the first step; it falls linearly to
    zero. alpha: weight of the bit penalty.
    """

    steps: int = 300
    length: int = 256
    learning_rate: float = 0.1
    alpha: float = 1.0


class _Interpolated(torch.autograd.Function):
    """y = x (L + share (H - L))^T for constant matrices; gradients flow into x [T, K] and share []."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: Tensor, low: Tensor, high: Tensor) -> Tensor:
        between = torch.lerp(low, high, share)
        ctx.save_for_backward(x, between, low, high)
        return x @ between.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, between, low, high = ctx.saved_tensors
        (grad,) = grads
        return grad @ between, ((grad.T @ x) * (high - low)).sum(), None, None


def interpolating_view(decoder: CalibrationDecoder, caps: np.ndarray) -> CalibrationDecoder:
    """The decoder with a backend that also takes fractional widths, up to caps [G].

    `select` may then return a float tensor that holds one value for all rows. The output is interpolated between
    the two widths around this value, and gradients flow into it.
    """
    backend = decoder.backend
    cap = {id(g.weight): int(c) for g, c in zip(decoder.groups, caps, strict=True)}

    def gemv(x: Tensor, w: Any, bits: Tensor, out: Tensor | None = None) -> Tensor:
        if not bits.is_floating_point():
            return backend.gemv(x, w, bits, out)
        p = bits[0]
        low = lower_width(float(p.detach()), w.seed_bits, cap[id(w)])
        lower = backend.dequantize(w, low, x.dtype)
        if low == cap[id(w)]:  # only the seed may be read
            return x @ lower.T
        y = _Interpolated.apply(x, p - low, lower, backend.dequantize(w, low + 1, x.dtype))
        assert isinstance(y, Tensor)
        return y

    return decoder.with_backend(replace(backend, gemv=gemv))


def lower_width(p: float, seed: int, cap: int) -> int:
    """The lower of the two candidate widths of an average p. The two differ even where p is a whole number."""
    return max(seed, min(int(np.floor(p)), cap - 1))


def averages(z: Tensor, seed: int, caps: Tensor) -> Tensor:
    """Average widths p = seed + sigmoid(z) (B - seed), float [G]."""
    return seed + torch.sigmoid(z) * (caps - seed)


def shifted_to(z: Tensor, seed: int, caps: Tensor, weights: Tensor, target: float) -> Tensor:
    """Moves z [G] by one common number so that the weighted mean of p is the target (bisection)."""
    low, high = -60.0, 60.0
    for _ in range(60):
        middle = (low + high) / 2
        mean = (averages(z + middle, seed, caps) * weights).sum() / weights.sum()
        low, high = (middle, high) if mean < target else (low, middle)
    return z + (low + high) / 2


def tune_averages(
    decoder: CalibrationDecoder, sequences: Tensor, caps: np.ndarray, target: float, options: AveragesOptions,
    start: np.ndarray | None = None, progress: Progress = no_progress,
) -> np.ndarray:  # fmt: skip
    """The average width float64 [G] of every group for a target.

    sequences: int64 [S, T]. caps: maximum widths [G]. start: z [G] to begin from (default: p near the target).
    """
    seed = decoder.groups[0].seed_bits
    cap = torch.from_numpy(np.asarray(caps, np.float64))
    weights = torch.tensor([float(g.weights) for g in decoder.groups], dtype=torch.float64)
    begin = torch.zeros(len(caps), dtype=torch.float64) if start is None else torch.from_numpy(start)
    z = shifted_to(begin, seed, cap, weights, target).clamp(-8, 8).requires_grad_()
    optimizer = torch.optim.AdamW([z], lr=options.learning_rate, weight_decay=0.0)
    pieces = sequences[:, : options.length]
    view = interpolating_view(decoder, caps)
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * (1 - step / options.steps)
        ids = pieces[step % len(pieces)]
        p = averages(z, seed, cap)
        widths = p.float().to(ids.device)

        def select(group: CalibrationGroup, x: Tensor, widths: Tensor = widths) -> Tensor:
            return widths[group.index].expand(len(x))

        logits = view.forward(ids[:-1], select=select)
        loss = torch.nn.functional.cross_entropy(logits, ids[1:])
        penalty = ((p * weights).sum() / weights.sum() - target) ** 2
        optimizer.zero_grad()
        (loss + options.alpha * penalty).backward()
        optimizer.step()
        progress("averages", step + 1, options.steps)
    return averages(shifted_to(z.detach(), seed, cap, weights, target), seed, cap).numpy()
