"""How a context is to be pruned."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dpllm.base.errors import InputError
from dpllm.kvzip_bridge.budget import ALLOCATIONS, Budget

if TYPE_CHECKING:
    pass

SMALLEST_BLOCK = 32

DEFAULT_KEEP = 0.3  # what the paper finds near-lossless


@dataclass(frozen=True)
class ContextOptions:
    """How a context is read and pruned.

    policy: a KV policy's name. allocation: how the budget is spread, by a name of ALLOCATIONS; None: as the policy's
    paper does. block: prune after every so many tokens, so that the whole cache never exists; None: once, at the end.
    chunk: tokens that the model is asked to repeat at a time, by policies that ask it; None: 2048, or what its
    positions leave. chat: the text is part of a chat message.
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
