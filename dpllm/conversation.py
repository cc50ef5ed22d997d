"""A conversation with a model. The KV cache holds what was said, so that each turn reads only the new message.

conversation = Conversation(engine, GenerateOptions(max_new_tokens=200), system="Answer in one sentence.")
for step in conversation.say("What is a bitplane?"):
    print(step.text, end="", flush=True)
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dpllm.base import forking
from dpllm.base.errors import InputError
from dpllm.base.files import write_text
from dpllm.base.processes import StaysInProcess
from dpllm.base.text import check_text
from dpllm.context.kv_context import KVContext
from dpllm.decode.generation import Generation
from dpllm.decode.options import GenerateOptions
from dpllm.engine import Engine


class OutOfPositions(InputError):
    """The model has too few positions left for a message."""


class Turn(NamedTuple):
    """A message and the answer to it."""

    message: str
    answer: Generation


@dataclass(frozen=True)
class ConversationStats:
    """Figures of a conversation so far.

    tokens: generated ones. tpot_ms: median time per token, without the first token of each answer. effective_bits,
    weight_bytes_per_token: means over the same tokens; None for a model that is not quantised, or before there are such
    tokens. kv_bytes: bytes of the cache. positions_left: of the model's `positions`, those that are free.
    """

    answers: int
    tokens: int
    tpot_ms: float | None
    effective_bits: float | None
    weight_bytes_per_token: int | None
    kv_bytes: int
    positions_left: int
    positions: int


class Conversation(StaysInProcess):
    """Messages and answers, by the model's chat template or as one plain text that goes on.

    An answer may be closed before its end: what was generated until then is part of the conversation. A message whose
    answer has no token is forgotten. Threads may share a conversation; a message ends an answer that still goes on,
    whichever thread reads it.
    """

    def __init__(
        self, engine: Engine, options: GenerateOptions = GenerateOptions(), *,
        system: str | None = None, plain: bool = False, context: KVContext | None = None,
    ):  # fmt: skip
        """Begins a conversation.

        options: of every answer. system: a system text for the chat template. plain: every message continues the text
        so far, without a chat template. context: a text that was read before; the conversation becomes part of it.
        Raises InputError where the model, the options or the context exclude such a conversation.
        """
        self.engine, self.options, self.plain = engine, replace(options, chat=False), plain
        self.system = system
        self._lock = forking.lock()  # one message at a time
        self._turns: list[Turn] = []
        self._before = ""  # the text in front of the first message
        if system is not None and (plain or context is not None):
            what = "plain text has none" if plain else "a context has begun the conversation already"
            raise InputError(f"a system text is a part of the chat template, and {what}. Leave it out.")
        if context is None:
            context = KVContext(engine.decoder.new_ragged_cache(0), model=engine.path)
            if not plain:
                self._before, context.behind, context.between = self._frame()
        elif plain and context.behind:
            raise InputError(
                "the context was built as a chat. Leave out --plain, or build it without --chat."
            )
        elif not plain and not context.behind:
            raise InputError("the context was not built as a chat. Give --plain, or build it with --chat.")
        self.context = context
        self._begin = context.cache.length, list(context.ids), list(context.pending)

    def _frame(self) -> tuple[str, str, str]:
        prompts = self.engine.prompts
        if not getattr(prompts.tokenizer, "chat_template", None):
            raise InputError(
                f"{prompts.path} has no chat template. Give --plain to continue what was said as plain text, or "
                "continue a single text with 'dpllm generate'."
            )
        if self.system is not None:
            check_text(self.system, "the system text")
        return prompts.chat_frame(self.system)

    def say(self, message: str) -> Generation:
        """Begins the answer to a message; an answer that still goes on ends.

        Raises InputError for a message that is empty or not UTF-8 text, and OutOfPositions for one that is too long.
        """
        if not message:
            raise InputError("the message is empty. Give some text.")
        check_text(message, "the message")
        with self._lock:
            return self._say(message)

    def _say(self, message: str) -> Generation:
        self._end_answer()
        if self.plain:
            self._set_pending(message)
        text = message if self.context.ids else self._before + message
        needed = len(self.context.question(self.engine.prompts, text, chat=False))
        free = self.engine.decoder.config.max_positions - self.context.cache.length
        if needed >= free:
            raise OutOfPositions(
                f"the message needs {needed} positions and an answer at least one more; {free} of the model's "
                f"{self.engine.decoder.config.max_positions} are left. Shorten it, or begin a new conversation."
            )
        answer = self.engine.generate_with(text, self.options, context=self.context, keep=True)
        self._turns.append(Turn(message, answer))
        return answer

    def _end_answer(self) -> None:
        if self._turns:
            self._turns[-1].answer.close()
        self._turns = self._answered()

    def _answered(self) -> list[Turn]:
        """The turns whose answers have begun."""
        return [turn for turn in self._turns if turn.answer.steps]

    def _set_pending(self, message: str) -> None:
        """Without a template: the special tokens that begin a text, and no end token within the text."""
        context, prompts = self.context, self.engine.prompts
        if not context.ids:
            ids = prompts.prompt_ids(message)
            context.pending = ids[: len(ids) - len(prompts.plain_ids(message))]
        elif context.pending and context.pending[-1] in prompts.config.eos_ids:
            context.pending = context.pending[:-1]

    def reset(self) -> None:
        """Forgets all messages and answers; the context that the conversation began with stays."""
        with self._lock:
            self._end_answer()
            self._turns.clear()
            length, ids, pending = self._begin
            with self.context.at_rest():
                self.context.cache.rewind(length)
                self.context.cache.trim()
                self.context.ids, self.context.pending = list(ids), list(pending)

    @property
    def messages(self) -> list[dict[str, str]]:
        """What was said, as transformers' chat templates take it: dicts with "role" and "content"."""
        said = [] if self.system is None else [{"role": "system", "content": self.system}]
        for message, answer in self._answered():
            said.append({"role": "user", "content": message})
            said.append({"role": "assistant", "content": "".join(step.text for step in answer.steps)})
        return said

    def save(self, path: str | Path) -> None:
        """Writes the messages as JSON Lines. Raises InputError where the file cannot be written."""
        lines = [json.dumps(message, ensure_ascii=False) + "\n" for message in self.messages]
        write_text(Path(path).expanduser(), "".join(lines))

    @property
    def stats(self) -> ConversationStats:
        """Figures of all answers so far."""
        answers = [turn.answer.steps for turn in self._answered()]
        steps = [step for answer in answers for step in answer[1:]]
        read = steps if self.engine.quantized else []
        positions, context = self.engine.decoder.config.max_positions, self.context
        return ConversationStats(
            answers=len(answers),
            tokens=sum(map(len, answers)),
            tpot_ms=round(float(np.median([s.ms for s in steps])), 3) if steps else None,
            effective_bits=round(float(np.mean([s.effective_bits for s in read])), 4) if read else None,
            weight_bytes_per_token=round(float(np.mean([s.weight_bytes for s in read]))) if read else None,
            kv_bytes=context.cache.nbytes,
            positions_left=positions - context.cache.length - len(context.pending),
            positions=positions,
        )
