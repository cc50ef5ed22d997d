"""The interfaces of pruning a context: scores -> budget -> keep mask -> prune.

A KV policy is a small class that scores every pair of a context. An allocation (budget.py) turns scores and a number
of pairs into a mask. The cache (ragged_cache.py) drops the pairs that the mask leaves out. Each policy has a file of
its own in policies/."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dpllm.kvzip_bridge.cache import KVCache
from dpllm.kvzip_bridge.model_view import ModelView
from dpllm.kvzip_bridge.query_recording import Queries, QueriesWanted


@dataclass(frozen=True)
class RepeatPrompts:
    """Token ids that ask the model to repeat a part of its context.

    first: asks for the first chunk. later: asks for the chunk that starts with the tokens that follow. after: the
    chat template's text between a request and its answer, or nothing."""

    first: tuple[int, ...]
    later: tuple[int, ...]
    after: tuple[int, ...] = ()


@dataclass(frozen=True)
class ScoringInput:
    """The input of a policy: a context that was just read. The cache still holds every pair to be scored.

    ids: int64 [n], all tokens that the cache has read. first: positions first .. n - 1 are scored. protected: the
    number of leading positions that are never evicted (a system prompt). queries: the queries recorded while ids were
    read. prompts: the token ids that ask for a repetition. model: the decoder as policies see it.
    """

    ids: Tensor
    cache: KVCache
    first: int
    protected: int
    queries: Queries
    prompts: RepeatPrompts
    model: ModelView

    @property
    def tokens(self) -> int:
        """The number of positions that are scored."""
        return len(self.ids) - self.first


class KVPolicy(Protocol):
    """Scores the pairs of a context. A larger score means that a pair is worth more."""

    name: str
    wants: QueriesWanted  # what must be recorded while the context is read
    scratch: int  # tokens that scoring writes after the context and removes again

    def score(self, context: ScoringInput) -> Tensor:
        """Returns float32 [P, KVH, tokens] for the P layers of `context.model.layers`. The cache stays as it was."""
        ...

    def allocate(self, scores: Tensor, pairs: int) -> Tensor:
        """Returns the mask bool [P, KVH, tokens] of exactly `pairs` pairs. Scores of +inf are kept first."""
        ...
