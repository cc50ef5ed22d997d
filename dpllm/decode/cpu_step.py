"""A whole decode step in one native call: the decoder described to the CPU library.

`NativeStep` computes what `Decoder.forward` computes for one token, or for several of one sequence behind each other,
without a Python operation in between. A policy whose rule is fixed widths, or thresholds on a weighted square, is
evaluated natively; any other policy is called back for each group.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dpllm.calib.runtime.token_sensitivity import LIMIT
from dpllm.kernels.cpu import step as native
from dpllm.kernels.cpu.library import STORAGE
from dpllm.kernels.weight import Int8Weight
from dpllm.kvzip_bridge.cache import KVCache
from dpllm.model.decoder import Decoder, Group
from dpllm.model.decoder import Layer as DecoderLayer
from dpllm.policies.base import PrecisionPolicy
from dpllm.policies.fixed import StaticPolicy
from dpllm.policies.rate_distortion import RateDistortionPolicy
from dpllm.policies.thresholds import ThresholdRule, own_inputs

Callback = Callable[[int, int], int]  # (group, address of its input) -> planes


class NativeStep:
    """Decodes up to MAX_ROWS tokens at a time. Made for one decoder; serves one sequence at a time."""

    def __init__(self, decoder: Decoder):
        assert decoder.backend.cpu is not None
        self.decoder = decoder
        self._alive: list[Any] = []
        self._runner = native.StepRunner(decoder.backend.cpu.handle, self._model())
        self._logits = torch.empty(0, decoder.config.vocab_size)
        self._bits = torch.empty(0, len(decoder.groups), dtype=torch.int32)
        rows = native.MAX_ROWS
        self._tokens, self._greedy = (native.Int * rows)(), (native.Int * rows)()
        self._corrections = (native.Float * rows)()
        pointers = ctypes.c_void_p * decoder.config.num_layers
        self._layers = pointers(), pointers()  # of a cache's keys and values
        self._policy: PrecisionPolicy | None = None
        self._selection = native.Selection()
        self._held: Any = None  # what the selection points to
        self._error: BaseException | None = None
        self.call_ms = 0.0  # of the last native call, without the Python around it

    @classmethod
    def of(cls, decoder: Decoder) -> NativeStep | None:
        """A native step, where the backend has one and the model is quantised; else None."""
        if decoder.backend.cpu is None or decoder.groups[0].dense or decoder.dtype != torch.float32:
            return None
        return cls(decoder) if decoder.kv_dtype in STORAGE else None

    def __call__(self, token: int, cache: KVCache, policy: PrecisionPolicy) -> tuple[Tensor, Tensor]:
        """(logits [1, vocab], bits int32 [1, G]) behind one more token, whose pair joins the cache.

        Both tensors are overwritten by the next call. Raises what the policy raises.
        """
        rule = policy if isinstance(policy, RateDistortionPolicy) else None
        found = self.several([token], cache, policy, None if rule is None else [float(rule.correction)])
        if rule is not None and self.decides_natively:
            rule.record(found[1])
        return found

    def several(
        self,
        tokens: Sequence[int],
        cache: KVCache,
        policy: PrecisionPolicy,
        corrections: Sequence[float] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(logits [T, vocab], bits int32 [T, G]) behind T more tokens (1..MAX_ROWS), whose pairs join the cache.

        Weights are read once for all of them. Row by row both are, bit for bit, what T steps of one token would give at
        the same widths. corrections: of a rate-distortion policy, for each token; its context is that of the first.
        Nothing is recorded with the policy. Both tensors are overwritten by the next call. Raises what the policy
        raises; ValueError for several tokens under a policy that is called back, which may remember one input a group.
        """
        rows = len(tokens)
        if not 1 <= rows <= native.MAX_ROWS:
            raise ValueError(f"{rows} tokens in one step; 1..{native.MAX_ROWS} are possible.")
        for token in tokens:
            if not 0 <= token < self.decoder.config.vocab_size:
                raise IndexError(
                    f"there is no token {token} in a vocabulary of {self.decoder.config.vocab_size}."
                )
        self.follow(policy)
        if rows > 1 and not self.decides_natively:
            raise ValueError(f"policy '{policy.name}' is called back: one token at a time.")
        self._make_room(rows)
        self._tokens[:rows] = list(tokens)
        if self._selection.probe:
            assert isinstance(policy, RateDistortionPolicy) and corrections is not None
            self._selection.offset = float(policy.probe.offset(policy.context))
            self._corrections[:rows] = list(corrections)
            self._allow(policy)
        starts, lengths = cache.runs(rows)
        request = native.Request(
            rows=rows, position=cache.length, tokens=ctypes.addressof(self._tokens), logits=self._logits.data_ptr(),
            bits=self._bits.data_ptr(), greedy=ctypes.addressof(self._greedy),
        )  # fmt: skip
        view = native.Cache(
            k=self._addresses(cache.k, 0), v=self._addresses(cache.v, 1), start=starts.data_ptr(),
            length=lengths.data_ptr(), storage=STORAGE[cache.k[0].dtype],
        )  # fmt: skip
        began = time.perf_counter()
        done = self._runner(self._selection, view, request)
        self.call_ms = (time.perf_counter() - began) * 1e3
        if not done:
            error, self._error = self._error, None
            assert error is not None
            raise error
        cache.advance(rows)
        return self._logits[:rows], self._bits[:rows]

    def _allow(self, policy: RateDistortionPolicy) -> None:
        """What its tokens may cost."""
        s, allowance, pace = self._selection, policy.allowance, policy.pace
        if allowance is None or pace is None:
            s.extra = None
            return
        s.extra, s.allowance = allowance.prices.extra.data_ptr(), allowance.spare
        s.rest, s.gain = pace.rest.data_ptr(), pace.gain

    @property
    def decides_natively(self) -> bool:
        """Whether the policy that it follows is evaluated without calling back."""
        return not self._selection.choose

    def _make_room(self, rows: int) -> None:
        """Memory for the results of so many tokens: one, or as many as there can be."""
        if len(self._logits) < rows:
            count = 1 if rows == 1 else native.MAX_ROWS
            self._logits = torch.empty(count, self.decoder.config.vocab_size)
            self._bits = torch.empty(count, len(self.decoder.groups), dtype=torch.int32)

    def follow(self, policy: PrecisionPolicy) -> None:
        """Makes a policy the one that decides; what calling with it does, too, when it is another than before."""
        if policy is not self._policy:
            self._policy, self._selection = policy, self._select(policy)

    def _addresses(self, layers: list[Tensor], which: int) -> int:
        """Address of the addresses of a cache's layers (which: 0 keys, 1 values)."""
        held = self._layers[which]
        for layer, tensor in enumerate(layers):
            held[layer] = tensor.data_ptr()
        return ctypes.addressof(held)

    # -- who decides -------------------------------------------------------------------------------------

    def _select(self, policy: PrecisionPolicy) -> native.Selection:
        groups = self.decoder.groups
        seed = groups[0].seed_bits
        if isinstance(policy, StaticPolicy):
            fixed = torch.tensor([resident(g, policy.bits[g.index]) for g in groups], dtype=torch.int32)
            self._held = (fixed,)
            return native.Selection(fixed=fixed.data_ptr(), seed=seed)
        if isinstance(policy, ThresholdRule) and own_inputs(policy):
            return self._by_thresholds(policy, seed)
        callback = native.Choose(self._callback(policy))
        self._held = (callback,)
        return native.Selection(choose=callback, seed=seed)

    def _by_thresholds(self, policy: ThresholdRule, seed: int) -> native.Selection:
        thresholds = policy.thresholds
        assert thresholds.dtype == torch.float32 and thresholds.is_contiguous()
        for g, row in zip(self.decoder.groups, thresholds, strict=True):
            if (row[g.resident_bits - seed :] < torch.inf).any():
                resident(g, seed + len(row))  # raises
        diagonals = [d.to(torch.float16).contiguous() for d in policy.diagonals]
        pointers = (ctypes.c_void_p * len(diagonals))(*(d.data_ptr() for d in diagonals))
        selection = native.Selection(
            diagonal=ctypes.addressof(pointers), thresholds=thresholds.data_ptr(), steps=thresholds.shape[1],
            seed=seed,
        )  # fmt: skip
        probe = getattr(policy, "probe", None)
        if probe is not None:
            weights = probe.probe.float().contiguous()
            selection.probe, selection.limit = weights.data_ptr(), LIMIT
            selection.correction = ctypes.addressof(self._corrections)
            self._held = (diagonals, pointers, weights)
        else:
            self._held = (diagonals, pointers)
        return selection

    def _callback(self, policy: PrecisionPolicy) -> Callback:
        groups = self.decoder.groups

        def choose(index: int, address: int) -> int:
            group = groups[index]
            values = (ctypes.c_float * group.weight.in_features).from_address(address)
            try:
                x = torch.frombuffer(values, dtype=torch.float32)[None].clone()
                return resident(group, int(policy(group, x)[0]))
            except BaseException as e:  # it must not unwind through the library
                self._error = e
                return 0

        return choose

    # -- the model ---------------------------------------------------------------------------------------

    def _model(self) -> native.Model:
        c, d = self.decoder.config, self.decoder
        layers = (native.Layer * c.num_layers)(*(self._layer(layer) for layer in d.layers))
        self._alive.append(layers)
        return native.Model(
            layers=c.num_layers, hidden=c.hidden_size, intermediate=c.intermediate_size, heads=c.num_heads,
            kv_heads=c.num_kv_heads, head_dim=c.head_dim, vocab=c.vocab_size, groups=len(d.groups),
            eps=c.rms_eps, rope_scale=c.rope_scale, inv_freq=self._at(d.inv_freq.float()),
            norm=self._at(d.norm), embedding=self._table(d.embedding), head=self._table(d.head),
            layer=ctypes.addressof(layers),
        )  # fmt: skip

    def _layer(self, layer: DecoderLayer) -> native.Layer:
        c = self.decoder.config
        return native.Layer(
            input_norm=self._at(layer.input_norm), post_norm=self._at(layer.post_norm),
            q_norm=self._at(layer.q_norm), k_norm=self._at(layer.k_norm),
            qkv=(native.Group * 3)(*self._groups(layer.qkv)), qkv_groups=len(layer.qkv),
            gate_up=(native.Group * 2)(*self._groups(layer.gate_up)), gate_up_groups=len(layer.gate_up),
            o=self._groups([layer.o])[0], down=self._groups([layer.down])[0],
            window=c.windows[layer.index] or 0, uses_rope=c.uses_rope[layer.index],
        )  # fmt: skip

    def _groups(self, groups: Sequence[Group]) -> list[native.Group]:
        described = []
        for g in groups:
            matrix = type(g.weight.matrix).from_buffer_copy(g.weight.matrix)
            matrix.bias = self._at(g.bias)
            described.append(native.Group(weight=matrix, index=g.index))
        return described

    def _table(self, table: Any) -> native.Table:
        if isinstance(table, Int8Weight):
            return native.Table(int8=self._at(table.values), scale=self._at(table.scale))
        if isinstance(table, Tensor):
            return native.Table(dense=self._at(table.float()))
        return native.Table(planes=table.matrix, planes_bits=table.resident_bits)

    def _at(self, tensor: Tensor | None) -> int | None:
        """Address of a tensor that is kept alive with this object."""
        if tensor is None:
            return None
        whole = tensor.contiguous()
        self._alive.append(whole)
        return whole.data_ptr()


def resident(group: Group, bits: int) -> int:
    """The width, if it can be read at this group: the library trusts its caller."""
    if not group.seed_bits <= bits <= group.resident_bits:
        raise ValueError(
            f"bits {bits} are not resident at {group.name}: {group.seed_bits}..{group.resident_bits} are."
        )
    return bits
