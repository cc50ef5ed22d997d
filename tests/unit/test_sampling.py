"""From logits to a token: the distribution, its limits, and the numbers of transformers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dpllm.decode.sampling import Sampler, SamplingOptions, drawn, penalised, probabilities


def sampler(seed: int = 0, **options) -> Sampler:
    return Sampler(SamplingOptions(**options), torch.Generator().manual_seed(seed))


def counts(logits, temperature, top_p, draws=20_000) -> torch.Tensor:
    draw = sampler(temperature=temperature, top_p=top_p)
    drawn = [draw(logits) for _ in range(draws)]
    return torch.bincount(torch.tensor(drawn), minlength=len(logits)).double()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampling_follows_the_softmax(temperature):
    logits = torch.tensor([2.0, 1.5, 1.0, 0.0, -0.5, 0.7, -1.0, 1.2])
    found = counts(logits, temperature, 1.0)
    expected = (logits.double() / temperature).softmax(0) * found.sum()
    assert ((found - expected) ** 2 / expected).sum() < 29.9  # chi-square, 7 degrees of freedom, 1 in 10,000


def test_nucleus_sampling_renormalises_what_it_keeps():
    p = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])
    found = counts(p.log(), 1.0, 0.7)
    kept = torch.tensor([0.0, 0.4, 0.0, 0.25, 0.2]).double()
    assert found[[0, 2]].sum() == 0
    expected = (kept / kept.sum() * found.sum())[[1, 3, 4]]
    assert ((found[[1, 3, 4]] - expected) ** 2 / expected).sum() < 18.4  # 2 degrees of freedom


LOGITS = st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=20)


@settings(max_examples=200, deadline=None)
@given(LOGITS, st.floats(0.05, 5), st.floats(0, 1, exclude_min=True), st.integers(0, 2**63 - 1))
def test_a_sampled_token_is_in_the_nucleus(values, temperature, top_p, seed):
    logits = torch.tensor(values)
    token = sampler(seed, temperature=temperature, top_p=top_p)(logits)
    p = (logits.double() / temperature).softmax(0)
    likelier = p[p > p[token]].sum()
    assert likelier < top_p + 1e-9, "the tokens before it did not fill the nucleus"


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-5, 1e30, float("inf")])
def test_extreme_temperatures(temperature):
    logits = torch.tensor([1.0, 3.0, 2.9, -1e4])
    drawn = {sampler(s, temperature=temperature)(logits) for s in range(40)}
    assert drawn == ({1} if temperature < 1 else {0, 1, 2, 3})


def test_greedy_draws_nothing():
    greedy = sampler()
    before = greedy.state()
    assert greedy(torch.tensor([0.0, 5.0, 1.0])) == 1 and greedy.state() == before


# -- beside transformers ------------------------------------------------------------------------------------

RANGES = {
    "repetition_penalty": st.floats(0.5, 2),
    "temperature": st.floats(0.1, 3),
    "top_k": st.integers(1, 25),
    "top_p": st.floats(0.05, 0.99),
    "min_p": st.floats(0.01, 0.9),
}


def by_transformers(logits, seen, options) -> torch.Tensor:
    """Probabilities [vocab] after the processors of transformers, in the order in which it applies them."""
    made = [
        (RepetitionPenaltyLogitsProcessor, "repetition_penalty"), (TemperatureLogitsWarper, "temperature"),
        (TopKLogitsWarper, "top_k"), (TopPLogitsWarper, "top_p"), (MinPLogitsWarper, "min_p"),
    ]  # fmt: skip
    scores = logits[None].double()
    for processor, name in made:
        if name in options:
            scores = processor(options[name])(torch.tensor([seen]), scores)
    return scores[0].softmax(-1)


def clear_of_limits(logits, seen, options) -> bool:
    """Whether rounding cannot decide which tokens stay: no two are equally likely, and none lies at a limit."""
    penalty = {k: v for k, v in options.items() if k == "repetition_penalty"}
    ranked = by_transformers(logits, seen, penalty).log().sort().values
    if (ranked.diff() < 1e-5).any():
        return False
    kept = []
    for factor in (1 - 1e-5, 1 + 1e-5):
        moved = {k: v * factor if k in ("top_p", "min_p") else v for k, v in options.items()}
        kept.append(by_transformers(logits, seen, moved) > 0)
    return torch.equal(*kept)


@pytest.mark.parametrize("names", [*([name] for name in RANGES), list(RANGES), None], ids=str)
@settings(max_examples=150, deadline=None)
@given(st.data(), st.lists(st.integers(-3000, 3000), min_size=2, max_size=20, unique=True))
def test_probabilities_are_those_of_transformers(names, data, values):
    """Each option alone, all of them (`list(RANGES)`), and any of them (None)."""
    logits = torch.tensor(values) / 100
    if names is None:
        names = data.draw(st.lists(st.sampled_from(list(RANGES)), unique=True))
    options = {name: data.draw(RANGES[name]) for name in names}
    seen = data.draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=5))
    assume(clear_of_limits(logits, seen, options))
    chosen = SamplingOptions(**{"temperature": 1.0} | options)
    own = penalised(logits, sorted(set(seen)), chosen.repetition_penalty)
    p = probabilities(own, chosen)
    expected = by_transformers(logits, seen, options)
    torch.testing.assert_close(p / p.sum(), expected, rtol=1e-4, atol=1e-6)


def test_the_penalty_counts_prompt_and_drawn_tokens():
    logits = torch.tensor([2.0, 1.9, 1.0, -1.0])
    draw = sampler(repetition_penalty=2.0)
    assert [draw(logits) for _ in range(3)] == [0, 1, 0], "0 and 1 are halved once, not every time"
    read = sampler(repetition_penalty=2.0)
    read.read([0, 1])
    assert read(logits) == 0 and penalised(logits, [0, 3], 2.0).tolist() == [
        1.0,
        pytest.approx(1.9),
        1.0,
        -2.0,
    ]


def test_going_back_takes_drawn_tokens_out_of_the_penalty():
    logits = torch.randn(30, generator=torch.Generator().manual_seed(0))
    draw = sampler(3, temperature=1.0, repetition_penalty=3.0)
    draw.read([4, 5])
    state = draw.state()
    first = [draw(logits) for _ in range(8)]
    draw.go_back(state)
    assert [draw(logits) for _ in range(8)] == first
    assert len(set(first)) > 4


def test_a_twin_draws_the_same_and_takes_nothing_away():
    logits = torch.randn(30, generator=torch.Generator().manual_seed(0))
    likeliest = logits.topk(3).indices.tolist()
    draw, unread = (sampler(3, temperature=1.0, repetition_penalty=9.0) for _ in range(2))
    draw.read(likeliest)
    twin = draw.twin()
    drawn = [twin(logits) for _ in range(30)]
    assert [draw(logits) for _ in range(30)] == drawn
    assert [unread(logits) for _ in range(30)] != drawn, "the tokens that were read matter"


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.3}, {"top_k": 4, "top_p": 0.7}]
)
def test_drawn_on_a_device_follows_the_same_probabilities(options):
    logits = torch.tensor([0.3, 2.0, -1.0, 1.2, -0.4, 1.9, 0.9])
    chosen = SamplingOptions(temperature=0.8, **options)
    grid = (torch.arange(2000) + 0.5) / 2000
    found = torch.cat([drawn(logits, chosen, float(u)) for u in grid]).bincount(minlength=7) / 2000
    p = probabilities(logits, chosen)
    assert (found - p / p.sum()).abs().max() < 2e-3


def test_a_seed_repeats_and_none_follows_torchs():
    logits = torch.zeros(1000)
    assert sampler_of(seed=5)(logits) == sampler_of(seed=5)(logits)
    torch.manual_seed(1)
    first = sampler_of()(logits)
    torch.manual_seed(1)
    assert sampler_of()(logits) == first != sampler_of()(logits)


def sampler_of(**options) -> Sampler:
    return Sampler(SamplingOptions(temperature=1.0, **options))
