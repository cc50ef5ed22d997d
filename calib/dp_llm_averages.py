"""Stage 2 of DP-LLM (arXiv:2508.06041): how many planes each group reads on average, by gradient descent.

p = seed + sigmoid(z) (B - seed); a group's output is interpolated between the two widths around p; the loss is
cross entropy + alpha (mean p - target)^2, and only z is trained. Interpolating the two outputs is interpolating
the two matrices, so a step costs one product forward and two backward per group.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpllm.calib.gradient_passes import Progress


@dataclass(frozen=True)
class AveragesOptions:
    """steps, learning_rate: of Adam on z, falling linearly to zero, one sequence of `length` tokens a step;
    alpha: weight of the bit penalty."""

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


@contextmanager
def interpolated(decoder: Any, caps: np.ndarray) -> Iterator[None]:
    """Lets `select` answer with a fractional width (a float tensor, one value for all rows): the output is
    then interpolated between the two widths around it, and gradients flow into the width."""
    backend = decoder.backend
    cap = {id(g.weight): int(c) for g, c in zip(decoder.groups, caps, strict=True)}

    def gemv(x: Tensor, w: Any, bits: Tensor, out: Tensor | None = None) -> Tensor:
        if not bits.is_floating_point():
            return backend.gemv(x, w, bits, out)
        p = bits[0]
        low = lower_width(float(p.detach()), w.seed_bits, cap[id(w)])
        lower = backend.dequantize(w, low, x.dtype)
        if low == cap[id(w)]:  # the seed is all there is
            return x @ lower.T
        y = _Interpolated.apply(x, p - low, lower, backend.dequantize(w, low + 1, x.dtype))
        assert isinstance(y, Tensor)
        return y

    decoder.backend = replace(backend, gemv=gemv)
    try:
        yield
    finally:
        decoder.backend = backend


def lower_width(p: float, seed: int, cap: int) -> int:
    """The lower of the two candidate widths of an average p: they are distinct even where p is whole."""
    return max(seed, min(int(np.floor(p)), cap - 1))


def averages(z: Tensor, seed: int, caps: Tensor) -> Tensor:
    """p = seed + sigmoid(z) (B - seed), float [G]."""
    return seed + torch.sigmoid(z) * (caps - seed)


def shifted_to(z: Tensor, seed: int, caps: Tensor, weights: Tensor, target: float) -> Tensor:
    """z moved by one common number so that the weighted mean of p is the target (bisection)."""
    low, high = -60.0, 60.0
    for _ in range(60):
        middle = (low + high) / 2
        mean = (averages(z + middle, seed, caps) * weights).sum() / weights.sum()
        low, high = (middle, high) if mean < target else (low, middle)
    return z + (low + high) / 2


def tune_averages(
    decoder: Any, sequences: Tensor, caps: np.ndarray, target: float, options: AveragesOptions,
    start: np.ndarray | None = None, progress: Progress = lambda stage, done, total: None,
) -> np.ndarray:  # fmt: skip
    """Average precision float64 [G] of every group for a target.

    sequences: int64 [S, T]. caps: maximum widths [G]. start: z [G] to begin from (default: p near the target).
    """
    seed = decoder.groups[0].seed_bits
    cap = torch.from_numpy(np.asarray(caps, np.float64))
    weights = torch.tensor([float(g.weights) for g in decoder.groups], dtype=torch.float64)
    begin = torch.zeros(len(caps), dtype=torch.float64) if start is None else torch.from_numpy(start)
    z = shifted_to(begin, seed, cap, weights, target).clamp(-8, 8).requires_grad_()
    optimizer = torch.optim.AdamW([z], lr=options.learning_rate, weight_decay=0.0)
    pieces = sequences[:, : options.length]
    with interpolated(decoder, caps):
        for step in range(options.steps):
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * (1 - step / options.steps)
            ids = pieces[step % len(pieces)]
            p = averages(z, seed, cap)
            widths = p.float().to(ids.device)

            def select(group: Any, x: Tensor, widths: Tensor = widths) -> Tensor:
                return widths[group.index].expand(len(x))

            logits = decoder.forward(ids[:-1], select=select)
            loss = torch.nn.functional.cross_entropy(logits, ids[1:])
            penalty = ((p * weights).sum() / weights.sum() - target) ** 2
            optimizer.zero_grad()
            (loss + options.alpha * penalty).backward()
            optimizer.step()
            progress("averages", step + 1, options.steps)
    return averages(shifted_to(z.detach(), seed, cap, weights, target), seed, cap).numpy()
