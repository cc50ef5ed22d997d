"""How a text is to be continued."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from dpllm.base.errors import InputError
from dpllm.decode.sampling import SamplingOptions

SPECULATE = ("auto", "off", "self", "lookup")


@dataclass(frozen=True)
class GenerateOptions:
    """Options of one generation. Raises InputError for values outside their range.

    The sampling options are those of SamplingOptions (temperature 0 is greedy). stop: strings that end the text and are
    not part of it. stop_tokens: tokens that do so too, special ones included, as texts or ids; a special token may also
    be given as a stop string. chat: the prompt is put into the model's chat template. ignore_eos: continue after the
    end-of-text
    token, for measurements.

    speculate: the source of drafts that are checked several tokens a pass (dpllm/decode/speculation). 'self': the
    overlay itself at draft_bits (None: 3, or what is resident); 'lookup': earlier occurrences in prompt and output;
    'auto': both for targets of 6 bits or more on the native kernels, else 'off'. Drafts that do not save time are not
    made.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | tuple[str, ...] = ()
    stop_tokens: str | int | tuple[str | int, ...] = ()
    chat: bool = False
    speculate: str = "auto"
    draft_bits: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}; at least 1 is needed.")
        self.sampling()  # checks its part
        if "" in self.stop_strings:
            raise InputError("an empty stop string would stop at once. Give at least one character.")
        if "" in self.stop_token_names:
            raise InputError("an empty stop token does not exist. Give the text or the id of a token.")
        if self.speculate not in SPECULATE:
            raise InputError(f"speculate is '{self.speculate}'. Choose one of: {', '.join(SPECULATE)}.")
        if self.draft_bits is not None and self.speculate not in ("auto", "self"):
            raise InputError(
                f"draft_bits is the width of a draft of the model itself; speculate '{self.speculate}' makes none. "
                "Choose 'self', or leave draft_bits out."
            )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, also where only one was given."""
        return (self.stop,) if isinstance(self.stop, str) else self.stop

    @property
    def stop_token_names(self) -> tuple[str | int, ...]:
        """The stop tokens, also where only one was given."""
        return (self.stop_tokens,) if isinstance(self.stop_tokens, str | int) else self.stop_tokens

    def sampling(self) -> SamplingOptions:
        """The sampling options among these."""
        return SamplingOptions(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
        )


def options_of(given: Mapping[str, Any]) -> GenerateOptions:
    """Options from keyword arguments. Raises InputError for a name or a value that is not one."""
    known = [f.name for f in fields(GenerateOptions)]
    if unknown := [name for name in given if name not in known]:
        raise InputError(f"generate has no option '{unknown[0]}'. Choose from: {', '.join(known)}.")
    return GenerateOptions(**given)
