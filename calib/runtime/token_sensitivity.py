"""Predicts how sensitive the next token is to errors: one number, the token's multiplier.

Errors at a confident token cost nothing, and a sensitivity averaged over a layer cannot see that. Two things are known
before the first matrix is read: the embedding of the token (group 0's input, `probe`), and how the previous step went
(`context`): the log entropy of its prediction, the log probability that it gave to the next token, and a moving average
of log entropies. A linear function of these predicts the log of the token's squared output gradients. Half of it (power
0.5, measured in docs/log.md) multiplies the signal of every group:

    m_t = exp(bias + probe . x_0 + weights . (context - means))      computed once per token, before group 0

Without a previous step (the first token of a text) the context counts as its mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

FEATURES = 3  # log entropy, log probability of the token, moving average of log entropy
DECAY = 0.8  # of the moving average, per token
POWER = 0.5  # of the predicted sensitivity
RIDGE = 0.005  # times the number of tokens: how strongly the coefficients are pulled to zero
LIMIT = 3.0  # largest |log multiplier|: protects against inputs that calibration never saw


def step_context(logits: Tensor, tokens: Tensor, previous: Tensor | None) -> Tensor:
    """The context features after one decode step, for the next step: float32 [R, 3].

    logits: [R, V] of the step, for R sequences side by side. tokens: int64 [R], the next token of each sequence.
    previous: float32 [R, 3], the context before this step (None at the first step).
    """
    if len(logits) == 1 and logits.device.type == "cpu":
        # By numpy: waking torch's threads for one row took longer than a small model's whole step.
        row = logits[0].float().numpy()
        shifted = row - row.max()
        p = np.exp(shifted)
        total = float(p.sum())
        log_total = math.log(total)
        low = math.log(log_total - float(p @ shifted) / total + 0.01)
        mean = low if previous is None else DECAY * float(previous[0, 2]) + (1 - DECAY) * low
        return torch.tensor([(low, max(float(shifted[int(tokens[0])]) - log_total, -20.0), mean)])
    log_p = logits.float().log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    level = (entropy + 0.01).log()
    chosen = log_p.gather(1, tokens.to(log_p.device)[:, None])[:, 0].clamp(min=-20)
    trend = level if previous is None else DECAY * previous[:, 2] + (1 - DECAY) * level
    return torch.stack([level, chosen, trend], dim=1)


def sequence_context(logits: Tensor, ids: Tensor) -> Tensor:
    """The context features of every position of a sequence, float32 [T, 3], with NaN in the first row.

    logits: [T, V] at each position. ids: int64 [T], the sequence.
    """
    steps = step_context(logits[:-1], ids[1:].to(logits.device), None).cpu()
    level = steps[:, 0].tolist()
    trend = level[:1]
    for value in level[1:]:
        trend.append(DECAY * trend[-1] + (1 - DECAY) * value)
    steps[:, 2] = torch.tensor(trend[: len(level)])
    return torch.cat([steps.new_full((1, FEATURES), float("nan")), steps])


@dataclass(frozen=True)
class TokenProbe:
    """The multiplier's parameters. probe: float32 [K]. weights, means: float32 [3]."""

    probe: Tensor
    weights: Tensor
    means: Tensor
    bias: float

    @classmethod
    def of(cls, probe: np.ndarray, context: np.ndarray, device: torch.device | str = "cpu") -> TokenProbe:
        """Makes the probe from a profile's arrays: probe [K], context [7] (weights, means, bias)."""
        numbers = torch.from_numpy(np.asarray(context, np.float32)).to(device)
        weights, means = numbers[:FEATURES], numbers[FEATURES : 2 * FEATURES]
        return cls(torch.from_numpy(probe).float().to(device), weights, means, float(context[-1]))

    def multiplier(self, x: Tensor, context: Tensor | None, correction: float | Tensor = 0.0) -> Tensor:
        """The multiplier of each row, float32 [R].

        x: [R, K], input of group 0. context: [R, 3], NaN where unknown, or None. correction: one number or [R], added
        to the exponent (calib/runtime/bits_correction.py).
        """
        exponent = x.float() @ self.probe + self.offset(context)
        return (exponent.clamp(-LIMIT, LIMIT) + correction).exp().float()

    def offset(self, context: Tensor | None) -> Tensor | float:
        """The exponent without the probe of the input: float32 [R], or one number if there is one row or no context."""
        if context is None:
            return self.bias
        if len(context) == 1 and context.device.type == "cpu":  # plain numbers, as in step_context
            total = 0.0
            for c, mean, w in zip(
                context[0].tolist(), self.means.tolist(), self.weights.tolist(), strict=True
            ):
                total += w * (c - mean) if c == c else 0.0
            return self.bias + total
        known = (context.to(self.means.device) - self.means).nan_to_num(nan=0.0)
        return self.bias + known @ self.weights


def fit_probe(
    inputs: np.ndarray, context: np.ndarray, sensitivity: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Fits the probe: ridge regression of log sensitivity on the input of group 0 and the context.

    inputs: [T, K]. context: [T, 3], NaN where unknown. sensitivity: [T], squared output gradients relative to their
    means, from one sample of labels: noisy, but unbiased.
    Returns (probe float16 [K], context float64 [7], share of variance explained on the last tenth of the tokens,
    which that fit did not see). Probe and context are zero where nothing can be predicted.
    """
    target = np.log(np.maximum(sensitivity, 1e-9)).astype(np.float64)
    means = np.nanmean(context, axis=0) if np.isfinite(context).any() else np.zeros(FEATURES)
    features = np.concatenate([inputs, np.where(np.isfinite(context), context - means, 0.0)], axis=1)
    cut = max(1, len(target) * 9 // 10)
    held = slice(cut, None)
    coefficients, centre, middle = _ridge(features[:cut], target[:cut])
    predicted = (features[held] - centre) @ coefficients + middle
    spread = ((target[held] - target[held].mean()) ** 2).sum() if cut < len(target) else 0.0
    explained = 1 - ((target[held] - predicted) ** 2).sum() / spread if spread > 0 else 0.0
    if explained <= 0:  # nothing can be predicted: every token counts the same
        return np.zeros(inputs.shape[1], np.float16), np.zeros(2 * FEATURES + 1), float(explained)
    coefficients, centre, _ = _ridge(features, target)
    coefficients *= POWER
    width = inputs.shape[1]
    # Around the mean input the multiplier is one: its scale is absorbed by the bins of the signal anyway.
    bias = -(coefficients * centre).sum()
    return (
        coefficients[:width].astype(np.float16),
        np.concatenate([coefficients[width:], means, [bias]]),
        float(explained),
    )


def _ridge(features: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """(coefficients, feature means, target mean) of a ridge regression on standardised features."""
    centre, spread = features.mean(axis=0, dtype=np.float64), features.std(axis=0, dtype=np.float64)
    scaled = (features - centre) / np.where(spread > 0, spread, 1.0)
    middle = float(target.mean())
    gram = scaled.T @ scaled + RIDGE * len(target) * np.eye(scaled.shape[1])
    solved = np.linalg.solve(gram, scaled.T @ (target - middle))
    return solved / np.where(spread > 0, spread, 1.0), centre, middle
