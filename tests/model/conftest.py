"""Fixtures of the command line, of reports and of scripted models, and overlays of the tiny models."""

from __future__ import annotations

import io
import re
import shutil
import sys

import pytest
import torch
from command_line import Result, complaint
from report_cases import tiny_report
from scripted_models import save_scripted, token_chain

from dpllm.base.text import encode
from dpllm.commands.main import main
from dpllm.opening import open_engine
from dpllm.quant.quantize import Quantizer
from dpllm.quant.quantize_plan import QuantizeOptions
from dpllm.quant.source import ModelSource


@pytest.fixture(scope="session")
def overlay(checkpoints, tmp_path_factory):
    """A factory of overlays (planes 2..6): architecture and width of the head -> directory."""
    root = tmp_path_factory.mktemp("native")

    def make(name: str, head_bits: int = 8):
        source, out = ModelSource.open(checkpoints / name), root / f"{name}-{head_bits}"
        if not out.exists():
            Quantizer(source, out, QuantizeOptions(head_bits=head_bits), documents=None).run()
        return out

    return make


@pytest.fixture
def scripted(tokenizer, tmp_path):
    """A factory of engines that continue the prompt 'A' with exactly this text (and eos, if asked to)."""

    def build(text: str, *, eos: bool = True, tokenizer=tokenizer, **config):
        chain = [*token_chain(tokenizer, "A" + text), *([tokenizer.eos_token_id] if eos else [])]
        shutil.rmtree(tmp_path / "scripted", ignore_errors=True)
        save_scripted(tmp_path / "scripted", tokenizer, chain, **config)
        return open_engine(tmp_path / "scripted")

    return build


@pytest.fixture
def dpllm(capsys, monkeypatch):
    """Runs the command in this process."""

    def run(*args, stdin: str | None = None) -> Result:
        monkeypatch.setattr(sys, "argv", ["dpllm", *map(str, args)])
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        threads = torch.get_num_threads()
        capsys.readouterr()
        try:
            with pytest.raises(SystemExit) as e:
                main()
        finally:
            torch.set_num_threads(threads)
        return Result(e.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def ok(dpllm):
    def run(*args, **options) -> Result:
        result = dpllm(*args, **options)
        assert result.code == 0, result.err
        return result

    return run


@pytest.fixture
def refused(dpllm):
    def run(*args, says: str, alone: bool = True, **options) -> None:
        line = complaint(dpllm(*args, **options), alone)
        assert re.search(says, line), line

    return run


@pytest.fixture(scope="session")
def report_documents(tokenizer, heldout_documents) -> list[list[int]]:
    """Token ids of the text that `report` was measured on."""
    return [encode(tokenizer, d)[:300] for d in heldout_documents[:4]]


@pytest.fixture(scope="session")
def report(tiny_overlay, report_documents):
    """A report measured on the tiny overlay."""
    return tiny_report(tiny_overlay, report_documents)
