"""Reads tokens into a cache, has them scored, and drops what a budget leaves out: what building a context consists
of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dpllm.base.errors import InputError
from dpllm.context.model_view import view_of
from dpllm.context.options import SMALLEST_BLOCK, ContextOptions
from dpllm.kvzip_bridge.budget import ALLOCATIONS
from dpllm.kvzip_bridge.interfaces import Context, KVPolicy, RepeatPrompts
from dpllm.kvzip_bridge.policies import make_kv_policy
from dpllm.kvzip_bridge.query_recording import Queries, WatchedCache
from dpllm.kvzip_bridge.ragged_cache import SLACK
from dpllm.kvzip_bridge.repetition import check_room, largest_chunk

if TYPE_CHECKING:
    from dpllm.context.kv_context import KVContext
    from dpllm.engine import Engine

REPEAT_ALL = "\n\nRepeat the previous context exactly."
REPEAT_FROM = "\n\nRepeat the part of the previous context exactly, starting with "
CHUNK = 2048  # tokens repeated at a time where the model has the positions
REQUEST = 256  # tokens of room for what asks for a repetition
PIECE = 512  # tokens of the text in one forward pass
HEADS = "kv.heads"  # of a calibration profile's extra arrays: float32 [P, KVH], the most a head's pairs were ever worth


class Pruner:
    """Reads tokens into a context's cache and prunes them there. tokens: how many the cache will hold in the end."""

    def __init__(self, engine: Engine, context: KVContext, options: ContextOptions, tokens: int):
        self.decoder, self.context, self.options, self.tokens = engine.decoder, context, options, tokens
        self.view = view_of(engine.decoder)
        asked = (REPEAT_ALL, REPEAT_FROM, context.behind)
        self.prompts = RepeatPrompts(*(tuple(plain_ids(engine, text)) for text in asked))
        self.policy = self._policy(engine)
        self.queries = Queries(self.policy.wants, self.view)

    def _policy(self, engine: Engine) -> KVPolicy:
        name = self.options.policy
        if name.startswith("kvzip"):
            fits = largest_chunk(self.view, self.prompts, self.tokens)
            return make_kv_policy(name, chunk=self.options.chunk or max(SMALLEST_BLOCK, min(CHUNK, fits)))
        if name == "heads":
            stored = {} if engine.profile is None else engine.profile.extra
            if HEADS not in stored:
                raise InputError(
                    "KV policy 'heads' needs a profile of heads, and there is none beside this model. "
                    "Run: dpllm calibrate OVERLAY --kv-heads"
                )
            return make_kv_policy(name, profile=torch.from_numpy(stored[HEADS]))
        return make_kv_policy(name)

    def share(self) -> float:
        """Pairs to keep in the end, over all pairs of the layers that are pruned.

        Raises InputError for a budget that cannot be met, or a policy that finds no room to score; nothing has been
        read then.
        """
        heads = len(self.view.layers) * self.view.kv_heads
        if not heads:  # every layer has a sliding window: bounded as it is
            return 1.0
        key, c = self.context.cache.k[0], self.context
        size = 2 * key.shape[1] * key.element_size()
        pairs = self.options.budget.pairs(
            len(self.view.layers), self.view.kv_heads, self.tokens, c.protected, size
        )
        chunk = getattr(self.policy, "chunk", None)
        if chunk is not None and pairs < heads * self.tokens:
            scored = self.tokens - max(c.protected, c.cache.base)
            check_room(self.view, self.prompts, self.tokens, min(chunk, self.options.block or scored, scored))
        return pairs / (heads * self.tokens)

    def read(self, ids: Sequence[int], progress: Callable[[int], None] = lambda done: None) -> None:
        """Prefill, in pieces."""
        cache = self.context.cache
        cache.reserve(self.room(len(ids)))
        watched = WatchedCache(cache, self.queries.watch)
        done = 0
        for piece in torch.tensor(ids, device=self.decoder.device).split(PIECE):
            self.view.forward(piece, watched)
            done += len(piece)
            progress(done)
        self.context.ids += ids

    def room(self, tokens: int) -> int:
        """Slack that reading and scoring so many tokens takes."""
        return tokens + min(self.policy.scratch, tokens + REQUEST)

    def prune(self, share: float, room: int = SLACK) -> None:
        """Drops what does not fit of the tail. room: slack to leave."""
        pairs, every = self.pairs(share)
        name = self.options.allocation
        allocate = self.policy.allocate if name is None else ALLOCATIONS[name]
        self.drop(None if pairs == every else allocate(self.policy.score(self.seen()), pairs), room)

    def pairs(self, share: float) -> tuple[int, int]:
        """How many pairs of the tail to keep, so that this share of all is held then; and how many it has."""
        cache, every = self.context.cache, self._heads() * self._tail()
        forced = self._heads() * max(0, self.context.protected - cache.base)
        return min(max(round(share * self._heads() * cache.length) - self.held(), forced), every), every

    def held(self) -> int:
        """Pairs that earlier prunings have kept, in the layers that are pruned."""
        return sum(len(p) for layer in self.view.layers for p in self.context.cache.kept[layer])

    def drop(self, keep: Tensor | None, room: int = SLACK) -> None:
        """Keeps what the mask [P, KVH, tail] of the prunable layers says; None: everything."""
        shape = (*self.context.cache.lengths.shape, self._tail())
        whole = torch.ones(shape, dtype=torch.bool, device=self.decoder.device)
        if keep is not None:
            whole[list(self.view.layers)] = keep
        self.context.cache.prune(whole, self.decoder.config.windows, room)

    def seen(self) -> Context:
        """The tail as a policy sees it."""
        c = self.context
        ids = torch.tensor(c.ids, device=self.decoder.device)
        return Context(ids, c.cache, c.cache.base, c.protected, self.queries, self.prompts, self.view)

    def _heads(self) -> int:
        return len(self.view.layers) * self.view.kv_heads

    def _tail(self) -> int:
        return self.context.cache.length - self.context.cache.base


def plain_ids(engine: Engine, text: str) -> list[int]:
    """Token ids of a text in the middle of another: nothing is put in front."""
    return list(engine.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []
