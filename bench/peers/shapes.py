"""The shapes at which peers are measured, by GGUF's names of the matrices."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes; the head is not tied to the embedding."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    rope_theta: float = 10000.0

    def tensors(self) -> dict[str, tuple[int, int]]:
        """Every matrix's GGUF name and its (rows, columns)."""
        q, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        shapes = {"token_embd.weight": (self.vocabulary, self.hidden)}
        for i in range(self.layers):
            shapes |= {
                f"blk.{i}.attn_q.weight": (q, self.hidden),
                f"blk.{i}.attn_k.weight": (kv, self.hidden),
                f"blk.{i}.attn_v.weight": (kv, self.hidden),
                f"blk.{i}.attn_output.weight": (self.hidden, q),
                f"blk.{i}.ffn_gate.weight": (self.intermediate, self.hidden),
                f"blk.{i}.ffn_up.weight": (self.intermediate, self.hidden),
                f"blk.{i}.ffn_down.weight": (self.hidden, self.intermediate),
            }
        return shapes | {"output.weight": (self.vocabulary, self.hidden)}

    def norms(self) -> list[str]:
        """The names of the norms' weights, each `hidden` long."""
        layers = [f"blk.{i}.{n}_norm.weight" for i in range(self.layers) for n in ("attn", "ffn")]
        return [*layers, "output_norm.weight"]


SHAPES = {
    "1.1b": Shape(2048, 16, 8192, 32, 8, 64, 32000),
    "8b": Shape(4096, 32, 14336, 32, 8, 128, 128256, 500000.0),
}
