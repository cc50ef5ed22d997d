"""Makes a tokenizer from the metadata of a GGUF file: the contents of tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from dpllm.base.errors import InputError
from dpllm.quant.gguf.metadata import Metadata
from dpllm.quant.gguf.splits import SPLITS, Split

CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
SPACE = "\u2581"  # how SentencePiece writes a space
TOO_LONG = int(1e30)  # transformers' value for a tokenizer without a limit of its own


@dataclass(frozen=True)
class TokenizerFiles:
    """The two files, as JSON objects."""

    tokenizer: dict[str, Any]
    config: dict[str, Any]


@dataclass(frozen=True)
class _Vocabulary:
    """What the metadata say about tokens. add_bos: put the first special token in front of a text."""

    tokens: list[str]
    kinds: list[int]
    specials: dict[str, str]
    add_bos: bool


def make_tokenizer(meta: Metadata, vocabulary: int) -> TokenizerFiles:
    """The tokenizer of a file. vocabulary: rows of the embedding.

    Raises InputError for a kind of tokenizer, or a way to split text, that is not known here: tokens would be wrong.
    """
    kind = meta.text("tokenizer.ggml.model")
    if kind not in KINDS:
        raise InputError(
            f"{meta.path}: tokenizer '{kind}' is not supported; {' and '.join(KINDS)} are. Get another model."
        )
    split = _split(meta) if kind == "gpt2" else Split((), add_bos=True)
    words = _vocabulary(meta, vocabulary, add_bos=split.add_bos)
    try:
        tokenizer = KINDS[kind](meta, words, split)
        _add_special_tokens(tokenizer, words)
        made = json.loads(tokenizer.to_str())
    except InputError:
        raise
    except Exception as e:  # the tokenizers library raises plain Exceptions
        reason = " ".join(str(e).split())[:160]
        raise InputError(
            f"{meta.path}: its tokenizer cannot be built ({reason}). Get another conversion."
        ) from None
    return TokenizerFiles(made, _config(meta, words))


def _split(meta: Metadata) -> Split:
    name = meta.text("tokenizer.ggml.pre")
    if name not in SPLITS:
        raise InputError(
            f"{meta.path}: the way '{name}' to split text (tokenizer.ggml.pre) is not known here, so tokens would be "
            "wrong. Give the original checkpoint instead."
        )
    return SPLITS[name]


def _vocabulary(meta: Metadata, rows: int, *, add_bos: bool) -> _Vocabulary:
    tokens = meta.texts("tokenizer.ggml.tokens")
    kinds = meta.numbers("tokenizer.ggml.token_type", [1] * len(tokens))
    if not tokens or len(tokens) > rows or len(kinds) != len(tokens):
        raise InputError(
            f"{meta.path}: {len(tokens)} tokens, {len(kinds)} token types and {rows} rows of the embedding do not fit "
            "together. Get another conversion."
        )
    specials = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if f"tokenizer.ggml.{key}_token_id" in meta:
            index = meta.whole(f"tokenizer.ggml.{key}_token_id", least=0, most=len(tokens) - 1)
            specials[f"{name}_token"] = tokens[index]
    wanted = meta.flag("tokenizer.ggml.add_bos_token", add_bos)
    return _Vocabulary(tokens, kinds, specials, wanted and "bos_token" in specials)


def _byte_level(meta: Metadata, words: _Vocabulary, split: Split) -> Tokenizer:
    """Byte-pair encoding of bytes, as GPT-2 does it."""
    merges = []
    for merge in meta.texts("tokenizer.ggml.merges"):
        cut = merge.find(" ", 1)  # the first character may be a space itself
        if cut < 0:
            raise InputError(f"{meta.path}: merge {merge[:40]!r} is not a pair. Get another conversion.")
        merges.append((merge[:cut], merge[cut + 1 :]))
    ids = _ids(words)
    tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=split.whole_words))
    steps = [pre_tokenizers.Split(Regex(p), behavior="isolated") for p in split.patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(meta: Metadata, words: _Vocabulary, split: Split) -> Tokenizer:
    """SentencePiece's byte-pair encoding. The file has no merges: pairs whose token has a high score come first."""
    scores = meta.numbers("tokenizer.ggml.scores")
    if len(scores) != len(words.tokens):
        raise InputError(
            f"{meta.path}: {len(scores)} scores for {len(words.tokens)} tokens. Get another conversion."
        )
    ids = _ids(words)
    merges = merges_by_score(ids, scores)
    unknown = words.specials.get("unk_token", words.tokens[0])
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = meta.flag("tokenizer.ggml.add_space_prefix", True)
    steps: list[Any] = [normalizers.Prepend(SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    back: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if prefix else back)
    return tokenizer


# Each `tokenizer.ggml.model` that can be made.
KINDS: dict[str, Callable[[Metadata, _Vocabulary, Split], Tokenizer]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
}


def merges_by_score(ids: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a token of two tokens, the highest score of the whole first."""
    found = []
    for token, index in ids.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                found.append((-scores[index], ids[left], ids[right], (left, right)))
    found.sort()
    return [pair for *_, pair in found]


def _ids(words: _Vocabulary) -> dict[str, int]:
    """Ids by token. A token that is listed twice keeps its first id, as in llama.cpp."""
    ids: dict[str, int] = {}
    for index, token in enumerate(words.tokens):
        ids.setdefault(token, index)
    return ids


def _add_special_tokens(tokenizer: Tokenizer, words: _Vocabulary) -> None:
    """Makes control and user-defined tokens match whole, and puts the first token in front of texts if it is wanted."""
    pairs = list(zip(words.tokens, words.kinds, strict=True))
    named = set(words.specials.values())
    tokenizer.add_special_tokens(
        [
            AddedToken(t, normalized=False, special=True)
            for t, kind in pairs
            if t and (kind == CONTROL or t in named)
        ]
    )
    tokenizer.add_tokens(
        [
            AddedToken(t, normalized=False)
            for t, kind in pairs
            if t and kind == USER_DEFINED and t not in named
        ]
    )
    if words.add_bos:
        bos = words.specials["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"],
            pair=[bos, "$A", bos, "$B:1"],
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        )


def _config(meta: Metadata, words: _Vocabulary) -> dict[str, Any]:
    """The contents of tokenizer_config.json."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": TOO_LONG,
        "add_bos_token": words.add_bos,
        **words.specials,
    }
    if "tokenizer.chat_template" in meta:
        config["chat_template"] = meta.text("tokenizer.chat_template")
    return config
