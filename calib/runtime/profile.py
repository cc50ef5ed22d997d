"""A calibration profile: everything a policy needs to meet any target, in one safetensors file.

A profile belongs to one overlay, by its hash, and has a checksum. Arrays are per decision group; widths are
seed_bits .. max_bits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from dpllm.base.errors import InputError
from dpllm.base.files import write_tensors
from dpllm.base.places import check_readable
from dpllm.base.shell import command_line

PROFILE_VERSION = 2
PROFILE_NAME = "profile.safetensors"
_VECTORS = (
    "knots", "gain", "mean_loss", "weights", "cost", "source", "probe", "context", "resident",
    "curve_bits", "curve_log2_lambda",
)  # fmt: skip
Resident = int | np.ndarray | None  # planes held: a number for every group, [G] of each group, None for all


@dataclass(frozen=True)
class CalibrationProfile:
    """One calibration: G groups, B widths, M bins of the signal, R residencies, C points of a lambda curve.

    A group's signal is m_t * sum_k d_k x_k^2, with x the input of group `source` and m_t the token's
    multiplier (calib/runtime/token_sensitivity.py), one number per token.

    diagonals: float16 [K] per group, expected loss per squared input. source: int64 [G], the group whose
    input is read: an earlier group where the estimate is asynchronous. probe (float16 [K], over group 0's
    input) and context (float64 [7]: weights and means of the context features, bias) define the multiplier.
    knots: float64 [G, M-1] ascending, bin edges of the signal. gain: float64 [G, B-1, M], expected loss
    saved by one more bit in each bin, non-decreasing in the signal. mean_loss: float64 [G, B].
    weights: int64 [G], matrix elements. cost: int64 [G, B], bytes read at each width.
    resident: int64 [R, G], planes held of each group; curve_log2_lambda, curve_bits: float64 [R, C],
    effective bits that decoding uses at each lambda with those planes; lambda falls and bits rise along C.
    origin: facts about the calibration, as JSON. extra: arrays of other policies ("dp-llm.*"), empty unless those
    were calibrated.
    """

    overlay_hash: str
    granularity: str
    bits: tuple[int, int]
    group_names: tuple[str, ...]
    diagonals: tuple[np.ndarray, ...]
    source: np.ndarray
    probe: np.ndarray
    context: np.ndarray
    knots: np.ndarray
    gain: np.ndarray
    mean_loss: np.ndarray
    weights: np.ndarray
    cost: np.ndarray
    resident: np.ndarray
    curve_log2_lambda: np.ndarray
    curve_bits: np.ndarray
    origin: Mapping[str, Any]
    extra: Mapping[str, np.ndarray] = field(default_factory=dict)

    def estimator_bytes(self) -> int:
        """Bytes that the selector itself reads for every token."""
        return sum(d.nbytes for d in self.diagonals) + self.probe.nbytes

    def planes(self, resident: Resident) -> np.ndarray:
        """The planes held of each group, int64 [G]."""
        high = self.bits[1] if resident is None else resident
        return np.minimum(np.broadcast_to(np.asarray(high, np.int64), len(self.gain)), self.bits[1])

    def _curve(self, resident: Resident) -> tuple[np.ndarray, np.ndarray]:
        planes = self.planes(resident)
        rows = np.flatnonzero((self.resident == planes).all(axis=1))
        if len(rows) == 0:
            mean = (planes * self.weights).sum() / self.weights.sum()
            raise InputError(
                f"the profile has no targets for the planes that are resident ({mean:.2f} bits on average). "
                "Run: dpllm calibrate OVERLAY --memory-bits with this budget."
            )
        return self.curve_log2_lambda[rows[0]], self.curve_bits[rows[0]]

    def target_range(self, resident: Resident = None) -> tuple[float, float]:
        """The (lowest, highest) effective bits that a target may have with these planes resident (default: all)."""
        _, bits = self._curve(resident)
        return float(bits[0]), float(bits[-1])

    def lambda_for(self, target_bits: float, resident: Resident = None) -> float:
        """The lambda whose measured effective bits are the target (log-linear between curve points).

        Raises InputError for a target out of range, or for resident planes without a curve.
        """
        low, high = self.target_range(resident)
        if not low - 1e-9 <= target_bits <= high + 1e-9:
            raise InputError(
                f"target {target_bits} bits is out of reach: {low:.2f} to {high:.2f} is possible. "
                "Choose a target in between, or hold more resident planes for a wider range."
            )
        log2_lambda, bits = self._curve(resident)
        return float(2 ** np.interp(target_bits, bits, log2_lambda))

    def budget(self, memory_bits: float) -> np.ndarray:
        """The planes that calibration allotted under this mean number of resident bits, int64 [G].

        Raises InputError for a budget that was not calibrated.
        """
        means = (self.resident * self.weights).sum(axis=1) / self.weights.sum()
        stored = self.origin.get("budgets", {})
        if f"{memory_bits:g}" in stored:
            return self.resident[stored[f"{memory_bits:g}"]]
        if memory_bits == int(memory_bits) and (same := np.flatnonzero(means == memory_bits)).size:
            return self.resident[same[0]]
        known = ", ".join(sorted(stored)) or "none"
        raise InputError(
            f"no budget of {memory_bits:g} resident bits was calibrated (stored: {known}). "
            f"Run: dpllm calibrate OVERLAY --memory-bits {memory_bits:g}"
        )

    def thresholds(self, lam: float, resident: Resident = None) -> np.ndarray:
        """The signal above which each further bit is worth its bytes: float32 [G, max(planes) - seed], ascending.

        In every bin the chosen width minimises expected loss + lambda * bytes. Gains rise with the signal, so the best
        width does too, and the whole rule is one threshold per step (possibly infinite).
        """
        planes = self.planes(resident)
        steps = int(planes.max()) - self.bits[0]
        groups = len(self.gain)
        price = lam * np.diff(self.cost, axis=1)[:, :steps, None]
        merit = np.cumsum(
            self.gain[:, :steps] - price, axis=1
        )  # loss saved by each width over the seed, less its price
        merit = np.concatenate([np.zeros_like(merit[:, :1]), merit], axis=1)
        beyond = np.arange(steps + 1)[None, :] > (planes - self.bits[0])[:, None]
        merit[beyond] = -np.inf
        best = np.maximum.accumulate(merit.argmax(axis=1), axis=1)  # [G, M] steps above the seed
        edges = self.lower_edges()
        out = np.full((groups, steps), np.inf, dtype=np.float32)
        for step in range(steps):
            reached = best > step
            first = reached.argmax(axis=1)
            out[:, step] = np.where(reached.any(axis=1), edges[np.arange(groups), first], np.inf)
        return out

    def lower_edges(self) -> np.ndarray:
        """The lower edge of each bin of signals, float32 [G, M].

        Every finite threshold is such an edge, so a bin exceeds a threshold where its edge is at or above it.
        """
        open_below = np.full((len(self.gain), 1), -np.inf)
        return np.concatenate([open_below, self.knots], axis=1).astype(np.float32)

    def exceeded(self, thresholds: np.ndarray) -> np.ndarray:
        """The share of the calibrated tokens whose signal exceeds each threshold [G, steps], counted in whole bins."""
        return (self.lower_edges()[:, None, :] >= thresholds[:, :, None]).mean(axis=2)

    def save(self, path: Path) -> None:
        """Writes the profile atomically."""
        tensors = {name: np.ascontiguousarray(getattr(self, name)) for name in _VECTORS}
        tensors |= {f"diagonal.{i}": d for i, d in enumerate(self.diagonals)}
        tensors |= {f"extra.{name}": np.ascontiguousarray(t) for name, t in self.extra.items()}
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
        """Reads and checks a profile.

        Raises InputError for a file that is missing, damaged or of another version, and for a profile of another
        overlay than overlay_hash (None: any).
        """
        header, tensors = _read(path)
        if overlay_hash is not None and header["overlay_hash"] != overlay_hash:
            raise InputError(
                f"{path} was calibrated for another overlay ({header['overlay_hash'][:12]}, this one is "
                f"{overlay_hash[:12]}). Run: {command_line('calibrate', path.parent)}"
            )
        diagonals = tuple(tensors[f"diagonal.{i}"] for i in range(len(header["group_names"])))
        return cls(
            overlay_hash=header["overlay_hash"],
            granularity=header["granularity"],
            bits=tuple(header["bits"]),
            group_names=tuple(header["group_names"]),
            diagonals=diagonals,
            origin=header["origin"],
            extra={n.removeprefix("extra."): t for n, t in tensors.items() if n.startswith("extra.")},
            **{name: tensors[name] for name in _VECTORS},
        )


def merge(one: CalibrationProfile, other: CalibrationProfile) -> CalibrationProfile:
    """Adds to `one` the budgets and policies that only `other` has. Both must come from the same measurement.

    Raises InputError if they were calibrated for different overlays, groups or gains.
    """
    same = (one.overlay_hash, one.granularity, one.bits) == (
        other.overlay_hash,
        other.granularity,
        other.bits,
    )
    if not same:
        raise InputError("profiles of different overlays, granularities or widths cannot be merged.")
    if not (np.array_equal(one.gain, other.gain) and np.array_equal(one.knots, other.knots)):
        raise InputError(
            "the profiles hold different measurements (other text, seed or options). Calibrate both in the same way."
        )
    fresh = [i for i, row in enumerate(other.resident) if not (one.resident == row).all(axis=1).any()]
    budgets = dict(one.origin.get("budgets", {}))
    resident = np.concatenate([one.resident, other.resident[fresh]])
    for name, row in other.origin.get("budgets", {}).items():
        at = np.flatnonzero((resident == other.resident[row]).all(axis=1))[0]
        budgets.setdefault(name, int(at))
    return replace(
        one,
        resident=resident,
        curve_log2_lambda=np.concatenate([one.curve_log2_lambda, other.curve_log2_lambda[fresh]]),
        curve_bits=np.concatenate([one.curve_bits, other.curve_bits[fresh]]),
        origin=dict(one.origin) | {"budgets": budgets},
        extra=dict(other.extra) | dict(one.extra),
    )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    if not path.is_file():
        raise InputError(f"{path} does not exist. Run: {command_line('calibrate', path.parent)}")
    check_readable(path)
    try:
        with safe_open(path, framework="np") as f:
            header = json.loads((f.metadata() or {})["dpllm_profile"])
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118  (no iterator)
        version = header.get("profile_version")
        sound = header["sha256"] == _sha256(tensors, {k: v for k, v in header.items() if k != "sha256"})
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, OSError) as e:
        raise InputError(
            f"{path} is not an intact calibration profile ({e}). Run: {command_line('calibrate', path.parent)}"
        ) from None
    if version != PROFILE_VERSION:
        raise InputError(
            f"{path}: profile version {version!r}, this dpllm reads {PROFILE_VERSION}. Calibrate again."
        )
    if not sound:
        raise InputError(
            f"{path} is damaged: its checksum does not match. Run: {command_line('calibrate', path.parent)}"
        )
    return header, tensors


def _sha256(tensors: Mapping[str, np.ndarray], header: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name}{tensors[name].dtype}{tensors[name].shape}".encode())
        digest.update(np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()
