"""A calibration profile: everything a policy needs to answer to any target, in one safetensors file.

Bound to one overlay by its hash, and checksummed. Arrays are per decision group; widths are
seed_bits .. max_bits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from dpllm.kernels.errors import InputError
from dpllm.quant.files import write_tensors

PROFILE_VERSION = 1
PROFILE_NAME = "profile.safetensors"
_VECTORS = ("knots", "gain", "mean_loss", "weights", "cost", "curve_bits", "curve_log2_lambda")


@dataclass(frozen=True)
class CalibrationProfile:
    """One calibration. G groups, B widths, M bins of the signal, C points of a lambda curve.

    diagonals: per group float16 [K], expected loss per squared input; the estimator's only table.
    knots: float64 [G, M-1] ascending, bin edges of the signal. gain: float64 [G, B-1, M], expected loss
    saved by one more bit in each bin, non-decreasing in the signal. mean_loss: float64 [G, B].
    weights: int64 [G], matrix elements. cost: int64 [G, B], bytes read at each width.
    curve_log2_lambda, curve_bits: float64 [B-1, C], effective bits that decoding uses at each lambda when
    seed_bits + 1 + row planes are resident; lambda falls, bits rise along C.
    """

    overlay_hash: str
    granularity: str
    bits: tuple[int, int]
    group_names: tuple[str, ...]
    diagonals: tuple[np.ndarray, ...]
    knots: np.ndarray
    gain: np.ndarray
    mean_loss: np.ndarray
    weights: np.ndarray
    cost: np.ndarray
    curve_log2_lambda: np.ndarray
    curve_bits: np.ndarray
    origin: Mapping[str, Any]

    def estimator_bytes(self) -> int:
        """Bytes the selector itself reads for every token."""
        return sum(d.nbytes for d in self.diagonals)

    def _curve(self, max_bits: int | None) -> tuple[np.ndarray, np.ndarray]:
        row = (max_bits or self.bits[1]) - self.bits[0] - 1
        return self.curve_log2_lambda[row], self.curve_bits[row]

    def target_range(self, max_bits: int | None = None) -> tuple[float, float]:
        """Effective bits that can be asked for when max_bits planes are resident (default: all)."""
        _, bits = self._curve(max_bits)
        return float(bits[0]), float(bits[-1])

    def lambda_for(self, target_bits: float, max_bits: int | None = None) -> float:
        """The lambda whose measured effective bits are the target (log-linear between curve points)."""
        low, high = self.target_range(max_bits)
        if not low <= target_bits <= high:
            raise InputError(
                f"target {target_bits} bits is out of reach: {low:.2f} to {high:.2f} can be had. "
                "Choose a target in between; a wider range needs more resident planes."
            )
        log2_lambda, bits = self._curve(max_bits)
        return float(2 ** np.interp(target_bits, bits, log2_lambda))

    def thresholds(self, lam: float, max_bits: int | None = None) -> np.ndarray:
        """Signal above which each further bit is worth its bytes. float32 [G, max_bits - seed], ascending.

        In every bin the width minimises expected loss + lambda * bytes; since gains rise with the signal,
        the best width does too, so the whole rule is a threshold per step (possibly infinite).
        """
        steps = (max_bits or self.bits[1]) - self.bits[0]
        groups = len(self.gain)
        price = lam * np.diff(self.cost, axis=1)[:, :steps, None]
        merit = np.cumsum(self.gain[:, :steps] - price, axis=1)  # of going from the seed up to each width
        merit = np.concatenate([np.zeros_like(merit[:, :1]), merit], axis=1)
        best = np.maximum.accumulate(merit.argmax(axis=1), axis=1)  # [G, M] steps above the seed
        edges = np.concatenate([np.full((groups, 1), -np.inf), self.knots], axis=1)  # lower edge of each bin
        out = np.full((groups, steps), np.inf)
        for step in range(steps):
            reached = best > step
            first = reached.argmax(axis=1)
            out[:, step] = np.where(reached.any(axis=1), edges[np.arange(groups), first], np.inf)
        return out.astype(np.float32)

    def save(self, path: Path) -> None:
        """Writes the profile atomically."""
        tensors = {name: np.ascontiguousarray(getattr(self, name)) for name in _VECTORS}
        tensors |= {f"diagonal.{i}": d for i, d in enumerate(self.diagonals)}
        header = {
            "profile_version": PROFILE_VERSION,
            "overlay_hash": self.overlay_hash,
            "granularity": self.granularity,
            "bits": list(self.bits),
            "group_names": list(self.group_names),
            "origin": dict(self.origin),
        }
        header["sha256"] = _sha256(tensors, header)
        as_torch = {name: torch.from_numpy(t) for name, t in tensors.items()}
        write_tensors(path, as_torch, {"dpllm_profile": json.dumps(header)})

    @classmethod
    def load(cls, path: Path, overlay_hash: str | None = None) -> CalibrationProfile:
        """Reads and checks a profile; with overlay_hash, refuses one made for another overlay."""
        header, tensors = _read(path)
        if overlay_hash is not None and header["overlay_hash"] != overlay_hash:
            raise InputError(
                f"{path} was calibrated for another overlay ({header['overlay_hash'][:12]}, this one is "
                f"{overlay_hash[:12]}). Run: dpllm calibrate {path.parent}"
            )
        diagonals = tuple(tensors[f"diagonal.{i}"] for i in range(len(header["group_names"])))
        return cls(
            overlay_hash=header["overlay_hash"],
            granularity=header["granularity"],
            bits=tuple(header["bits"]),
            group_names=tuple(header["group_names"]),
            diagonals=diagonals,
            origin=header["origin"],
            **{name: tensors[name] for name in _VECTORS},
        )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    if not path.is_file():
        raise InputError(f"{path} does not exist. Run: dpllm calibrate {path.parent}")
    try:
        with safe_open(path, framework="np") as f:
            header = json.loads((f.metadata() or {})["dpllm_profile"])
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118  (no iterator)
        version = header.get("profile_version")
        sound = header["sha256"] == _sha256(tensors, {k: v for k, v in header.items() if k != "sha256"})
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, OSError) as e:
        raise InputError(
            f"{path} is no intact calibration profile ({e}). Run dpllm calibrate again."
        ) from None
    if version != PROFILE_VERSION:
        raise InputError(
            f"{path}: profile version {version!r}, this dpllm reads {PROFILE_VERSION}. Calibrate again."
        )
    if not sound:
        raise InputError(f"{path} is damaged: its checksum does not match. Run dpllm calibrate again.")
    return header, tensors


def _sha256(tensors: Mapping[str, np.ndarray], header: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name}{tensors[name].dtype}{tensors[name].shape}".encode())
        digest.update(np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()
