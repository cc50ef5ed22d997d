"""A whole decode step as one CUDA graph: the counterpart of cpu_step.py for GPUs.

`GpuStep` computes what `Decoder.forward` computes for one token. Everything that changes from token to token stands
in device memory at fixed addresses (kernels/gpu_step/tables.py): the token, its position, where the cache's pairs lie,
and what the policy compares with. So one captured graph serves every cache, length and target, and is captured anew
only for a policy of another structure. Where capturing fails, and without a GPU, the same operations run one by one.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dpllm.base.errors import InputError
from dpllm.calib.runtime.token_sensitivity import DECAY, LIMIT
from dpllm.decode.gpu_policy_table import DevicePolicy, LayerSites, Structure
from dpllm.decode.step import DecoderStep, Stepped, TokenStep, accounted
from dpllm.kernels.backend import lacking_for_triton
from dpllm.kernels.gpu_step import tables
from dpllm.kernels.gpu_step.tables import CacheTable, Heads, Site
from dpllm.kvzip_bridge.cache import KVCache
from dpllm.model.decoder import Decoder, Group
from dpllm.model.decoder import Layer as DecoderLayer
from dpllm.model.nonfinite import check_logits, fault
from dpllm.policies.base import TextPolicy, WidthSums

log = logging.getLogger("dpllm")


class GpuStep(TokenStep):
    """Decodes one token at a time. Made for one decoder; its texts take turns, at some cost per change.

    reason: why steps are not one graph, empty if they are. graphs: structure of a policy -> its captured step.
    """

    def __init__(self, decoder: Decoder, operations: Any, reason: str = ""):
        c, device = decoder.config, decoder.device
        self.decoder, self.operations, self.reason = decoder, operations, reason
        self.graphs: dict[Structure, torch.cuda.CUDAGraph] = {}
        self.logits = torch.zeros(1, c.vocab_size, dtype=torch.float32, device=device)
        count = len(decoder.groups)
        self._result = torch.zeros(count + 1, dtype=torch.int32, device=device)  # bits [G], greedy token
        self._policy = DevicePolicy(decoder, self.logits)
        self._table = self._policy.table
        self._table.bits = self._result[:count]
        self._cache = CacheTable.empty(c.num_layers, c.num_kv_heads, decoder.kv_dtype, device)
        self._placed: tuple[weakref.ref[KVCache], int, int] | None = None  # cache, its layout and length then
        scratch = max(4 * c.vocab_size // 1024, tables.MAX_FED * 32) + 64
        self._partial = torch.zeros(scratch, dtype=torch.float32, device=device)
        self._counter = torch.zeros(tables.MAX_FED, dtype=torch.int32, device=device)
        self._nowhere = Site((), torch.zeros(1, dtype=torch.int32, device=device))
        self._inv_freq = decoder.inv_freq.float()
        self._captures = cuda = device.type == "cuda"
        self._request = torch.zeros(tables.SPARE + 1, dtype=torch.int64, pin_memory=cuda)
        self._answer = torch.zeros(count + 1, dtype=torch.int32, pin_memory=cuda)
        self._sent: torch.cuda.Event | None = torch.cuda.Event() if cuda else None
        self._done: torch.cuda.Event | None = torch.cuda.Event() if cuda else None
        self._sums = WidthSums(decoder.groups)
        self._by_torch = DecoderStep(decoder)  # for policies that decide on the host
        self._on_host: Stepped | None = None  # the result of the last step, where torch made it
        self._warned: set[str] = set()
        # Streams, events and launches are those of the current device, which need not be the decoder's.
        self._here = partial(torch.cuda.device, device) if cuda else nullcontext

    @classmethod
    def of(cls, decoder: Decoder) -> GpuStep | None:
        """The step for a decoder on a GPU, where our kernels run on it; else None."""
        if decoder.device.type != "cuda":
            return None
        if lacking := lacking_for_triton(decoder.device):
            log.warning("decoding by torch's operations: %s", lacking)
            return None
        from dpllm.kernels.triton import step_operations

        ready = decoder.groups[0].dense or decoder.backend.name.startswith("triton")
        reason = "" if ready else f"products of backend '{decoder.backend.name}' cannot be captured"
        return cls(decoder, step_operations, reason)

    @torch.no_grad()
    def __call__(self, token: int, cache: KVCache, text: TextPolicy | None) -> Stepped:
        """See TokenStep. Logits lie on the decoder's device and are overwritten by the next call."""
        self.launch(token, cache, text)
        return self.finished(text)

    @torch.no_grad()
    def launch(self, token: int, cache: KVCache, text: TextPolicy | None) -> Tensor:
        """Begins the step of one more token, whose pair joins the cache, and waits for nothing.

        Returns the logits float32 [1, vocab], which are there when the device has caught up. Raises what the policy
        raises.
        """
        if not 0 <= token < self.logits.shape[1]:
            raise IndexError(f"there is no token {token} in a vocabulary of {self.logits.shape[1]}.")
        with self._here():
            return self._launch(token, cache, text)

    def _launch(self, token: int, cache: KVCache, text: TextPolicy | None) -> Tensor:
        cache.reserve(1)
        reason = self._policy.follow(text)
        if reason is None and cache.k[0].dtype != self.decoder.kv_dtype:
            self._policy.store()
            reason = f"the cache holds {cache.k[0].dtype}, the decoder {self.decoder.kv_dtype}"
        if reason is not None:
            self.warn_once(f"{reason}: decoding operation by operation")
            self._on_host = self._by_torch(token, cache, text)
            return self._on_host.logits
        self._on_host = None
        self._point_to(cache)
        self._upload_request(token, cache.length)
        graph = self._graph()
        if graph is not None:
            graph.replay()
        else:
            self._run(self._policy.sites[self._policy.structure])
        cache.advance(1)
        if self._done is not None:
            self._answer.copy_(self._result, non_blocking=True)
            self._done.record()
        return self.logits

    def finished(self, text: TextPolicy | None) -> Stepped:
        """The result of the last step, as soon as the device has made it."""
        if self._on_host is not None:
            return self._on_host
        if self._done is None:
            self._answer.copy_(self._result)
        else:
            self._done.synchronize()
        check_logits(self.logits, self._fault)
        bits = None if text is None else self._answer[:-1][None].clone()
        return accounted(self.decoder, self._sums, text, self.logits, bits, int(self._answer[-1]))

    def _fault(self) -> InputError:
        """The error of logits that are not finite; the decoder finds its cause at the same widths."""
        assert self._placed is not None
        d, cache = self.decoder, self._placed[0]()
        assert cache is not None
        cache.rewind(cache.length - 1)
        x = d.embed(self._request[tables.TOKEN : tables.TOKEN + 1].to(d.device))
        return fault(d, x, d.rope(cache.length, 1), cache, lambda group, x: self.widths[:, group.index])

    def learn(self, text: TextPolicy | None, stepped: Stepped, token: int) -> None:
        """See TokenStep. On the device, learning is the beginning of the next step."""
        if text is None or not text.stepwise:
            return
        if self._on_host is not None or not self._policy.learn_later(text, token):
            text.learn(stepped.logits, torch.tensor([token]), stepped.effective_bits)

    @property
    def widths(self) -> Tensor:
        """int32 [1, G] in device memory: the widths of the last step, and of the next one where they are fixed."""
        return self._table.bits[None]

    def store(self) -> None:
        """Gives the state of the text that was decoded last back to its policy object."""
        self._policy.store()

    def prepare(self, text: TextPolicy | None, note: Callable[[str], None] = lambda line: None) -> None:
        """Compiles, warms up and captures the step for such a text's policy now, so that no token waits for it."""
        with torch.no_grad(), self._here():
            if self._policy.follow(text) is not None or self.reason:
                return
            cache = self.decoder.new_cache(2)
            self._point_to(cache)
            self._upload_request(0, 0)
            note(f"capturing the decode step ({self._policy.structure.kind}) ...")
            if self._graph() is not None:
                note("captured: one launch a token")
            self._placed = None

    def warn_once(self, line: str) -> None:
        """Logs a line, the first time."""
        if line not in self._warned:
            self._warned.add(line)
            log.warning(line)

    # -- what changes from token to token ------------------------------------------------------------------

    def _point_to(self, cache: KVCache) -> None:
        """Makes the table point to the cache, if it does not."""
        if self._placed is not None and self._placed[0]() is cache and self._placed[1] == cache.layout:
            return
        start, length = cache.runs(1)
        self._cache.write(cache.k, cache.v, start, length)
        if self.decoder.device.type == "cuda":
            self._cache.k = (
                self._cache.v
            ) = ()  # addresses are enough, and the cache's end is its owner's affair
        self._placed = (weakref.ref(cache), cache.layout, cache.length)

    def _upload_request(self, token: int, position: int) -> None:
        """Sends the request. The copy before must have left its place on the host."""
        assert self._placed is not None
        if self._sent is not None:
            self._sent.synchronize()
        since = position - self._placed[2]
        learnt, spare = self._policy.take_learning(), self._policy.spare
        self._request.copy_(torch.tensor([token, position, since, learnt, spare]))
        self._cache.request.copy_(self._request, non_blocking=True)
        if self._sent is not None:
            self._sent.record()

    # -- the graph -----------------------------------------------------------------------------------------

    def _graph(self) -> torch.cuda.CUDAGraph | None:
        """The captured step of the policy's structure; None where steps run operation by operation."""
        structure = self._policy.structure
        if self.reason or not self._captures:
            if self.reason:
                self.warn_once(f"decoding operation by operation: {self.reason}")
            return None
        if structure not in self.graphs:
            try:
                self.graphs[structure] = self._captured(self._policy.sites[structure])
            except Exception as e:  # whatever a driver, a compiler or torch may raise
                self.reason = f"the step could not be captured ({' '.join(str(e).split())[:200]})"
                return self._graph()
        return self.graphs[structure]

    def _captured(self, sites: list[LayerSites]) -> torch.cuda.CUDAGraph:
        """Warm-up (which compiles and loads every kernel), then capture. Leaves what a step changes as it was."""
        request = self._cache.request  # of this very token: its pair may be written, and written again
        kept = [(t, t.clone()) for t in (self.logits, self._result, self._table.state, request)]
        request[tables.OBSERVE] = 0
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(side):
                for _ in range(2):
                    self._run(sites)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side):  # torch's own stream may be another device's
                self._run(sites)
        finally:
            self._counter.zero_()
            for tensor, before in kept:
                tensor.copy_(before)
        return graph

    # -- the step ------------------------------------------------------------------------------------------

    def _run(self, sites: list[LayerSites]) -> None:
        """The operations of one step: no argument, no result, no memory but the tables'."""
        d, ops, table, cache = self.decoder, self.operations, self._table, self._cache
        if self._policy.structure.probes:
            ops.observe(self.logits, cache, table, DECAY)
        x = d.embed(cache.request[tables.TOKEN : tables.TOKEN + 1])
        angle = cache.request[tables.POSITION].float() * self._inv_freq
        rope = angle.cos() * d.config.rope_scale, angle.sin() * d.config.rope_scale
        delta = None
        for layer, site in zip(d.layers, sites, strict=True):
            delta = self._block(layer, site, x, delta, rope)
        h = ops.norm(x, delta, d.norm, d.config.rms_eps, self._nowhere, table, LIMIT)
        self.logits.copy_(d.apply_head(h))
        ops.finish(self.logits, self._result[-1:], table, self._partial, self._counter)

    def _block(
        self,
        layer: DecoderLayer,
        site: LayerSites,
        x: Tensor,
        delta: Tensor | None,
        rope: tuple[Tensor, Tensor],
    ) -> Tensor:
        """One block. x [1, K] takes in delta, the block before's last product; returns this block's."""
        c, ops, table, cache = self.decoder.config, self.operations, self._table, self._cache
        i = layer.index
        h = ops.norm(x, delta, layer.input_norm, c.rms_eps, site.qkv, table, LIMIT)
        qkv = self._products(layer.qkv, h, site.qkv)
        norms = None if layer.q_norm is None or layer.k_norm is None else (layer.q_norm, layer.k_norm)
        heads = Heads(c.head_dim, c.rms_eps, norms, rope if c.uses_rope[i] else None, c.windows[i] or 0)
        mixed = ops.attend(qkv, heads, cache, i, site.o, table)
        delta = self._products([layer.o], mixed, site.o)
        h = ops.norm(x, delta, layer.post_norm, c.rms_eps, site.gate_up, table, LIMIT)
        gate_up = self._products(layer.gate_up, h, site.gate_up)
        inner = ops.silu_mul(gate_up, site.down, table)
        return self._products([layer.down], inner, site.down)

    def _products(self, groups: list[Group], x: Tensor, site: Site) -> Tensor:
        """[1, sum of rows]: the groups' products with x [1, K], at the widths that the table says by then."""
        if self._table.kind == tables.ESTIMATED:
            self.operations.estimate(x, site, self._table, self._partial, self._counter)
        outs = [self._product(g, x) for g in groups]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)

    def _product(self, group: Group, x: Tensor) -> Tensor:
        if group.dense:
            return torch.nn.functional.linear(x, group.weight, group.bias)
        g, gemv = group.index, self.decoder.backend.gemv
        if self._table.kind == tables.WEIGHTED:
            return self.operations.chosen_gemv(x, group.weight, group.bias, g, self._table, gemv)
        return gemv(x, group.weight, self._table.bits[g : g + 1], bias=group.bias)
