"""Copies of the tiny models, for tests of commands that alter them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def overlay(tiny_overlay, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(tiny_overlay, tmp_path / "overlay"))


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
