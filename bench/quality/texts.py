"""The texts of quality_vs_bits.py, cut into windows of 1024 tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import metadata

from bench.reference_model.reference_corpus import read_source, stdlib_root
from dpllm import reference
from dpllm.base.text import encode, load_tokenizer

CONTEXT = 1024
SHORTEST = 16  # tokens of a window that is worth scoring
PROSE_CHARACTERS = 3000  # of a package description that is worth reading


@dataclass(frozen=True)
class Windows:
    """Text to score. ids: token ids of each window; files: the file each comes from (they are resampled
    together)."""

    ids: list[list[int]]
    files: list[int]

    def count(self, tokens: int) -> int:
        """How many windows, from the first one, hold at least this many scored tokens (or all there are)."""
        total = 0
        for i, ids in enumerate(self.ids):
            total += len(ids) - 1
            if total >= tokens:
                return i + 1
        return len(self.ids)


@cache
def windows_of(text: str) -> Windows:
    """'stdlib': held-out files of Python's standard library, the domain of training and calibration. 'prose':
    the descriptions (READMEs in English) of the packages installed here, another domain."""
    return _cut(_stdlib() if text == "stdlib" else _prose())


def heldout_windows(tokens: int) -> Windows:
    """The first windows of 'stdlib' that hold this many scored tokens."""
    windows = windows_of("stdlib")
    n = windows.count(tokens)
    return Windows(windows.ids[:n], windows.files[:n])


def _stdlib() -> list[str]:
    names = json.loads((reference.model_path() / "heldout_files.json").read_text())
    root = stdlib_root()
    texts = [read_source(root / n) for n in names if (root / n).is_file()]
    return [t for t in texts if t]


def _prose() -> list[str]:
    found = {}
    for package in metadata.distributions():
        header = package.metadata
        body = header.get("Description") or str(header.get_payload())  # type: ignore[attr-defined]
        if len(body) >= PROSE_CHARACTERS and header["Name"] != "dpllm":
            found[header["Name"].lower()] = body
    return [found[name] for name in sorted(found)]


def _cut(texts: list[str]) -> Windows:
    """Every file's first window, then every second one, and so on."""
    tokenizer = load_tokenizer(reference.overlay_path())
    encoded = [encode(tokenizer, t) for t in texts]
    found: list[list[int]] = []
    files: list[int] = []
    for round_ in range(max(len(e) for e in encoded) // CONTEXT + 1):
        for f, ids in enumerate(encoded):
            piece = ids[round_ * CONTEXT : (round_ + 1) * CONTEXT]
            if len(piece) > SHORTEST:
                found.append(piece)
                files.append(f)
    return Windows(found, files)
