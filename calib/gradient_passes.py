"""What calibration text shows about a decoder: the two passes with gradients, sequence by sequence.

Labels are drawn from the model itself (the true Fisher information, no peeking at the text). Draws depend on
the seed and the sequence's number only, so a run that was cut off continues to the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpllm.calib.runtime.token_sensitivity import FEATURES, sequence_context

Progress = Callable[[str, int, int], None]
LABEL_STREAM = 1_000_003  # sequences per seed that get streams of their own


@dataclass(frozen=True)
class Measurements:
    """Of T tokens.

    signal: float32 [G, T], sum_k d_k x_k^2. loss: float32 [G, T, B], expected loss of reading each width
    instead of the widest, by the token's own squared gradients; exact: the same by mean squared gradients.
    inputs: float32 [T, K] of group 0. context: float32 [T, 3] (see token_sensitivity). sensitivity: float32
    [T], squared output gradients relative to their means, averaged over the model.
    """

    signal: np.ndarray
    loss: np.ndarray
    exact: np.ndarray
    inputs: np.ndarray
    context: np.ndarray
    sensitivity: np.ndarray

    @classmethod
    def join(cls, parts: list[Measurements]) -> Measurements:
        """All tokens of the parts."""
        axis = {"signal": 1, "loss": 1, "exact": 1}
        return cls(**{f.name: np.concatenate([getattr(p, f.name) for p in parts], axis.get(f.name, 0)) for f in fields(cls)})  # fmt: skip  # noqa: E501


@contextmanager
def gradients(decoder: Any) -> Iterator[None]:
    """Lets gradients flow through a decoder whose weights are constants: they need a leaf to start from."""
    anchor, embed = torch.zeros((), requires_grad=True), decoder._embed
    decoder._embed = lambda ids: embed(ids) + anchor
    try:
        yield
    finally:
        decoder._embed = embed


def backward_from_samples(
    decoder: Any, ids: Tensor, seed: int, select: Any = None, observe: Any = None
) -> Tensor:
    """Backward pass of the loss of labels drawn from the model. Returns the logits [T, V]."""
    generator = torch.Generator().manual_seed(seed)
    logits = decoder.forward(ids, select=select, observe=observe)
    labels = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
    torch.nn.functional.cross_entropy(logits, labels.to(logits.device), reduction="sum").backward()
    return logits.detach()


def output_saliency(decoder: Any, sequences: Tensor, seed: int, progress: Progress) -> list[Tensor]:
    """float32 [N] per group: mean over tokens of (dLoss/dy_n)^2, every resident plane read."""
    total: list[Any] = [0.0] * len(decoder.groups)

    def observe(group: Any, x: Tensor, y: Tensor) -> None:
        def add(grad: Tensor) -> None:
            total[group.index] = total[group.index] + (grad.float() ** 2).sum(0)

        y.register_hook(add)

    with gradients(decoder):
        for i, ids in enumerate(sequences):
            backward_from_samples(decoder, ids, seed * LABEL_STREAM + i, observe=observe)
            progress("saliency", i + 1, len(sequences))
    return [t / sequences.numel() for t in total]


class Meter:
    """Measures one sequence at a time, widths drawn at random so that inputs look as in quantised decoding."""

    def __init__(
        self,
        decoder: Any,
        widths: list[int],
        saliency: list[Tensor],
        diagonals: list[Tensor],
        source: list[int],
    ):
        self.decoder, self.widths, self.source = decoder, widths, source
        self.saliency, self.diagonals = saliency, diagonals
        odds = 0.75 ** np.arange(len(widths))  # low widths matter most, and are read most
        self.odds = odds / odds.sum()

    def sequence(self, ids: Tensor, seed: int) -> Measurements:
        """One sequence [T], its widths and labels drawn from this seed."""
        groups, tokens = len(self.decoder.groups), len(ids)
        signal = np.zeros((groups, tokens), np.float32)
        loss = np.zeros((groups, tokens, len(self.widths)), np.float32)
        exact = np.zeros_like(loss)
        sensitivity = np.zeros((groups, tokens), np.float32)
        inputs: dict[int, Tensor] = {}

        def observe(group: Any, x: Tensor, y: Tensor) -> None:
            g, x = group.index, x.detach()
            inputs[g] = x
            signal[g] = ((inputs[self.source[g]].float() ** 2) @ self.diagonals[g]).cpu().numpy()

            def hook(grad: Tensor) -> None:
                squares = grad.float() ** 2
                relative = squares / self.saliency[g].clamp(min=1e-30)
                sensitivity[g] = relative.mean(1).cpu().numpy()
                loss[g], exact[g] = (t.cpu().numpy() for t in self._losses(group, x, squares))

            y.register_hook(hook)

        select = _Drawn(self.widths, self.odds, seed)
        with gradients(self.decoder):
            logits = backward_from_samples(self.decoder, ids, seed, select, observe)
        context = sequence_context(logits, ids).numpy() if tokens > 1 else np.full((tokens, FEATURES), np.nan)
        return Measurements(
            signal,
            loss,
            exact,
            inputs[0].float().cpu().numpy(),
            context.astype(np.float32),
            sensitivity.mean(0),
        )

    def _losses(self, group: Any, x: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
        """[T, B] twice: squared output error of each width against the widest, weighted by the token's own
        squared gradients [T, N], and by their mean."""
        dequantize = self.decoder.backend.dequantize
        full = x @ dequantize(group.weight, self.widths[-1], x.dtype).T
        own = torch.zeros(len(x), len(self.widths), device=x.device)
        mean = torch.zeros_like(own)
        for i, width in enumerate(self.widths[:-1]):
            error = (full - x @ dequantize(group.weight, width, x.dtype).T).float() ** 2
            own[:, i] = (error * squares).sum(1)
            mean[:, i] = error @ self.saliency[group.index]
        return own, mean


class _Drawn:
    """Random widths; a group asked twice (blocks are recomputed in the backward pass) answers the same."""

    def __init__(self, widths: list[int], odds: np.ndarray, seed: int):
        self.widths, self.odds, self.rng = widths, odds, np.random.default_rng(seed)
        self.given: dict[int, Tensor] = {}

    def __call__(self, group: Any, x: Tensor) -> Tensor:
        if group.index not in self.given:
            drawn = self.rng.choice(self.widths, size=len(x), p=self.odds)
            self.given[group.index] = torch.as_tensor(drawn, dtype=torch.int32, device=x.device)
        return self.given[group.index]
