"""Drafts, and the tokens that are drawn with them: as likely as without."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import pytest
import torch
from cpu_cases import needs_library, options_of
from scipy.stats import chi2

from dpllm.decode.cpu_step import NativeStep
from dpllm.decode.sampling import Sampler, SamplingOptions
from dpllm.decode.speculation import continuation
from dpllm.decode.speculation.continuation import SpeculativeContinuation
from dpllm.decode.speculation.draft_length import DraftLengths
from dpllm.decode.speculation.drafts import PromptLookup, SelfDraft
from dpllm.decode.step import Stepped
from dpllm.model.loading import LoadOptions
from dpllm.model.random_models import random_decoder, shape
from dpllm.policies.fixed import StaticPolicy

pytestmark = needs_library


# -- lookup -------------------------------------------------------------------------------------------------


def test_lookup_finds_the_latest_of_the_longest_matches():
    def proposed(text, count=3):
        return PromptLookup().propose(text, count, None, None)

    assert proposed([1, 2, 3, 4, 9, 9, 1, 2, 3, 4]) == [9, 9, 1]
    assert proposed([1, 2, 7, 1, 2, 8, 1, 2]) == [8, 1, 2]  # the later one
    assert proposed([5, 1, 2, 7, 1, 2, 8, 5, 1, 2]) == [7, 1, 2]  # three match
    assert proposed([1, 2, 3, 4, 5]) == []
    assert proposed([4, 4, 4], 5) == [4]  # what is known of it
    assert proposed([1], 5) == proposed([], 5) == []


def test_lookup_goes_on_with_a_growing_text():
    lookup, text = PromptLookup(), []
    for token in torch.randint(0, 4, (300,), generator=torch.Generator().manual_seed(0)).tolist():
        text.append(token)
        assert lookup.propose(text, 5, None, None) == PromptLookup().propose(text, 5, None, None)


def drawing(seed: int) -> Sampler:
    return Sampler(SamplingOptions(temperature=1.0, seed=seed))


# -- sampling -----------------------------------------------------------------------------------------------

VOCABULARY = 6
LOOKED_UP = (1, 2, 3)


class Always(DraftLengths):
    """Drafts as much as it may, at any cost."""

    def plans(self, room):
        return [(0, min(3, room))] if room else []


@pytest.fixture(scope="module")
def tiny():
    """A random model of six tokens at 8 bits, whose 2-bit self is a poor draft."""
    config = replace(
        shape("tiny"), num_layers=2, hidden_size=64, intermediate_size=96, head_dim=16, vocab_size=VOCABULARY,
        windows=(None,) * 2, uses_rope=(True,) * 2, inv_freq=torch.ones(8),
    )  # fmt: skip
    decoder = random_decoder(config, 8, LoadOptions(cpu=options_of(accuracy="balanced")), seed=4)
    return decoder, NativeStep.of(decoder), StaticPolicy([8] * len(decoder.groups))


def probabilities(logits, temperature, top_p) -> torch.Tensor:
    p = (logits.double() / temperature).softmax(-1)
    ranked, order = p.sort(descending=True)
    ranked[ranked.cumsum(-1) - ranked >= top_p] = 0
    return torch.zeros_like(p).scatter_(0, order, ranked / ranked.sum())


def exact(tiny, temperature, top_p):
    """Probability of each sequence of three tokens after token 0."""
    decoder, step, policy = tiny
    found = torch.zeros((VOCABULARY,) * 3, dtype=torch.float64)
    for a, b in itertools.product(range(VOCABULARY), repeat=2):
        cache = decoder.new_cache(4)
        rows = [
            probabilities(step(t, cache, policy).logits[0].clone(), temperature, top_p) for t in (0, a, b)
        ]
        found[a, b] = rows[0][a] * rows[1][b] * rows[2]
    return found


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.7)])
@pytest.mark.parametrize("source", ["self", "lookup"])
def test_sampling_is_unbiased(tiny, monkeypatch, source, temperature, top_p):
    """Sequences of three tokens are as frequent as their probability says, drafts accepted or not."""
    decoder, step, policy = tiny
    # The first token, drawn from the prompt, is always 0.
    first = Stepped(torch.full((1, VOCABULARY), -1e9).index_fill(1, torch.tensor([0]), 0.0), None, 0, 0.0, 0)
    expected, draws = exact(tiny, temperature, top_p), 2500
    sampler = Sampler(SamplingOptions(temperature=temperature, top_p=top_p, seed=11), decoder.backend.cpu)
    counts = torch.zeros_like(expected)
    cache, own = decoder.new_cache(8), SelfDraft(decoder, 2, NativeStep.of(decoder))
    accepted = rejected = 0
    for _ in range(draws):
        cache.rewind(0)
        # Looked up: what followed 5, 0 in a text before.
        ahead = SpeculativeContinuation(
            decoder, step, cache, sampler, drafts=[own if source == "self" else PromptLookup()],
            lengths=Always([3]), clock=time.perf_counter, before=[5, 0, *LOOKED_UP, 5],
        )  # fmt: skip
        monkeypatch.setattr(continuation, "read_prompt", lambda *args: first)
        tokens = [d.token for d in itertools.islice(ahead.tokens([], lambda text: policy, 5), 4)][1:]
        ahead.drop()
        counts[tuple(tokens)] += 1
        accepted, rejected = accepted + ahead.tally.accepted, rejected + ahead.tally.rejected
    assert min(accepted, rejected) > 200
    assert counts[expected == 0].sum() == 0
    often = expected * draws >= 5
    found = torch.cat([counts[often], counts[~often].sum()[None]])
    wanted = torch.cat([expected[often], expected[~often].sum()[None]]) * draws
    keep = wanted > 0
    statistic = float(((found - wanted)[keep] ** 2 / wanted[keep]).sum())
    assert statistic < chi2.ppf(1 - 1e-4, int(keep.sum()) - 1)


def test_shared_clocks_accept_about_what_two_distributions_have_in_common(tiny):
    """Between (1 - d) / (1 + d) and 1 - d, at a total variation d."""
    decoder, step, policy = tiny
    draft, wide = (
        probabilities(step(0, decoder.new_cache(2), p).logits[0].clone(), 1.0, 1.0)
        for p in (StaticPolicy([2] * len(decoder.groups)), policy)
    )
    d = 0.5 * float((draft - wide).abs().sum())
    assert 0.05 < d < 0.9
    sampler = Sampler(SamplingOptions(temperature=1.0, seed=1), decoder.backend.cpu)
    agreed, draws = 0, 20_000
    for _ in range(draws):
        guess = sampler.twin()(draft.log())
        agreed += sampler(wide.log()) == guess
    margin = 4 * (0.25 / draws) ** 0.5
    assert (1 - d) / (1 + d) - margin < agreed / draws < 1 - d + margin


def test_a_sampler_goes_back():
    sampler, logits = drawing(0), torch.zeros(50)
    state = sampler.state()
    twin = sampler.twin()
    first = [sampler(logits) for _ in range(5)]
    assert [twin(logits) for _ in range(5)] == first
    sampler.go_back(state)
    assert [sampler(logits) for _ in range(5)] == first
