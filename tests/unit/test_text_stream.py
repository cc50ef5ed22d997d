"""Streamed pieces of every kind of tokenizer are what transformers decodes."""

from __future__ import annotations

from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import tokenizer_kinds

from dpllm.decode.text_stream import TextStream

KINDS = tokenizer_kinds()


def streamed(tokenizer, before: list[int], tokens: list[int], *, stop=(), ended: bool = False) -> list[str]:
    """The pieces of the tokens. ended: an end token follows, which is not text."""
    stream, parts = TextStream(tokenizer, stop, before), []
    for n, token in enumerate(tokens, 1):
        parts.append(stream.push(token, last=n == len(tokens) and not ended))
        if stream.stopped:
            return parts
    return [*parts, stream.push(None, last=True)] if ended else parts


def decoded(tokenizer, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=300, deadline=None)
@given(data=st.data(), lead=st.integers(1, 6), window=st.integers(2, 12), ended=st.booleans())
def test_the_pieces_are_the_decoded_text(kind, data, lead, window, ended):
    tokenizer = KINDS[kind]
    tokens = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), min_size=1, max_size=60))
    split = data.draw(st.integers(0, len(tokens) - 1))
    with patch.multiple("dpllm.decode.text_stream", LEAD=lead, WINDOW=window):
        parts = streamed(tokenizer, tokens[:split], tokens[split:], ended=ended)
    whole = decoded(tokenizer, tokens)
    assert "".join(parts) == whole[len(decoded(tokenizer, tokens[:split])) :]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(data=st.data(), lead=st.integers(1, 6), window=st.integers(2, 12))
def test_stop_strings_end_the_decoded_text(kind, data, lead, window):
    """The text ends before the first stop string of the whole text as it was then."""
    tokenizer = KINDS[kind]
    tokens = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), min_size=1, max_size=40))
    split = data.draw(st.integers(0, len(tokens) - 1))
    stop = tuple(data.draw(st.lists(st.sampled_from([" a", "b", "é", "n't", "ab", " ", "'s"]), min_size=1)))
    with patch.multiple("dpllm.decode.text_stream", LEAD=lead, WINDOW=window):
        parts = streamed(tokenizer, tokens[:split], tokens[split:], stop=stop)
    begin, used = len(decoded(tokenizer, tokens[:split])), split + len(parts)
    seen = decoded(tokenizer, tokens[:used])[begin:]
    found = [seen.find(s) for s in stop if s in seen]
    assert bool(found) or used == len(tokens)
    assert "".join(parts) == seen[: min(found, default=None)]


@pytest.mark.parametrize("kind", KINDS)
def test_few_tokens_are_decoded_at_once(kind):
    """A long text is not decoded from its first token on: the time of a token does not grow."""
    tokenizer = KINDS[kind]
    most, decode = 0, type(tokenizer).decode

    def counted(self, tokens, **options):
        nonlocal most
        most = max(most, len(tokens))
        return decode(self, tokens, **options)

    word = tokenizer.convert_tokens_to_ids("a")
    with patch.object(type(tokenizer), "decode", counted):
        streamed(tokenizer, [word] * 5000, [word] * 2000)
    assert most <= 48


def test_the_first_space_of_a_continuation_is_kept():
    tokenizer = KINDS["stripping"]
    ids = tokenizer.convert_tokens_to_ids
    assert streamed(tokenizer, [ids("<s>"), ids("▁a")], [ids("▁b")]) == [" b"]
    assert streamed(tokenizer, [ids("<s>")], [ids("▁b")]) == ["b"], "the beginning of the text"
    assert streamed(tokenizer, [ids("▁a")], [ids("▁b"), ids("a")], stop=(" b",)) == [""]


def test_bytes_come_when_no_other_byte_can_change_them():
    tokenizer = KINDS["keeping"]
    ids = tokenizer.convert_tokens_to_ids
    e = [ids("<0xC3>"), ids("<0xA9>")]
    assert streamed(tokenizer, [ids("a")], [*e, ids("b")]) == ["", "", "éb"]
    assert streamed(tokenizer, [ids("a")], [*e, ids("<0xFF>"), ids("b")]) == ["", "", "", "\ufffd" * 3 + "b"]
    assert streamed(tokenizer, [ids("a")], [*e, ids("b")], stop=("é",)) == ["", ""], "at once"
