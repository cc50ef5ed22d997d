"""Rotary embedding as a GGUF file describes it. Llama 3 scales it by a tensor, which holds a divisor per frequency."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dpllm.base.errors import InputError
from dpllm.quant.gguf.header import StoredTensor
from dpllm.quant.gguf.metadata import Metadata
from dpllm.quant.gguf.types import dequantized

ROPE_FREQUENCIES = "rope_freqs.weight"
THETA = 10_000.0  # where the metadata do not say otherwise


def rope_parameters(
    meta: Metadata, head: int, divisors: tuple[Path, StoredTensor] | None
) -> dict[str, Any]:  # fmt: skip
    """The `rope_parameters` of config.json.

    head: values per head. divisors: where the tensor 'rope_freqs.weight' lies. Raises InputError for a scaling that
    transformers has no formula for.
    """
    own = f"{meta.text('general.architecture')}.rope."
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": meta.real(own + "freq_base", THETA)}
    kind = meta.text(own + "scaling.type", "none")
    if own + "scale_linear" in meta:  # the key of older files
        kind, factor = "linear", meta.real(own + "scale_linear")
    else:
        factor = meta.real(own + "scaling.factor", 1.0)
    if divisors is not None:
        if kind != "none":
            raise InputError(
                f"{meta.path} scales rotary embedding twice ('{kind}' and a tensor). Get another conversion."
            )
        return found | llama3_parameters(meta.path, found["rope_theta"], _read(meta.path, divisors, head))
    if kind == "none" or (kind == "linear" and factor == 1):
        return found
    if kind == "linear":
        return found | {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return found | _yarn(meta, own, factor)
    raise InputError(f"{meta.path}: rotary embedding is scaled by '{kind}', which is not supported.")


def _yarn(meta: Metadata, own: str, factor: float) -> dict[str, Any]:
    found: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
    found["original_max_position_embeddings"] = meta.whole(own + "scaling.original_context_length")
    for name in ("beta_fast", "beta_slow"):
        if own + f"scaling.yarn_{name}" in meta:
            found[name] = meta.real(own + f"scaling.yarn_{name}")
    if own + "scaling.attn_factor" in meta:  # a further factor on the one of the paper
        found["attention_factor"] = meta.real(own + "scaling.attn_factor") * (1 + 0.1 * float(np.log(factor)))
    return found


def _read(path: Path, divisors: tuple[Path, StoredTensor], head: int) -> np.ndarray:
    """The divisors, float64 [head / 2]."""
    where, tensor = divisors
    if tensor.shape != (head // 2,):
        raise InputError(
            f"{where}: tensor '{ROPE_FREQUENCIES}' has shape {list(tensor.shape)}, not {[head // 2]}. "
            "Get another conversion."
        )
    raw = np.fromfile(where, np.uint8, tensor.nbytes, offset=tensor.offset)
    values = dequantized(raw, tensor.shape, tensor.kind).double().numpy()
    if not np.isfinite(values).all() or values.min() <= 0:
        raise InputError(
            f"{path}: tensor '{ROPE_FREQUENCIES}' holds values that are not divisors. Download it again."
        )
    return values


def llama3_parameters(path: Path, theta: float, divisors: np.ndarray) -> dict[str, Any]:
    """Llama 3's parameters that give these divisors.

    Short waves have divisor 1 and long waves `factor`. Between two lengths, 1 / divisor is linear in 1 / wavelength;
    the line says what the two lengths are. Raises InputError where no parameters fit.
    """
    if np.allclose(divisors, 1):
        return {}
    wavelengths = 2 * np.pi * theta ** (np.arange(len(divisors)) / len(divisors))
    factor = float(np.round(divisors.max(), 4))
    for original, low, high in ((8192, 1.0, 4.0), *_fitted(1 / wavelengths, 1 / divisors, factor)):
        smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
        if np.allclose((1 - smooth) / factor + smooth, 1 / divisors, rtol=1e-3):
            return {
                "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }  # fmt: skip
    raise InputError(
        f"{path}: the divisors in '{ROPE_FREQUENCIES}' do not follow Llama 3's formula. Such a model is "
        "not supported."
    )


def _fitted(inverse: np.ndarray, share: np.ndarray, factor: float) -> list[tuple[int, float, float]]:
    """(original length, 1, high factor) by a line through the divisors that lie between 1 and `factor`."""
    between = (share > 1 / factor * 1.001) & (share < 0.999)
    if between.sum() < 2:
        return []
    slope, base = np.polyfit(inverse[between], share[between], 1)
    low, high = (
        (1 / factor - base) / slope,
        (1 - base) / slope,
    )  # 1 / wavelength where the line leaves the range
    if not 0 < low < high:
        return []
    return [(round(1 / low), 1.0, float(np.round(high / low, 4)))]
