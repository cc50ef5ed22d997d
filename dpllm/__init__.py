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

from dpllm.version import __version__

# torch's OpenMP threads spin for a while after each operation and would take the cores that the native kernels need:
# 15% of the time of a prompt on two cores. Read when torch loads its OpenMP; a user's own setting stands.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# In a checkout the sub-packages lie beside this folder, not in it.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file():
    __path__.append(str(_root))

if TYPE_CHECKING:
    from dpllm.base.errors import InputError
    from dpllm.context.build import build_context, prune_tail
    from dpllm.context.kv_context import KVContext
    from dpllm.context.options import ContextOptions
    from dpllm.context.saved import load_context, save_context
    from dpllm.engine import Engine, GenerateOptions, Step, load
    from dpllm.kvzip_bridge.budget import Budget
    from dpllm.planning.plan import plan
    from dpllm.planning.planner import Planned
    from dpllm.prepare.calibrate import CalibrationReport, calibrate
    from dpllm.prepare.quantize import quantize

_EXPORTS = {
    "Budget": "dpllm.kvzip_bridge.budget",
    "CalibrationReport": "dpllm.prepare.calibrate",
    "ContextOptions": "dpllm.context.options",
    "Engine": "dpllm.engine",
    "GenerateOptions": "dpllm.engine",
    "InputError": "dpllm.base.errors",
    "KVContext": "dpllm.context.kv_context",
    "Planned": "dpllm.planning.planner",
    "Step": "dpllm.engine",
    "build_context": "dpllm.context.build",
    "calibrate": "dpllm.prepare.calibrate",
    "load": "dpllm.engine",
    "load_context": "dpllm.context.saved",
    "plan": "dpllm.planning.plan",
    "prune_tail": "dpllm.context.build",
    "quantize": "dpllm.prepare.quantize",
    "save_context": "dpllm.context.saved",
}

__all__ = [
    "Budget", "CalibrationReport", "ContextOptions", "Engine", "GenerateOptions", "InputError", "KVContext", "Planned",
    "Step", "__version__", "build_context", "calibrate", "load", "load_context", "plan", "prune_tail", "quantize",
    "save_context",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Imports torch only when something that needs it is asked for: `dpllm --help` stays quick."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'dpllm' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_EXPORTS[name]), name)
