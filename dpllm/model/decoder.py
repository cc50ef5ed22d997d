"""The decoder: a Llama-family model whose matrices are read at a width chosen for every token.

`Decoder.forward` embeds the tokens, runs the blocks and applies the head. A block is norm, q/k/v, attention, o, norm,
gate/up, down. Matrices that share an input form a `Group`. Before a group is applied, `select(group, x)` chooses how
many planes each token reads. One token and a thousand tokens go through the same code, and each token reads its own
widths, so evaluating a batch gives the same result as decoding step by step.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dpllm.kernels.backend import Backend
from dpllm.kernels.reference import causal_attention
from dpllm.kernels.weight import Int8Weight
from dpllm.kvzip_bridge.attention import rotate
from dpllm.kvzip_bridge.cache import DenseKVCache, KVCache
from dpllm.kvzip_bridge.ragged_cache import RaggedKVCache
from dpllm.model.config import ModelConfig
from dpllm.model.nonfinite import check_logits, fault

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass
class Group:
    """Matrices that share a decision and a product. `weight` is dense [N, K] or prepared planes."""

    name: str
    weight: Any
    bias: Tensor | None
    index: int = 0  # its number in the model, set by the decoder
    seed_bits: int = 0
    resident_bits: int = 0
    weights: int = 0  # N * K, the group's share in the effective bits
    bytes_at: tuple[int, ...] = ()  # bytes that one pass reads at width seed_bits, seed_bits + 1, ...

    @property
    def dense(self) -> bool:
        """True where the group's matrices are not quantised."""
        return isinstance(self.weight, Tensor)


@dataclass
class Layer:
    """The weights of one decoder block. qkv and gate_up each hold one fused group, or one group per matrix."""

    index: int
    input_norm: Tensor
    post_norm: Tensor
    qkv: list[Group]
    o: Group
    gate_up: list[Group]
    down: Group
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


Select = Callable[[Group, Tensor], Tensor]  # (group, x [T, K]) -> int32 [T]
Observe = Callable[[Group, Tensor, Tensor], None]  # (group, x [T, K], y [T, N])


