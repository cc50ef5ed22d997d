"""The families of models that are read from GGUF files. A family is a table: adding one needs no other code.

The tables say which tensor of a file is which tensor of the Hugging Face model, and what is undone on the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

PERMUTED = "permuted"  # rows of each head lie as (x0, x_half, x1, ..): llama.cpp rotates neighbours


class Wanted(NamedTuple):
    """A tensor that a family has. shape: names of sizes (`ModelShape`). change: what the stored values are."""

    name: str
    shape: tuple[str, ...]
    change: str | None = None
    optional: bool = False


@dataclass(frozen=True)
class Family:
    """A `general.architecture` of GGUF files.

    model_type: of the Hugging Face model. layer: tensors of decoder layer n, by their names after "blk.n.". biases:
    for each configuration flag, the stored name (of layer 0) whose presence sets it. extra: constants of config.json
    that the metadata do not hold.
    """

    model_type: str
    layer: Mapping[str, Wanted]
    biases: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def permuted(self) -> bool:
        """Whether rows of queries and keys are stored in another order."""
        return any(w.change == PERMUTED for w in self.layer.values())


OUTER = {
    "token_embd.weight": Wanted("model.embed_tokens.weight", ("vocabulary", "hidden")),
    "output_norm.weight": Wanted("model.norm.weight", ("hidden",)),
    "output.weight": Wanted("lm_head.weight", ("vocabulary", "hidden"), optional=True),
}
NORMS = {
    "attn_norm.weight": Wanted("input_layernorm.weight", ("hidden",)),
    "ffn_norm.weight": Wanted("post_attention_layernorm.weight", ("hidden",)),
}
QK_NORMS = {
    "attn_q_norm.weight": Wanted("self_attn.q_norm.weight", ("head",)),
    "attn_k_norm.weight": Wanted("self_attn.k_norm.weight", ("head",)),
}
# Stored name, name in the model, rows, columns, and whether rotary embedding follows.
LINEARS = (
    ("attn_q", "self_attn.q_proj", "queries", "hidden", True),
    ("attn_k", "self_attn.k_proj", "keys", "hidden", True),
    ("attn_v", "self_attn.v_proj", "keys", "hidden", False),
    ("attn_output", "self_attn.o_proj", "hidden", "queries", False),
    ("ffn_gate", "mlp.gate_proj", "inner", "hidden", False),
    ("ffn_up", "mlp.up_proj", "inner", "hidden", False),
    ("ffn_down", "mlp.down_proj", "hidden", "inner", False),
)
QKV = ("attn_q", "attn_k", "attn_v")


def _linears(
    change: str | None = None, *, biases: tuple[str, ...] = (), optional: bool = False
) -> dict[str, Wanted]:
    """Matrices of a gated decoder layer. change: of queries and keys. biases: stored names of those with a bias."""
    found = {}
    for stored, name, rows, columns, rotated in LINEARS:
        done = change if rotated else None
        found[f"{stored}.weight"] = Wanted(f"{name}.weight", (rows, columns), done)
        if stored in biases:
            found[f"{stored}.bias"] = Wanted(f"{name}.bias", (rows,), done, optional)
    return found


_LLAMA = NORMS | _linears(PERMUTED, biases=tuple(row[0] for row in LINEARS), optional=True)
_LLAMA_BIASES = {"attention_bias": "attn_q.bias", "mlp_bias": "ffn_gate.bias"}
FAMILIES = {
    "llama": Family("llama", _LLAMA, _LLAMA_BIASES),  # also Mistral, SmolLM and SmolLM2
    "smollm3": Family("smollm3", _LLAMA, _LLAMA_BIASES, {"no_rope_layer_interval": 4}),
    "qwen2": Family("qwen2", NORMS | _linears(biases=QKV)),
    "qwen3": Family("qwen3", NORMS | QK_NORMS | _linears()),
}
