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
from dpllm.base.places import check_readable
from dpllm.base.plain_text import without_byte_order_mark

# The attribute that makes transformers remove spaces before punctuation for a BPE tokenizer, too.
FORCED_CLEANING = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"


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
    check_readable(path)
    try:
        text = without_byte_order_mark(path.read_text("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist. Give a text file.") from None
    except UnicodeDecodeError as e:
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
    """The directory's tokenizer (transformers). Code that lies in the directory is neither run nor asked about.

    Raises InputError where there is no tokenizer, or where it needs such code.
    """
    from transformers import AutoTokenizer

    if not (path / "tokenizer.json").exists() and not (path / "tokenizer.model").exists():
        raise InputError(f"{path} has no tokenizer.json. Copy the model's tokenizer files there.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as e:  # transformers raises many kinds for a broken tokenizer
        if "trust_remote_code" in str(e):
            raise InputError(
                f"the tokenizer in {path} needs Python code of the model's own, which dpllm never runs. Give a model "
                "whose tokenizer.json is enough: remove auto_map from tokenizer_config.json if it is."
            ) from None
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise InputError(f"the tokenizer in {path} cannot be loaded: {reason[:200]}") from None
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if type(model).__name__ == "BPE" and not getattr(tokenizer, FORCED_CLEANING, False):
        tokenizer.clean_up_tokenization_spaces = (
            False  # transformers ignores it for BPE, with a warning each time
        )
    return tokenizer


def check_text(text: str, what: str) -> None:
    """Raises InputError where bytes that are no UTF-8 were read as text: Python keeps them as lone surrogates."""
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise InputError(f"{what} is not UTF-8 text. Convert it first.")


def check_tokens(ids: Sequence[int], vocab_size: int, path: Path) -> None:
    """Raises InputError where the tokenizer in `path` gave a token that a model of `vocab_size` tokens does not know.

    A tokenizer may be larger than its model: it can be used for texts without the tokens that the model lacks.
    """
    if (largest := max(ids, default=0)) >= vocab_size:
        raise InputError(
            f"the tokenizer in {path} gives token {largest}; the model knows {vocab_size}. "
            "Copy the model's own tokenizer files there."
        )


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
