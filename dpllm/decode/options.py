"""How a text is to be continued."""

from __future__ import annotations

from dataclasses import dataclass

from dpllm.base.errors import InputError

SPECULATE = ("auto", "off", "self", "lookup")


@dataclass(frozen=True)
class GenerateOptions:
    """temperature 0 is greedy. stop: strings that end the text (not part of it).

    speculate: where drafts come from that are checked several tokens a pass (dpllm/decode/continuation.py). 'self': the
    overlay itself at draft_bits (None: 3, or what is resident); 'lookup': earlier occurrences in prompt and output;
    'auto': both for targets of 6 bits or more on the native kernels, else off. Where no draft is worth its time, there
    is none. ignore_eos: go on behind the end-of-text token, for measurements.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    chat: bool = False
    speculate: str = "auto"
    draft_bits: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}; at least 1 is needed.")
        if not self.temperature >= 0:
            raise InputError(f"temperature is {self.temperature}; it must be 0 (greedy) or more.")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; it must lie in (0, 1].")
        if "" in self.stop:
            raise InputError("an empty stop string would stop at once. Give at least one character.")
        if self.speculate not in SPECULATE:
            raise InputError(f"speculate is '{self.speculate}'. Choose one of: {', '.join(SPECULATE)}.")
        if self.draft_bits is not None and self.speculate not in ("auto", "self"):
            raise InputError(
                f"draft_bits is the width of a draft of the model itself; speculate '{self.speculate}' makes none. "
                "Choose 'self', or leave draft_bits out."
            )
