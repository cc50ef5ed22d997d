"""From logits to a token: the distribution, its limits, and the numbers of transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cpu_cases import ISAS, kernels_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dpllm.decode.sampling import Sampler, SamplingOptions, drawn, penalised, probabilities, uniform

# Who draws: torch, by the definition, or the native library with one of its instruction sets.
each_way = pytest.mark.parametrize("isa", [None, *ISAS], ids=lambda isa: isa or "definition")


def sampler(seed: int = 0, isa: str | None = None, **options) -> Sampler:
    kernels = None if isa is None else kernels_of(isa)
    return Sampler(SamplingOptions(seed=seed, **options), kernels)


def assert_drawn_as(p: torch.Tensor, tokens: list[int]) -> None:
    """Tokens are as frequent as their probabilities float64 [vocab] say, which need not add up to 1: chi-square."""
    found = torch.bincount(torch.tensor(tokens), minlength=len(p)).double()
    expected = p / p.sum() * len(tokens)
    assert found[expected == 0].sum() == 0, "a token that is dropped was drawn"
    often = expected >= 10
    cells = [(found[often], expected[often]), (found[~often].sum()[None], expected[~often].sum()[None])]
    statistic = sum(float(((f - e) ** 2 / e)[e > 0].sum()) for f, e in cells)
    freedom = int(often.sum()) - int(expected[~often].sum() == 0)
    assert statistic < chi2.ppf(1 - 1e-5, max(freedom, 1)), (statistic, freedom)


MODES = [
    {}, {"temperature": 0.4}, {"temperature": 2.0}, {"top_k": 7}, {"top_k": 300}, {"top_p": 0.9}, {"top_p": 0.3},
    {"min_p": 0.1}, {"top_k": 40, "top_p": 0.8}, {"top_p": 0.95, "min_p": 0.05},
    {"top_k": 60, "top_p": 0.9, "min_p": 0.02, "temperature": 0.8},
]  # fmt: skip


@pytest.mark.parametrize("isa", [None, *ISAS[:1]], ids=lambda isa: isa or "definition")
@pytest.mark.parametrize("options", MODES, ids=str)
@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_tokens_are_as_frequent_as_their_probabilities(isa, options, spread):
    """Nearly level logits, of which most tokens are kept, and logits with a few likely ones."""
    logits = torch.randn(700, generator=torch.Generator().manual_seed(3)) * spread
    chosen = SamplingOptions(**{"temperature": 1.0} | options)
    draw = sampler(5, isa, **{"temperature": 1.0} | options)
    assert_drawn_as(
        probabilities(logits, chosen), [draw(logits) for _ in range(1500 if isa is None else 20_000)]
    )


@each_way
def test_seeds_are_independent(isa):
    """First tokens of texts with seeds in a row, and tokens of one text, are as frequent as their probabilities."""
    logits = torch.tensor([2.0, 1.5, 1.0, 0.0, -0.5, 0.7, -1.0, 1.2])
    p = logits.double().softmax(0)
    first = [sampler(seed, isa, temperature=1.0)(logits) for seed in range(2000)]
    assert_drawn_as(p, first)
    pairs = torch.tensor(first[:-1]) * len(p) + torch.tensor(first[1:])
    assert_drawn_as((p[:, None] * p).flatten(), pairs.tolist())
    draw = sampler(0, isa, temperature=1.0)
    tokens = torch.tensor([draw(logits) for _ in range(2000)])
    assert_drawn_as((p[:, None] * p).flatten(), (tokens[:-1] * len(p) + tokens[1:]).tolist())


def test_random_numbers_are_threefrys():
    """The published values for 2 x 32 bits and 13 rounds, with no, with all and with some bits set."""
    ones = 2**32 - 1
    for token, number, low, high, expected in (
        (0, 0, 0, 0, 0x9D1C5EC68BD50731), (ones, ones, ones, ones, 0xFD36D0482D17272C),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xBA3E4725F27D669E),
    ):  # fmt: skip
        [found] = uniform(np.asarray([token], np.uint32), low | high << 32, number)
        assert found == (expected + 0.5) * 2.0**-64


# -- native ------------------------------------------------------------------------------------------------------


@st.composite
def cases(draw):
    """Logits of many shapes, with levels and tokens that are ruled out, and any options."""
    n = draw(st.sampled_from([1, 2, 15, 16, 17, 100, 1000, 5000]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    values = rng.normal(size=n) * draw(st.sampled_from([0.0, 0.01, 1.0, 5.0, 30.0]))
    if draw(st.booleans()):
        values = np.round(values)  # many are level
    if draw(st.booleans()):
        values[rng.random(n) < draw(st.sampled_from([0.01, 0.9]))] = -np.inf
    values[0] = max(values[0], 0.0)
    options = {
        "temperature": draw(st.sampled_from([0.0, 0.05, 0.7, 1.0, 3.0, 1e30])),
        "top_k": draw(st.sampled_from([0, 0, 1, 3, 50, 600])),
        "top_p": draw(st.sampled_from([1.0, 0.99, 0.6, 0.05])), "min_p": draw(st.sampled_from([0.0, 0.0, 0.02, 1.0])),
        "repetition_penalty": draw(st.sampled_from([1.0, 1.3])), "seed": draw(st.integers(0, 2**64 - 1)),
    }  # fmt: skip
    read = draw(st.lists(st.integers(0, n - 1), max_size=5))
    return torch.tensor(values, dtype=torch.float32), options, read


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=150, deadline=None)
@given(cases())
def test_native_draws_are_the_definitions(isa, case):
    logits, options, read = case
    one, other = (Sampler(SamplingOptions(**options), k) for k in (kernels_of(isa), None))
    one.read(read)
    other.read(read)
    native = [one(logits) for _ in range(4)]
    defined = [other(logits) for _ in range(4)]
    if (
        native != defined
    ):  # sums in another order may decide otherwise about a token at the very limit of top-p
        moved = [
            Sampler(SamplingOptions(**options | {"top_p": options["top_p"] * f}))
            for f in (1 - 1e-5, 1 + 1e-5)
        ]
        assert options["top_p"] < 1 and options["temperature"] > 0
        for near in moved:
            near.read(read)
        assert native in [[near(logits) for _ in range(4)] for near in moved]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "options", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.2}, {"temperature": 0.0}], ids=str
)
def test_logits_that_are_no_numbers_do_no_harm(isa, bad, options):
    """Those that are not numbers are never drawn while others are there, and there is a token whatever happens."""
    chosen = {"temperature": 1.0} | options
    logits = torch.randn(100, generator=torch.Generator().manual_seed(0))
    logits[10:90] = bad
    drawn = {sampler(seed, isa, **chosen)(logits) for seed in range(30)}
    if bad == torch.inf:
        assert drawn == {10}
    else:
        assert all(t < 10 or t >= 90 for t in drawn)
    assert sampler(0, isa, **chosen)(torch.full((100,), bad)) == 0


@pytest.mark.parametrize("isa", ISAS)
def test_logits_of_another_shape_are_refused(isa):
    with pytest.raises(ValueError, match="one row"):
        sampler(0, isa)(torch.zeros(2, 5))


LOGITS = st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=20)


@each_way
@settings(max_examples=60, deadline=None)
@given(LOGITS, st.floats(0.05, 5), st.floats(0, 1, exclude_min=True), st.integers(0, 2**63 - 1))
def test_a_sampled_token_is_in_the_nucleus(isa, values, temperature, top_p, seed):
    logits = torch.tensor(values)
    token = sampler(seed, isa, temperature=temperature, top_p=top_p)(logits)
    p = (logits.double() / temperature).softmax(0)
    likelier = p[p > p[token]].sum()
    assert likelier < top_p + 1e-9, "the tokens before it did not fill the nucleus"


@each_way
@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-5, 1e30, float("inf")])
def test_extreme_temperatures(isa, temperature):
    logits = torch.tensor([1.0, 3.0, 2.9, -1e4])
    drawn = {sampler(s, isa, temperature=temperature)(logits) for s in range(40)}
    assert drawn == ({1} if temperature < 1 else {0, 1, 2, 3})


@each_way
def test_greedy_takes_the_first_of_the_largest(isa):
    assert sampler(0, isa)(torch.tensor([0.0, 5.0, 1.0, 5.0])) == 1


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


TIES = st.lists(st.integers(-2, 2), min_size=2, max_size=16)  # of more, torch sorts level ones in no order


@each_way
@settings(max_examples=60, deadline=None)
@given(TIES, st.sampled_from([{"top_k": 3}, {"top_p": 0.31}, {"top_k": 9, "top_p": 0.77}, {"min_p": 0.3}]))
def test_level_tokens_are_dropped_as_transformers_drops_them(isa, values, options):
    """Many are equally likely; no limit lies at a sum of some of them, so that rounding decides nothing."""
    logits = torch.tensor(values, dtype=torch.float32)
    assume(clear_of_rounding(logits, options))
    kept = by_transformers(logits, [0], options) > 0
    assert torch.equal(probabilities(logits, SamplingOptions(temperature=1.0, **options)) > 0, kept)
    drawn = {sampler(seed, isa, temperature=1.0, **options)(logits) for seed in range(20)}
    assert kept[list(drawn)].all()


def clear_of_rounding(logits, options) -> bool:
    """Whether a limit that is a little higher or lower keeps the same number of tokens."""
    kept = []
    for factor in (1 - 1e-5, 1 + 1e-5):
        moved = {k: v * factor if k in ("top_p", "min_p") else v for k, v in options.items()}
        kept.append(int((by_transformers(logits, [0], moved) > 0).sum()))
    return kept[0] == kept[1]


@each_way
def test_the_penalty_counts_prompt_and_drawn_tokens(isa):
    logits = torch.tensor([2.0, 1.9, 1.0, -1.0])
    draw = sampler(0, isa, repetition_penalty=2.0)
    assert [draw(logits) for _ in range(3)] == [0, 1, 0], "0 and 1 are halved once, not every time"
    read = sampler(0, isa, repetition_penalty=2.0)
    read.read([0, 1])
    assert read(logits) == 0 and penalised(logits, [0, 3], 2.0).tolist() == [
        1.0,
        pytest.approx(1.9),
        1.0,
        -2.0,
    ]


@each_way
def test_going_back_takes_drawn_tokens_out_of_the_penalty(isa):
    logits = torch.randn(30, generator=torch.Generator().manual_seed(0))
    draw = sampler(3, isa, temperature=1.0, repetition_penalty=3.0)
    draw.read([4, 5])
    state = draw.state()
    first = [draw(logits) for _ in range(8)]
    draw.go_back(state)
    assert [draw(logits) for _ in range(8)] == first
    assert len(set(first)) > 4


@each_way
def test_a_twin_draws_the_same_and_takes_nothing_away(isa):
    logits = torch.randn(30, generator=torch.Generator().manual_seed(0))
    likeliest = logits.topk(3).indices.tolist()
    draw, unread = (sampler(3, isa, temperature=1.0, repetition_penalty=9.0) for _ in range(2))
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
