"""A KV cache that can be pruned and then takes less memory: every (layer, KV head) holds its own number of pairs.

A layer's pairs lie in one flat buffer, head after head, with slack after each head's pairs:

    head 0: [kept pairs | tail | slack]  head 1: [kept pairs | tail | slack]  ...

The tail holds the tokens since the last pruning, which every head has. A new pair is written at the end of its head's
run, so appending neither copies nor allocates until the slack is used up. Keys were rotated for their positions
before they were stored, so they stay valid; `length` counts all positions, also those whose pairs were dropped."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dpllm.kvzip_bridge.attention import AttentionKernels, attend

SLACK = 256  # tokens of room after each head when a cache was pruned, by default


class RaggedKVCache:
    """Keys and values, [slots, D] for each layer, and the run of slots of each head.

    length: the position of the next token. base: the position where the tail begins; pairs before it were pruned.
    kept: positions int32 of the pairs before `base`, by layer and head. layout: a number that changes whenever the
    runs have moved in memory or were pruned; while it stays the same, every run grows and shrinks as `length` does.
    """

    def __init__(
        self, layers: int, kv_heads: int, head_dim: int, capacity: int,
        dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
    ):  # fmt: skip
        empty = torch.empty(0, dtype=torch.int32, device=device)
        self.length = self.base = 0
        self.kept: list[list[Tensor]] = [[empty] * kv_heads for _ in range(layers)]
        self.k = [
            torch.empty(kv_heads * capacity, head_dim, dtype=dtype, device=device) for _ in range(layers)
        ]
        self.v = [torch.empty_like(k) for k in self.k]
        self._pruned = torch.zeros(layers, kv_heads, dtype=torch.int32, device=device)  # pairs before `base`
        self._room = torch.full((layers, kv_heads), capacity, dtype=torch.int64, device=device)
        self._start = _starts(self._room)
        self._given = self._pruned.clone()
        self._even = [True] * layers  # whether all heads of a layer have runs of the same length
        self.layout = 0
        self._count()

    @classmethod
    def of_runs(
        cls,
        k: list[Tensor],
        v: list[Tensor],
        lengths: Tensor,
        kept: list[list[Tensor]],
        base: int,
        length: int,
    ) -> RaggedKVCache:
        """Makes a cache of given runs, without slack.

        k, v: [pairs, D] for each layer, head after head. lengths: int32 [layers, KVH]. kept: positions of the pairs
        before `base`. base, length: as in the class."""
        cache = cls(len(k), lengths.shape[1], k[0].shape[1], 0, k[0].dtype, k[0].device)
        cache.k, cache.v, cache.kept, cache.base, cache.length = k, v, kept, base, length
        cache._pruned, cache._given = lengths - (length - base), lengths.clone()
        cache._room = lengths.to(torch.int64)
        cache._start = _starts(cache._room)
        cache._even = [bool((row == row[0]).all()) for row in lengths]
        cache._count()
        return cache

    def to(self, dtype: torch.dtype, device: torch.device | str) -> RaggedKVCache:
        """Returns the cache in another dtype or on another device, without slack; itself if neither changes."""
        if (dtype, torch.device(device)) == (self.k[0].dtype, self.k[0].device):
            return self
        k, v = (
            [
                torch.cat([self.run(i, h)[which] for h in range(len(heads))])
                for i, heads in enumerate(self.kept)
            ]
            for which in (0, 1)
        )
        return RaggedKVCache.of_runs(
            [t.to(device, dtype) for t in k], [t.to(device, dtype) for t in v], self.lengths.to(device),
            [[p.to(device) for p in heads] for heads in self.kept], self.base, self.length,
        )  # fmt: skip

    # -- what is held ------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of all pairs held, keys and values of all layers. Decoding one token reads that many."""
        return 2 * self._pairs * self.k[0].shape[1] * self.k[0].element_size()

    @property
    def allocated_nbytes(self) -> int:
        """Bytes of all buffers, slack included."""
        return sum(t.numel() * t.element_size() for t in (*self.k, *self.v))

    @property
    def lengths(self) -> Tensor:
        """The number of pairs that each head holds, int32 [layers, KVH]; a new tensor."""
        return self._pruned + (self.length - self.base)

    def pairs(self, layer: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Returns (k, v), both [KVH, last - first, D], of positions that every head holds.

        The positions lie in the tail, or in a beginning that every head has kept. The result is a view where the
        layer's runs have the same length, else a copy. Raises ValueError where a head lacks one of the positions.
        """
        if first < self.base:
            if last > self.base or any(
                len(p) < last or int(p[last - 1]) != last - 1 for p in self.kept[layer]
            ):
                raise ValueError(f"positions {first} to {last} were pruned in layer {layer}.")
            skip = [first] * len(self.kept[layer])
        else:
            skip = [len(p) + first - self.base for p in self.kept[layer]]
        starts = (self._start[layer] + torch.tensor(skip, device=self._start.device)).tolist()
        if self._even[layer]:
            k, v = (t[layer].view(len(skip), -1, t[layer].shape[1]) for t in (self.k, self.v))
            return k[:, skip[0] : skip[0] + last - first], v[:, skip[0] : skip[0] + last - first]
        k, v = (torch.stack([t[layer][s : s + last - first] for s in starts]) for t in (self.k, self.v))
        return k, v

    def _held(self, layer: int) -> Tensor:
        """Returns the number of pairs of each head of a layer, int32 [KVH]."""
        return self._pruned[layer] + (self.length - self.base)

    def run(self, layer: int, head: int, room: int = 0) -> tuple[Tensor, Tensor]:
        """Returns (k, v), views [n + room, D], of one head's n pairs in order of position and the next `room` slots."""
        start = int(self._start[layer, head])
        end = start + int(self._pruned[layer, head]) + self.length - self.base + room
        return self.k[layer][start:end], self.v[layer][start:end]

    # -- the decoder's side ------------------------------------------------------------------------------

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Writes k, v [T, KVH, D] after each head's pairs; `advance` makes them part of the cache."""
        self.reserve(len(k))
        at = (self._start[layer] + self._held(layer))[:, None] + torch.arange(len(k), device=k.device)
        self.k[layer][at] = k.transpose(0, 1).to(self.k[layer].dtype)
        self.v[layer][at] = v.transpose(0, 1).to(self.v[layer].dtype)

    def advance(self, tokens: int) -> None:
        """Makes `tokens` written tokens part of the cache, after every layer has written them."""
        self.length += tokens
        self._pairs += tokens * self._pruned.numel()
        self._free -= tokens

    def _count(self) -> None:
        """Counts the pairs held and the free room as plain numbers, because the tensors may lie on another device."""
        self._pairs = int(self.lengths.sum())
        self._free = int((self._room - self.lengths).min())
        self.layout += 1

    def runs(self, room: int) -> tuple[Tensor, Tensor]:
        """Returns every run as (start int64, length int32), both [layers, KVH], with room for `room` more tokens."""
        self.reserve(room)
        return self._start, torch.add(self._pruned, self.length - self.base, out=self._given)

    def attend(
        self, layer: int, q: Tensor, scale: float, window: int | None, kernels: AttentionKernels
    ) -> Tensor:
        """Computes the attention of the T tokens just written. q: [T, H, D]. Returns [T, H, D]."""
        runs = self._start[layer], self._held(layer) + len(q)
        return attend(kernels, q, (self.k[layer], self.v[layer]), runs, scale, window)

    # -- the life of a context ---------------------------------------------------------------------------

    def reserve(self, tokens: int) -> None:
        """Makes room for `tokens` more tokens. A copy at least doubles the tail's room, so that copies are rare."""
        if self._free < tokens:
            more = max(tokens, self.length - self.base, 32)
            try:
                for layer in range(len(self.k)):
                    self._rebuild(layer, None, more)
            finally:
                self._count()

    def trim(self, room: int = SLACK) -> None:
        """Reduces the slack to `room` tokens where it is more than twice that, as after a long tail was forgotten."""
        if self._free <= 2 * room:
            return
        try:
            for layer in range(len(self.k)):
                self._rebuild(layer, None, room)
        finally:
            self._count()

    def rewind(self, length: int) -> None:
        """Forgets every token from position `length` on. Raises ValueError where that is not in the tail."""
        if not self.base <= length <= self.length:
            raise ValueError(
                f"cannot rewind {self.length} tokens to {length}; the pruned part ends at {self.base}."
            )
        self.advance(length - self.length)

    def fork(self, room: int = SLACK) -> RaggedKVCache:
        """Returns an independent copy of the cache, with room for `room` more tokens."""
        other = object.__new__(RaggedKVCache)
        other.__dict__.update(self.__dict__)
        other.k, other.v, other._even = list(self.k), list(self.v), list(self._even)
        other.kept = [list(heads) for heads in self.kept]
        other._pruned, other._given = self._pruned.clone(), self._given.clone()
        other._room, other._start = self._room.clone(), self._start.clone()
        for layer in range(len(self.k)):
            other._rebuild(layer, None, room)
        other._count()
        return other

    def prune(self, keep: Tensor, windows: Sequence[int | None], room: int = SLACK) -> None:
        """Drops pairs of the tail. The pairs that are kept join the pruned part.

        keep: bool [layers, KVH, tail]. windows: a layer with a sliding window keeps as many of its last pairs as it
        can see, whatever `keep` says. room: slack after each head, in tokens. Layers are copied one after another, so
        that little is held twice. If pruning is interrupted, the cache is empty."""
        tail = self.length - self.base
        if keep.shape != (*self._pruned.shape, tail) or keep.dtype != torch.bool:
            shape = [*self._pruned.shape, tail]
            raise ValueError(f"a mask bool {shape} is needed, not {keep.dtype} {list(keep.shape)}.")
        new = torch.arange(self.base, self.length, dtype=torch.int32, device=keep.device)
        try:
            for layer, window in enumerate(windows):
                chosen = self._chosen(layer, keep[layer], window)
                self._rebuild(layer, chosen, room)
                self.kept[layer] = [
                    torch.cat([old, new])[i] for old, i in zip(self.kept[layer], chosen, strict=True)
                ]
            self.base = self.length
        except BaseException:
            self._empty()
            raise
        finally:
            self._count()

    def _empty(self) -> None:
        self.kept = [[p[:0] for p in heads] for heads in self.kept]
        self._pruned.zero_()
        self._even = [False] * len(self.k)  # the heads' buffers have room for different numbers of pairs
        self.length = self.base = 0

    def _chosen(self, layer: int, keep: Tensor, window: int | None) -> list[Tensor]:
        """Returns the indices into each head's run that stay, ascending."""
        found = []
        for h, old in enumerate(self.kept[layer]):
            if window is not None:
                n = len(old) + self.length - self.base
                found.append(torch.arange(max(0, n - window), n, device=keep.device))
            else:
                before = torch.arange(len(old), device=keep.device)
                found.append(torch.cat([before, len(old) + keep[h].nonzero()[:, 0]]))
        return found

    def _rebuild(self, layer: int, chosen: list[Tensor] | None, room: int) -> None:
        """Copies the chosen pairs of a layer's runs (None: all) to new buffers, with `room` free slots after each."""
        runs = zip(self._start[layer].tolist(), self._held(layer).tolist(), strict=True)
        slots = [torch.arange(s, s + n, device=self._start.device) for s, n in runs]
        if chosen is not None:
            slots = [own[i] for own, i in zip(slots, chosen, strict=True)]
        stored = torch.tensor([len(own) for own in slots], dtype=torch.int32, device=self._pruned.device)
        tail = self.length - self.base if chosen is None else 0
        capacity = stored.to(torch.int64) + room
        start = _starts(capacity)
        k, v = (_copied(flat[layer], slots, start.tolist(), int(capacity.sum())) for flat in (self.k, self.v))
        # The fields change together, so that an interrupted copy leaves the layer as it was.
        self.k[layer], self.v[layer] = k, v
        self._pruned[layer], self._room[layer], self._start[layer] = stored - tail, capacity, start
        self._even[layer] = bool((stored == stored[0]).all())


def _copied(flat: Tensor, slots: list[Tensor], start: list[int], size: int) -> Tensor:
    """Returns a buffer [size, D] that holds flat[slots[h]] from start[h] on."""
    new = flat.new_empty(size, flat.shape[1])
    for own, begin in zip(slots, start, strict=True):
        torch.index_select(flat, 0, own, out=new[begin : begin + len(own)])
    return new


def _starts(capacity: Tensor) -> Tensor:
    """Returns the first slot of each head's run in its layer, int64 [..., KVH]."""
    return capacity.cumsum(-1) - capacity
