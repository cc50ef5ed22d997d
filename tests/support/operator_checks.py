"""Whether our torch operators keep what their schemas and fake implementations promise."""

from __future__ import annotations

from typing import Any

import torch
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

CHECKS = ("test_schema", "test_faketensor")


class Checked(TorchDispatchMode):
    """Lets torch check every operator of ours when it is first called, with what it is called with: what it writes, and
    the shapes of what it returns. seen: their names."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("dpllm::")
        if func.namespace == "dpllm" and name not in self.seen:
            self.seen.add(name)
            given = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
            opcheck(func, given, kwargs, test_utils=CHECKS)
        return func(*args, **(kwargs or {}))
