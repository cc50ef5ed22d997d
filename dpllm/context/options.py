"""Options for reading and pruning a context."""

from __future__ import annotations

from dataclasses import dataclass, field

from dpllm.base.errors import InputError
from dpllm.kvzip_bridge.budget import ALLOCATIONS, Budget

SMALLEST_BLOCK = 32

DEFAULT_KEEP = 0.3  # the ratio that the KVzip paper finds near-lossless


@dataclass(frozen=True)
class ContextOptions:
    """Options for reading and pruning a context.

    budget: how much of the cache to keep. policy: a KV policy's name. allocation: the rule that spreads the budget
    over layers and heads, a name of ALLOCATIONS; None: the rule of the policy's paper. block: prune after every
    `block` tokens, so that the whole cache never exists; None: once, at the end. chunk: the number of tokens that the
    model is asked to repeat at a time, for policies that ask it; None: 2048, or fewer where the model has too few
    positions. chat: the text is part of a chat message.
    """

    budget: Budget = field(default_factory=lambda: Budget(keep_ratio=DEFAULT_KEEP))
    policy: str = "kvzip"
    allocation: str | None = None
    block: int | None = None
    chunk: int | None = None
    chat: bool = False

    def __post_init__(self) -> None:
        if self.allocation is not None and self.allocation not in ALLOCATIONS:
            known = ", ".join(ALLOCATIONS)
            raise InputError(f"allocation '{self.allocation}' is unknown. Choose one of: {known}.")
        for name, size in (("block", self.block), ("chunk", self.chunk)):
            if size is not None and size < SMALLEST_BLOCK:
                raise InputError(
                    f"a {name} of {size} tokens is too small; at least {SMALLEST_BLOCK} are needed."
                )
