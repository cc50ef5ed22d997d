"""Streamed text: what was said never has to be taken back, and stop strings end it."""

from __future__ import annotations

from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_models import pieces, token_chain
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from dpllm.decode.options import GenerateOptions
from dpllm.decode.text_stream import TextStream


def test_streaming_gives_the_whole_text(scripted):
    assert "".join(pieces(scripted("The quick:\n"))) == "The quick:\n"


def test_characters_of_several_bytes_come_whole(scripted):
    parts = pieces(scripted("naïve€5😀."))
    assert parts == ["n", "a", "", "ï", "v", "e", "", "", "€", "5", "", "", "", "😀", ".", ""]


def test_a_character_cut_off_by_the_limit_is_marked(scripted):
    assert pieces(scripted("a€b"), max_new_tokens=3) == ["a", "", "\ufffd"]


def test_eos_ends_and_is_no_text(scripted):
    steps = list(scripted("abc").generate_with("A", GenerateOptions(max_new_tokens=40)))
    assert [s.text for s in steps] == ["a", "b", "c", ""]
    assert steps[-1].token == 1


def test_any_of_several_eos_tokens_ends(scripted, tokenizer):
    last = token_chain(tokenizer, "c")[0]
    assert pieces(scripted("abcde", eos_token_id=[1, last])) == ["a", "b", ""]


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("abcdefg", ("d",), "abc"),  # one token
        ("abcdefg", ("cde",), "ab"),  # several tokens
        ("abcdefg", ("a",), ""),  # at once
        ("abcdefg", ("fg", "bc", "cde"), "a"),  # whichever is complete first
        ("abcdefg", ("bcX", "efX"), "abcdefg"),  # begun, never finished
        ("abcdefg", ("fgh",), "abcdefg"),  # begun when the text ends
        ("abcdefg", ("efg",), "abcd"),  # the very end
        ("xa€yz", ("a€",), "x"),  # begun before a character that spans tokens
        ("x€yz", ("€y",), "x"),
        ("xa😀€yz", ("😀€",), "xa"),
    ],
)
def test_stop_strings(scripted, text, stop, expected):
    parts = pieces(scripted(text), stop=stop)
    assert "".join(parts) == expected
    assert not any("\ufffd" in p for p in parts)


def test_nothing_is_generated_behind_a_stop_string(scripted):
    assert pieces(scripted("abcdefg"), stop=("cd",)) == ["a", "b", "", ""]


def test_what_only_looked_like_a_stop_string_comes_late(scripted):
    assert pieces(scripted("abcdefg"), stop=("bcX",)) == ["a", "", "", "bcd", "e", "f", "g", ""]


# The alphabet makes characters of one to four bytes, and stop strings that overlap themselves.
TEXTS = st.text("aab€é😀 ", max_size=14)


@settings(max_examples=300, deadline=None)
@given(text=TEXTS, stop=st.lists(st.text("aab€é😀 ", min_size=1, max_size=4), max_size=3), data=st.data())
def test_streamed_text_is_final(tokenizer, text, stop, data):
    ids = [i for b in text for i in tokenizer(b, add_special_tokens=False)["input_ids"]]
    pending, sent = TextStream(tokenizer, tuple(stop)), ""
    for n, token in enumerate(ids, 1):
        piece = pending.push(token, last=n == len(ids))
        assert "\ufffd" not in piece
        sent += piece
        if pending.stopped:
            break
    ends = [text.find(s) + len(s) for s in stop if s in text]
    assert pending.stopped == bool(ends)
    if ends:  # the text as it was when the first stop string became complete
        seen = text[: min(ends)]
        assert sent == seen[: min(seen.find(s) for s in stop if s in seen)]
    else:
        assert sent == text


@pytest.fixture(scope="module")
def byte_fallback():
    """A tokenizer as SentencePiece makes them: words begin with a mark, unknown characters are bytes."""
    vocab = {f"<0x{b:02X}>": b for b in range(256)}
    for piece in ("▁", "a", "b", "▁a", "▁b", "ab"):
        vocab[piece] = len(vocab)
    made = Tokenizer(models.BPE(vocab, [("▁", "a"), ("▁", "b"), ("a", "b")], byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=made)


@settings(max_examples=200, deadline=None)
@given(text=st.text("aab€é😀 ", max_size=60), lead=st.integers(1, 4), window=st.integers(4, 12))
def test_a_long_text_is_decoded_in_stretches(byte_fallback, tokenizer, text, lead, window):
    for made in (byte_fallback, tokenizer):
        ids = made(text, add_special_tokens=False)["input_ids"]
        pending, most = TextStream(made, ("bb€",)), 0
        with patch.multiple("dpllm.decode.text_stream", LEAD=lead, WINDOW=window):
            sent = ""
            for n, token in enumerate(ids, 1):
                sent += pending.push(token, last=n == len(ids))
                most = max(most, len(pending._tokens))
                if pending.stopped:
                    break
        whole = made.decode(ids, skip_special_tokens=True)
        assert sent == whole.split("bb€")[0]
        # A character or a stop string more, of four bytes each. A run of bytes is decoded together.
        assert most <= 2 * max(window, 2 * lead) + 4 * 4 or "\ufffd" in whole or made is byte_fallback
