"""Shared fixtures. What session fixtures put on disk is for reading: a test that alters it copies it first."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from filelock import FileLock
from tiny_models import ARCHITECTURES, build_model
from tiny_text import train_tokenizer

from dpllm import reference
from dpllm.base.text import load_tokenizer, read_documents, sample_sequences
from dpllm.calib.calibrate import CalibrateOptions, Calibrator
from dpllm.calib.dp_llm import DPLLMOptions, calibrate_dp_llm
from dpllm.calib.dp_llm_averages import AveragesOptions
from dpllm.calib.runtime.profile import PROFILE_NAME, CalibrationProfile
from dpllm.model.loading import LoadOptions, load_decoder
from dpllm.quant.overlay import Overlay
from dpllm.quant.quantize import Quantizer
from dpllm.quant.quantize_plan import QuantizeOptions
from dpllm.quant.source import ModelSource

SEQUENCE = 128
LONGEST = (
    "test_prepare",
    "test_generate_and_eval",
    "test_damaged_input",
    "test_step_kernels",
    "test_triton_products",
    "test_reference_model",
    "test_quantize",
)
torch.set_num_threads(1)  # tiny matrices: more threads only get in each other's way


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest begin first, so that no worker is left alone with one of them in the end."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> Path:
    """A folder with one saved checkpoint per architecture."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name in ARCHITECTURES:
        build_model(name).save_pretrained(root / name)
    return root


@pytest.fixture(scope="session")
def calibration_documents() -> list[str]:
    return read_documents(reference.calibration_text())


@pytest.fixture(scope="session")
def heldout_documents() -> list[str]:
    return read_documents(reference.heldout_text())


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory, calibration_documents) -> Path:
    """A random llama of three layers with a real byte-level BPE tokenizer of 384 tokens."""
    path = tmp_path_factory.mktemp("tiny") / "checkpoint"
    build_model("llama", vocab_size=384, max_position_embeddings=512).save_pretrained(path)
    train_tokenizer([calibration_documents[0][:8000]], 384).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tokenizer(tiny_checkpoint):
    return load_tokenizer(tiny_checkpoint)


@pytest.fixture(scope="session")
def quantized(tiny_checkpoint, tokenizer, calibration_documents) -> Path:
    """The checkpoint as an overlay of planes 2..6, without a profile."""
    source, options = ModelSource.open(tiny_checkpoint), QuantizeOptions(samples=8, sequence_length=64)
    out = tiny_checkpoint.parent / "overlay"
    job = Quantizer(source, out, options, documents=calibration_documents[:4], tokenizer=tokenizer, jobs=2)
    return job.run()


@pytest.fixture(scope="session")
def calibration_sequences(tokenizer, calibration_documents) -> torch.Tensor:
    return sample_sequences(calibration_documents, tokenizer, 32, SEQUENCE, seed=0)


@pytest.fixture(scope="session")
def heldout_sequences(tokenizer, heldout_documents) -> torch.Tensor:
    """Other text than the calibration saw, in pieces of the same length."""
    return sample_sequences(heldout_documents, tokenizer, 64, SEQUENCE, seed=1)


@pytest.fixture(scope="session")
def profiles(quantized, calibration_sequences, tmp_path_factory, worker_id) -> dict[str, CalibrationProfile]:
    """A calibration at each granularity; workers share it."""

    def calibrate(granularity: str) -> CalibrationProfile:
        decoder = load_decoder(quantized, LoadOptions(granularity=granularity))
        calibrator = Calibrator(decoder, calibration_sequences, CalibrateOptions(budgets=(4.0,)))
        profile = calibrator.run(Overlay.open(quantized).hash, granularity, {}, lambda *stage: None)
        caps = {"6": profile.planes(None), "4": profile.budget(4)}
        few = DPLLMOptions(averages=AveragesOptions(steps=6, length=64), tokens=2048, tune_steps=40)
        found = calibrate_dp_llm(
            decoder, calibration_sequences, caps, {b: [2.75, 3.25, 4.0] for b in caps}, few
        )
        return replace(profile, extra=dict(profile.extra) | found)

    root = tmp_path_factory.getbasetemp()
    shared = (root if worker_id == "master" else root.parent) / f"profiles-{Overlay.open(quantized).hash}"
    with FileLock(f"{shared}.lock"):
        shared.mkdir(exist_ok=True)
        for g in ("fused", "linear"):
            if not (shared / g).exists():
                calibrate(g).save(shared / g)
    return {g: CalibrationProfile.load(shared / g) for g in ("fused", "linear")}


@pytest.fixture(scope="session")
def tiny_overlay(quantized, profiles) -> Path:
    """The overlay with its (fused) profile beside it: what a user has after quantize and calibrate."""
    profiles["fused"].save(quantized / PROFILE_NAME)
    return quantized
