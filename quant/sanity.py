"""Tells a working model from nonsense by its loss on 256 tokens of plain text."""

from __future__ import annotations

import math
from typing import Any

import torch

from dpllm import reference
from dpllm.base.text import encode, read_documents
from dpllm.quant.layerwise import LayerwiseModel, call_layer
from dpllm.quant.source import ModelSource

TOKENS = 128  # of each text
PROSE = (  # Abraham Lincoln's address at Gettysburg, 1863
    "Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in Liberty, "
    "and dedicated to the proposition that all men are created equal. Now we are engaged in a great civil war, testing "
    "whether that nation, or any nation so conceived and so dedicated, can long endure. We are met on a great "
    "battle-field of that war. We have come to dedicate a portion of that field, as a final resting place for those "
    "who here gave their lives that that nation might live. It is altogether fitting and proper that we should do this."
)
SANE, SURE = 0.7, 0.3  # of the loss of guessing, log(vocabulary)


def is_sane(found: list[float], vocabulary: int) -> bool:
    """Tells whether a model has learnt what one of the texts is. found: what `losses` gives."""
    return min(found) < SANE * math.log(vocabulary)


def is_sure(found: list[float], vocabulary: int) -> bool:
    """Tells whether the losses are too good for a model that is read wrongly.

    SmolLM2 with the rows of its queries and keys in the wrong order has 0.43 times the loss of guessing, and 0.21 times
    in the right order.
    """
    return sum(found) / len(found) < SURE * math.log(vocabulary)


def losses(source: ModelSource, tokenizer: Any) -> list[float]:
    """The loss of a model in nats per token on two texts, prose and Python code. One decoder layer is in memory."""
    texts = (PROSE, read_documents(reference.calibration_text())[0])
    rows = [encode(tokenizer, text)[:TOKENS] for text in texts]
    length = min(map(len, rows))
    ids = torch.tensor([row[:length] for row in rows])
    model = LayerwiseModel(source)
    with torch.no_grad():
        hidden, arguments = model.embed(ids)
        for index in range(len(model)):
            hidden = call_layer(model.load_layer(index), hidden, arguments[index])
    return model.losses(hidden, ids)
