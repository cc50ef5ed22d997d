"""Which drafts a text is decoded with, and what is known of them from earlier texts."""

from __future__ import annotations

from collections.abc import Sequence

from dpllm.base.errors import InputError
from dpllm.decode.continuation import obstacle
from dpllm.decode.cpu_step import NativeStep
from dpllm.decode.options import GenerateOptions
from dpllm.decode.speculation.draft_length import Pacer
from dpllm.decode.speculation.drafts import Draft, PromptLookup, SelfDraft
from dpllm.model.decoder import Decoder
from dpllm.policies.base import PrecisionPolicy

HIGH_QUALITY = 6.0  # bits, from which 'auto' tries to speculate
DRAFT_BITS = 3


class Drafting:
    """Makes the drafts of a decoder, each once, and keeps their paces."""

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        self.pacers: dict[tuple, Pacer] = {}
        self._own: dict[int, SelfDraft] = {}

    def sources(
        self,
        options: GenerateOptions,
        policy: PrecisionPolicy | None,
        native: NativeStep | None,
        target_bits: float | None,
        text: Sequence[int],
    ) -> list[Draft]:
        """Sources of drafts behind a text, the cheapest first. Raises InputError where those asked for cannot be."""
        mode, why = options.speculate, obstacle(policy, native)
        if mode == "auto" and (why or native is None or (target_bits or 0) < HIGH_QUALITY):
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

    def pacer(
        self,
        options: GenerateOptions,
        policy: PrecisionPolicy | None,
        target_bits: float | None,
        drafts: Sequence[Draft],
    ) -> Pacer:
        """What is known of drafts of this kind at about this target."""
        about = None if policy is None else (policy.name, round(target_bits or 0))
        key = (about, options.draft_bits, options.temperature > 0, *(d.name for d in drafts))
        return self.pacers.setdefault(key, Pacer([d.longest for d in drafts]))

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
        if bits not in self._own:
            self._own[bits] = SelfDraft(self.decoder, bits)
        return self._own[bits]
