"""Holds a pruned KV cache together with what is needed to continue from it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dpllm.base.errors import InputError
from dpllm.base.text import check_text
from dpllm.context.saved import load_context, save_context
from dpllm.decode.prompting import Prompts
from dpllm.kvzip_bridge.ragged_cache import RaggedKVCache
from dpllm.model.decoder import Decoder


class LoadedModel(Protocol):
    """What a context is loaded for: an engine."""

    path: Path
    decoder: Decoder


@dataclass
class KVContext:
    """A text that was read into a cache and pruned.

    ids: the tokens that the cache has read. protected: the number of leading tokens that are never evicted. behind,
    between: the text that the chat template puts after a question, and between an answer and the next question.
    pending: the end of the last answer, which the cache has not read yet. facts: the options that the context was
    built with. model: the directory of the model that read the text.
    """

    cache: RaggedKVCache
    ids: list[int] = field(default_factory=list)
    protected: int = 0
    behind: str = ""
    between: str = ""
    pending: list[int] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    model: Path | None = None
    _busy: bool = field(default=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def save(self, path: str | Path) -> dict[str, Any]:
        """Writes the context to a new directory and returns its manifest.

        Raises InputError where the directory exists or cannot be written; no file is left then.
        """
        assert self.model is not None, "a context that is saved was made by Engine.read or KVContext.load"
        return save_context(self, Path(path).expanduser(), model=self.model)

    @classmethod
    def load(cls, path: str | Path, engine: LoadedModel) -> KVContext:
        """Loads a saved context. engine: of the model that read it.

        Raises InputError for another model, another format, or a damaged file.
        """
        fields = load_context(Path(path).expanduser(), decoder=engine.decoder, model=engine.path)
        return cls(**fields, model=engine.path)

    def question(self, prompts: Prompts, prompt: str, chat: bool) -> list[int]:
        """Returns the token ids of the next question, led by the pending end of the last answer.

        Raises InputError for an empty prompt, or for `chat` where the context was not built as a chat."""
        if not prompt:
            raise InputError("the prompt is empty. Give some text, or '-' to read it from standard input.")
        check_text(prompt, "the prompt")
        if chat and not self.behind:
            raise InputError(
                "the context was not built as a chat. Leave out --chat, or build it with --chat."
            )
        ids = prompts.plain_ids((self.between if self.pending else "") + prompt + self.behind)
        # After an answer that ended by itself, the template's own end token takes the place of the one generated.
        ends = {*prompts.config.eos_ids, *(i for i in ids[:1] if i in prompts.tokenizer.added_tokens_decoder)}
        ended = self.between and self.pending and self.pending[-1] in ends
        return [*(self.pending[:-1] if ended else self.pending), *ids]

    def begin_turn(self) -> None:
        """Claims the cache for one question. Raises InputError while another is being answered."""
        with self._lock:
            if self._busy:
                raise InputError(
                    "another question to this context is still being answered. Exhaust or close that generator first."
                )
            if len(self.ids) != self.cache.length:
                raise InputError("this context was interrupted while it was being pruned. Build it again.")
            self._busy = True

    def end_turn(self, question: Sequence[int], answer: Sequence[int], read: int, keep: bool) -> None:
        """Ends the turn that `begin_turn` began.

        question, answer: token ids of the question and of the answer. read: tokens that the cache had read before.
        keep: the question and the answer stay in the context. Without an answer or without `keep`, the cache is
        rewound."""
        self._busy = False
        if not keep or not answer:
            self.cache.rewind(read)
            self.cache.trim()
            return
        tokens, count = [*question, *answer], self.cache.length - read
        if count == len(tokens):  # interrupted after the last token was read: the next turn reads it
            count -= 1
            self.cache.rewind(read + count)
        self.ids += tokens[:count]
        self.pending = tokens[count:]

    @property
    def kept_ratio(self) -> float:
        """The number of pairs held over the number of pairs read, over all layers and heads."""
        lengths = self.cache.lengths
        return float(lengths.sum()) / max(1, lengths.numel() * self.cache.length)
