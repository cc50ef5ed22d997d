"""Text for calibration and evaluation: files of several kinds into token sequences."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from dpllm.base.errors import InputError
from dpllm.base.plain_text import without_byte_order_mark


def read_documents(path: Path) -> list[str]:
    """The documents of a text source.

    path: a .jsonl file (one object with "text" a line), any other text file (one document), or a directory
    of text files. Raises InputError where it is missing, empty or no text.
    """
    if path.is_dir():
        files = sorted(
            p for p in path.rglob("*") if p.is_file() and p.suffix in (".txt", ".md", ".py", ".jsonl")
        )
        if not files:
            raise InputError(f"{path} holds no .txt, .md, .py or .jsonl file. Give a text file.")
        return [d for p in files for d in read_documents(p)]
    try:
        text = without_byte_order_mark(path.read_text("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist. Give a text file.") from None
    except (UnicodeDecodeError, OSError) as e:
        raise InputError(f"{path} is not UTF-8 text ({e}). Give a .txt or .jsonl file.") from None
    if path.suffix == ".jsonl":
        documents = [_text_of(path, i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    else:
        documents = [text]
    documents = [d for d in documents if d.strip()]
    if not documents:
        raise InputError(f"{path} is empty. Give a file with text in it.")
    return documents


def _text_of(path: Path, line_number: int, line: str) -> str:
    try:
        value = json.loads(line)["text"]
        value.encode("utf-8")  # an escaped half of a surrogate pair is no text
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(
            f'{path}, line {line_number}: expected a JSON object with a string "text".'
        ) from None
    return value


def documents_sha256(documents: Sequence[str]) -> str:
    """Identifies a corpus."""
    digest = hashlib.sha256()
    for text in documents:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def load_tokenizer(path: Path) -> Any:
    """The directory's tokenizer (transformers); InputError where there is none."""
    from transformers import AutoTokenizer

    if not (path / "tokenizer.json").exists() and not (path / "tokenizer.model").exists():
        raise InputError(f"{path} has no tokenizer.json. Copy the model's tokenizer files there.")
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as e:  # transformers raises many kinds for a broken tokenizer
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise InputError(f"the tokenizer in {path} cannot be loaded: {reason[:200]}") from None


def check_text(text: str, what: str) -> None:
    """Raises InputError where bytes that are no UTF-8 were read as text: Python keeps them as lone surrogates."""
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise InputError(f"{what} is not UTF-8 text. Convert it first.")


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids with the special tokens the tokenizer adds in front; none at the end."""
    ids = cast("list[int]", tokenizer(text, verbose=False)["input_ids"])
    if ids and tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id and len(ids) > 1:
        ids = ids[:-1]
    return ids


def sample_sequences(
    documents: Sequence[str], tokenizer: Any, count: int, length: int, seed: int = 0
) -> torch.Tensor:
    """`count` windows of `length` tokens from the joined documents, each led by bos where there is one.

    Returns int64 [count, length], in random order, so that a part of them is a sample too; fewer windows where
    the text is short. Raises InputError when it does not fill even one.
    """
    pieces = [
        np.asarray(tokenizer(d, add_special_tokens=False, verbose=False)["input_ids"]) for d in documents
    ]
    stream = np.concatenate(pieces).astype(np.int64)
    lead = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    body = length - len(lead)
    windows = len(stream) // body
    if windows == 0:
        raise InputError(
            f"the text has {len(stream)} tokens; at least {body} are needed. Give a longer --data file."
        )
    chosen = np.random.default_rng(seed).permutation(windows)[:count]
    rows = [np.concatenate([lead, stream[i * body : (i + 1) * body]]) for i in chosen]
    return torch.from_numpy(np.stack(rows).astype(np.int64))
