"""Sizes, shares and counts as people write them."""

from __future__ import annotations

import math

import pytest

from dpllm.base.errors import InputError
from dpllm.base.quantities import parse_count, parse_share, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GB", 4e9),
        ("600 MiB", 600 * 2**20),
        ("1e9", 1e9),
        ("1.5k", 1500),
        ("2g", 2e9),
        ("1TiB", 2**40),
        ("7b", 7),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "-4GB", "4XB", "nan", "inf", "0", "1e999", "1.2.3", "4 G B", "..", "4GB!"]
)
def test_no_sizes(text):
    with pytest.raises(InputError, match="is not a size"):
        parse_size(text)


def test_sizes_as_numbers():
    assert (parse_size(4e9), parse_size(600)) == (4_000_000_000, 600)
    assert parse_size(2**60) == 2**60
    for size in (0, -1, math.nan, math.inf):
        with pytest.raises(InputError, match="is not a size"):
            parse_size(size)


@pytest.mark.parametrize(
    ("text", "share"), [("2%", 0.02), ("0.02", 0.02), (" 2 % ", 0.02), (0.5, 0.5), (0, 0.0)]
)
def test_shares(text, share):
    assert parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "%", "much", "-1%", -0.1, math.nan, "inf"])
def test_no_shares(text):
    with pytest.raises(InputError, match="is not a share"):
        parse_share(text)


@pytest.mark.parametrize(("text", "count"), [("16k", 16384), ("4096", 4096), (4096, 4096), (" 2 K", 2048)])
def test_counts(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "k", "many", "1.5k", "-4", -4, 1.5])
def test_no_counts(text):
    with pytest.raises(InputError, match="is not a number of tokens"):
        parse_count(text)
