"""Drafts change how long a text takes, and nothing else."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
from cpu_cases import needs_library, options_of

from dpllm import reference
from dpllm.base.errors import InputError
from dpllm.context.build import build_context
from dpllm.context.options import ContextOptions
from dpllm.decode.continuation import read_prompt
from dpllm.decode.cpu_step import NativeStep
from dpllm.decode.options import GenerateOptions
from dpllm.decode.sampling import Sampler, SamplingOptions
from dpllm.decode.speculation.continuation import SpeculativeContinuation
from dpllm.decode.speculation.draft_length import DraftLengths
from dpllm.decode.speculation.drafts import LAG, SelfDraft
from dpllm.kvzip_bridge.budget import Budget
from dpllm.model.loading import LoadOptions
from dpllm.opening import open_engine

pytestmark = needs_library

PROMPT = "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self"
MODES = [("self", 2), ("self", 3), ("self", 5), ("lookup", None)]


@pytest.fixture(scope="module")
def engine():
    """The bundled reference model: it has something to say, and its drafts are sometimes right."""
    return open_engine(
        target_bits=6, policy="uniform", options=LoadOptions(cpu=options_of(accuracy="balanced"))
    )


@pytest.fixture(autouse=True)
def at_six_bits(engine):
    engine.set_policy("uniform", 6)
    engine._draft_choice.known.clear()


def ticking():
    """A clock for which every pass takes as long: drafts are as cheap as can be."""
    return itertools.count(0.0, 1.0).__next__


@pytest.fixture
def toiling(monkeypatch):
    """A maker of clocks of a machine for which each token is as much work as the next, drafted or checked: nothing
    pays."""
    work, several = [0.0], NativeStep.several

    def counted(self, tokens, *args):
        work[0] += len(tokens)
        return several(self, tokens, *args)

    monkeypatch.setattr(NativeStep, "several", counted)
    return lambda: lambda: work[0]


def options(mode="self", draft_bits=None, n=80, **more) -> GenerateOptions:
    return GenerateOptions(n, speculate=mode, draft_bits=draft_bits, **more)


class Last:
    """The tally of the last generation of `begin`."""

    tally = None


def begin(engine, chosen, *, prompt=PROMPT, clock=None, **more):
    """A generation, whose tally is Last.tally from now on."""
    generation = engine.generate_with(prompt, chosen, clock=clock or ticking(), **more)
    Last.tally = generation.tally
    return generation


def said(engine, *args, prompt=PROMPT, clock=ticking, **more):
    """(tokens, widths) of a generation."""
    steps = list(begin(engine, options(*args, **more), prompt=prompt, clock=clock()))
    return [s.token for s in steps], [tuple(s.bits) for s in steps]


# -- the same text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "target"), [("uniform", 6), ("uniform", 4), ("static", 3.3)])
@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.9, "seed": 5}, {"temperature": 1.2, "top_p": 0.8, "seed": 7}]
)
def test_the_text_is_that_of_plain_decoding(engine, policy, target, sampling):
    """Token for token and width for width, under fixed widths."""
    engine.set_policy(policy, target)
    plain = said(engine, "off", **sampling)
    assert Last.tally.checks == 0
    for mode, bits in MODES:
        assert said(engine, mode, bits, **sampling) == plain
        tally = Last.tally
        assert tally.accepted > 0, (mode, bits)
        assert tally.rejected > 0 or not sampling or bits == 5, "at 5 bits all may be right"
        assert tally.drafted >= tally.accepted + tally.rejected
        assert 1 + tally.plain + tally.checks + tally.accepted == len(plain[0])


@pytest.mark.parametrize("target", [3.5, 5.0])
def test_what_a_dynamic_policy_reads_does_not_depend_on_drafts(engine, toiling, target):
    """Greedy and sampled: whatever was drafted, however much, and where passes began and ended."""
    for sampling in ({}, {"temperature": 1.0, "seed": 2}):
        engine.set_policy("rate-distortion", target)
        expected = delayed(engine, **sampling)
        assert len(set(expected[1])) > 20
        for mode, bits in MODES:
            for clock in (ticking, toiling):
                assert said(engine, mode, bits, clock=clock, **sampling) == expected
    assert said(engine, "off", **sampling)[1] != expected[1], "where nothing is drafted, nothing is delayed"


def delayed(engine, n=80, temperature=0.0, seed=0):
    """Plain decoding with the policy that speculation uses: step by step, by hand."""
    decoder, policy = engine.decoder, engine.policy.begin_text()
    policy.delay(LAG)
    ids, cache = engine.prompts.prompt_ids(PROMPT), decoder.new_cache(200)
    tokens, widths = [], [()]
    draw = Sampler(SamplingOptions(temperature=temperature, seed=seed), decoder.backend.cpu)
    step, stepped = NativeStep.of(decoder), read_prompt(decoder, ids, cache)
    while True:
        tokens.append(draw(stepped.logits[-1]))
        if len(tokens) == n or tokens[-1] in decoder.config.eos_ids:
            return tokens, widths
        if stepped.bits is None:  # the prompt's
            policy.learn(stepped.logits, torch.tensor([tokens[-1]]))
        else:
            step.learn(policy, stepped, tokens[-1])
        stepped = step(tokens[-1], cache, policy)
        widths.append(tuple(stepped.bits[0].tolist()))


def test_a_delayed_policy_is_on_target(engine):
    engine.set_policy("rate-distortion", 4.0)
    for prompt in ("import os\n", PROMPT, "def main(argv):\n"):
        sampling = {"temperature": 1.0, "seed": 1, "n": 200}
        steps = list(begin(engine, options("self", 2, **sampling), prompt=prompt))[1:]
        assert len(steps) > 150
        assert sum(s.effective_bits for s in steps) / len(steps) == pytest.approx(4.0, abs=0.15)


def test_elsewhere_than_on_the_native_kernels():
    """Drafts are checked by the decoder; the tokens are the same but for ties."""
    engine = open_engine(target_bits=6, policy="uniform", options=LoadOptions(backend="reference"))
    for policy in ("uniform", "rate-distortion"):
        engine.set_policy(policy, 6)
        plain = said(engine, "off", n=24)
        for mode in ("self", "lookup"):
            assert said(engine, mode, n=24) == plain
            assert Last.tally.accepted > 0
        assert said(engine, "auto", n=24) == plain
        assert Last.tally.checks == 0


def test_a_model_that_was_never_quantised():
    engine = open_engine(reference.model_path())
    plain = said(engine, "off", n=40)
    assert said(engine, "lookup", n=40) == plain
    assert Last.tally.accepted > 0
    with pytest.raises(InputError, match="not quantised, so it holds no draft"):
        said(engine, "self")


# -- where texts end ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(1, 13))
def test_as_many_tokens_as_asked_for(engine, n):
    for mode in ("self", "lookup"):
        for _ in range(2):  # the second time, drafts are known to pay from the start
            assert len(said(engine, mode, n=n)[0]) == n


def test_stop_strings_and_ends_inside_a_run(engine):
    text = "".join(s.text for s in engine.generate_with(PROMPT, options("off")))
    for stop in (text[20:23], text[41:42], text[60:66]):
        plain = list(engine.generate_with(PROMPT, options("off", stop=(stop,))))
        for mode, bits in MODES:
            steps = list(begin(engine, options(mode, bits, stop=(stop,))))
            assert [(s.token, s.text) for s in steps] == [(s.token, s.text) for s in plain]


def test_an_end_of_text_inside_a_run(engine, monkeypatch):
    plain = said(engine, "off")[0]
    for end in sorted(set(plain[10:60]))[:8]:
        ends = replace(engine.decoder.config, eos_ids=(end,))
        monkeypatch.setattr(engine.decoder, "config", ends)
        expected = plain[: plain.index(end) + 1]
        for mode, bits in MODES:
            assert said(engine, mode, bits)[0] == expected


def test_time_and_bytes_are_shared_out(engine):
    """Nothing is lost, wherever a text ends."""
    text = "".join(s.text for s in engine.generate_with(PROMPT, options("off")))
    draft = SelfDraft(engine.decoder, 3, engine.new_step())
    everything = engine.decoder.bytes_for(6) + engine.decoder.head_bytes()  # what a prompt reads
    for stop in ((), (text[30:34],), (text[52:54],)):
        now = ticking()
        clocked = []

        def clock(now=now, clocked=clocked):
            clocked.append(now())
            return clocked[-1]

        steps = list(begin(engine, options("self", 3, stop=stop), clock=clock))
        tally = Last.tally
        passes = 1 + tally.plain + tally.checks  # the prompt's, too
        read = sum(s.weight_bytes for s in steps)
        assert read == pytest.approx(passes * everything + tally.drafted * draft.nbytes, abs=len(steps))
        gaps = len(steps) - 1  # a tick between two steps belongs to the caller
        assert sum(s.ms for s in steps) == pytest.approx(1e3 * (clocked[-1] - gaps))
        assert {s.effective_bits for s in steps} == {6.0}
        assert all(s.ms > 0 for s in steps)


# -- callers that do what callers do ------------------------------------------------------------------------


def test_retargeting_inside_a_run(engine):
    """From the very next token, and the tokens are those of plain decoding retargeted at the same place."""

    def run(mode, bits=None, **more):
        engine.set_policy("uniform", 6)
        found = []
        for step in begin(engine, options(mode, bits, n=40, **more)):
            found.append((step.token, step.effective_bits))
            if len(found) in (10, 23, 24):
                engine.set_policy("uniform", {10: 3, 23: 5, 24: 6}[len(found)])
        return found

    for sampling in ({}, {"temperature": 1.0, "seed": 3}):
        plain = run("off", **sampling)
        assert [round(b) for _, b in plain] == [6] * 10 + [3] * 13 + [5] + [6] * 16
        for mode, bits in MODES:
            assert run(mode, bits, **sampling) == plain
            assert Last.tally.checks > 0
            assert Last.tally.accepted > 0 or sampling


def test_a_policy_that_takes_one_token_at_a_time_may_follow(engine):
    steps = begin(engine, options("self", n=30))
    for _ in range(8):
        next(steps)
    before = Last.tally.checks
    engine.set_policy("random", 3.5)
    assert len(list(steps)) == 22
    assert before > 0 and Last.tally.checks == before


def test_generators_take_turns(engine):
    prompts = (PROMPT, "import os\nimport sys\n")
    for policy, target in (("uniform", 6), ("rate-distortion", 4.5)):
        engine.set_policy(policy, target)
        for mode in ("self", "lookup", "off"):
            alone = [said(engine, mode, n=40, prompt=p) for p in prompts]
            both = [begin(engine, options(mode, n=40), prompt=p) for p in prompts]
            turns = [(s.token, tuple(s.bits)) for pair in zip(*both, strict=True) for s in pair]
            for i in (0, 1):
                assert turns[i::2] == list(zip(*alone[i], strict=True))


@pytest.mark.parametrize("mode", ["self", "lookup"])
def test_a_context_is_as_it_was(engine, heldout_documents, mode):
    """Asked, asked by a caller who walks away, kept and gone on with."""

    def conversation(mode):
        text = heldout_documents[0][:1500]
        context = build_context(
            text,
            ContextOptions(Budget(keep_ratio=0.5), chunk=64),
            decoder=engine.decoder,
            prompts=engine.prompts,
        )
        found = []
        for stop_after, keep in ((40, False), (7, False), (13, True), (40, False)):
            steps = begin(engine, options(mode, n=40), prompt="\n    return ", context=context, keep=keep)
            found.append([s.token for s in itertools.islice(steps, stop_after)])
            steps.close()
            found.append((context.cache.length, list(context.ids[-30:]), list(context.pending)))
            found.append([float(context.cache.run(3, h)[0].double().sum()) for h in (0, 1)])
        return found

    assert conversation(mode) == conversation("off")
    assert Last.tally.checks == 0
    conversation(mode)
    assert Last.tally.accepted > 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_while_drafting(engine, monkeypatch, error):
    """What the draft has written is no part of the text."""
    ids, cache = engine.prompts.prompt_ids(PROMPT), engine.decoder.new_cache(200)
    draft = SelfDraft(engine.decoder, 2, engine.new_step())
    ahead = SpeculativeContinuation(
        engine.decoder, engine.new_step(), cache, Sampler(),
        drafts=[draft], lengths=DraftLengths([8]), clock=ticking(),
    )  # fmt: skip
    tokens = ahead.tokens(ids, lambda text: engine.policy, 30)
    next(tokens), next(tokens)
    held = cache.length
    real, calls = draft._step, itertools.count()

    def failing(*args):
        if next(calls) == 2:
            raise error
        return real(*args)

    monkeypatch.setattr(draft, "_step", failing)
    with pytest.raises(error):
        list(tokens)
    assert cache.length == held
    ahead.drop()
    assert cache.length == held


# -- drafts -------------------------------------------------------------------------------------------------


def test_auto_is_for_high_quality_on_native_kernels(engine):
    for policy, target, expected in (
        ("uniform", 6, True), ("rate-distortion", 6, True), ("uniform", 5, False), ("random", 6, False),
    ):  # fmt: skip
        engine.set_policy(policy, target)
        assert list(begin(engine, GenerateOptions(40)))
        assert (Last.tally.checks > 0) == expected, (policy, target)


def test_what_does_not_pay_is_left_alone(engine, toiling):
    said(engine, "self", n=150, clock=toiling)
    assert 1 <= Last.tally.checks <= 6
    assert Last.tally.plain > 120


def test_what_earlier_texts_taught_is_remembered(engine):
    said(engine, "self", n=60)
    said(engine, "self", n=60)
    assert Last.tally.plain == 0, "no plain step is needed to begin with"


# -- what cannot be -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"speculate": "yes"}, "Choose one of: auto, off, self, lookup"),
     ({"speculate": "lookup", "draft_bits": 3}, "makes none"), ({"speculate": "off", "draft_bits": 3}, "makes none")],
)  # fmt: skip
def test_impossible_options(wrong, says):
    with pytest.raises(InputError, match=says):
        GenerateOptions(**wrong)


@pytest.mark.parametrize("bits", [1, 7, 0])
def test_widths_that_are_not_resident(engine, bits):
    with pytest.raises(InputError, match=r"2\.\.6 are resident"):
        said(engine, "self", bits)


@pytest.mark.parametrize("policy", ["random", "oracle-rate-distortion"])
def test_policies_that_decide_one_token_at_a_time(engine, policy):
    engine.set_policy(policy, 3.5)
    for mode in ("self", "lookup"):
        with pytest.raises(InputError, match=f"'{policy}' decides one token at a time"):
            said(engine, mode)


# -- the command line ---------------------------------------------------------------------------------------


def test_generate_speculates(ok):
    def run(*args):
        return ok("generate", PROMPT, "--bits", "6", "--max-new-tokens", "60", *args)

    plain = json.loads(run("--speculate", "off", "--json").out.splitlines()[-1])
    assert plain["speculation"] == {
        "checks": 0, "plain_steps": 59, "acceptance_rate": None, "accepted_per_check": None, "k": None,
        "tokens_per_pass": 1.0,
    }  # fmt: skip
    for args in (("--speculate", "self", "--draft-bits", "2"), ("--speculate", "lookup"), ()):
        found = json.loads(run(*args, "--json").out.splitlines()[-1])
        assert found["text"] == plain["text"]
        drafts = found["speculation"]
        assert drafts["checks"] > 0
        assert 0 <= drafts["acceptance_rate"] <= 1
        assert drafts["tokens_per_pass"] >= 1
    shown = run("--speculate", "lookup")
    assert "of drafts accepted" in shown.err


@pytest.mark.parametrize(
    ("args", "says"),
    [(("--speculate", "maybe"), "auto, off, self, lookup"), (("--speculate", "self", "--draft-bits", "9"), "resident"),
     (("--draft-bits", "3", "--speculate", "off"), "makes none"),
     (("--policy", "random", "--target-bits", "3.5", "--speculate", "self"), "'random' decides one token")],
)  # fmt: skip
def test_generate_refuses(refused, args, says):
    refused("generate", PROMPT, *args, says=says)
