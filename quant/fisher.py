"""Diagonal Fisher information of every linear layer, one decoder layer at a time.

F = sum over calibration sequences of (dLoss/dW)^2, accumulated in float32 (SqueezeLLM, arXiv:2306.07629). On request
the guided Hessian is computed too: H = sum over tokens of s x x^T, with x the layer's input and s the mean squared
gradient of its outputs (GuidedQuant, arXiv:2505.07004). It knows which errors of different columns cancel.

The forward pass writes the hidden state at every layer boundary to disk. The backward pass goes through the layers from
the last to the first and loads each one again, so memory never holds more than one layer's weights and Fisher. Both
passes can be interrupted after any layer and continued.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dpllm.base.errors import InputError
from dpllm.base.files import write_tensors
from dpllm.quant.int8_cost import Int8Cost
from dpllm.quant.layerwise import LayerwiseModel, call_layer

INT8_SHARE = 4  # the cost of int8 activations is measured on one sequence in so many, the first ones


class FisherPass:
    """The forward and the backward pass, with boundary activations and gradients in the directory `work`."""

    def __init__(
        self,
        model: LayerwiseModel,
        sequences: Tensor,
        work: Path,
        *,
        diagonal: bool = True,
        guided: bool = False,
    ):
        """sequences: int64 [S, T]. diagonal: `backward` returns the Fisher, which takes a gradient of every weight for
        every sequence. guided: `backward` stores each linear layer's guided Hessian in `hessians`.
        """
        self.model, self.sequences, self.work = model, sequences, work
        self.diagonal, self.guided = diagonal, guided
        self.hessians: dict[
            str, Tensor
        ] = {}  # float32 [K, K] on the CPU, of the last layer that `backward` handled
        self.int8_nats: dict[
            str, float
        ] = {}  # cost of int8 activations at that layer's matrices, nats per token
        work.mkdir(parents=True, exist_ok=True)

    def _hidden(self, index: int) -> Path:
        return self.work / f"hidden-{index:04d}.safetensors"

    def _gradient(self, index: int) -> Path:
        return self.work / f"gradient-{index:04d}.safetensors"

    @cached_property
    def _layer_arguments(self) -> list[dict[str, Any]]:
        """Each layer's arguments apart from the hidden state. They are the same for every sequence."""
        return self.model.embed(self.sequences[:1])[1]

    def forward(self, progress: Callable[[], None]) -> None:
        """Stores the input of every layer and the gradient at the last layer's output."""
        depth = len(self.model)
        done = [i for i in range(depth + 1) if self._hidden(i).exists()]
        if not done:
            write_tensors(self._hidden(0), {"x": self.model.embed(self.sequences)[0].cpu()})
            done = [0]
        for index in range(max(done), depth):
            layer, kwargs = self.model.load_layer(index), self._layer_arguments[index]
            states = _load(self._hidden(index))
            with torch.no_grad():
                rows = [call_layer(layer, s[None].to(self.model.device), kwargs).cpu() for s in states]
            write_tensors(
                self._hidden(index + 1), {"x": self._finite(torch.cat(rows), f"output of layer {index}")}
            )
            progress()
        if not self._gradient(depth).exists() and not any(self.work.glob("gradient-*")):
            gradients = self.model.head_gradients(_load(self._hidden(depth)), self.sequences)
            write_tensors(self._gradient(depth), {"x": self._finite(gradients, "gradient at the head")})

    def backward(self, index: int) -> dict[str, Tensor]:
        """The Fisher float32 [N, K], on the CPU, of each linear layer in decoder layer `index`; {} without `diagonal`.

        It starts from the stored gradient above the layer. `keep_gradient` stores the gradient below, after the caller
        has used the result.
        """
        layer = self.model.load_layer(index)
        names = {m: n for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
        fisher = {}
        for module, name in names.items() if self.diagonal else ():
            fisher[name] = torch.zeros_like(module.weight, device=self.model.device)
            module.weight.requires_grad_()
            module.weight.register_post_accumulate_grad_hook(_squaring(fisher[name]))
        guides = {n: _Guide(m) for m, n in names.items()} if self.guided else {}
        costs = {n: Int8Cost(m) for m, n in names.items()}
        kwargs, below = self._layer_arguments[index], []
        pairs = zip(_load(self._hidden(index)), _load(self._gradient(index + 1)), strict=True)
        for state, gradient in pairs:
            hidden = state[None].to(self.model.device).requires_grad_()
            call_layer(layer, hidden, kwargs).backward(gradient[None].to(self.model.device))
            assert hidden.grad is not None
            below.append(hidden.grad.cpu())
            if len(below) * INT8_SHARE >= len(self.sequences):
                for cost in costs.values():
                    cost.stop()
        self._below = self._finite(torch.cat(below), f"gradient below layer {index}")
        prefix = self.model.layer_prefix(index)
        for name, squares in fisher.items():
            self._finite(squares, f"squared gradient of '{prefix}.{name}'")
        self.int8_nats = {f"{prefix}.{n}": cost.nats for n, cost in costs.items()}
        self.hessians = {f"{prefix}.{n}": g.hessian.cpu() for n, g in guides.items()}
        return {f"{prefix}.{n}": f.cpu() for n, f in fisher.items()}

    def _finite(self, x: Tensor, what: str) -> Tensor:
        """Returns x. Raises InputError where it holds NaN or infinity."""
        if not torch.isfinite(x).all():
            raise InputError(
                f"{self.model.source.path}: the {what} is not finite on the calibration text, so there is no Fisher "
                "information. Get an intact checkpoint, give other --data, or use --fisher none."
            )
        return x

    def keep_gradient(self, index: int) -> None:
        """Stores the gradient below layer `index`, from which the layer below starts."""
        write_tensors(self._gradient(index), {"x": self._below})

    def drop_gradient(self, index: int) -> None:
        """Deletes a gradient that no layer needs any more."""
        self._gradient(index).unlink(missing_ok=True)


class _Guide:
    """Sums a linear layer's guided Hessian float32 [K, K] over all forward and backward passes through the layer."""

    def __init__(self, module: nn.Linear):
        self.hessian = module.weight.new_zeros(module.in_features, module.in_features)
        module.register_forward_hook(self._forward)

    def _forward(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].detach().flatten(0, -2)  # [tokens, K]

        def backward(gradient: Tensor) -> None:
            weighted = x * gradient.flatten(0, -2).square().mean(1).sqrt()[:, None]
            self.hessian.addmm_(weighted.T, weighted)

        output.register_hook(backward)


def _squaring(total: Tensor) -> Callable[[Tensor], None]:
    """A hook that adds the square of a new gradient to `total`, and frees the gradient at once."""

    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        total.addcmul_(parameter.grad, parameter.grad)
        parameter.grad = None

    return hook


def _load(path: Path) -> Tensor:
    return load_file(path)["x"]
