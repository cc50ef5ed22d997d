"""A pruned KV cache and what is needed to continue from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dpllm.base.errors import InputError
from dpllm.base.text import check_text
from dpllm.context.pruner import plain_ids
from dpllm.kvzip_bridge.ragged_cache import RaggedKVCache

if TYPE_CHECKING:
    from dpllm.engine import Engine


@dataclass
class KVContext:
    """A pruned cache and what is needed to go on from it.

    ids: the tokens the cache has read. protected: how many leading ones are never evicted. behind, between: what a chat
    template puts behind a question, and between an answer and the next one. pending: the end of the last answer, not
    read yet. facts: how it was made.
    """

    cache: RaggedKVCache
    ids: list[int] = field(default_factory=list)
    protected: int = 0
    behind: str = ""
    between: str = ""
    pending: list[int] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    _busy: bool = field(default=False, repr=False)

    def question(self, engine: Engine, prompt: str, chat: bool) -> list[int]:
        """Token ids of what is asked next. Raises InputError for an empty prompt, or a chat where there is none."""
        if not prompt:
            raise InputError("the prompt is empty. Give some text, or '-' to read it from standard input.")
        check_text(prompt, "the prompt")
        if chat and not self.behind:
            raise InputError(
                "the context was not built as a chat. Leave out --chat, or build it with --chat."
            )
        ids = plain_ids(engine, (self.between if self.pending else "") + prompt + self.behind)
        # An answer that ended by itself has said the end token with which the template goes on.
        said = self.pending and ids and self.pending[-1] == ids[0]
        return [*self.pending, *(ids[1:] if said else ids)]

    def begin_turn(self) -> None:
        """Claims the cache for one question. Raises InputError while another is being answered."""
        if self._busy:
            raise InputError(
                "another question to this context is still being answered. Exhaust or close that generator first."
            )
        if len(self.ids) != self.cache.length:
            raise InputError("this context was interrupted while it was being pruned. Build it again.")
        self._busy = True

    def end_turn(self, asked: Sequence[int], said: Sequence[int], read: int, keep: bool) -> None:
        """After a question and its answer: the cache had read `read` tokens before. Without an answer, or without
        `keep`, it is as it was then."""
        self._busy = False
        if not keep or not said:
            self.cache.rewind(read)
            self.cache.trim()
            return
        tokens, count = [*asked, *said], self.cache.length - read
        self.ids += tokens[:count]
        self.pending = tokens[count:]

    @property
    def kept_ratio(self) -> float:
        """Pairs held over pairs read, all layers and heads."""
        lengths = self.cache.lengths
        return float(lengths.sum()) / max(1, lengths.numel() * self.cache.length)
