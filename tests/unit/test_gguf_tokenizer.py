"""Tokenizers from the metadata of GGUF files: the tokens of the tokenizer that the metadata were made from."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from gguf_files import tokenizer_metadata
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, trainers
from transformers import AutoTokenizer

from dpllm import reference
from dpllm.base.errors import InputError
from dpllm.base.text import read_documents
from dpllm.quant.gguf.config import token_ids
from dpllm.quant.gguf.metadata import Metadata
from dpllm.quant.gguf.splits import SPLITS
from dpllm.quant.gguf.tokenizer import make_tokenizer

TEXTS = st.text(alphabet=st.sampled_from("ab  é\n\t\r'sTt12.(_▁中🙂\u0301"), max_size=40)
SENTENCE = "He said: it's 12345 o'clock,\n\n   or so…  CamelCase naïve 北京 x.y  "


def loaded(values: dict[str, Any], folder: Path, **changes) -> Any:
    """The tokenizer as transformers loads it from the two files."""
    values = {k: v for k, v in (values | changes).items() if v is not None}
    made = make_tokenizer(Metadata(Path("m.gguf"), values), len(values["tokenizer.ggml.tokens"]))
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "tokenizer.json").write_text(json.dumps(made.tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(made.config))
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """(the reference model's own tokenizer, the one that is made from its metadata)."""
    original = AutoTokenizer.from_pretrained(reference.model_path())
    return original, loaded(tokenizer_metadata(reference.model_path()), tmp_path_factory.mktemp("t"))


@given(text=TEXTS)
@settings(max_examples=200, deadline=None)
def test_byte_level_tokens_are_the_original_ones(byte_level, text):
    original, made = byte_level
    ids = made(text)["input_ids"]
    assert ids == original(text)["input_ids"]
    assert made.decode(ids, skip_special_tokens=True) == text


def test_code_and_special_tokens_are_the_original_ones(byte_level):
    original, made = byte_level
    text = read_documents(reference.heldout_text())[0][:5000] + "<|eos|> and <|bos|>"
    assert made(text)["input_ids"] == original(text)["input_ids"]
    assert len(made) == len(original)
    assert (made.bos_token_id, made.eos_token_id, made.pad_token_id) == (0, 1, 2)
    assert made.decode(made(text)["input_ids"], skip_special_tokens=True).endswith(" and ")


def test_digits_are_split_where_the_model_splits_them(byte_level):
    _, made = byte_level
    assert [made.decode([i]) for i in made("12345", add_special_tokens=False)["input_ids"]] == list("12345")


@pytest.fixture(scope="module")
def pieces() -> list[str]:
    """A vocabulary as SentencePiece makes it: special tokens, bytes, then pieces from the most frequent on."""
    trainer, model = trainers.BpeTrainer(vocab_size=500, show_progress=False), Tokenizer(models.BPE())
    words = read_documents(reference.calibration_text())[0][:20000].split()
    model.train_from_iterator(["\u2581" + w for w in words], trainer)
    found = [t for t, _ in sorted(model.get_vocab().items(), key=lambda item: item[1])]
    return ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *found]


@pytest.fixture(scope="module")
def sentencepiece(pieces, tmp_path_factory):
    """(the tokenizer, the metadata that it is made from)."""
    values = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [-float(max(0, i - 259)) for i in range(len(pieces))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(pieces) - 259),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return loaded(values, tmp_path_factory.mktemp("s")), values


@given(text=st.text(alphabet=st.sampled_from("abdefist selfrn.()\n_é中🙂"), max_size=60))
@settings(max_examples=200, deadline=None)
def test_sentencepiece_text_comes_back(sentencepiece, text):
    made, _ = sentencepiece
    ids = made(text)["input_ids"]
    assert ids[0] == 1 and made.decode(ids, skip_special_tokens=True) == text


