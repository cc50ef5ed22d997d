"""The layer-wise Fisher pass equals plain backpropagation through the whole model."""

from __future__ import annotations

import pytest
import torch
from tiny_models import build_model
from torch import nn
from transformers import AutoModelForCausalLM

from dpllm.quant.fisher import FisherPass
from dpllm.quant.layerwise import LayerwiseModel
from dpllm.quant.source import ModelSource

# Windows, mixed window and full layers, layers without rope, biases, tied embeddings, 3-part rope.
NAMES = [
    "llama",
    "qwen3",
    "mistral-window",
    "qwen2-window",
    "smollm3",
    "llama-biased",
    "smollm",
    "llama3-rope",
]
SEQUENCES = torch.randint(3, 96, (3, 24), generator=torch.Generator().manual_seed(3))


def whole_model_fisher(path) -> dict[str, torch.Tensor]:
    """Sum over sequences of the squared gradient of the summed next-token loss, in one autograd graph."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n}
    total = {n: torch.zeros_like(m.weight) for n, m in linears.items()}
    for ids in SEQUENCES:
        model.zero_grad()
        logits = model(ids[None]).logits[0, :-1]
        nn.functional.cross_entropy(logits, ids[1:], reduction="sum").backward()
        for name, module in linears.items():
            total[name] += module.weight.grad**2
    return total


def layerwise(path) -> LayerwiseModel:
    return LayerwiseModel(ModelSource.open(path))


def run_pass(fisher: FisherPass) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    fisher.forward(lambda: None)
    for index in range(len(fisher.model) - 1, -1, -1):
        found |= fisher.backward(index)
        fisher.keep_gradient(index)
        fisher.drop_gradient(index + 1)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_equals_whole_model_backward(name, checkpoints, tmp_path):
    expected = whole_model_fisher(checkpoints / name)
    found = run_pass(FisherPass(layerwise(checkpoints / name), SEQUENCES, tmp_path / "work"))
    assert found.keys() == expected.keys()
    assert len(found) == 3 * 7
    for linear, total in expected.items():
        assert total.max() > 0, f"{linear}: nothing to compare"
        assert found[linear].dtype == torch.float32
        assert (found[linear] - total).abs().max() <= 1e-4 * total.max(), linear
        assert torch.allclose(found[linear].sum(), total.sum(), rtol=1e-4), linear


def test_half_precision_checkpoint_is_computed_in_float32(tmp_path):
    build_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    expected = whole_model_fisher(tmp_path / "model")
    found = run_pass(FisherPass(layerwise(tmp_path / "model"), SEQUENCES, tmp_path / "work"))
    for linear, total in expected.items():
        assert (found[linear] - total).abs().max() <= 1e-4 * total.max(), linear


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("stop_after", [0, 1, 2])
def test_forward_continues_where_it_was_cut_off(stop_after, checkpoints, tmp_path):
    """A second process picks up the stored boundaries; the result is bit for bit the same."""
    straight = run_pass(FisherPass(layerwise(checkpoints / "llama"), SEQUENCES, tmp_path / "straight"))
    calls = 0

    def cut() -> None:
        nonlocal calls
        calls += 1
        if calls > stop_after:
            raise Interrupted

    with pytest.raises(Interrupted):
        FisherPass(layerwise(checkpoints / "llama"), SEQUENCES, tmp_path / "cut").forward(cut)
    resumed = FisherPass(layerwise(checkpoints / "llama"), SEQUENCES, tmp_path / "cut")
    layers_done = []
    resumed.forward(lambda: layers_done.append(1))
    assert len(layers_done) == 2 - stop_after, "finished layers are not run again"
    found = run_pass(FisherPass(layerwise(checkpoints / "llama"), SEQUENCES, tmp_path / "cut"))
    assert all(torch.equal(found[n], straight[n]) for n in straight)


def test_backward_can_be_repeated_until_its_gradient_is_dropped(checkpoints, tmp_path):
    fisher = FisherPass(layerwise(checkpoints / "smollm"), SEQUENCES, tmp_path / "work")
    fisher.forward(lambda: None)
    first = fisher.backward(2)
    fisher.keep_gradient(2)
    again = FisherPass(layerwise(checkpoints / "smollm"), SEQUENCES, tmp_path / "work").backward(2)
    assert all(torch.equal(first[n], again[n]) for n in first)


def test_a_second_process_can_take_over_between_layers(checkpoints, tmp_path):
    """What lies in `work` is all the state there is."""
    straight = run_pass(FisherPass(layerwise(checkpoints / "smollm"), SEQUENCES, tmp_path / "straight"))
    found: dict[str, torch.Tensor] = {}
    for index in (2, 1, 0):
        fisher = FisherPass(layerwise(checkpoints / "smollm"), SEQUENCES, tmp_path / "work")
        fisher.forward(lambda: None)
        found |= fisher.backward(index)
        fisher.keep_gradient(index)
        fisher.drop_gradient(index + 1)
        assert len(list((tmp_path / "work").glob("gradient-*"))) == 1
    assert not list((tmp_path / "work").glob("*.tmp"))
    assert all(torch.equal(found[n], straight[n]) for n in straight)


def whole_model_hessians(path) -> dict[str, torch.Tensor]:
    """sum over tokens of mean(gradient of the outputs ^ 2) x x^T, from one autograd graph a sequence."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n}
    inputs, outputs = {}, {}
    for name, module in linears.items():
        module.register_forward_hook(
            lambda m, x, y, n=name: inputs.update({n: x[0][0]}) or outputs.update({n: y})
        )
    total = {n: torch.zeros(m.in_features, m.in_features, dtype=torch.float64) for n, m in linears.items()}
    for ids in SEQUENCES:
        logits = model(ids[None]).logits[0, :-1]
        loss = nn.functional.cross_entropy(logits, ids[1:], reduction="sum")
        for name, gradient in zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True):
            x, s = inputs[name].detach().double(), gradient[0].double().square().mean(1)
            total[name] += (x * s[:, None]).T @ x
    return total


@pytest.mark.parametrize("name", ["llama", "qwen3", "llama-biased"])
def test_guided_hessians_equal_those_of_the_whole_model(name, checkpoints, tmp_path):
    expected = whole_model_hessians(checkpoints / name)
    passes = FisherPass(layerwise(checkpoints / name), SEQUENCES, tmp_path / "work", guided=True)
    plain = FisherPass(layerwise(checkpoints / name), SEQUENCES, tmp_path / "plain")
    passes.forward(lambda: None)
    plain.forward(lambda: None)
    seen = set()
    for index in (2, 1, 0):
        fisher, without = passes.backward(index), plain.backward(index)
        assert all(torch.equal(fisher[n], without[n]) for n in fisher)
        assert not plain.hessians
        for linear, h in passes.hessians.items():
            seen.add(linear)
            assert (h - h.T).abs().max() <= 1e-6 * h.abs().max()
            assert (h - expected[linear]).abs().max() <= 1e-4 * expected[linear].abs().max(), linear
        passes.keep_gradient(index)
        plain.keep_gradient(index)
    assert seen == expected.keys()
