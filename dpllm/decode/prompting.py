"""Turns prompts, chat messages and plain text into token ids that a model can continue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpllm.base.errors import InputError
from dpllm.base.text import check_text, check_tokens, encode
from dpllm.decode.chat_template import ChatTemplate
from dpllm.model.config import ModelConfig


@dataclass(frozen=True)
class Prompts:
    """Tokenises text for one model.

    tokenizer: the transformers tokenizer. config: the model's configuration. path: the model's directory, for error
    messages.
    """

    tokenizer: Any
    config: ModelConfig
    path: Path

    def prompt_ids(self, prompt: str, chat: bool = False) -> list[int]:
        """Returns the token ids of a prompt, with the special tokens that the tokenizer puts in front.

        chat: the prompt is a user's message, and is put into the model's chat template. Raises InputError where the
        prompt is empty or not UTF-8 text, or where a chat template is asked for and missing.
        """
        if not prompt:
            raise InputError("the prompt is empty. Give some text, or '-' to read it from standard input.")
        check_text(prompt, "the prompt")
        if chat:
            return list(self.chat_template([{"role": "user", "content": prompt}], tokenize=True))
        return encode(self.tokenizer, prompt)

    def doubled_start(self, text: str) -> str | None:
        """Returns a line about a text that spells out the start token which the tokenizer puts in front as well.

        Raises InputError for a text that is not UTF-8."""
        check_text(text, "the prompt")
        ids, start = encode(self.tokenizer, text[:64]), self.tokenizer.bos_token_id
        if start is None or ids[:2] != [start, start]:
            return None
        name = self.tokenizer.bos_token
        return f"the text begins with {name}, and the tokenizer puts {name} in front of it: leave {name} out."

    def plain_ids(self, text: str) -> list[int]:
        """Returns the token ids of a text that continues another one: no special token is put in front."""
        return (
            list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []
        )

    def stop_ids(self, tokens: Sequence[str | int], strings: Sequence[str]) -> frozenset[int]:
        """Returns the ids of stop tokens (texts or ids), and of special tokens among stop strings.

        A special token is never part of the text, so that as a stop string alone it would not be found. Raises
        InputError for a token that does not exist.
        """
        special = {t.content: i for i, t in self.tokenizer.added_tokens_decoder.items() if t.special}
        return frozenset([*map(self._token_id, tokens), *(special[s] for s in strings if s in special)])

    def _token_id(self, token: str | int) -> int:
        if isinstance(token, int):
            if 0 <= token < self.config.vocab_size:
                return token
            raise InputError(f"stop token {token} does not exist; the model knows {self.config.vocab_size}.")
        ids = self.plain_ids(token)
        known = self.tokenizer.get_vocab().get(token, ids[0] if len(ids) == 1 else None)
        if known is None:
            raise InputError(
                f"stop token '{token}' is not one token of {self.path} but {len(ids)}. Give it as a stop string."
            )
        return int(known)

    def chat_template(self, messages: list[dict[str, Any]], tokenize: bool = False) -> Any:
        """Formats messages (`role`, `content`) by the model's chat template, up to where its answer begins.

        Returns text, or token ids where `tokenize` is set. Raises InputError where the model has no chat template, or
        one that is broken, refuses these messages, or leaves their text out.
        """
        return ChatTemplate(self.tokenizer, self.path).apply(messages, tokenize)

    def chat_frame(self, system: str | None = None) -> tuple[str, str, str]:
        """Returns the parts of the chat template that surround messages.

        These are the text before a user's first message, the text between a user's message and the answer, and the
        text between an answer and the next message. system: a system text, which becomes part of the first of these.
        Raises InputError for a template that cannot be split like this.
        """
        marks = [f"\u241e{i}\u241e" for i in range(3)]
        roles = ("user", "assistant", "user")
        lead = [] if system is None else [{"role": "system", "content": system}]
        talk = [{"role": r, "content": m} for r, m in zip(roles, marks, strict=True)]
        try:
            text = self.chat_template([*lead, *talk])
            before, rest = text.split(marks[0])
            _, rest = rest.split(marks[1])
            between, after = rest.split(marks[2])
            if self.chat_template([*lead, talk[0]]) != before + marks[0] + after:
                raise ValueError("it surrounds a first message otherwise when others follow")
        except InputError:
            raise
        except Exception as e:  # a template may raise anything
            raise InputError(
                f"the chat template of {self.path} does not frame a conversation message by message ({e}). "
                "Use plain text: leave out --chat, or give --plain to dpllm chat."
            ) from None
        return before, after, between

    def check_tokens(self, ids: Sequence[int]) -> None:
        """Raises InputError where the model does not know one of these tokens."""
        check_tokens(ids, self.config.vocab_size, self.path)

    def check_prompt(self, ids: Sequence[int], read: int = 0) -> None:
        """Checks that the model can continue these tokens after `read` other tokens.

        Raises InputError where there are no tokens, where the model does not know one of them, or where the model has
        too few positions.
        """
        c = self.config
        if not ids:
            raise InputError("the prompt has no tokens: the tokenizer drops all of it. Give other text.")
        self.check_tokens(ids)
        if read + len(ids) >= c.max_positions:
            after = f" after {read} tokens of context" if read else ""
            raise InputError(
                f"the prompt has {len(ids)} tokens{after}; the model has {c.max_positions} positions. Shorten it."
            )
