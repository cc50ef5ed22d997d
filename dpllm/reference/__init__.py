"""The bundled reference model: a 7 M parameter Llama trained on Python's standard library.

It is the default of every command, and the yardstick for quality. `model/` is the checkpoint with its
card, `overlay/` what `dpllm quantize` and `dpllm calibrate` made of it, `calibration.jsonl` and
`heldout.jsonl` excerpts of training and held-out files.
"""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent


def model_path() -> Path:
    """The bf16 checkpoint."""
    return _HERE / "model"


def overlay_path() -> Path:
    """The overlay with its calibration profile."""
    return _HERE / "overlay"


def calibration_text() -> Path:
    """Default text of `dpllm quantize` and `dpllm calibrate`."""
    return _HERE / "calibration.jsonl"


def heldout_text() -> Path:
    """Text of files the model was never trained on."""
    return _HERE / "heldout.jsonl"
