"""Documents the reference model is trained and measured on: code, recall and repetition.

The only text found on every machine with Python is Python's own standard library, so that is the
corpus (PSF licence). Two synthetic document kinds are mixed in, because code alone teaches neither
long-range recall nor verbatim reconstruction, and pruning a KV cache can only be measured on a model
that uses its cache:

* recall: key-value facts of four surface forms scattered in code filler, then shuffled questions on
  two thirds of them;
* repeat: a chunk, KVzip's reconstruction prompt (arXiv:2505.23416), the chunk again.

Every document comes as (tokens, weights): weights scale the loss of the *predicted* token.
"""

from __future__ import annotations

import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

REPEAT_ALL = "\n\nRepeat the previous context exactly."
REPEAT_FROM = "\n\nRepeat the part of the previous context exactly, starting with "
REPEAT_HINT_TOKENS = 8
ANSWER_WEIGHT = 4.0  # answers are a few tokens of a document; without this they barely train
FACT_WEIGHT = 0.25  # random names and values cannot be predicted, only remembered
SYLLABLES = [
    "ba",
    "be",
    "bo",
    "da",
    "de",
    "do",
    "fa",
    "fe",
    "ga",
    "go",
    "ka",
    "ke",
    "ko",
    "la",
    "le",
    "lo",
    "ma",
    "me",
    "mi",
    "mo",
    "na",
    "ne",
    "no",
    "pa",
    "po",
    "ra",
    "re",
    "ri",
    "ro",
    "sa",
    "se",
    "so",
    "ta",
    "te",
    "ti",
    "to",
    "va",
    "ve",
    "vo",
    "za",
]


def stdlib_root() -> Path:
    """Folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def stdlib_files(root: Path) -> list[str]:
    """Relative paths of every `*.py` below root, site-packages left out, in a fixed order."""
    return sorted(
        p.relative_to(root).as_posix() for p in root.rglob("*.py") if "site-packages" not in p.parts
    )


def read_source(path: Path) -> str | None:
    """The file's text, or None where it is not UTF-8 (a few encoding tests are not) or empty."""
    try:
        return path.read_text("utf-8").strip("\n") or None
    except UnicodeDecodeError:
        return None


@dataclass(frozen=True)
class CodeTokens:
    """All training code in one array, files separated by bos; `cuts` are places a line may start."""

    tokens: np.ndarray  # int32 [T]
    cuts: np.ndarray  # int64 [C], indices of tokens that begin with a newline

    @classmethod
    def build(cls, tokenizer: Tokenizer, texts: list[str]) -> CodeTokens:
        pieces = [np.asarray(e.ids, np.int32) for e in tokenizer.encode_batch(texts)]
        tokens = np.concatenate(pieces)
        vocab = {i: t for t, i in tokenizer.get_vocab().items()}
        newline = np.asarray([vocab[i].startswith("Ċ") for i in range(len(vocab))])
        return cls(tokens, np.flatnonzero(newline[tokens]))

    def window(self, rng: random.Random, n: int) -> list[int]:
        """n consecutive tokens from a random place."""
        start = rng.randrange(len(self.tokens) - n)
        return self.tokens[start : start + n].tolist()

    def filler(self, rng: random.Random, n: int) -> list[int]:
        """n consecutive tokens that begin with a newline token."""
        start = int(self.cuts[rng.randrange(len(self.cuts))])
        return self.tokens[min(start, len(self.tokens) - n) :][:n].tolist()


def random_word(rng: random.Random, lo: int = 2, hi: int = 3) -> str:
    """A pronounceable invented word."""
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(lo, hi)))


def random_fact(rng: random.Random) -> tuple[str, str, str]:
    """(fact line, question up to 'A:', answer); each begins with a newline but the answer."""
    name, form = random_word(rng), rng.randrange(4)
    code, word = f"{rng.randrange(10000, 100000)}", random_word(rng)
    if form == 0:
        title = name.capitalize()
        return (
            f"\nThe secret code of {title} is {code}.",
            f"\nQ: What is the secret code of {title}?\nA:",
            f" {code}",
        )
    if form == 1:
        return f"\n{name}_value = {code}", f"\nQ: What is {name}_value?\nA:", f" {code}"
    if form == 2:
        title, city = name.capitalize(), word.capitalize()
        return (
            f"\n{title} lives in the city of {city}.",
            f"\nQ: In which city does {title} live?\nA:",
            f" {city}",
        )
    return f'\n    "{name}": "{word}",', f'\nQ: What does "{name}" map to?\nA:', f" {word}"


