"""What bits and pruning cost in quality: nats per token above the resident maximum with the whole cache.

Weights and cache are measured together, because their errors meet in the same logits: documents are read, their caches
pruned to every ratio, and what follows is decoded at every number of bits. Without such a measurement the calibration's
own estimate stands in; it knows nothing of pruning.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpllm.base.errors import InputError
from dpllm.base.files import write_text
from dpllm.calib.runtime.profile import CalibrationProfile, Resident

if TYPE_CHECKING:
    from dpllm.engine import Engine

VERSION = 1
NAME = "quality.json"


@dataclass(frozen=True)
class QualityModel:
    """nats[i][j]: loss per token at bits[i] with keep[j] of the cache, above the resident maximum with all of it; falls
    along bits and along keep. text: what it was measured on; tokens: how many (0: the calibration's estimate)."""

    overlay_hash: str
    text: str
    tokens: int
    bits: tuple[float, ...]
    keep: tuple[float, ...]
    nats: tuple[tuple[float, ...], ...]

    def loss(self, bits: float, keep: float = 1.0) -> float:
        """Nats per token; straight between measured bits and between logarithms of measured ratios."""
        columns, table = np.arange(len(self.keep)), np.asarray(self.nats)
        at = float(np.interp(np.log(keep), np.log(self.keep), columns))
        low, high = math.floor(at), math.ceil(at)
        return float(
            np.interp(bits, self.bits, table[:, low] + (at - low) * (table[:, high] - table[:, low]))
        )

    def save(self, path: Path) -> None:
        """Writes it as JSON, atomically."""
        write_text(path, json.dumps({"quality_version": VERSION, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path, overlay_hash: str) -> QualityModel:
        """Raises InputError for a file that is not such a measurement, or one of another overlay."""
        try:
            stored = json.loads(path.read_text())
            version = stored.pop("quality_version")
            if version != VERSION:
                raise ValueError(f"version {version}, this dpllm reads {VERSION}")
            nats = tuple(tuple(float(x) for x in row) for row in stored.pop("nats"))
            lists: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
            found = cls(nats=nats, **lists)
            if np.shape(found.nats) != (len(found.bits), len(found.keep)):
                raise ValueError("its table is not whole")
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
            raise InputError(
                f"{path} is not a measurement of quality ({e}). Run: dpllm profile --quality"
            ) from None
        if found.overlay_hash != overlay_hash:
            raise InputError(f"{path} was measured with another overlay. Run: dpllm profile --quality")
        return found


def quality_of(engine: Engine) -> QualityModel:
    """The measurement beside the overlay, else the calibration's estimate. Raises InputError without a profile."""
    profile, beside = engine.calibration(), engine.path / NAME
    return QualityModel.load(beside, profile.overlay_hash) if beside.exists() else estimated(profile)


def estimated(profile: CalibrationProfile, resident: Resident = None) -> QualityModel:
    """From calibration alone: the loss its gains predict at every number of bits, with the whole cache."""
    low, high = profile.target_range(resident)
    bits = [float(b) for b in np.linspace(low, high, 17)]
    losses = [expected_loss(profile, b, resident) for b in bits]
    rows = tuple((max(0.0, x - losses[-1]),) for x in losses)
    return QualityModel(profile.overlay_hash, "the calibration's estimate", 0, tuple(bits), (1.0,), rows)


def expected_loss(profile: CalibrationProfile, target_bits: float, resident: Resident = None) -> float:
    """Nats per token that calibration predicts at these bits, less those of reading the seed width everywhere."""
    planes = profile.planes(resident)
    thresholds = profile.thresholds(profile.lambda_for(target_bits, planes), planes)
    steps = (profile.lower_edges()[:, :, None] >= thresholds[:, None, :]).sum(axis=2)  # [G, M]
    gains = np.concatenate([np.zeros_like(profile.gain[:, :1]), np.cumsum(profile.gain, axis=1)], axis=1)
    taken = np.take_along_axis(gains, steps[:, None, :], axis=1)[
        :, 0
    ]  # [G, M]; bins hold equally many tokens
    return -float(taken.mean(axis=1).sum())
