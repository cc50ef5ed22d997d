"""The bundled reference model: whole, as good as its card says, and on target."""

from __future__ import annotations

import json
import math
import os
import sys

import pytest
import torch

from dpllm import reference
from dpllm.commands import demo
from dpllm.commands.evaluate import token_documents
from dpllm.commands.main import main
from dpllm.evaluation.evaluate import evaluate
from dpllm.model.loading import load_decoder
from dpllm.opening import open_engine
from dpllm.quant.overlay import Overlay

TOKENS = 6000


@pytest.fixture(scope="module", autouse=True)
def all_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def engine():
    return open_engine()


@pytest.fixture(scope="module")
def heldout(engine):
    return token_documents(engine, reference.heldout_text(), context=512, max_tokens=TOKENS)


def command(capsys, monkeypatch, *args) -> str:
    monkeypatch.setattr(sys, "argv", ["dpllm", *args])
    with pytest.raises(SystemExit) as e:
        main()
    out, err = capsys.readouterr()
    assert e.value.code == 0, err
    return out


def test_the_overlay_is_intact():
    overlay = Overlay.open(reference.overlay_path())
    assert overlay.bits == (2, 6)
    for name, _ in overlay.entries():
        overlay.read(name)  # against its checksum


def test_the_overlay_is_of_the_bundled_model():
    folders = (reference.model_path(), reference.overlay_path())
    model, overlay = (json.loads((p / "config.json").read_text()) for p in folders)
    del overlay["quantization_config"]
    assert model == overlay
    first, second = ((p / "tokenizer.json").read_bytes() for p in folders)
    assert first == second


def test_the_model_card():
    facts = json.loads((reference.model_path() / "training.json").read_text())
    assert facts["recall"] >= 0.8
    assert facts["heldout_perplexity"] == pytest.approx(math.exp(facts["heldout_loss"]), rel=1e-3)
    assert facts["tokens_seen"] > 0 and facts["heldout_tokens"] > 50_000
    held = json.loads((reference.model_path() / "heldout_files.json").read_text())
    assert len(held) > 20 and all(isinstance(name, str) for name in held)
    weights = sum(p.stat().st_size for p in reference.model_path().glob("*.safetensors"))
    assert weights < 30e6


def test_generate_needs_no_overlay(capsys, monkeypatch):
    out = command(capsys, monkeypatch, "generate", "import os\n", "--max-new-tokens", "8", "--json")
    said = json.loads(out.splitlines()[-1])
    assert (said["new_tokens"], said["policy"], said["target"]) == (8, "rate-distortion", {"bits": 3.5})
    assert 2 < said["effective_bits"] < 6


@pytest.mark.slow
def test_six_bits_are_as_good_as_all(engine, heldout):
    plain = load_decoder(reference.model_path())
    nll = tokens = 0.0
    with torch.no_grad():
        for document in heldout:
            ids = torch.tensor(document)
            nll += torch.nn.functional.cross_entropy(plain.forward(ids[:-1]), ids[1:], reduction="sum").item()
            tokens += len(ids) - 1
    assert tokens > 0.9 * TOKENS
    perplexity = math.exp(nll / tokens)
    assert perplexity < 12, "a model that has learnt something"
    engine.set_policy("uniform", 6)
    six = evaluate(engine.decoder, engine.policy, 6, heldout)
    assert six.tokens == tokens
    assert abs(six.perplexity / perplexity - 1) < 0.02


@pytest.mark.parametrize("target", [2.5, 3.5])
def test_targets_hold(engine, heldout, target):
    engine.set_policy("rate-distortion", target)
    assert abs(evaluate(engine.decoder, engine.policy, target, heldout).effective_bits - target) <= 0.05


@pytest.mark.slow
def test_demo(capsys, monkeypatch):
    monkeypatch.setattr(demo, "HELDOUT_TOKENS", 500)
    rows = json.loads(command(capsys, monkeypatch, "demo", "--tokens", "3", "--json").splitlines()[-1])[
        "results"
    ]
    assert [r["target_bits"] for r in rows] == [2.5, 3.25, 4.0]
    assert all(r["generated"]["new_tokens"] == 3 and r["heldout"]["perplexity"] > 1 for r in rows)
    read = [r["heldout"]["weight_bytes_per_token"] for r in rows]
    assert read == sorted(set(read)), "more bits, more bytes"


def test_demo_shows_the_text_as_it_is(capsys, monkeypatch):
    monkeypatch.setattr(demo, "HELDOUT_TOKENS", 300)
    monkeypatch.setattr(demo, "PROMPT", "x[i] = y[/b]\n")
    shown = command(capsys, monkeypatch, "demo", "--tokens", "2")
    assert shown.count("x[i] = y[/b]") == 3
    assert "dpllm quantize" in shown and "dpllm calibrate" in shown