def greedy(tokens: list[str], scores: list[float], text: str) -> list[int]:
    """llama.cpp's rule: of all neighbours that make a token, the one of the highest score is joined first."""
    ids = {t: i for i, t in enumerate(tokens)}
    parts = list(text)
    while True:
        pairs = [(scores[ids[a + b]], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ids]
        if not pairs:
            return [ids[p] for p in parts]
        at = -max(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@given(text=st.text(alphabet="abc", min_size=1, max_size=20), seed=st.permutations(range(8)))
@settings(max_examples=100, deadline=None)
def test_sentencepiece_is_the_greedy_rule(text, seed):
    tokens = ["<unk>", "▁", "a", "b", "c", "ab", "bc", "abc", "ca", "aa", "abab", "ba", "cab"]
    scores = [0.0] * 5 + [-float(s) for s in seed]
    values = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_space_prefix": False,
    }  # fmt: skip
    made = make_tokenizer(Metadata(Path("m.gguf"), values), len(tokens))
    assert Tokenizer.from_str(json.dumps(made.tokenizer)).encode(text).ids == greedy(tokens, scores, text)


def test_sentencepiece_words_are_joined_by_their_scores(sentencepiece):
    made, values = sentencepiece
    text = " ".join(read_documents(reference.calibration_text())[0][:800].split())
    found = made(text, add_special_tokens=False)["input_ids"]
    scores = values["tokenizer.ggml.scores"]
    assert found == greedy(values["tokenizer.ggml.tokens"], scores, "\u2581" + text.replace(" ", "\u2581"))
    assert len(found) < 0.7 * len(text)


@pytest.mark.parametrize("prefix, text", [(True, "▁a"), (False, "a")])
def test_the_space_in_front_follows_its_flag(sentencepiece, tmp_path, prefix, text):
    _, values = sentencepiece
    made = loaded(values, tmp_path, **{"tokenizer.ggml.add_space_prefix": prefix})
    assert made.convert_ids_to_tokens(made("a", add_special_tokens=False)["input_ids"]) in (
        [text],
        list(text),
    )


@pytest.mark.parametrize(
    "kind, flag, added",
    [("gpt2", None, False), ("gpt2", True, True), ("llama", None, True), ("llama", False, False)],
)
def test_the_first_token_follows_its_flag(sentencepiece, tmp_path, kind, flag, added):
    values = sentencepiece[1] if kind == "llama" else tokenizer_metadata(reference.model_path())
    made = loaded(values, tmp_path, **{"tokenizer.ggml.add_bos_token": flag})
    assert (made("a")["input_ids"][0] == made.bos_token_id) is added


def test_a_llama_3_tokenizer_takes_whole_words_and_a_first_token(tmp_path):
    values = tokenizer_metadata(reference.model_path(), pre="llama-bpe")
    values["tokenizer.ggml.tokens"] = [*values["tokenizer.ggml.tokens"], "qzqzq"]
    values["tokenizer.ggml.token_type"] = [*values["tokenizer.ggml.token_type"], 1]
    made = loaded(values, tmp_path, **{"tokenizer.ggml.add_bos_token": None})
    assert made("qzqzq")["input_ids"] == [0, 4096]  # no merges lead to this token
    assert [made.decode([i]) for i in made("1234", add_special_tokens=False)["input_ids"]][-1] == "4"


def test_user_defined_tokens_match_whole_and_are_shown(tmp_path):
    values = tokenizer_metadata(reference.model_path())
    values["tokenizer.ggml.tokens"] = [*values["tokenizer.ggml.tokens"], "<think>"]
    values["tokenizer.ggml.token_type"] = [*values["tokenizer.ggml.token_type"], 4]
    made = loaded(values, tmp_path)
    assert 4096 in made("a<think>b")["input_ids"]
    assert made.decode(made("a<think>b")["input_ids"], skip_special_tokens=True) == "a<think>b"


def test_the_chat_template_is_kept(tmp_path):
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    made = loaded(
        tokenizer_metadata(reference.model_path()), tmp_path, **{"tokenizer.chat_template": template}
    )
    assert made.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "[user] Hi\n"


PIECES = {  # SENTENCE as the model's own tokenizer.json splits it (a space is written _, a line end /)
    "gpt-2": "He|_said|:|_it|'s|_12345|_o|'|clock|,|//__|_or|_so|…|_|_CamelCase|_naïve|_北京|_x|.|y|__",
    "smollm": "He|_said|:|_it|'s|_|1|2|3|4|5|_o|'|clock|,|//__|_or|_so|…|_|_CamelCase|_naïve|_北京|_x|.|y|__",
    "llama-bpe": "He|_said|:|_it|'s|_|123|45|_o|'clock|,//|__|_or|_so|…|_|_CamelCase|_naïve|_北京|_x|.y|__",
    "qwen2": "He|_said|:|_it|'s|_|1|2|3|4|5|_o|'clock|,//|__|_or|_so|…|_|_CamelCase|_naïve|_北京|_x|.y|__",
    "tekken": "He|_said|:|_it|'s|_|1|2|3|4|5|_o|'clock|,//|__|_or|_so|…|_|_Camel|Case|_naïve|_北京|_x|.y|__",
    "gpt-4o": "He|_said|:|_it's|_|123|45|_o|'clock|,//|__|_or|_so|…|_|_Camel|Case|_naïve|_北京|_x|.y|__",
}


@pytest.mark.parametrize("name", PIECES)
def test_text_is_split_as_the_model_splits_it(name):
    assert words_of(name) == PIECES[name].replace("_", " ").replace("/", "\n").split("|")


def words_of(name: str) -> list[str]:
    """SENTENCE in the pieces within which merges happen."""
    values = tokenizer_metadata(reference.model_path(), pre=name)
    made = make_tokenizer(Metadata(Path("m.gguf"), values), 4096)
    steps = Tokenizer.from_str(json.dumps(made.tokenizer)).pre_tokenizer
    return [SENTENCE[a:b] for _, (a, b) in steps.pre_tokenize_str(SENTENCE)]


@pytest.mark.parametrize("name", SPLITS)
def test_every_split_covers_its_text(name):
    words = words_of(name)
    assert "".join(words) == SENTENCE and len(words) > 10


@pytest.mark.parametrize(
    "key, value, named",
    [
        ("tokenizer.ggml.pre", "klingon", "'klingon'"),
        ("tokenizer.ggml.pre", None, "tokenizer.ggml.pre"),
        ("tokenizer.ggml.model", "t5", "'t5'"),
        ("tokenizer.ggml.token_type", [1, 2], "do not fit together"),
        ("tokenizer.ggml.merges", ["ab"], "merge"),
        ("tokenizer.ggml.bos_token_id", 4096, "bos_token_id"),
        ("tokenizer.ggml.bos_token_id", "0", "bos_token_id"),
        ("tokenizer.ggml.add_bos_token", 1, "add_bos_token"),
        ("tokenizer.chat_template", 7, "chat_template"),
    ],
)
def test_what_is_not_known_is_refused(key, value, named):
    values = tokenizer_metadata(reference.model_path()) | {key: value}
    values = {k: v for k, v in values.items() if v is not None}
    with pytest.raises(InputError, match=named):
        make_tokenizer(Metadata(Path("m.gguf"), values), 4096)


def test_all_tokens_that_end_a_text_are_found():
    values = {
        "tokenizer.ggml.tokens": ["a", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "b"],
        "tokenizer.ggml.token_type": [1, 3, 3, 1, 3],
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 4,
    }
    assert token_ids(Metadata(Path("m.gguf"), values), 5)["eos_token_id"] == [2, 4, 1]
