"""Sources of drafts for speculative decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from dpllm.decode.sampling import Sampler
from dpllm.decode.step import TokenStep
from dpllm.kernels.cpu.step import MAX_ROWS
from dpllm.kvzip_bridge.cache import KVCache
from dpllm.model.decoder import Decoder
from dpllm.policies.fixed import StaticPolicy

LAG = MAX_ROWS  # tokens between what a policy learns and where it may use it


class Draft(Protocol):
    """A source of drafts for one text.

    longest: the most tokens that are worth drafting at once. nbytes: bytes that drafting one of them reads.
    """

    name: str
    longest: int
    nbytes: int

    def propose(self, text: Sequence[int], count: int, cache: KVCache, pick: Sampler) -> list[int]:
        """Up to `count` tokens that may follow `text`, of which the cache holds all but the last token. The cache may
        be written to after its end; the caller rewinds it. pick: draws with the numbers that the check will draw
        with."""
        ...


class SelfDraft:
    """Drafts by the same model, at `bits` planes everywhere, with a decode step of its own."""

    name, longest = "self", 8

    def __init__(self, decoder: Decoder, bits: int, step: TokenStep):
        self.bits, self._step = bits, step
        widths = [min(max(bits, g.seed_bits), g.resident_bits) for g in decoder.groups]
        self.policy = StaticPolicy(widths, name="uniform")
        read = (g.bytes_at[b - g.seed_bits] for b, g in zip(widths, decoder.groups, strict=True))
        self.nbytes = sum(read) + decoder.head_bytes()

    def propose(self, text: Sequence[int], count: int, cache: KVCache, pick: Sampler) -> list[int]:
        """See Draft."""
        drafted: list[int] = []
        for _ in range(count):
            token = drafted[-1] if drafted else text[-1]
            drafted.append(pick(self._step(token, cache, self.policy).logits[-1]))
        return drafted


class PromptLookup:
    """Drafts the tokens that followed the last few tokens where they occurred before, in the prompt or the output.

    The longest match counts, and among these the latest. Made for one text, which proposals continue.
    """

    name, longest, nbytes = "lookup", MAX_ROWS - 1, 0
    SIZES = (4, 3, 2)  # tokens that have to match, the most first

    def __init__(self, text: Sequence[int] = ()) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # tokens -> where their latest occurrence ended
        self._known = 0
        self._read(text)

    def propose(self, text: Sequence[int], count: int, cache: KVCache, pick: Sampler) -> list[int]:
        """See Draft."""
        self._read(text)
        for n in self.SIZES:
            if len(text) >= n and (at := self._after.get(tuple(text[-n:]))) is not None:
                return list(text[at : at + count])
        return []

    def _read(self, text: Sequence[int]) -> None:
        for end in range(self._known, len(text)):  # the last tokens of the text are no match for themselves
            for n in self.SIZES:
                if end >= n:
                    self._after[tuple(text[end - n : end])] = end
        self._known = len(text)
