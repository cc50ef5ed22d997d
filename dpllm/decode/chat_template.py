"""The chat template of a tokenizer, which may refuse messages, be broken, or want contents in parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpllm.base.errors import InputError

PROBE = "\u241e?\u241e"  # a text that no template contains


@dataclass(frozen=True)
class ChatTemplate:
    """Formats messages by the template of a tokenizer (transformers). path: the model's directory, for messages."""

    tokenizer: Any
    path: Path

    def apply(self, messages: Sequence[Mapping[str, Any]], tokenize: bool = False) -> Any:
        """Returns the text of messages up to where an answer begins, or its token ids.

        messages: dicts with "role" and "content". A content is a text or a list of parts of the type "text"; the
        template is given what it wants of the two. Raises InputError where there is no template, or where it is broken,
        refuses the messages, or leaves their text out.
        """
        self._check_present()
        told = [dict(m) | {"content": _text_of(m)} for m in messages]
        marked = [m | {"content": PROBE + m["content"]} for m in told]
        try:
            whole, in_parts = self._render(marked, False), False
        except Exception as e:  # a template may raise anything
            whole, in_parts = self._rendered_in_parts(marked, e), True
        if PROBE not in whole:
            whole, in_parts = self._rendered_in_parts(marked, None), True
        if PROBE not in whole:
            raise InputError(
                f"the chat template of {self.path} leaves out what was said. Leave out --chat, or correct the template."
            )
        try:
            return self._render(_in_parts(told) if in_parts else told, tokenize)
        except Exception as e:
            raise self._refusal(e) from None

    def _check_present(self) -> None:
        template = getattr(self.tokenizer, "chat_template", None)
        if not template:
            raise InputError(f"{self.path} has no chat template. Leave out --chat.")
        if isinstance(template, dict) and "default" not in template:
            raise InputError(
                f"{self.path} has the chat templates {', '.join(sorted(template))}, but none with the name 'default'. "
                "Leave out --chat, or give one of them that name in tokenizer_config.json."
            )

    def _rendered_in_parts(self, messages: list[dict[str, Any]], error: Exception | None) -> str:
        """The text where contents are lists of parts; where that fails too, what was wrong with texts."""
        try:
            text = str(self._render(_in_parts(messages), False))
            if PROBE in text or error is None:
                return text
        except Exception as e:
            error = error or e
        raise self._refusal(error) from None

    def _refusal(self, error: Exception) -> InputError:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return InputError(
            f"the chat template of {self.path} cannot format these messages: {reason}. Say what it asks for, or leave "
            "out --chat."
        )

    def _render(self, messages: list[dict[str, Any]], tokenize: bool) -> Any:
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=tokenize, return_dict=False
        )


def _in_parts(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [dict(m) | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]


def _text_of(message: Mapping[str, Any]) -> str:
    """The content of a message as one text. Raises InputError for a content that is not text."""
    content = message.get("content") or ""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [p.get("text") if isinstance(p, Mapping) and p.get("type") == "text" else None for p in parts]
    if not all(isinstance(t, str) for t in texts):
        raise InputError(
            f"the content of a message is {content!r:.80}. Give a text, or a list of parts of the type 'text'."
        )
    return "".join(str(t) for t in texts)
