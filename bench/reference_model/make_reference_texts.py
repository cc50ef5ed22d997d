"""Writes the bundled excerpts: calibration.jsonl (training files, every other one from the middle) and
heldout.jsonl (held-out files, from the start).

Perplexity quoted anywhere in this project on "held-out text" means heldout.jsonl, the first 4,000 characters
of every held-out file of the reference model; it is bundled so that the figure does not depend on the
Python version at hand.

    python -m bench.reference_model.make_reference_texts HELDOUT_FILES.json
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from bench.reference_model.reference_corpus import read_source, stdlib_files, stdlib_root
from dpllm import reference

EXCERPT = 4000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("heldout", type=Path, help="JSON list of the held-out files")
    root, heldout = stdlib_root(), json.loads(parser.parse_args().heldout.read_text())
    held = set(heldout)
    training = [n for n in stdlib_files(root) if n not in held]
    random.Random(0).shuffle(training)
    for path, names in ((reference.heldout_text(), heldout), (reference.calibration_text(), training[:160])):
        rows = []
        for i, name in enumerate(names):
            text = read_source(root / name)
            if text and len(text) >= 200:
                head = path == reference.heldout_text() or i % 2 == 0
                cut = text[:EXCERPT] if head else _middle(text)
                rows.append(json.dumps({"file": name, "text": cut}))
        path.write_text("\n".join(rows) + "\n")
        print(path, len(rows), "documents", path.stat().st_size, "bytes")


def _middle(text: str) -> str:
    """An excerpt that starts at a line somewhere in the file: heads of files are mostly imports."""
    start = text.find("\n", max(0, len(text) // 2 - EXCERPT // 2)) if len(text) > EXCERPT else 0
    return text[max(0, start) :][:EXCERPT]


if __name__ == "__main__":
    main()