class Decoder:
    """The model. Made by dpllm.model.loading.load_decoder.

    No method changes a decoder, so several threads may use one. `with_backend` makes a decoder that computes the
    same model in another way. recompute: whether the backward pass computes blocks again instead of keeping
    their activations.
    """

    def __init__(
        self, config: ModelConfig, backend: Backend, layers: list[Layer], embedding: Tensor | Int8Weight,
        norm: Tensor, head: Any, dtype: torch.dtype, kv_dtype: torch.dtype,
    ):  # fmt: skip
        self.config, self.backend, self.layers = config, backend, layers
        self.embedding, self.norm, self.head = embedding, norm, head
        self.dtype, self.kv_dtype = dtype, kv_dtype
        self.device = norm.device
        self.groups = [g for layer in layers for g in (*layer.qkv, layer.o, *layer.gate_up, layer.down)]
        for index, group in enumerate(self.groups):
            group.index = index
        self.inv_freq = config.inv_freq.to(self.device)
        self.bytes_read = 0  # from disk, to load it
        self.notes: tuple[str, ...] = ()  # sentences for people about how it was loaded
        self.recompute = True

    def with_backend(self, backend: Backend, *, recompute: bool | None = None) -> Self:
        """A decoder over the same weights that computes with another backend; this one stays as it is.

        backend: its functions must accept the weights as this decoder's backend prepared them. recompute: as the
        attribute; None takes this decoder's.
        """
        view = copy.copy(self)
        view.backend = backend
        view.recompute = self.recompute if recompute is None else recompute
        return view

    def forward(
        self,
        ids: Tensor,
        cache: KVCache | None = None,
        select: Select | None = None,
        *,
        last_only: bool = False,
        observe: Observe | None = None,
        embedded: Tensor | None = None,
    ) -> Tensor:
        """Computes the next-token logits of one sequence.

        ids: int64 [T], the tokens after those in `cache` (which they join). select: widths of each token
        at each group; None reads every resident plane. observe: sees every group's input and output.
        embedded: the first block's input [T, K] in the decoder's dtype; None takes `embed(ids)`. Gradients flow
        into it.
        Returns [T, vocab] in fp32, or [1, vocab] with last_only; without select, the last layer is then computed
        for one row after its attention, the only one that observe sees there. Differentiable when gradients are
        on and no cache is given (blocks are then computed again in the backward pass, unless `recompute` is off).
        Raises InputError, and leaves the cache as it was, where a logit is NaN or infinite.
        """
        first = x = self.embed(ids) if embedded is None else embedded
        rope = self.rope(cache.length if cache else 0, len(ids))
        alone = last_only and select is None  # a policy may keep account of every token in every group
        for layer in self.layers:
            rows = slice(-1, None) if alone and layer is self.layers[-1] else slice(None)
            if torch.is_grad_enabled() and self.recompute:
                x = checkpoint(self.block, layer, x, rope, cache, select, observe, rows, use_reentrant=False)
            else:
                x = self.block(layer, x, rope, cache, select, observe, rows)
        logits = self.apply_head(self.rms_norm(x[-1:] if last_only else x, self.norm)).float()
        check_logits(logits, lambda: fault(self, first, rope, cache, select))
        if cache:
            cache.advance(len(ids))
        return logits

    def block(
        self,
        layer: Layer,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: KVCache | None,
        select: Select | None,
        observe: Observe | None = None,
        rows: slice = slice(None),
    ) -> Tensor:
        """One decoder layer's output [R, hidden] in x's dtype.

        x: [T, hidden], the layer's input. rope: as `rope` returns it. rows: the R tokens whose output is wanted;
        after attention, the others are not computed.
        """

        def apply(groups: list[Group], h: Tensor) -> Tensor:
            outs = [self._apply(g, h, select, observe) for g in groups]
            return outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)

        h = self.rms_norm(x, layer.input_norm)
        h = self._attention(layer, apply(layer.qkv, h), rope, cache)[rows]
        x = x[rows] + apply([layer.o], h)
        h = self.rms_norm(x, layer.post_norm)
        gate, up = apply(layer.gate_up, h).chunk(2, dim=-1)
        return x + apply([layer.down], F.silu(gate) * up)

    def _apply(self, group: Group, x: Tensor, select: Select | None, observe: Observe | None) -> Tensor:
        """Returns x [T, K] times the group's matrix, [T, N], each row at its own width."""
        if group.dense:
            y = F.linear(x, group.weight)
        elif select is None:
            y = self.backend.matmul(x, group.weight)
        else:
            y = self.backend.gemv(x, group.weight, select(group, x))
        y = y if group.bias is None else y + group.bias
        if observe is not None:
            observe(group, x, y)
        return y

    def _attention(
        self, layer: Layer, qkv: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache | None
    ) -> Tensor:
        c = self.config
        heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        q, k, v = (t.unflatten(-1, (-1, c.head_dim)) for t in qkv.split([heads, kv, kv], dim=-1))
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = self.rms_norm(q, layer.q_norm), self.rms_norm(k, layer.k_norm)
        if c.uses_rope[layer.index]:
            q, k = rotate(q, *rope), rotate(k, *rope)
        scale, window = c.head_dim**-0.5, c.windows[layer.index]
        if cache is None:
            k, v = (
                t.to(self.kv_dtype).to(t.dtype).transpose(0, 1) for t in (k, v)
            )  # as a cache would hold them
            out = causal_attention(q, k, v, scale, window)
        else:
            cache.write(layer.index, k, v)
            out = cache.attend(layer.index, q, scale, window, self.backend)
        return out.flatten(1)  # [T, H * D]

    def embed(self, ids: Tensor) -> Tensor:
        """The embeddings [T, hidden] of token ids int64 [T], in the decoder's dtype. Every call makes a new tensor."""
        if isinstance(self.embedding, Int8Weight):
            return self.embedding.rows(ids, self.dtype)
        return self.embedding[ids].to(self.dtype)

    def apply_head(self, x: Tensor) -> Tensor:
        """Logits [T, vocab], in x's dtype, of normalised hidden states [T, hidden]."""
        if isinstance(self.head, Int8Weight):
            return self.backend.int8_linear(x, self.head)
        if isinstance(self.head, Tensor):
            return F.linear(x, self.head.to(x.dtype))
        bits = torch.full((len(x),), self.head.resident_bits, dtype=torch.int32, device=x.device)
        return self.backend.gemv(x, self.head, bits)

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm of x [..., K], computed in float32, times weight [K]. Returns x's shape and dtype."""
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.config.rms_eps)).to(
            x.dtype
        ) * weight

    def rope(self, start: int, tokens: int) -> tuple[Tensor, Tensor]:
        """cos and sin [T, 1, D/2] of the positions start .. start + tokens - 1, in the decoder's dtype."""
        position = torch.arange(start, start + tokens, device=self.device, dtype=torch.float32)
        angle = position[:, None] * self.inv_freq
        scale = self.config.rope_scale
        return (angle.cos() * scale).to(self.dtype)[:, None], (angle.sin() * scale).to(self.dtype)[:, None]

    # -- accounting --------------------------------------------------------------------------------------

    def new_cache(self, capacity: int) -> DenseKVCache:
        """Returns an empty cache for `capacity` tokens."""
        c = self.config
        return DenseKVCache(c.num_layers, c.num_kv_heads, c.head_dim, capacity, self.kv_dtype, self.device)

    def new_ragged_cache(self, capacity: int) -> RaggedKVCache:
        """Returns an empty cache that can be pruned. It grows where `capacity` tokens are exceeded."""
        c = self.config
        return RaggedKVCache(c.num_layers, c.num_kv_heads, c.head_dim, capacity, self.kv_dtype, self.device)

    def head_bytes(self) -> int:
        """Returns the bytes of the head, which every token reads."""
        if isinstance(self.head, Int8Weight):
            return self.head.nbytes()
        if isinstance(self.head, Tensor):
            return self.head.numel() * self.head.element_size()
        return self.head.nbytes(self.head.resident_bits)

    def bytes_for(self, bits: float) -> int:
        """Returns the bytes of planes, tables and scales that a token reads at this width everywhere.

        bits: a width, or a number between two widths, whose bytes lie in between in proportion.
        """
        low = math.floor(bits)
        at_low, at_next = (
            sum(g.bytes_at[min(max(b, g.seed_bits), g.resident_bits) - g.seed_bits] for g in self.groups)
            for b in (low, low + 1)
        )
        return math.floor(at_low + (bits - low) * (at_next - at_low))

    def pairs_in(self, cache: KVCache) -> float:
        """Returns the pairs that a cache holds, over all layers and heads."""
        return cache.nbytes / (2 * self.config.head_dim * self.kv_dtype.itemsize)
