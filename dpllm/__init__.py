"""dpllm: one stored model, many precisions, chosen per layer and token to meet a target.

import dpllm
engine = dpllm.load()                      # the bundled reference model; or a path to an overlay
for step in engine.generate("import os\n"):
    print(step.text, end="")
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# torch's OpenMP threads spin for a while after each operation and would take the cores that the native kernels need:
# 15% of the time of a prompt on two cores. Read when torch loads its OpenMP; a user's own setting stands.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# In a checkout the sub-packages lie beside this folder, not in it.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file():
    __path__.append(str(_root))

if TYPE_CHECKING:
    from dpllm.engine import Engine, Step, load
    from dpllm.kernels.errors import InputError

__all__ = ["Engine", "InputError", "Step", "__version__", "load"]

_EXPORTS = {"Engine": "engine", "Step": "engine", "load": "engine", "InputError": "kernels.errors"}


def __getattr__(name: str) -> Any:
    """Imports torch only when something that needs it is asked for: `dpllm --help` stays quick."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'dpllm' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f"dpllm.{_EXPORTS[name]}"), name)
