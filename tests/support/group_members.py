"""Which matrices a decision group consists of, from its name alone."""

from __future__ import annotations

from collections.abc import Iterable

PARTS = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}


def members(group_name: str, matrices: Iterable[str]) -> list[str]:
    """'model.layers.0.qkv' -> the three projections of layer 0, in the decoder's order."""
    layer = ".".join(group_name.split(".")[:3])
    last = group_name.rpartition(".")[2]
    of_layer = {n.rpartition(".")[2]: n for n in matrices if n.startswith(layer + ".")}
    return [of_layer[part] for part in PARTS.get(last, (last,))]
