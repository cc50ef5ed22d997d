"""What kv_quality.py reads and asks: facts scattered in held-out code, and the code's own continuation."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import cache

from tokenizers import Tokenizer

from bench.reference_model.reference_corpus import CodeTokens, bos_of, random_fact, read_source, stdlib_root
from dpllm import reference


@dataclass(frozen=True)
class Document:
    """Token ids of a context, and what is asked of it afterwards: (question, answer) ids, each alone. Of a continuation
    the question is the token it begins with."""

    context: list[int]
    asked: list[tuple[list[int], list[int]]]


@cache
def heldout_code() -> tuple[Tokenizer, CodeTokens]:
    """The reference model's tokenizer, and the files it was never trained on."""
    root = stdlib_root()
    names = json.loads((reference.model_path() / "heldout_files.json").read_text())
    texts = [t for n in names if (root / n).is_file() and (t := read_source(root / n))]
    tokenizer = Tokenizer.from_file(str(reference.model_path() / "tokenizer.json"))
    return tokenizer, CodeTokens.build(tokenizer, texts)


def recall(number: int, length: int, facts: int) -> Document:
    """`facts` facts at random places of code, `length` tokens in all; a question about each."""
    tokenizer, code = heldout_code()
    rng = random.Random(f"{number}/{length}/{facts}")

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    chosen = [random_fact(rng) for _ in range(facts)]
    lines = [encode(line) for line, _, _ in chosen]
    filler = length - 1 - sum(map(len, lines))
    spots = sorted(rng.randrange(filler + 1) for _ in lines)
    ids, before = [bos_of(tokenizer)], 0
    for line, spot in zip(lines, spots, strict=True):
        ids += (code.filler(rng, spot - before) if spot > before else []) + line
        before = spot
    ids += code.filler(rng, filler - before) if filler > before else []
    return Document(ids, [(encode(question), encode(answer)) for _, question, answer in chosen])


def continuation(number: int, length: int, tokens: int = 257) -> Document:
    """`length` tokens of code, of which the next ones are to be foretold."""
    tokenizer, code = heldout_code()
    window = code.filler(random.Random(f"{number}/{length}"), length - 1 + tokens)
    ids = [bos_of(tokenizer), *window]
    return Document(ids[:length], [(ids[length : length + 1], ids[length + 1 :])])
