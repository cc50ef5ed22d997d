"""One document of kv_quality.py: read once, pruned by every policy to every ratio, asked everything."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor

from bench.kv.kv_documents import Document
from dpllm.context.kv_context import KVContext
from dpllm.context.options import ContextOptions
from dpllm.context.pruner import Pruner
from dpllm.engine import Engine
from dpllm.evaluation.forced_steps import forced_steps
from dpllm.kvzip_bridge.attention import SINKS
from dpllm.kvzip_bridge.budget import Budget
from dpllm.kvzip_bridge.policies import make_kv_policy
from dpllm.kvzip_bridge.query_recording import Queries, QueriesWanted
from dpllm.policies.make import make_policy

RATIOS = (0.7, 0.5, 0.3, 0.2, 0.1)
CHUNK = (
    512  # tokens repeated at a time: context and repetition stay within the reference model's 4096 positions
)
POLICIES = {
    "random": {}, "recent": {}, "knorm": {}, "snapkv": {}, "pyramidkv": {}, "expected-attention": {}, "adakv": {},
    "heads": {}, "kvzip": {"chunk": CHUNK}, "kvzip+": {"chunk": CHUNK},
}  # fmt: skip
BLOCKWISE = "kvzip, blocks of 512"
WIDTHS = (3.0, 4.0)  # of the weights, beside the resident maximum
Outcome = tuple[int, float, int]  # (1 if the whole answer was foretold, nats, tokens)


def asked(engine: Engine, context: KVContext, document: Document) -> list[Outcome]:
    """Every question of the document, each from the same cache; teacher-forced, at the resident maximum."""
    found = []
    for question, answer in document.asked:
        ids = torch.tensor([*question, *answer])
        with torch.no_grad():
            logits = engine.decoder.forward(ids[:-1], context.cache)[len(question) - 1 :]
        context.cache.rewind(context.cache.base)
        found.append(_outcome(logits, ids[len(question) :]))
    return found


def asked_at(engine: Engine, context: KVContext, document: Document, bits: float) -> list[Outcome]:
    """The same token by token, every one (those of the question, too) at widths of its own."""
    policy = make_policy("rate-distortion", bits, engine.decoder, engine.profile)
    found = []
    for question, answer in document.asked:
        ids = [*question, *answer]
        steps = forced_steps(engine.new_step(), policy, context.cache, ids[:-1])
        logits = [stepped.logits.clone() for stepped in steps]
        context.cache.rewind(context.cache.base)
        found.append(_outcome(torch.cat(logits[len(question) - 1 :]), torch.tensor(answer)))
    return found


def _outcome(logits: Tensor, answer: Tensor) -> Outcome:
    nats = torch.nn.functional.cross_entropy(logits, answer, reduction="sum").item()
    return int((logits.argmax(1) == answer).all()), round(nats, 4), len(answer)


def read(engine: Engine, document: Document, wants: QueriesWanted) -> Pruner:
    """The document's context in a cache of its own, with what `wants` says recorded."""
    context = KVContext(engine.decoder.new_ragged_cache(0), protected=SINKS)
    options = ContextOptions(chunk=CHUNK)
    pruner = _pruner(engine, context, options, document)
    pruner.queries = Queries(wants, pruner.view)
    pruner.read(document.context)
    return pruner


def _pruner(engine: Engine, context: KVContext, options: ContextOptions, document: Document) -> Pruner:
    return Pruner(
        context, options, len(document.context),
        decoder=engine.decoder, prompts=engine.prompts, profile=engine.profile,
    )  # fmt: skip


def measure(engine: Engine, document: Document, heads: Tensor, widths: bool) -> dict[str, list[Outcome]]:
    """'policy|ratio|bits of the weights' -> outcomes; bits 0: the resident maximum."""
    found, everything = {}, QueriesWanted(last=64, statistics=True)
    pruner = read(engine, document, everything)
    for name, ratio, context in chain(_pruned(pruner, heads), _blockwise(engine, document)):
        found[f"{name}|{ratio:g}|0"] = asked(engine, context, document)
        if widths and name in ("keep-all", "kvzip"):
            for bits in WIDTHS:
                found[f"{name}|{ratio:g}|{bits:g}"] = asked_at(engine, context, document, bits)
    return found


def _pruned(pruner: Pruner, heads: Tensor) -> Iterator[tuple[str, float, KVContext]]:
    whole = pruner.context.cache
    for name, options in POLICIES.items():
        policy = make_kv_policy(name, **(options | ({"profile": heads} if name == "heads" else {})))
        scores = policy.score(pruner.scoring_input())
        for ratio in RATIOS:
            pruner.context.cache = whole.fork(0)
            pruner.drop(policy.allocate(scores, pruner.pairs_to_keep(ratio)[0]))
            yield name, ratio, pruner.context
        pruner.context.cache = whole
    pruner.drop(None)
    yield "keep-all", 1.0, pruner.context


def _blockwise(engine: Engine, document: Document) -> Iterator[tuple[str, float, KVContext]]:
    """Pruned after every 512 tokens, so that the later ones are read with what is left of the earlier ones."""
    if len(document.context) <= CHUNK:
        return
    for ratio in RATIOS[1::2]:  # the dearest: everything is read anew
        context = KVContext(engine.decoder.new_ragged_cache(0), protected=SINKS)
        options = ContextOptions(Budget(keep_ratio=ratio), chunk=CHUNK)
        pruner = _pruner(engine, context, options, document)
        for start in range(0, len(document.context), CHUNK):
            pruner.read(document.context[start : start + CHUNK])
            pruner.prune(ratio, pruner.room(CHUNK))
        yield BLOCKWISE, ratio, context
