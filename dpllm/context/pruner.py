"""Reads tokens into a cache, scores their pairs, and drops the pairs that exceed a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dpllm.base.errors import InputError
from dpllm.calib.runtime.profile import CalibrationProfile
from dpllm.context.kv_context import KVContext
from dpllm.context.model_view import view_of
from dpllm.context.options import SMALLEST_BLOCK, ContextOptions
from dpllm.decode.prompting import Prompts
from dpllm.kvzip_bridge.budget import ALLOCATIONS
from dpllm.kvzip_bridge.interfaces import KVPolicy, RepeatPrompts, ScoringInput
from dpllm.kvzip_bridge.policies import canonical_name, make_kv_policy
from dpllm.kvzip_bridge.query_recording import Queries, WatchedCache
from dpllm.kvzip_bridge.ragged_cache import SLACK
from dpllm.kvzip_bridge.repetition import check_room, largest_chunk
from dpllm.model.decoder import Decoder

REPEAT_ALL = "\n\nRepeat the previous context exactly."
REPEAT_FROM = "\n\nRepeat the part of the previous context exactly, starting with "
CHUNK = 2048  # tokens repeated at a time where the model has the positions
REQUEST = 256  # tokens of room for the request to repeat
PIECE = 512  # tokens of the text in one forward pass
HEADS = "kv.heads"  # a calibration profile's extra array, float32 [P, KVH]: the largest score of each head's pairs


class Pruner:
    """Reads tokens into a context's cache and prunes them there.

    tokens: the number of tokens that the cache will have read in the end. decoder, prompts: of the model that reads.
    profile: the calibration profile, which policy 'whole-heads' needs.
    """

    def __init__(
        self,
        context: KVContext,
        options: ContextOptions,
        tokens: int,
        *,
        decoder: Decoder,
        prompts: Prompts,
        profile: CalibrationProfile | None = None,
    ):
        self.decoder, self.context, self.options, self.tokens = decoder, context, options, tokens
        self.view = view_of(decoder)
        asked = (REPEAT_ALL, REPEAT_FROM, context.behind)
        self.prompts = RepeatPrompts(*(tuple(prompts.plain_ids(text)) for text in asked))
        self.policy = self._policy(profile, prompts)
        self.queries = Queries(self.policy.wants, self.view)

    def _policy(self, profile: CalibrationProfile | None, prompts: Prompts) -> KVPolicy:
        name = canonical_name(self.options.policy)
        if name.startswith("kvzip"):  # the only policies that ask the model to repeat the text
            prompts.check_tokens([*self.prompts.first, *self.prompts.later, *self.prompts.after])
            fits = largest_chunk(self.view, self.prompts, self.tokens)
            return make_kv_policy(name, chunk=self.options.chunk or max(SMALLEST_BLOCK, min(CHUNK, fits)))
        if name == "whole-heads":
            stored = {} if profile is None else profile.extra
            if HEADS not in stored:
                raise InputError(
                    "KV policy 'whole-heads' needs a profile of heads, and this model has none. "
                    "Run: dpllm calibrate OVERLAY --kv-heads"
                )
            return make_kv_policy(name, profile=torch.from_numpy(stored[HEADS]))
        return make_kv_policy(name)

    def share(self) -> float:
        """Returns the number of pairs to keep in the end, over the number of all pairs of the pruned layers.

        Reads nothing. Raises InputError for a budget that cannot be met, or for a policy that has no room to score.
        """
        heads = len(self.view.layers) * self.view.kv_heads
        if not heads:  # every layer has a sliding window, which bounds its cache already
            return 1.0
        key, c = self.context.cache.k[0], self.context
        size = 2 * key.shape[1] * key.element_size()
        pairs = self.options.budget.pair_count(
            len(self.view.layers), self.view.kv_heads, self.tokens, c.protected, size
        )
        chunk = getattr(self.policy, "chunk", None)
        if chunk is not None and pairs < heads * self.tokens:
            scored = self.tokens - max(c.protected, c.cache.base)
            check_room(self.view, self.prompts, self.tokens, min(chunk, self.options.block or scored, scored))
        return pairs / (heads * self.tokens)

    def read(self, ids: Sequence[int], progress: Callable[[int], None] = lambda done: None) -> None:
        """Reads the tokens in pieces. progress: called with the number of tokens read so far."""
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
        """Returns the slack, in tokens, that reading and scoring `tokens` tokens takes."""
        return tokens + min(self.policy.scratch, tokens + REQUEST)

    def prune(self, share: float, room: int = SLACK) -> None:
        """Drops the pairs of the tail that exceed the budget. room: slack to leave, in tokens."""
        pairs, every = self.pairs_to_keep(share)
        name = self.options.allocation
        allocate = self.policy.allocate if name is None else ALLOCATIONS[name]
        self.drop(None if pairs == every else allocate(self.policy.score(self.scoring_input()), pairs), room)

    def pairs_to_keep(self, share: float) -> tuple[int, int]:
        """Returns (number of the tail's pairs to keep so that `share` of all pairs is held, number of its pairs)."""
        cache, every = self.context.cache, self._heads() * self._tail()
        forced = self._heads() * max(0, self.context.protected - cache.base)
        return min(max(round(share * self._heads() * cache.length) - self.held(), forced), every), every

    def held(self) -> int:
        """Returns the number of pairs that earlier prunings have kept, in the layers that are pruned."""
        return sum(len(p) for layer in self.view.layers for p in self.context.cache.kept[layer])

    def drop(self, keep: Tensor | None, room: int = SLACK) -> None:
        """Prunes the tail to a mask bool [P, KVH, tail] of the P pruned layers. keep None: every pair is kept."""
        shape = (*self.context.cache.lengths.shape, self._tail())
        whole = torch.ones(shape, dtype=torch.bool, device=self.decoder.device)
        if keep is not None:
            whole[list(self.view.layers)] = keep
        self.context.cache.prune(whole, self.decoder.config.windows, room)

    def scoring_input(self) -> ScoringInput:
        """Returns the tail in the form in which a policy scores it."""
        c = self.context
        ids = torch.tensor(c.ids, device=self.decoder.device)
        return ScoringInput(ids, c.cache, c.cache.base, c.protected, self.queries, self.prompts, self.view)

    def _heads(self) -> int:
        return len(self.view.layers) * self.view.kv_heads

    def _tail(self) -> int:
        return self.context.cache.length - self.context.cache.base
