"""The seam between a context that was read and the pairs of it that are kept: scores -> budget -> keep mask -> prune.

A KV policy is a small class that scores every pair of a context; an allocation (budget.py) turns scores and a number
of pairs into a mask; the cache (ragged.py) drops what the mask leaves out. Each policy stands in a file of its own in
policies/."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dpllm.kvzip_bridge.cache import KVCache
from dpllm.kvzip_bridge.model_view import ModelView
from dpllm.kvzip_bridge.query_recording import Queries, QueriesWanted


@dataclass(frozen=True)
class RepeatPrompts:
    """Token ids that ask the model to repeat: all of a first chunk, a later one that starts with given tokens, and what
    stands between the request and the answer (a chat template's, or nothing)."""

    first: tuple[int, ...]
    later: tuple[int, ...]
    after: tuple[int, ...] = ()


@dataclass(frozen=True)
class Context:
    """A context just read, every pair of which the cache still holds.

    ids: int64 [n], all tokens the cache has seen. first: positions first .. n - 1 are to be scored. protected: leading
    positions that are never evicted (a system prompt). queries: what was recorded while ids were read.
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
        """How many positions are scored."""
        return len(self.ids) - self.first


class KVPolicy(Protocol):
    """Scores pairs; the larger, the more it is worth to keep."""

    name: str
    wants: QueriesWanted  # what must be recorded while the context is read
    scratch: int  # tokens that scoring writes behind the context for a while

    def score(self, context: Context) -> Tensor:
        """float32 [P, KVH, tokens] for the P layers of `context.model.layers`. Leaves the cache as it was."""
        ...

    def allocate(self, scores: Tensor, pairs: int) -> Tensor:
        """The mask bool [P, KVH, tokens] of exactly `pairs` pairs. Scores of +inf are kept first."""
        ...
