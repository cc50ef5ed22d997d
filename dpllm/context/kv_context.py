"""Holds a pruned KV cache together with what is needed to continue from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dpllm.base import forking
from dpllm.base.errors import InputError
from dpllm.base.processes import StaysInProcess
from dpllm.base.text import check_text
from dpllm.context.saved import load_context, save_context
from dpllm.decode.prompting import Prompts
from dpllm.kvzip_bridge.cache import KVCache
from dpllm.kvzip_bridge.ragged_cache import RaggedKVCache
from dpllm.model.decoder import Decoder


class LoadedModel(Protocol):
    """What a context is loaded for: an engine."""

    path: Path
    decoder: Decoder


@dataclass
class KVContext(StaysInProcess):
    """A text that was read into a cache and pruned.

    Several threads may ask it. The first question uses the cache itself. Another one that comes while that question is
    being answered uses a copy of what was read before, which needs as much memory until it is answered.

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
    _lock: Any = field(default_factory=forking.lock, repr=False, compare=False)

    def save(self, path: str | Path) -> dict[str, Any]:
        """Writes the context to a new directory and returns its manifest.

        Raises InputError where the directory exists or cannot be written, or while a question is being answered; no
        file is left then.
        """
        assert self.model is not None, "a context that is saved was made by Engine.read or KVContext.load"
        with self.at_rest():
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
        with self._lock:
            pending = list(self.pending)
        ids = prompts.plain_ids((self.between if pending else "") + prompt + self.behind)
        # After an answer that ended by itself, the template's own end token takes the place of the one generated.
        ends = {*prompts.config.eos_ids, *(i for i in ids[:1] if i in prompts.tokenizer.added_tokens_decoder)}
        ended = self.between and pending and pending[-1] in ends
        return [*(pending[:-1] if ended else pending), *ids]

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Keeps questions of other threads waiting until the block ends.

        Raises InputError while a question is being answered.
        """
        with self._lock:
            self._check_free()
            yield

    def begin_turn(self, read: int, room: int, keep: bool) -> RaggedKVCache:
        """Begins one question and returns the cache to answer it with, which has room for `room` more tokens.

        read: the number of tokens that the cache had read when the question was put. keep: the turn is to stay in the
        context. Where another question is being answered, the result is a copy of the cache as it was before. Raises
        InputError where such a turn is to be kept, and where the context has changed since the question was put.
        """
        with self._lock:
            if keep:
                self._check_free()
            if read != len(self.ids):
                raise InputError("the context has changed since this question was put. Ask again.")
            if self._busy:
                copy = self.cache.fork(room)
                copy.rewind(read)
                return copy
            if len(self.ids) != self.cache.length:
                raise InputError("this context was interrupted while it was being pruned. Build it again.")
            self.cache.reserve(room)  # runs move now or never: a copy may be taken while tokens are appended
            self._busy = True
            return self.cache

    def _check_free(self) -> None:
        if self._busy:
            raise InputError(
                "another question to this context is still being answered. Exhaust or close that generator first."
            )

    def end_turn(self, cache: KVCache, question: Sequence[int], answer: Sequence[int], keep: bool) -> None:
        """Ends the turn that `begin_turn` began with this cache.

        question, answer: token ids of the question and of the answer. keep: the question and the answer stay in the
        context. Without an answer or without `keep`, the cache is rewound. A copy is dropped."""
        with self._lock:
            if cache is not self.cache:
                return
            try:
                self._take_in(question, answer, keep)
            finally:
                self._busy = False

    def _take_in(self, question: Sequence[int], answer: Sequence[int], keep: bool) -> None:
        read = len(self.ids)
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
