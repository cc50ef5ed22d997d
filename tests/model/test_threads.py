"""Several texts at once through one engine: in threads, and in turns in one thread."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import dpllm
from dpllm.opening import open_engine

PROMPTS = ["import os\n", "def main():\n", "class Stack:\n", "for i in range(", "try:\n", "x = ["]
NEW = 24


def tokens(engine, prompt: str, **options) -> list[int]:
    return [step.token for step in engine.generate(prompt, max_new_tokens=NEW, **options)]


@pytest.fixture(scope="module", params=[None, "reference"])
def engine(request, tiny_overlay):
    from dpllm.model.loading import LoadOptions

    return open_engine(tiny_overlay, options=LoadOptions(backend=request.param))


CASES = {
    "chosen widths": ("rate-distortion", 3.3, {}),
    "one width": ("uniform", 4.0, {}),
    "sampled": ("rate-distortion", 3.3, {"temperature": 1.0, "seed": 4}),
    "estimates of DP-LLM": ("dp-llm", 3.25, {}),
    "drafts": ("uniform", 6.0, {"speculate": "self", "draft_bits": 2}),
    "penalised": ("static", 3.3, {"repetition_penalty": 1.3}),
}


@pytest.mark.parametrize("case", CASES)
def test_threads_get_what_they_get_alone(engine, case):
    name, bits, options = CASES[case]
    engine.set_policy(name, bits)
    alone = [tokens(engine, p, **options) for p in PROMPTS]
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        for _ in range(3):
            together = list(pool.map(lambda p: tokens(engine, p, **options), PROMPTS))
            assert together == alone
    assert len(set(map(tuple, alone))) > 1, "the prompts must matter"


def test_texts_take_turns_in_one_thread(engine):
    engine.set_policy("rate-distortion", 3.3)
    alone = [tokens(engine, p) for p in PROMPTS]
    running = [iter(engine.generate(p, max_new_tokens=NEW)) for p in PROMPTS]
    found: list[list[int]] = [[] for _ in PROMPTS]
    while any(len(f) < len(a) for f, a in zip(found, alone, strict=True)):
        for steps, f in zip(running, found, strict=True):
            if (step := next(steps, None)) is not None:
                f.append(step.token)
    assert found == alone


def test_a_budget_is_that_of_each_text(engine):
    engine.hold_budget(3.0)
    most = engine.decoder.bytes_for(3.0)

    def read(prompt: str) -> int:
        steps = list(engine.generate(prompt, max_new_tokens=NEW))[1:]
        per_group = [g.bytes_at for g in engine.decoder.groups]
        seed = engine.decoder.groups[0].seed_bits
        return sum(per_group[g][b - seed] for s in steps for g, b in enumerate(s.bits)) // max(1, len(steps))

    with ThreadPoolExecutor(3) as pool:
        for spent in pool.map(read, PROMPTS[:3]):
            assert spent <= most * (1 + 1 / (NEW - 1))


def test_targets_change_while_others_decode(engine):
    """Every text runs to its end, whatever widths it read."""
    engine.set_policy("rate-distortion", 3.0)
    done = threading.Event()

    def retarget() -> None:
        turn = 0
        while not done.is_set():
            engine.set_target(target_bits=2.5 + turn % 3)
            turn += 1

    other = threading.Thread(target=retarget)
    other.start()
    try:
        with ThreadPoolExecutor(3) as pool:
            for found in pool.map(lambda p: tokens(engine, p), PROMPTS[:3]):
                assert 0 < len(found) <= NEW
    finally:
        done.set()
        other.join()


def test_a_context_answers_two_questions_in_turns(tiny_overlay):
    engine = dpllm.load(tiny_overlay)
    context = engine.read("import os\nimport sys\n" * 10, keep=0.5)
    alone = [tokens(engine, p, context=context) for p in PROMPTS[:2]]
    first, second = (engine.generate(p, context=context, max_new_tokens=NEW) for p in PROMPTS[:2])
    length, nbytes = context.cache.length, context.cache.nbytes
    found = [[step.token for step in pair] for pair in zip(*zip(first, second, strict=True), strict=True)]
    assert found == alone
    assert (context.cache.length, context.cache.nbytes) == (length, nbytes)
