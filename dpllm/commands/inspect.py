"""`dpllm inspect`: what a directory holds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from dpllm.base.errors import InputError
from dpllm.commands.app import COMMON, Command, Json, app
from dpllm.commands.common import note, print_json, stage_bars, stdout

if TYPE_CHECKING:
    from dpllm.calib.runtime.profile import CalibrationProfile

Directory = Annotated[
    str,
    typer.Argument(help="Overlay, checkpoint, GGUF file, calibration profile or saved context to describe."),
]
Verify = Annotated[
    bool,
    typer.Option("--verify", help="Also read every tensor and check its sha256.", rich_help_panel=COMMON),
]


@app.command(cls=Command)
def inspect(*, directory: Directory, verify: Verify = False, json: Json = False) -> None:
    """Describe what a directory holds: shapes, widths, bytes by kind, and how it was made."""
    facts = describe(Path(directory).expanduser(), verify=verify)
    if json:
        print_json(facts)
        return
    table = Table(show_header=False)
    for key, value in facts.items():
        table.add_row(key, Text(_readable(key, value)))
    stdout.print(table)


def describe(path: Path, *, verify: bool) -> dict[str, Any]:
    """The object of `dpllm inspect --json`. Raises InputError for a path that holds none of these kinds."""
    from dpllm.calib.runtime.profile import CalibrationProfile
    from dpllm.context.saved import is_context, read_manifest
    from dpllm.model.loading import is_overlay
    from dpllm.quant.gguf.header import is_gguf

    if is_gguf(path):
        return {"kind": "gguf", "path": str(path), **describe_gguf(path, verify)}
    if path.is_file():
        return {"kind": "profile", "path": str(path), **describe_profile(CalibrationProfile.load(path))}
    if not path.is_dir():
        raise InputError(f"{path} does not exist. Give an overlay, a checkpoint directory or a profile.")
    if is_context(path):
        return {"kind": "context", "path": str(path), **read_manifest(path)}
    return describe_overlay(path, verify) if is_overlay(path) else describe_checkpoint(path, verify)


def describe_overlay(path: Path, verify: bool) -> dict[str, Any]:
    """Widths, bytes by kind, memory at each resident width, provenance, and its profile."""
    from dpllm.calib.runtime.profile import PROFILE_NAME, CalibrationProfile
    from dpllm.model.memory import resident_bytes
    from dpllm.quant.overlay import Overlay

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
        **_generation(path),
        "profile": describe_profile(CalibrationProfile.load(profile, overlay.hash))
        if profile.exists()
        else None,
    }


def describe_profile(profile: CalibrationProfile) -> dict[str, Any]:
    """Targets, granularity, size of the selector, and provenance of a profile."""
    low, high = profile.target_range()
    return {
        "overlay_hash": profile.overlay_hash,
        "granularity": profile.granularity,
        "groups": len(profile.group_names),
        "targets": [round(low, 3), round(high, 3)],
        "estimator_bytes": profile.estimator_bytes(),
        "asynchronous": any(source != group for group, source in enumerate(profile.source)),
        "budgets": sorted(float(b) for b in profile.origin.get("budgets", {})),
        "dp_llm_targets": sorted({float(t) for t in profile.extra.get("dp-llm.targets", [])}),
        "origin": dict(profile.origin),
    }


def describe_checkpoint(path: Path, verify: bool) -> dict[str, Any]:
    """Parameters, types and stored tensors of a plain checkpoint. Raises InputError for one that cannot be loaded."""
    from dpllm.model.config import ModelConfig
    from dpllm.quant.checkpoint import Checkpoint
    from dpllm.quant.source import ModelSource

    config, source = ModelConfig.read(path), ModelSource.open(path)
    checkpoint = Checkpoint(source)
    names, stored = list(checkpoint.names()), list(source.names())
    if verify:
        _read_all(checkpoint, names)
    return {
        "kind": "checkpoint", "path": str(path), "model_type": config.model_type,
        "tensors": len(stored), "parameters": sum(math.prod(checkpoint.shape(n)) for n in names),
        "dtypes": sorted({source.dtype(n) for n in stored}), "tied_head": checkpoint.tied,
        "unused_tensors": checkpoint.unused(), "verified": verify, **_generation(path),
    }  # fmt: skip


def describe_gguf(path: Path, verify: bool) -> dict[str, Any]:
    """Architecture, tokenizer and types of a GGUF file, by its header alone unless `verify` is given."""
    from dpllm.quant.gguf.families import FAMILIES
    from dpllm.quant.gguf.model import GgufModel
    from dpllm.quant.resolve import resolve_model
    from dpllm.quant.source import ModelSource

    model = GgufModel.read(path)
    if verify:
        source = ModelSource.open(resolve_model(str(path), note))
        _read_all(source, list(source.names()))
    metadata, types = model.header.metadata, model.types()
    architecture = metadata.get("general.architecture")
    return {
        "name": metadata.get("general.name"), "architecture": architecture, "supported": architecture in FAMILIES,
        "tokenizer": [metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre")],
        "files": len(model.paths), "tensors": len(model.tensors), "parameters": sum(types.values()), "types": types,
        "note": model.quantized_note(), "verified": verify,
    }  # fmt: skip


def _generation(path: Path) -> dict[str, Any]:
    """The end tokens, and the sampling options that generation_config.json suggests."""
    from dpllm.model.config import end_token_ids
    from dpllm.model.generation_config import suggested_sampling

    return {"end_tokens": list(end_token_ids(path)), "suggested_sampling": suggested_sampling(path)}


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
