"""Objects that several threads share: contexts, generations, conversations, targets, and engines that go away."""

from __future__ import annotations

import asyncio
import copy
import gc
import multiprocessing
import pickle
import signal
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import pytest

import dpllm
from dpllm import InputError
from dpllm.control.controller import LatencyController
from dpllm.control.cost_model import CostModel
from dpllm.conversation import Conversation
from dpllm.decode.options import GenerateOptions
from dpllm.policies.base import PrecisionPolicy, TextPolicy
from dpllm.policies.token_limit import WidthCosts

QUESTIONS = ["import os\n", "def main():\n", "class Stack:\n", "for i in range(", "try:\n", "x = ["]
NEW = 12


@pytest.fixture
def impatient():
    """Threads change as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def engine(tiny_overlay):
    return dpllm.load(tiny_overlay, target_bits=3.3)


@pytest.fixture
def context(engine):
    return engine.read("import os\nimport sys\n" * 10, keep=0.5)


def tokens(generation) -> list[int]:
    return [step.token for step in generation]


def together(work, items) -> list:
    """work(item) of every item at once, each in a thread of its own."""
    begin = threading.Barrier(len(items))

    def one(item):
        begin.wait()
        return work(item)

    with ThreadPoolExecutor(len(items)) as pool:
        return list(pool.map(one, items))


def state(context) -> tuple:
    cache = context.cache
    pairs = [cache.run(i, h)[0].clone() for i in range(len(cache.k)) for h in range(len(cache.kept[i]))]
    return context.ids.copy(), context.pending.copy(), cache.length, [p.tolist() for p in pairs]


def cost_of(engine) -> CostModel:
    return CostModel(
        "cpu", "", 6.0, bits=(2.0, 4.0, 6.0), weights_ms=(1.0, 2.0, 4.0), pairs=(0.0, 1e6), attention_ms=(0.0, 1.0),
        plane_ms=(1.0,) * 4,
    )  # fmt: skip


@pytest.mark.parametrize("speculate", ["off", "lookup"])
def test_threads_ask_one_context(engine, context, speculate, impatient):
    def ask(question):
        return tokens(engine.generate(question, context=context, max_new_tokens=NEW, speculate=speculate))

    engine.set_target(bits=4)
    alone, before = [ask(q) for q in QUESTIONS], state(context)
    for _ in range(3):
        assert together(ask, QUESTIONS) == alone
    assert state(context) == before


def test_a_kept_turn_has_the_context_for_itself(engine, context):
    kept = engine.generate("def", context=context, keep=True, max_new_tokens=4)
    next(kept)
    with pytest.raises(InputError, match="still being answered"):
        next(engine.generate("class", context=context, keep=True, max_new_tokens=4))
    with pytest.raises(InputError, match="still being answered"):
        engine.prune(context)
    meanwhile = tokens(engine.generate("class", context=context, max_new_tokens=4))
    late = engine.generate("class", context=context, max_new_tokens=4)
    kept.close()
    with pytest.raises(InputError, match="has changed since"):
        next(late)
    assert len(meanwhile) == 4 and len(context.ids) == context.cache.length


def test_threads_that_keep_turns_are_refused_or_kept_whole(engine, context, impatient):
    def ask(question):
        try:
            return question, tokens(engine.generate(question, context=context, keep=True, max_new_tokens=3))
        except InputError:
            return question, None

    read, outcomes = len(context.ids), together(ask, QUESTIONS)
    said = [*context.ids, *context.pending][read:]
    assert len(context.ids) == context.cache.length
    kept = [(engine.prompts.plain_ids(question), answer) for question, answer in outcomes if answer]
    assert kept
    assert sum(len(q) + len(a) for q, a in kept) == len(said)


@pytest.mark.parametrize("speculate", ["off", "lookup"])
def test_threads_share_one_generation(engine, speculate, impatient):
    engine.set_target(bits=6)
    alone = tokens(engine.generate(QUESTIONS[0], max_new_tokens=40, speculate=speculate))
    shared = engine.generate(QUESTIONS[0], max_new_tokens=40, speculate=speculate)
    parts = together(lambda _: tokens(shared), range(4))
    assert sorted(chain.from_iterable(parts)) == sorted(alone)
    assert [step.token for step in shared.steps] == alone


def test_a_generation_is_closed_by_another_thread(engine, context, impatient):
    for _ in range(5):
        shared = engine.generate(QUESTIONS[0], context=context, max_new_tokens=200)
        reader = threading.Thread(target=tokens, args=(shared,))
        reader.start()
        while not shared.steps:
            pass
        shared.close()
        reader.join()
        assert len(context.ids) == context.cache.length
    assert len(tokens(engine.generate("a", context=context, keep=True, max_new_tokens=2))) == 2


def test_threads_share_a_conversation(engine, impatient):
    conversation = Conversation(engine, GenerateOptions(max_new_tokens=4), plain=True)

    def say(message):
        for _ in range(3):
            tokens(conversation.say(message))

    together(say, QUESTIONS)
    said, context = conversation.messages, conversation.context
    assert [m["role"] for m in said] == ["user", "assistant"] * (len(said) // 2)
    assert {m["content"] for m in said[::2]} <= set(QUESTIONS)
    assert len(context.ids) == context.cache.length
    conversation.reset()
    assert context.cache.length == 0 and not conversation.messages


def test_every_kind_of_target_changes_while_others_decode(engine, impatient):
    cost = cost_of(engine)
    changes = [
        partial(engine.set_target, bits=4),
        partial(engine.set_target, target_bits=2.5),
        partial(engine.hold_budget, 3.0),
        partial(engine.hold_latency, 1.0, cost),
        partial(engine.hold_latency, 2.0, cost),
        partial(engine.set_policy, "dp-llm", 3.25),
        partial(engine.set_policy, "random", 4.0),
    ]
    done = threading.Event()

    def retarget():
        while not done.is_set():
            for change in changes:
                change()

    def read(question):
        generation = engine.generate(question, max_new_tokens=40)
        tokens(generation)
        return generation.stopped_by

    others = [ThreadPoolExecutor(1) for _ in range(2)]
    changing = [other.submit(retarget) for other in others]
    try:
        assert set(together(read, QUESTIONS[:3])) <= {"max_new_tokens", "end token"}
    finally:
        done.set()
        for future in changing:
            future.result()  # raises what the thread raised


class Interrupted(float):
    """Bits that another thread's `retarget` comes between, where it is let in."""

    def __sub__(self, other):
        self.other.start()
        self.other.join(0.2)
        return 0.0


