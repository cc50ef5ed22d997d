"""Cheaper ways to KVzip's scores, each with what it costs and what it keeps, on the reference model.

Limit measured: exact answers to 10 questions a text (1000 in all) from caches pruned by scores that take less than
repeating everything: (1) repeating through the first half of the layers only, the others scored by the mean of those;
(2) repeating one stretch of 64 tokens in two, or in four, pairs in between scored by the mean of the one before; (3) no
repetition: the most attention that a pair got while the text was read. Cost: tokens times layers
forwarded, over those of reading.

    python -m bench.kv.kv_approximations [--documents 100]
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from bench.common.report import arguments, begin
from bench.kv import kv_documents
from bench.kv.kv_cells import CHUNK, asked, read
from bench.kv.kv_quality import interval
from dpllm.kvzip_bridge.budget import over_all
from dpllm.kvzip_bridge.interfaces import ScoringInput
from dpllm.kvzip_bridge.policies.common import protect
from dpllm.kvzip_bridge.policies.kvzip import KVzip
from dpllm.kvzip_bridge.query_recording import QueriesWanted
from dpllm.kvzip_bridge.repetition import Repetition, repetitions
from dpllm.opening import open_engine

SPAN, ASKING, RATIOS, TOKENS, FACTS = 64, 24, (0.5, 0.3, 0.2, 0.1), 1024, 10


def exact(context: ScoringInput) -> Tensor:
    """KVzip as it is."""
    return KVzip(CHUNK).score(context)


def first_half(context: ScoringInput) -> Tensor:
    """What the layers of the second half would have said is not looked at."""
    scores = exact(context)
    half = len(scores) // 2
    scores[half:] = scores[:half].mean((0, 1))
    return protect(scores, context)


class Sparse(KVzip):
    """Repeats one stretch of SPAN tokens in `every`. Pairs of the others get the mean of the next one repeated: what is
    not known is kept before what is known to be of little use."""

    def __init__(self, every: int):
        super().__init__(SPAN)
        self.every = every

    def score(self, context: ScoringInput) -> Tensor:
        """float32 [P, KVH, tokens]."""
        model = context.model
        scores = torch.zeros(len(model.layers), model.kv_heads, context.tokens)
        spans = repetitions(context, SPAN)
        for i in range(0, len(spans), self.every):
            scored = spans[i]
            own = self._scorer(context, scored).run()
            scores[..., self._at(context, scored)] = own
            for r in spans[i + 1 : i + self.every]:
                scores[..., self._at(context, r)] = own.mean(-1, keepdim=True)
        return protect(scores, context)

    def _at(self, context: ScoringInput, r: Repetition) -> slice:
        return slice(r.start - context.first, r.end - context.first)


def while_reading(context: ScoringInput) -> Tensor:
    """The queries of the text itself, which have met every pair once already: what they would be is recomputed by
    reading it again, so that nothing need be stored; a real implementation would look while it reads."""
    model, n = context.model, len(context.ids)
    best = torch.full((len(model.layers), model.kv_heads, n), -torch.inf)

    class Looking:
        """Stands where the cache would stand, and looks at attention."""

        def __init__(self, cache):
            self.cache = cache

        def __getattr__(self, name):
            return getattr(self.cache, name)

        def attend(self, layer, q, scale, window, kernels):
            if layer in model.layers:
                row, end = model.layers.index(layer), self.cache.length + len(q)
                k, _ = self.cache.pairs(layer, 0, end)
                before = slice(0, end - len(q))
                if before.stop:
                    peaks = kernels.attention_peaks(q, k, before, scale, None).amax(1)
                    best[row, :, before] = torch.maximum(best[row, :, before], peaks)
            return self.cache.attend(layer, q, scale, window, kernels)

    fresh = type(context.cache)(
        len(context.cache.k), model.kv_heads, model.head_dim, n, context.cache.k[0].dtype
    )
    for piece in context.ids.split(64):
        model.forward(piece, Looking(fresh))
    return protect(best.exp(), context)


VARIANTS: dict[str, tuple[Callable[[ScoringInput], Tensor], float]] = {
    "exact": (exact, 1.0),
    "first half of the layers": (first_half, 0.5),
    "every other 64 tokens": (Sparse(2).score, (SPAN + ASKING) / SPAN / 2),
    "64 tokens of 256": (Sparse(4).score, (SPAN + ASKING) / SPAN / 4),
    "attention while reading": (while_reading, 0.0),
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--documents", type=int, default=100)
    args = parser.parse_args()
    run = begin(args)
    engine = open_engine()
    right: dict[tuple[str, float], list[int]] = {(v, r): [] for v in VARIANTS for r in RATIOS}
    for number in range(args.documents):
        document = kv_documents.recall(number, TOKENS, FACTS)
        pruner = read(engine, document, QueriesWanted())
        whole = pruner.context.cache
        for name, (score, _) in VARIANTS.items():
            scores = score(pruner.scoring_input())
            for ratio in RATIOS:
                pruner.context.cache = whole.fork(0)
                pruner.drop(over_all(scores, pruner.pairs_to_keep(ratio)[0]))
                right[name, ratio].append(sum(o[0] for o in asked(engine, pruner.context, document)))
            pruner.context.cache = whole
    count = np.full(args.documents, float(FACTS))
    rows = []
    for (name, ratio), found in right.items():
        mean, low, high = interval(np.asarray(found) - np.asarray(right["exact", ratio], float), count)
        rows.append(
            {
                "scores": name, "kept": ratio, "cost": round(VARIANTS[name][1], 3),
                "right": round(sum(found) / count.sum(), 4), "less_exact": round(mean, 4), "low": round(low, 4),
                "high": round(high, 4), "questions": int(count.sum()),
            }
        )  # fmt: skip
    run.report("kv_approximations", rows, measured_on="reference model")


if __name__ == "__main__":
    main()
