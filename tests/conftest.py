"""Shared fixtures."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from tiny_models import ARCHITECTURES, build_model


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> Path:
    """A folder with one saved checkpoint per architecture."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name in ARCHITECTURES:
        build_model(name).save_pretrained(root / name)
    return root
