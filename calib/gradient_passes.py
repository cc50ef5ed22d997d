"""The two calibration passes that compute gradients, sequence by sequence.

Labels are drawn from the model itself: this gives the true Fisher information, without the text's own next tokens.
Draws depend on the seed and the sequence's number only, so an interrupted run continues to the same result.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from dpllm.base.errors import InputError
from dpllm.base.progress import Progress
from dpllm.calib.decoder_protocol import CalibrationDecoder, CalibrationGroup, Observe, Select
from dpllm.calib.runtime.token_sensitivity import FEATURES, sequence_context

LABEL_STREAM = 1_000_003  # random streams per seed: one for each sequence


@dataclass(frozen=True)
class Measurements:
    """What the second pass measures on T tokens.

    signal: float32 [G, T], sum_k d_k x_k^2. loss: float32 [G, T, B], expected loss of reading this width instead of
    the widest, by the token's own squared gradients. exact: float32 [G, T, B], the same by mean squared gradients.
    inputs: float32 [T, K] of group 0. context: float32 [T, 3] (see token_sensitivity). sensitivity: float32 [T],
    squared output gradients relative to their means, averaged over the model.
    """

    signal: np.ndarray
    loss: np.ndarray
    exact: np.ndarray
    inputs: np.ndarray
    context: np.ndarray
    sensitivity: np.ndarray

    @classmethod
    def join(cls, parts: list[Measurements]) -> Measurements:
        """Joins measurements of different tokens, in the order given."""
        axis = {"signal": 1, "loss": 1, "exact": 1}
        return cls(**{f.name: np.concatenate([getattr(p, f.name) for p in parts], axis.get(f.name, 0)) for f in fields(cls)})  # fmt: skip  # noqa: E501


def gradient_leaf(decoder: CalibrationDecoder, ids: Tensor) -> Tensor:
    """Embeddings [T, hidden] of ids int64 [T] that require a gradient, for `forward(embedded=...)`.

    The decoder's weights are constants, so autograd needs another leaf to start from.
    """
    return decoder.embed(ids).requires_grad_()


def backward_from_samples(
    decoder: CalibrationDecoder,
    ids: Tensor,
    seed: int,
    *,
    select: Select | None = None,
    observe: Observe | None = None,
) -> Tensor:
    """Runs the backward pass of the loss of labels drawn from the model. Returns the logits [T, V].

    ids: int64 [T]. `observe` sees every output and may register hooks for its gradient.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = decoder.forward(ids, select=select, observe=observe, embedded=gradient_leaf(decoder, ids))
    labels = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
    torch.nn.functional.cross_entropy(logits, labels.to(logits.device), reduction="sum").backward()
    return logits.detach()


def output_saliency(
    decoder: CalibrationDecoder, sequences: Tensor, seed: int, progress: Progress
) -> list[Tensor]:
    """The mean over tokens of (dLoss/dy_n)^2, float32 [N] per group, with every resident plane read.

    sequences: int64 [S, T].
    """
    total = [torch.zeros(())] * len(decoder.groups)

    def observe(group: CalibrationGroup, x: Tensor, y: Tensor) -> None:
        def add(grad: Tensor) -> None:
            total[group.index] = total[group.index] + (grad.float() ** 2).sum(0)

        y.register_hook(add)

    for i, ids in enumerate(sequences):
        backward_from_samples(decoder, ids, seed * LABEL_STREAM + i, observe=observe)
        progress("saliency", i + 1, len(sequences))
    for group, squares in zip(decoder.groups, total, strict=True):
        if not torch.isfinite(squares).all():
            raise InputError(
                f"the gradients at the output of '{group.name}' are not finite on the calibration text. "
                "Quantise an intact checkpoint, or give other --data."
            )
    return [t / sequences.numel() for t in total]


class Meter:
    """Measures one sequence at a time, at random widths, so that inputs look as they do in quantised decoding.

    saliency: float32 [N] per group. diagonals: float32 [K] per group. source: the group whose input each group's
    signal is computed from.
    """

    def __init__(
        self,
        decoder: CalibrationDecoder,
        widths: list[int],
        saliency: list[Tensor],
        diagonals: list[Tensor],
        source: list[int],
    ):
        self.decoder, self.widths, self.source = decoder, widths, source
        self.saliency, self.diagonals = saliency, diagonals
        odds = 0.75 ** np.arange(len(widths))  # low widths have the largest errors and are read most
        self.odds = odds / odds.sum()

    def sequence(self, ids: Tensor, seed: int) -> Measurements:
        """Measures one sequence of ids int64 [T], with widths and labels drawn from this seed."""
        groups, tokens = len(self.decoder.groups), len(ids)
        signal = np.zeros((groups, tokens), np.float32)
        loss = np.zeros((groups, tokens, len(self.widths)), np.float32)
        exact = np.zeros_like(loss)
        sensitivity = np.zeros((groups, tokens), np.float32)
        inputs: dict[int, Tensor] = {}

        def observe(group: CalibrationGroup, x: Tensor, y: Tensor) -> None:
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
        logits = backward_from_samples(self.decoder, ids, seed, select=select, observe=observe)
        context = sequence_context(logits, ids).numpy() if tokens > 1 else np.full((tokens, FEATURES), np.nan)
        return Measurements(
            signal,
            loss,
            exact,
            inputs[0].float().cpu().numpy(),
            context.astype(np.float32),
            sensitivity.mean(0),
        )

    def _losses(self, group: CalibrationGroup, x: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
        """Squared output errors of each width against the widest, float32 [T, B], weighted in two ways.

        The first result is weighted by the token's own squared gradients [T, N], the second by their mean.
        """
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
    """Selects random widths. A second call for the same group gives the same widths, because the backward pass may
    compute blocks again."""

    def __init__(self, widths: list[int], odds: np.ndarray, seed: int):
        self.widths, self.odds, self.rng = widths, odds, np.random.default_rng(seed)
        self.given: dict[int, Tensor] = {}

    def __call__(self, group: CalibrationGroup, x: Tensor) -> Tensor:
        if group.index not in self.given:
            drawn = self.rng.choice(self.widths, size=len(x), p=self.odds)
            self.given[group.index] = torch.as_tensor(drawn, dtype=torch.int32, device=x.device)
        return self.given[group.index]