def test_an_order_is_made_for_one_target(engine):
    @dataclass(frozen=True)
    class Slow(CostModel):
        def bits_for(self, ms: float, pairs: float = 0.0) -> float:
            bits = Interrupted(3.0)
            bits.other = threading.Thread(target=controller.retarget, args=(2.0,))
            return bits

    cost = Slow(**vars(cost_of(engine)))
    controller = LatencyController(
        cost, 2.0, WidthCosts.in_nanoseconds(engine.decoder.groups, 1.0, cost.plane_ms)
    )
    for _ in range(2):  # the second order compares with the first
        assert controller.order(0.0).bits == 3.0


class Failing(PrecisionPolicy, TextPolicy):
    """Raises at the third token."""

    name = "failing"

    def begin_text(self) -> Failing:
        text = Failing()
        text.left = 2
        return text

    def __call__(self, group, x):
        if group.index == 0:
            self.left -= 1
        if self.left < 0:
            raise RuntimeError("this policy fails")
        return x.new_full((len(x),), group.resident_bits, dtype=int).int()


def test_an_error_in_one_thread_leaves_the_others_alone(tiny_overlay, engine):
    alone = [tokens(engine.generate(q, max_new_tokens=NEW)) for q in QUESTIONS]
    good, bad = engine.policy, Failing()

    def ask(question):
        if question is not QUESTIONS[0]:
            return tokens(engine.generate(question, max_new_tokens=NEW))
        with pytest.raises(RuntimeError, match="this policy fails"):
            list(engine.decode_after(0, NEW, bad))
        return alone[0]

    assert together(ask, QUESTIONS) == alone
    assert engine.policy is good


def test_an_engine_may_go_while_its_text_is_generated(tiny_overlay):
    threads = Path("/proc/self/task")
    before = len(list(threads.iterdir())) if threads.exists() else 0
    engine = dpllm.load(tiny_overlay, target_bits=3.3, threads=1)
    alone = tokens(engine.generate(QUESTIONS[0], max_new_tokens=NEW))
    handle = weakref.ref(engine.decoder.backend.cpu.handle) if engine.decoder.backend.cpu else None
    generations = [engine.generate(QUESTIONS[0], max_new_tokens=NEW) for _ in range(4)]
    abandoned = engine.generate(QUESTIONS[1], max_new_tokens=NEW)
    next(abandoned)
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(tokens, g) for g in generations]
        del engine, generations, abandoned
        gc.collect()
        assert [future.result() for future in running] == [alone] * 4
    del running
    gc.collect()
    assert handle is None or handle() is None, "the library's threads are freed with the last text"
    assert not before or len(list(threads.iterdir())) <= before


def test_texts_are_generated_by_tasks_of_asyncio(engine):
    def ask(question):
        return engine.generate(question, max_new_tokens=NEW).text

    async def all_of_them():
        return await asyncio.gather(*(asyncio.to_thread(ask, q) for q in QUESTIONS))

    assert asyncio.run(all_of_them()) == [ask(q) for q in QUESTIONS]


def test_an_interrupt_leaves_another_threads_text_whole(engine):
    """Ctrl-C reaches the main thread, while another one is in the library."""
    alone = tokens(engine.generate(QUESTIONS[0], max_new_tokens=60))
    shared = engine.generate(QUESTIONS[0], max_new_tokens=60)

    def read():
        for n, _ in enumerate(shared):
            if n == 5:
                signal.raise_signal(signal.SIGINT)

    reader = threading.Thread(target=read)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # tests in the background inherit that it is ignored
    with pytest.raises(KeyboardInterrupt):
        reader.start()
        reader.join(60)
        reader.join(1)
    reader.join()
    assert [step.token for step in shared.steps] == alone
    assert tokens(engine.generate(QUESTIONS[0], max_new_tokens=60)) == alone


@pytest.mark.parametrize("send", [pickle.dumps, copy.deepcopy, "spawn"])
def test_what_cannot_be_sent_to_a_process_says_so(engine, context, send):
    if send == "spawn":

        def send(thing):
            multiprocessing.get_context("spawn").Process(target=print, args=(thing,)).start()

    conversation = Conversation(engine, plain=True)
    for thing in (engine, context, engine.generate("a"), conversation):
        with pytest.raises(
            TypeError, match=rf"^{type(thing).__name__} cannot be pickled.*dpllm.load"
        ) as refusal:
            send(thing)
        assert "\n" not in str(refusal.value)
