"""Numbers that are not finite: in JSON, and where perplexities exceed the largest float."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpllm.base.json_text import strict_json
from dpllm.base.quantities import field, figure, perplexity, rise
from dpllm.commands.common import print_json
from dpllm.evaluation.evaluate import DocumentScore, summarize
from dpllm.report.page import as_script_data

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


def strictly(text: str):
    """The value of a JSON text; NaN and Infinity, which JSON does not have, fail."""

    def refuse(word: str):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def expected(value):
    """What a reader finds: null for a number that is not finite, lists for tuples."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: expected(v) for k, v in value.items()}
    return [expected(v) for v in value] if isinstance(value, (list, tuple)) else value


@given(VALUES)
def test_json_is_strict(value):
    assert strictly(strict_json(value)) == expected(value)


@given(value=st.dictionaries(st.text(), VALUES))
def test_what_commands_and_pages_write_is_strict(value):
    assert strictly(as_script_data(value)) == expected(value)


def test_printed_json_is_strict(capsys):
    print_json({"a": math.nan, "b": [1.5, -math.inf]})
    assert strictly(capsys.readouterr().out) == {"a": None, "b": [1.5, None]}


@given(st.floats(-1e300, 1e300))
def test_perplexity_of_any_size(nats):
    assert perplexity(nats) == (math.inf if nats > 709.782712893384 else math.exp(nats))
    assert rise(nats) == pytest.approx(perplexity(nats) - 1, rel=1e-9, abs=1e-9)


def test_an_infinite_perplexity_is_said():
    result = summarize("static", 3.0, [DocumentScore(8000.0, 10, 30.0, 100.0)], 5)
    assert (result.perplexity, result.nll_mean) == (math.inf, 800.0)
    assert figure(result.perplexity) == "inf (beyond floats)"
    found = strictly(strict_json(result.as_json()))
    assert (found["perplexity"], found["nll_mean"]) == (None, 800.0)
    assert "beyond floats" in found["perplexity_is"]


def test_a_finite_figure_has_no_further_field():
    assert field("perplexity", 2.5) == {"perplexity": 2.5}
    assert figure(2.5) == "2.500"
