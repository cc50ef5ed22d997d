"""Static allocations of other systems, rebuilt from their formulas to compare with ours.

HAWQ-V2 and LLM-MQ are loss tables, float [G, B]: the predicted loss of each group at each width, which
`dpllm.calib.allocation.static_bits` turns into widths. BAQ's rule gives widths from the table that is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpllm.base.progress import Progress
from dpllm.calib.decoder_protocol import CalibrationDecoder, CalibrationGroup
from dpllm.calib.gradient_passes import LABEL_STREAM, backward_from_samples, gradient_leaf


@dataclass(frozen=True)
class WeightGradients:
    """Gradients of every group's matrix.

    mean: float32 [N, K] per group, gradient of the text's own loss per token. square: float32 [N, K] per group,
    squared gradient under labels drawn from the model, per token (the diagonal of the Fisher matrix).
    """

    mean: list[Tensor]
    square: list[Tensor]


def weight_gradients(
    decoder: CalibrationDecoder, sequences: Tensor, seed: int, progress: Progress
) -> WeightGradients:
    """Computes the gradients of every group's matrix. sequences: int64 [S, T]."""
    groups = decoder.groups
    mean = [torch.zeros_like(decoder.backend.dequantize(g.weight, g.seed_bits)) for g in groups]
    square = [torch.zeros_like(m) for m in mean]
    into: list[Tensor] = square

    def observe(group: CalibrationGroup, x: Tensor, y: Tensor) -> None:
        x = x.detach().float()

        def hook(grad: Tensor) -> None:
            grad = grad.float()
            if into is square:
                # Labels are drawn independently, so the cross terms between tokens vanish on average.
                square[group.index] += (grad**2).T @ (x**2)
            else:
                mean[group.index] += grad.T @ x

        y.register_hook(hook)

    for i, ids in enumerate(sequences):
        into = square
        backward_from_samples(decoder, ids, seed * LABEL_STREAM + i, observe=observe)
        into = mean
        logits = decoder.forward(ids, observe=observe, embedded=gradient_leaf(decoder, ids))
        torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum").backward()
        progress("gradients", i + 1, len(sequences))
    tokens = sequences.numel()
    return WeightGradients([m / tokens for m in mean], [s / tokens for s in square])


def hawq_losses(decoder: CalibrationDecoder, gradients_: WeightGradients) -> np.ndarray:
    """HAWQ-V2's measure [G, B] (arXiv:1911.03852): average Hessian trace times squared perturbation."""

    def loss(group: CalibrationGroup, delta: Tensor) -> float:
        return float(gradients_.square[group.index].mean() * (delta**2).sum())

    return _table(decoder, loss)


def llm_mq_losses(decoder: CalibrationDecoder, gradients_: WeightGradients) -> np.ndarray:
    """LLM-MQ's measure [G, B]: the first-order term |gradient . perturbation| of the loss."""

    def loss(group: CalibrationGroup, delta: Tensor) -> float:
        return float((gradients_.mean[group.index] * delta).sum().abs())

    return _table(decoder, loss)


def _table(decoder: CalibrationDecoder, loss: Callable[[CalibrationGroup, Tensor], float]) -> np.ndarray:
    first = decoder.groups[0]
    widths = range(first.seed_bits, first.resident_bits + 1)
    out = np.zeros((len(decoder.groups), len(widths)))
    for g in decoder.groups:
        full = decoder.backend.dequantize(g.weight, first.resident_bits)
        for i, width in enumerate(widths):
            out[g.index, i] = loss(g, full - decoder.backend.dequantize(g.weight, width))
    return out


def equal_loss_bits(
    mean_loss: np.ndarray, weights: np.ndarray, seed_bits: int, target_bits: float
) -> np.ndarray:
    """Widths [G] by BAQ's equal-loss rule (reverse water-filling), within the target.

    Every group takes the least width whose loss per weight is below one common level; the level is the lowest
    that the target affords. What is left over goes to the groups furthest above the next level.
    """
    density = mean_loss / weights[:, None]
    density = np.minimum.accumulate(density, axis=1)
    budget = target_bits * weights.sum() * (1 + 1e-12)
    steps = np.zeros(len(weights), np.int64)
    while True:
        level = density[np.arange(len(steps)), steps]
        order = np.argsort(-level, kind="stable")
        room = budget - ((seed_bits + steps) * weights).sum()
        for g in order:
            if steps[g] + 1 < mean_loss.shape[1] and weights[g] <= room:
                steps[g] += 1
                break
        else:
            return seed_bits + steps
