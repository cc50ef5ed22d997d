"""Defines the operations of a GPU decode step in plain torch.

Tests and `dpllm doctor` compare the fused GPU kernels with these operations. A step on a CPU does not use them. The
signatures are those of kernels/triton/{norm_silu_finish,attention,select,products}.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpllm.kernels import reference
from dpllm.kernels.gpu_step.tables import (
    ALL,
    BIAS,
    CONTEXT,
    CORRECTION,
    ENTROPY,
    GAIN,
    LIMIT,
    LOG_TOTAL,
    MEANS,
    MULTIPLIER,
    OBSERVE,
    OFFSET,
    RATE,
    SINCE,
    SPARE,
    TARGET,
    TOKEN,
    WEIGHTS,
    CacheTable,
    Heads,
    PolicyTable,
    Site,
)


def _signals(x: Tensor, site: Site, table: PolicyTable) -> None:
    """Writes the signals of the site's groups, the weighted squares of x [1, K], to the table."""
    if site.diagonals is not None:
        table.signals[site.ids] = 0
        table.signals[site.ids, 0] = site.diagonals.float() @ x[0].float().square()


def decide(group: int, table: PolicyTable) -> None:
    """Chooses the width of a group of a WEIGHTED table from the group's signals in the table."""
    g, left = group, table.left[group]
    paced = (left / table.rest[g].clamp(min=1e-30)).pow(table.state[GAIN])
    signal = table.signals[g].sum() * torch.minimum(table.state[MULTIPLIER], paced)
    step = min(int((signal > table.thresholds[g]).sum()), int((table.extra[g] <= left).sum()))
    table.bits[g] = table.base[g] + step
    table.left[g + 1] = left - table.extra[g, step - 1] if step else left


def chosen_gemv(
    x: Tensor, w: Any, bias: Tensor | None, group: int, table: PolicyTable, otherwise: Callable[..., Tensor]
) -> Tensor:
    """Computes x W_b^T + bias of one token at the width that the group's signals decide. otherwise: the gemv to use."""
    decide(group, table)
    return otherwise(x, w, table.bits[group : group + 1], bias=bias)


def norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, site: Site, table: PolicyTable, limit: float
) -> Tensor:
    """Adds delta to x [1, K] in place, returns rms_norm(x) * weight, and writes the signals of the site's groups."""
    if delta is not None:
        x += delta
    wide = x.float()
    h = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight
    if site.first:
        exponent = (h[0].float() @ table.probe + table.state[OFFSET]).clamp(-limit, limit)
        table.state[MULTIPLIER] = (exponent + table.state[CORRECTION]).exp()
    _signals(h, site, table)
    return h


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def attend(
    qkv: Tensor, heads: Heads, cache: CacheTable, layer: int, site: Site, table: PolicyTable
) -> Tensor:
    """Norms and rotates q and k, appends k and v to their heads' runs, and computes the attention to these.

    qkv: [1, (H + 2 KVH) D]. Returns [1, H D], and writes the signals of the site's groups."""
    start, kv_heads = cache.start[layer], cache.start.shape[1]
    rows = qkv.view(-1, heads.dim)
    q, k, v = rows.split([len(rows) - 2 * kv_heads, kv_heads, kv_heads])
    if heads.norms is not None:
        q, k = (_normed(t, w, heads.eps) for t, w in zip((q, k), heads.norms, strict=True))
    if heads.rope is not None:
        q, k = (_rotated(t, *heads.rope) for t in (q, k))
    before = cache.length[layer] + cache.request[SINCE]
    cache.k[layer][start + before] = k.to(cache.dtype)
    cache.v[layer][start + before] = v.to(cache.dtype)
    n = before.int() + 1
    skip = (n - heads.window).clamp(min=0) if heads.window else torch.zeros_like(n)
    runs = start + skip, n - skip
    out = reference.decode_attention(q, cache.k[layer], cache.v[layer], *runs, heads.dim**-0.5).view(1, -1)
    _signals(out, site, table)
    return out


def silu_mul(gate_up: Tensor, site: Site, table: PolicyTable) -> Tensor:
    """Returns silu(gate) * up of gate_up [1, 2K], and writes the signals of the site's groups."""
    gate, up = gate_up.chunk(2, dim=-1)
    out = F.silu(gate) * up
    _signals(out, site, table)
    return out


def estimate(x: Tensor, site: Site, table: PolicyTable, partial: Tensor, counter: Tensor) -> None:
    """Chooses the widths of the site's groups by the estimates of an ESTIMATED table. x: [1, K]."""
    wide = x[0].float()
    for g in site.groups:
        matrix = table.estimators[g]
        size = (wide if matrix is None else matrix.float() @ wide).norm()
        signal = table.line[g, 0] * size + table.line[g, 1]
        table.bits[g] = table.base[g] + (signal > table.thresholds[g]).sum(dtype=torch.int32)


def finish(logits: Tensor, token: Tensor, table: PolicyTable, partial: Tensor, counter: Tensor) -> None:
    """Sets token int32 [1] to the first largest of logits [1, V], and writes the prediction's entropy to the table."""
    token.copy_(logits.argmax(-1))
    log_total = logits[0].logsumexp(0)
    log_p = logits[0] - log_total
    table.state[LOG_TOTAL], table.state[ENTROPY] = log_total, -(log_p.exp() * log_p).sum()


def observe(logits: Tensor, cache: CacheTable, table: PolicyTable, decay: float) -> None:
    """Learns from the previous step where the request asks for it, then prepares the next token.

    It sets the offset of the token's multiplier, and what the token may cost."""
    s = table.state
    table.left[0] = cache.request[SPARE]
    context = s[CONTEXT : CONTEXT + 3]
    if cache.request[OBSERVE]:
        level = (s[ENTROPY] + 0.01).log()
        chosen = (logits[0, cache.request[TOKEN]] - s[LOG_TOTAL]).clamp(min=-20)
        trend = level if context[2].isnan() else decay * context[2] + (1 - decay) * level
        context.copy_(torch.stack([level, chosen, trend]))
    if cache.request[OBSERVE] == ALL:
        used = table.bits.float() @ table.share
        moved = s[CORRECTION] + s[RATE] * (s[TARGET] - used)
        s[CORRECTION] = torch.minimum(torch.maximum(moved, -s[LIMIT]), s[LIMIT])
    known = (context - s[MEANS : MEANS + 3]).nan_to_num(nan=0.0)
    s[OFFSET] = s[BIAS] + known @ s[WEIGHTS : WEIGHTS + 3]
