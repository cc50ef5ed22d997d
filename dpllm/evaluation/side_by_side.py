"""Several texts decoded side by side, one token each per step: real step-by-step decoding, batched.

Rows are sequences, all at the same position; a policy sees them as it sees one sequence, step after step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpllm.decode.step import Stepped, TokenStep
from dpllm.evaluation.forced_steps import forced_steps
from dpllm.model.decoder import Decoder
from dpllm.model.nonfinite import check_logits, fault
from dpllm.policies.base import PrecisionPolicy, Recorder, TextPolicy


class _Rows:
    """Keys and values [layers, R, KVH, S, D] of R sequences of equal length; the decoder's cache protocol."""

    def __init__(self, decoder: Decoder, rows: int, capacity: int):
        c = decoder.config
        shape = (c.num_layers, rows, c.num_kv_heads, capacity, c.head_dim)
        self.k = torch.zeros(shape, dtype=decoder.kv_dtype, device=decoder.device)
        self.v = torch.zeros(shape, dtype=decoder.kv_dtype, device=decoder.device)
        self.native = decoder.backend.cpu is not None
        # Each head of each row is a run of its own for the decode kernel: all rows in one call.
        self._starts = torch.arange(rows * c.num_kv_heads) * capacity
        self._lengths = torch.zeros(rows * c.num_kv_heads, dtype=torch.int32)
        self.length = 0

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """k, v: [R, KVH, D], one pair for each of the first R sequences."""
        self.k[layer, : len(k), :, self.length] = k
        self.v[layer, : len(v), :, self.length] = v

    def attend(self, layer: int, q: Tensor, scale: float, window: int | None, kernels: Any) -> Tensor:
        """q: [R, H, D]. Returns [R, H, D]."""
        end = self.length + 1
        first = 0 if window is None else max(0, end - window)
        if self.native:
            heads = len(q) * self.k.shape[2]
            k, v = (t[layer].flatten(0, 2) for t in (self.k, self.v))
            starts, lengths = self._starts[:heads] + first, self._lengths[:heads].fill_(end - first)
            return kernels.decode_attention(q.flatten(0, 1), k, v, starts, lengths, scale).view(q.shape)
        k, v = (t[layer, : len(q), :, first:end].to(q.dtype) for t in (self.k, self.v))
        grouped = q.unflatten(1, (k.shape[1], -1))  # [R, KVH, H / KVH, D]
        return F.scaled_dot_product_attention(grouped, k, v, scale=scale).flatten(1, 2)


class RowsStep(TokenStep):
    """One token of each of R sequences, by the decoder's own operations. Tokens are int64 [R] here; fewer than in the
    step before mean that the last sequences have ended."""

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        self.recorder: Recorder | None = None  # of the text's widths

    def __call__(self, token: Any, cache: Any, text: TextPolicy | None) -> Stepped:
        """Returns logits float32 [R, V] and bits int32 [R, G]; sums are left to `recorder`."""
        assert text is not None
        if self.recorder is None or self.recorder.policy is not text:
            self.recorder = Recorder(text, self.decoder.groups)
        d, ids = self.decoder, token.to(self.decoder.device)
        first = x = d.embed(ids)
        rope = d.rope(cache.length, 1)
        for layer in d.layers:
            x = d.block(layer, x, rope, cache, self.recorder)
        logits = d.apply_head(d.rms_norm(x, d.norm)).float()
        check_logits(logits, lambda: fault(d, first, rope, cache, self.recorder))
        cache.length += 1
        bits = None if d.groups[0].dense else self.recorder.bits()
        return Stepped(logits, bits, -1, 0.0, 0)

    def learn(self, text: TextPolicy | None, stepped: Stepped, token: Any) -> None:
        """See TokenStep; every sequence learns from its own row."""
        if text is not None and text.stepwise and self.recorder is not None:
            going = len(token)
            read = self.recorder.effective_bits()[:going].to(stepped.logits.device)
            text.learn(stepped.logits[:going], token, read)


def steps(
    decoder: Decoder, policy: PrecisionPolicy, documents: Sequence[Tensor], rows: int = 128
) -> Iterator[tuple[list[int], Tensor, Tensor, Recorder]]:
    """Decodes documents of token ids, `rows` at a time, teacher-forced.

    Yields after every step: (document numbers [R], logits [R, V], the tokens that follow int64 [R], recorder of
    this step's widths). Each document is read from an empty cache, its last token is never fed.
    """
    order = sorted(range(len(documents)), key=lambda i: -len(documents[i]))
    for start in range(0, len(order), rows):
        numbers = order[start : start + rows]
        lengths = [len(documents[i]) - 1 for i in numbers]
        cache: Any = _Rows(decoder, len(numbers), lengths[0])
        live = [
            sum(n > t for n in lengths) for t in range(lengths[0])
        ]  # sorted by length: the last ones end first
        columns = [torch.stack([documents[i][t] for i in numbers[:n]]) for t, n in enumerate(live)]
        step = RowsStep(decoder)
        for t, stepped in enumerate(forced_steps(step, policy, cache, columns)):
            after = torch.stack([documents[i][t + 1] for i in numbers[: live[t]]]).to(decoder.device)
            assert step.recorder is not None
            yield numbers[: live[t]], stepped.logits, after, step.recorder
