"""Models the quality lost by reading fewer bits and by pruning the cache.

The loss is in nats per token above the resident maximum with the whole cache. Weights and cache are measured together,
because their errors add up in the same logits (quality_measurement.py). Without such a measurement, the calibration's
estimate is used. The estimate does not cover pruning.
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
from dpllm.base.json_text import strict_json
from dpllm.base.places import check_readable
from dpllm.calib.runtime.profile import CalibrationProfile, Resident

if TYPE_CHECKING:
    from dpllm.engine import Engine

VERSION = 1
NAME = "quality.json"


@dataclass(frozen=True)
class QualityModel:
    """A table of losses.

    overlay_hash: the overlay it was measured with. text: name of the text it was measured on. tokens: tokens of that
    text (0: the calibration's estimate). bits, keep: effective bits and shares of the cache, both ascending.
    nats[i][j]: loss per token at bits[i] with keep[j] of the cache, above the resident maximum with the whole cache;
    the loss falls along both axes.
    """

    overlay_hash: str
    text: str
    tokens: int
    bits: tuple[float, ...]
    keep: tuple[float, ...]
    nats: tuple[tuple[float, ...], ...]

    def loss(self, bits: float, keep: float = 1.0) -> float:
        """Returns nats per token, interpolated linearly in the bits and in the logarithm of the share kept."""
        columns, table = np.arange(len(self.keep)), np.asarray(self.nats)
        at = float(np.interp(np.log(keep), np.log(self.keep), columns))
        low, high = math.floor(at), math.ceil(at)
        return float(
            np.interp(bits, self.bits, table[:, low] + (at - low) * (table[:, high] - table[:, low]))
        )

    def save(self, path: Path) -> None:
        """Writes the model as JSON, atomically."""
        write_text(path, strict_json({"quality_version": VERSION, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path, overlay_hash: str) -> QualityModel:
        """Reads a stored model. Raises InputError if the file is not one or is of another overlay."""
        check_readable(path)
        try:
            stored = json.loads(path.read_text())
            version = stored.pop("quality_version")
            if version != VERSION:
                raise ValueError(f"version {version}, this dpllm reads {VERSION}")
            nats = tuple(tuple(float(x) for x in row) for row in stored.pop("nats"))
            lists: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
            found = cls(nats=nats, **lists)
            if np.shape(found.nats) != (len(found.bits), len(found.keep)):
                raise ValueError("its table is incomplete")
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
            raise InputError(
                f"{path} is not a measurement of quality ({e}). Run: dpllm profile --quality --overlay OVERLAY"
            ) from None
        if found.overlay_hash != overlay_hash:
            raise InputError(
                f"{path} was measured with another overlay. Run: dpllm profile --quality --overlay OVERLAY"
            )
        return found


def quality_of(engine: Engine) -> QualityModel:
    """Returns the measurement stored with the overlay, or else the calibration's estimate.

    Raises InputError if the engine has no calibration profile.
    """
    profile, stored = engine.calibration(), engine.path / NAME
    return QualityModel.load(stored, profile.overlay_hash) if stored.exists() else estimated(profile)


def estimated(profile: CalibrationProfile, resident: Resident = None) -> QualityModel:
    """Returns the losses that the calibration's gains predict at every number of bits, with the whole cache."""
    low, high = profile.target_range(resident)
    bits = [float(b) for b in np.linspace(low, high, 17)]
    losses = [expected_loss(profile, b, resident) for b in bits]
    rows = tuple((max(0.0, x - losses[-1]),) for x in losses)
    return QualityModel(profile.overlay_hash, "the calibration's estimate", 0, tuple(bits), (1.0,), rows)


def expected_loss(profile: CalibrationProfile, target_bits: float, resident: Resident = None) -> float:
    """Returns the loss in nats per token that calibration predicts at these bits.

    The loss is relative to reading the seed width everywhere, so it is negative.
    """
    planes = profile.planes(resident)
    thresholds = profile.thresholds(profile.lambda_for(target_bits, planes), planes)
    steps = (profile.lower_edges()[:, :, None] >= thresholds[:, None, :]).sum(axis=2)  # [G, M]
    gains = np.concatenate([np.zeros_like(profile.gain[:, :1]), np.cumsum(profile.gain, axis=1)], axis=1)
    taken = np.take_along_axis(gains, steps[:, None, :], axis=1)[
        :, 0
    ]  # [G, M]; every bin holds the same number of tokens
    return -float(taken.mean(axis=1).sum())
