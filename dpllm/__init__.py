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
    from dpllm.api import load
    from dpllm.base.errors import InputError
    from dpllm.context.kv_context import KVContext
    from dpllm.context.options import ContextOptions
    from dpllm.decode.generation import Generation, GenerationStats, Step
    from dpllm.decode.options import GenerateOptions
    from dpllm.engine import Engine
    from dpllm.evaluation.text_score import TextScore
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
    "GenerateOptions": "dpllm.decode.options",
    "Generation": "dpllm.decode.generation",
    "GenerationStats": "dpllm.decode.generation",
    "InputError": "dpllm.base.errors",
    "KVContext": "dpllm.context.kv_context",
    "Planned": "dpllm.planning.planner",
    "Step": "dpllm.decode.generation",
    "TextScore": "dpllm.evaluation.text_score",
    "calibrate": "dpllm.prepare.calibrate",
    "load": "dpllm.api",
    "plan": "dpllm.planning.plan",
    "quantize": "dpllm.prepare.quantize",
}

__all__ = [
    "Budget", "CalibrationReport", "ContextOptions", "Engine", "GenerateOptions", "Generation", "GenerationStats",
    "InputError", "KVContext", "Planned", "Step", "TextScore", "__version__", "calibrate", "load", "plan", "quantize",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Imports torch only when something that needs it is asked for: `dpllm --help` stays quick."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'dpllm' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_EXPORTS[name]), name)
