"""Says in one line why an object cannot be sent to another process."""

from __future__ import annotations

from typing import Any, NoReturn


class StaysInProcess:
    """An object that holds native memory, threads or locks, so that it can be neither pickled nor copied."""

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Raises TypeError: pickling, deep copies and processes that are spawned end here."""
        raise TypeError(
            f"{type(self).__name__} cannot be pickled, copied or sent to another process: it holds native memory and "
            "threads of this one. Load the model there with dpllm.load, or start that process by 'fork'."
        )
