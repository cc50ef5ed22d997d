"""The loss that int8 activations cost at each matrix, and the matrices that are better read with 16-bit activations.

The CPU kernels round activations to int8, with a scale for every 32. Where one channel is a hundred times as large as
its neighbours, little of them is left. The cost is measured while gradients of the calibration text are computed: an
error e of a matrix's outputs costs (g . e)^2 / 2 nats, with g the gradient at these outputs (the Fisher information's
second-order term).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

GROUP = 32  # activations that share a scale, as in kernels/cpu/src/kernels.h
ALLOWED = 5e-4  # nats per token that int8 activations may cost over all matrices: 0.05% of perplexity


def int8_rounded(x: Tensor) -> Tensor:
    """Rounds activations [T, K] as the CPU kernels' int8 does: a scale for every 32 columns. Returns [T, K]."""
    columns = x.shape[1]
    groups = nn.functional.pad(x, (0, -columns % GROUP)).unflatten(1, (-1, GROUP))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-35) / 127
    return ((groups / scale).round() * scale).flatten(1)[:, :columns]


class Int8Cost:
    """Sums the cost of int8 activations at one linear layer over forward and backward passes through it."""

    def __init__(self, module: nn.Linear):
        self._nats, self._tokens = 0.0, 0
        self._hook = module.register_forward_hook(self._forward)

    @property
    def nats(self) -> float:
        """Nats per token, to three significant digits."""
        return float(f"{self._nats / max(1, self._tokens):.3g}")

    def stop(self) -> None:
        """Leaves later passes alone."""
        self._hook.remove()

    def _forward(self, module: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].detach().flatten(0, -2)
        error = (int8_rounded(x) - x) @ module.weight.detach().T

        def backward(gradient: Tensor) -> None:
            self._nats += float((gradient.flatten(0, -2) * error).sum(1).square().sum()) / 2
            self._tokens += len(error)

        output.register_hook(backward)


def wide_matrices(nats: Mapping[str, float]) -> set[str]:
    """Names of the matrices to read with 16-bit activations: the costliest, until the others cost little together.

    nats: cost of int8 activations at each matrix, in nats per token.
    """
    found, left = set(nats), 0.0
    for name, cost in sorted(nats.items(), key=lambda item: item[1]):
        left += cost
        if left > ALLOWED:
            break
        found.remove(name)
    return found