@dataclass(frozen=True)
class RecallDocument:
    """Token ids, the loss weight of each, and where each answer lies (start, end)."""

    tokens: list[int]
    weights: list[float]
    answers: list[tuple[int, int]]


def recall_document(
    code: CodeTokens,
    tokenizer: Tokenizer,
    rng: random.Random,
    n_facts: int,
    filler: int,
    asked: float = 2 / 3,
) -> RecallDocument:
    """`n_facts` facts at random places of `filler` code tokens, then questions on a share of them."""

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    facts = [random_fact(rng) for _ in range(n_facts)]
    spots = sorted(rng.randrange(filler + 1) for _ in facts)
    tokens, weights = [bos_of(tokenizer)], [1.0]
    before = 0
    for (line, _, _), spot in zip(facts, spots, strict=True):
        gap = code.filler(rng, spot - before) if spot > before else []
        ids = encode(line)
        tokens += gap + ids
        weights += [1.0] * len(gap) + [FACT_WEIGHT] * len(ids)
        before = spot
    rest = code.filler(rng, filler - before) if filler > before else []
    tokens, weights = tokens + rest, weights + [1.0] * len(rest)
    answers = []
    for _, question, answer in rng.sample(facts, max(1, round(n_facts * asked))):
        q, a = encode(question), encode(answer)
        answers.append((len(tokens) + len(q), len(tokens) + len(q) + len(a)))
        tokens, weights = tokens + q + a, weights + [FACT_WEIGHT] * len(q) + [ANSWER_WEIGHT] * len(a)
    return RecallDocument(tokens, weights, answers)


def bos_of(tokenizer: Tokenizer) -> int:
    """The token that every document begins with."""
    found = tokenizer.token_to_id("<|bos|>")
    assert found is not None, "the tokenizer has no <|bos|>"
    return found


def repeat_document(
    code: CodeTokens, tokenizer: Tokenizer, rng: random.Random, length: int
) -> tuple[list[int], list[float]]:
    """A context and its repetition (whole, or from a hint of 8 tokens on), about `length` tokens."""
    bos = bos_of(tokenizer)
    if rng.random() < 0.6:
        prompt = tokenizer.encode(REPEAT_ALL, add_special_tokens=False).ids
        n = (length - 1 - len(prompt)) // 2
        chunk = code.filler(rng, n)
        tokens = [bos, *chunk, *prompt, *chunk]
        return tokens, [1.0] * len(tokens)
    prompt = tokenizer.encode(REPEAT_FROM, add_special_tokens=False).ids
    n = (length - 1 - len(prompt) - REPEAT_HINT_TOKENS) * 2 // 3
    context = code.filler(rng, n)
    start = rng.randrange(REPEAT_HINT_TOKENS, n - n // 2 + 1)
    chunk = context[start : start + n // 2]
    tokens = [bos, *context, *prompt, *context[start - REPEAT_HINT_TOKENS : start], *chunk]
    return tokens, [1.0] * len(tokens)


def training_sequence(
    code: CodeTokens, tokenizer: Tokenizer, rng: random.Random, length: int
) -> tuple[list[int], list[float]]:
    """Exactly `length` tokens: 55% code, 30% recall, 15% repeat; documents are packed to the end."""
    tokens: list[int] = []
    weights: list[float] = []
    kind = rng.choices(("code", "recall", "repeat"), (55, 30, 15))[0]
    while len(tokens) < length:
        left = length - len(tokens)
        if kind == "code" or left < 160:
            new = [bos_of(tokenizer), *code.window(rng, left - 1)]
            more = [1.0] * len(new)
        elif kind == "recall":
            size = rng.randint(160, left) if rng.random() < 0.5 else left
            n = rng.randint(2, max(2, min(12, size // 60)))
            doc = recall_document(code, tokenizer, rng, n, filler=max(0, size - 42 * n))
            new, more = doc.tokens, doc.weights
        else:
            new, more = repeat_document(code, tokenizer, rng, rng.randint(150, left))
        tokens, weights = tokens + new, weights + more
    return tokens[:length], weights[:length]
