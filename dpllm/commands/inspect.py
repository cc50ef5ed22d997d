"""`dpllm inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from dpllm.base.errors import InputError
from dpllm.calib.runtime.profile import PROFILE_NAME, CalibrationProfile
from dpllm.commands.common import print_json, stage_bars, stdout
from dpllm.context.saved import is_context, read_manifest
from dpllm.model.loading import is_overlay
from dpllm.model.memory import resident_bytes
from dpllm.quant.overlay import Overlay
from dpllm.quant.source import ModelSource


def run(directory: str, verify: bool, as_json: bool) -> None:
    """Describes an overlay, a checkpoint, a profile or a saved context."""
    path = Path(directory).expanduser()
    if path.is_file():
        facts = {"kind": "profile", "path": str(path), **describe_profile(CalibrationProfile.load(path))}
    elif not path.is_dir():
        raise InputError(f"{path} does not exist. Give an overlay, a checkpoint directory or a profile.")
    elif is_context(path):
        facts = {"kind": "context", "path": str(path), **read_manifest(path)}
    elif is_overlay(path):
        facts = describe_overlay(path, verify)
    else:
        facts = describe_checkpoint(path, verify)
    if as_json:
        print_json(facts)
        return
    table = Table(show_header=False)
    for key, value in facts.items():
        table.add_row(key, Text(_readable(key, value)))
    stdout.print(table)


def describe_overlay(path: Path, verify: bool) -> dict[str, Any]:
    """Widths, bytes by kind, memory at each resident width, provenance, the profile beside it."""
    overlay = Overlay.open(path)
    if verify:
        _read_all(overlay, [name for name, _ in overlay.entries()])
    q, (lo, hi) = overlay.quantization, overlay.bits
    profile = path / PROFILE_NAME
    return {
        "kind": "overlay",
        "path": str(path),
        "model_type": overlay.config["model_type"],
        "hash": overlay.hash,
        "bits": [lo, hi],
        "head_bits": q["head_bits"],
        "matrices": len(overlay.linears),
        "weights": sum(n * k for n, k in (w.shape for w in overlay.linears.values())),
        "rows_per_table": sorted({w.rows_per_table for w in overlay.linears.values()}),
        "stored_bytes": overlay.stored_bytes(),
        "resident_bytes": {b: resident_bytes(overlay, b) for b in range(lo, hi + 1)},
        "fisher": q["fisher"],
        "unquantized": len(q["unquantized"]),
        "verified": verify,
        "profile": describe_profile(CalibrationProfile.load(profile, overlay.hash))
        if profile.exists()
        else None,
    }


def describe_profile(profile: CalibrationProfile) -> dict[str, Any]:
    """Targets, granularity, size of the selector, provenance."""
    low, high = profile.target_range()
    return {
        "overlay_hash": profile.overlay_hash,
        "granularity": profile.granularity,
        "groups": len(profile.group_names),
        "targets": [round(low, 3), round(high, 3)],
        "estimator_bytes": profile.estimator_bytes(),
        "asynchronous": bool((profile.source != np.arange(len(profile.source))).any()),
        "budgets": sorted(float(b) for b in profile.origin.get("budgets", {})),
        "dp_llm_targets": sorted({float(t) for t in profile.extra.get("dp-llm.targets", [])}),
        "origin": dict(profile.origin),
    }


def describe_checkpoint(path: Path, verify: bool) -> dict[str, Any]:
    """A plain checkpoint's tensors and bytes."""
    source = ModelSource.open(path)
    names = list(source.names())
    if verify:
        _read_all(source, names)
    elements = 0
    for name in names:
        count = 1
        for size in source.shape(name):
            count *= size
        elements += count
    return {
        "kind": "checkpoint", "path": str(path), "model_type": source.config.get("model_type"),
        "tensors": len(names), "parameters": elements, "dtypes": sorted({source.dtype(n) for n in names}),
        "verified": verify,
    }  # fmt: skip


def _read_all(source: Any, names: list[str]) -> None:
    with stage_bars() as progress:
        for i, name in enumerate(names):
            source.read(name)
            progress("verify", i + 1, len(names))


def _readable(key: str, value: Any) -> str:
    if key.endswith("_bytes") and isinstance(value, int):
        return f"{value / 1e6:.3f} MB"
    if key.endswith("_bytes") and isinstance(value, dict):
        return ", ".join(f"{k}: {v / 1e6:.3f} MB" for k, v in value.items())
    if isinstance(value, dict):
        return "\n".join(f"{k}: {_readable(k, v)}" for k, v in value.items())
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
