"""Which drafts a text is decoded with, and what is known of drafts from earlier texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dpllm.base.errors import InputError
from dpllm.decode.options import GenerateOptions
from dpllm.decode.speculation.draft_length import DraftLengths
from dpllm.decode.speculation.drafts import Draft, PromptLookup, SelfDraft
from dpllm.decode.step import TokenStep
from dpllm.model.decoder import Decoder
from dpllm.policies.base import PrecisionPolicy

HIGH_QUALITY = 6.0  # bits, from which 'auto' tries to speculate
DRAFT_BITS = 3


class DraftChoice:
    """Makes the drafts of a decoder's texts, and keeps what was learnt about their lengths.

    new_step: makes a decode step for a draft of its own. fast: whether a pass over several tokens is native, which is
    where 'auto' speculates.
    """

    def __init__(self, decoder: Decoder, new_step: Callable[[], TokenStep], fast: bool):
        self.decoder, self.new_step, self.fast = decoder, new_step, fast
        self.known: dict[tuple, DraftLengths] = {}

    def sources(
        self,
        options: GenerateOptions,
        policy: PrecisionPolicy | None,
        target_bits: float | None,
        text: Sequence[int],
    ) -> list[Draft]:
        """Sources of drafts after a text, the cheapest first. Raises InputError where those asked for cannot be."""
        mode = options.speculate
        why = None if policy is None else policy.begin_text().passes_limited_to_one()
        if mode == "auto" and (why or not self.fast or (target_bits or 0) < HIGH_QUALITY):
            mode = "off"
        if mode == "off":
            return []
        if why:
            raise InputError(
                f"{why}, so drafts cannot be checked. Choose policy uniform, static or rate-distortion, or leave "
                "--speculate out."
            )
        lookup: list[Draft] = [PromptLookup(text)] if mode != "self" else []
        return lookup if mode == "lookup" else [*lookup, self._self_draft(options.draft_bits)]

    def lengths(
        self,
        options: GenerateOptions,
        policy: PrecisionPolicy | None,
        target_bits: float | None,
        drafts: Sequence[Draft],
    ) -> DraftLengths:
        """What is known of drafts of this kind at about this target."""
        about = None if policy is None else (policy.name, round(target_bits or 0))
        key = (about, options.draft_bits, options.temperature > 0, *(d.name for d in drafts))
        return self.known.setdefault(key, DraftLengths([d.longest for d in drafts]))

    def _self_draft(self, bits: int | None) -> SelfDraft:
        first = self.decoder.groups[0]
        if first.dense:
            raise InputError(
                "this model is not quantised, so it holds no draft of itself. Run dpllm quantize first, or choose "
                "--speculate lookup."
            )
        held = max(g.resident_bits for g in self.decoder.groups)
        if bits is None:
            bits = min(max(DRAFT_BITS, first.seed_bits), held)
        if not first.seed_bits <= bits <= held:
            raise InputError(
                f"a draft of {bits} bits is impossible: {first.seed_bits}..{held} are resident. Choose one of these."
            )
        return SelfDraft(self.decoder, bits, self.new_step())
