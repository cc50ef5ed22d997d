"""The cost of int8 activations: what is measured, and which matrices get 16-bit activations for it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dpllm.quant.int8_cost import ALLOWED, GROUP, Int8Cost, int8_rounded, wide_matrices


@given(st.integers(1, 100), st.integers(0, 2**31))
def test_rounding_is_that_of_a_scale_for_every_32(columns, seed):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(3, columns, generator=rng) * 10 ** torch.randint(-3, 4, (3, columns), generator=rng)
    x[1] = 0
    found = int8_rounded(x)
    assert found.shape == x.shape and torch.equal(found[1], x[1])
    for first in range(0, columns, GROUP):
        part, rounded = x[:, first : first + GROUP].double(), found[:, first : first + GROUP].double()
        scale = part.abs().amax(1, keepdim=True) / 127
        assert bool(((rounded - part).abs() <= scale * 0.5001).all())
        steps = rounded / scale.clamp(min=1e-30)
        assert torch.allclose(steps, steps.round(), atol=1e-3) and float(steps.abs().max()) < 127.001


@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1e-3), max_size=12))
def test_the_costliest_matrices_are_widened_and_no_more(nats):
    wide = wide_matrices(nats)
    narrow = {n: x for n, x in nats.items() if n not in wide}
    assert sum(narrow.values()) <= ALLOWED * (1 + 1e-9)
    if wide:
        least = min(nats[n] for n in wide)
        assert all(x <= least for x in narrow.values())
        assert sum(narrow.values()) + least > ALLOWED * (1 - 1e-9)


def test_the_cost_is_half_the_squared_first_order_change():
    torch.manual_seed(3)
    module, target = nn.Linear(40, 6), torch.randn(2, 5, 6)
    cost = Int8Cost(module)
    expected = 0.0
    for x, t in zip(torch.randn(2, 5, 40), target, strict=True):
        x = (x * torch.tensor([100.0] + [1.0] * 39)).requires_grad_()
        y = module(x[None])
        loss = ((y[0] - t) ** 2).sum()
        (gradient,) = torch.autograd.grad(loss, y, retain_graph=True)
        loss.backward()
        error = (int8_rounded(x.detach()) - x.detach()).double() @ module.weight.detach().double().T
        expected += float(((gradient[0].double() * error).sum(1) ** 2).sum()) / 2
    assert cost.nats == pytest.approx(expected / 10, rel=6e-3)
    cost.stop()
    module(torch.randn(1, 5, 40)).sum().backward()
    assert cost.nats == pytest.approx(expected / 10, rel=6e-3)
