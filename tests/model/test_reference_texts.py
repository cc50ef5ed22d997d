"""Texts of the bundled model, kept token for token: what a refactoring must not change.

reference_texts.json holds greedy continuations at 2.5, 3.5 and 6 bits, as far as the backends agreed on them (AVX-512,
AVX2, portable C++ and torch round differently, and some texts part where two tokens are level).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import dpllm

TEXTS = json.loads(Path(__file__).with_name("reference_texts.json").read_text())


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("bits", [2.5, 3.5, 6.0])
def test_greedy_texts_are_the_stored_ones(bits, backend):
    engine = dpllm.load(target_bits=bits, backend=backend)
    texts = [t for t in TEXTS if t["bits"] == bits]
    assert len(texts) >= 3
    for text in texts:
        generation = engine.generate(text["prompt"], max_new_tokens=len(text["tokens"]))
        assert [step.token for step in generation] == text["tokens"], text["prompt"]
