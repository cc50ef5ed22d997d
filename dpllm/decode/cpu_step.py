"""A whole decode step in one native call: the decoder described to the CPU library.

`NativeStep` computes what `Decoder.forward` computes for one token, or for several consecutive tokens of one sequence,
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

from dpllm.base.errors import InputError
from dpllm.calib.runtime.threshold_rule import ThresholdRule
from dpllm.calib.runtime.token_sensitivity import LIMIT
from dpllm.decode.step import Stepped, TokenStep
from dpllm.kernels.cpu import step as native
from dpllm.kernels.cpu.library import STORAGE
from dpllm.kernels.weight import MAX_BITS, Int8Weight
from dpllm.kvzip_bridge.cache import KVCache
from dpllm.model.decoder import Decoder, Group
from dpllm.model.decoder import Layer as DecoderLayer
from dpllm.model.nonfinite import fault
from dpllm.policies.base import TextPolicy

Callback = Callable[[int, int], int]  # (group, address of its input) -> planes


class NativeModel:
    """A decoder described to the CPU library, once for all its texts. Keeps alive what the description points to."""

    def __init__(self, decoder: Decoder):
        assert decoder.backend.cpu is not None
        self.decoder = decoder
        self.total_weights = sum(g.weights for g in decoder.groups)
        self.head_bytes = decoder.head_bytes()
        self._alive: list[Any] = []
        self.runner = native.StepRunner(decoder.backend.cpu.handle, self._model())

    @classmethod
    def of(cls, decoder: Decoder) -> NativeModel | None:
        """The description, where the backend has a native step and the model is quantised; else None."""
        if decoder.backend.cpu is None or decoder.groups[0].dense or decoder.dtype != torch.float32:
            return None
        return cls(decoder) if decoder.kv_dtype in STORAGE else None

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
            read = [
                g.bytes_at[b - g.seed_bits] if g.seed_bits <= b <= g.resident_bits else 0
                for b in range(MAX_BITS + 1)
            ]
            bytes_at = torch.tensor(read, dtype=torch.int64)
            described.append(
                native.Group(weight=matrix, index=g.index, weights=g.weights, bytes_at=self._at(bytes_at))
            )
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


class NativeStep(TokenStep):
    """Decodes one text, up to MAX_ROWS tokens at a time. Cheap to make; not to be shared by threads."""

    def __init__(self, model: NativeModel):
        self.model, self.decoder = model, model.decoder
        rows, config = native.MAX_ROWS, self.decoder.config
        self._logits = torch.empty(1, config.vocab_size)
        self._bits = torch.empty(1, len(self.decoder.groups), dtype=torch.int32)
        self._tokens, self._greedy = (native.Int * rows)(), (native.Int * rows)()
        self._read_bits = (native.Long * rows)()
        self._corrections = (native.Float * rows)()
        pointers = ctypes.c_void_p * config.num_layers
        self._layers = pointers(), pointers()  # of a cache's keys and values
        self._cache: tuple[KVCache | None, int] = (None, 0)  # that the pointers are of, and its layout then
        self._view = native.Cache()
        self._text: TextPolicy | None = None
        self._rule: ThresholdRule | None = None  # that the selection describes
        self._selection = native.Selection()
        self._held: Any = None  # what the selection points to
        self._error: BaseException | None = None
        self.call_ms = 0.0  # of the last native call, without the Python around it

    @classmethod
    def of(cls, decoder: Decoder) -> NativeStep | None:
        """A step with a description of its own, where the decoder supports one; else None."""
        model = NativeModel.of(decoder)
        return None if model is None else cls(model)

    def __call__(self, token: int, cache: KVCache, text: TextPolicy | None) -> Stepped:
        """See TokenStep. Logits and bits are overwritten by the next call."""
        assert text is not None, "a quantised model is decoded under a policy"
        self._corrections[0] = float(text.correction)
        self._tokens[0] = token
        request = self._run(1, cache, text)
        return Stepped(
            self._logits[:1],
            self._bits[:1],
            self._greedy[0],
            self._read_bits[0] / self.model.total_weights,
            request.read_bytes + self.model.head_bytes + text.extra_bytes,
        )

    def several(
        self, tokens: Sequence[int], cache: KVCache, text: TextPolicy, corrections: Sequence[float]
    ) -> tuple[Tensor, Tensor, int]:
        """Decodes T consecutive tokens (1..MAX_ROWS) in one pass, whose pairs join the cache.

        Returns (logits float32 [T, vocab], bits int32 [T, G], bytes of weights that the pass reads), the tensors
        overwritten by the next call. Weights are read once for all tokens. Row by row the results are, bit for bit,
        those of T steps of one token at the same widths. corrections: of each token; the features of the previous
        step are those of the first token. Raises what the policy raises; ValueError for several tokens under a policy
        that is called back, which may remember one input a group.
        """
        rows = len(tokens)
        if not 1 <= rows <= native.MAX_ROWS:
            raise ValueError(f"{rows} tokens in one step; 1..{native.MAX_ROWS} are possible.")
        self.follow(text)
        if rows > 1 and not self.decides_natively:
            raise ValueError(f"policy '{text.name}' is called back: one token at a time.")
        self._make_room(rows)
        self._tokens[:rows] = list(tokens)
        self._corrections[:rows] = list(corrections)
        request = self._run(rows, cache, text)
        read = request.read_bytes + self.model.head_bytes + text.extra_bytes
        return self._logits[:rows], self._bits[:rows], read

    def _run(self, rows: int, cache: KVCache, text: TextPolicy) -> native.Request:
        for token in self._tokens[:rows]:
            if not 0 <= token < self.decoder.config.vocab_size:
                raise IndexError(
                    f"there is no token {token} in a vocabulary of {self.decoder.config.vocab_size}."
                )
        if text is not self._text:
            self.follow(text)
        if self._rule is not None and text.thresholds is not None:
            s, limit, pace = self._selection, text.limit, text.pace
            s.thresholds, s.extra = text.thresholds.data_ptr(), None
            if self._rule.probe is not None:
                s.offset = float(self._rule.probe.offset(text.previous))
            if limit is not None and pace is not None:
                s.extra, s.allowance = limit.width_costs.extra.data_ptr(), limit.beyond_seed
                s.rest, s.gain = pace.expected_rest.data_ptr(), pace.gain
        starts, lengths = cache.runs(rows)
        if (cache, cache.layout) != self._cache:
            self._point(cache)
        self._view.start, self._view.length = starts.data_ptr(), lengths.data_ptr()
        request = native.Request(
            rows=rows, position=cache.length, tokens=ctypes.addressof(self._tokens), logits=self._logits.data_ptr(),
            bits=self._bits.data_ptr(), greedy=ctypes.addressof(self._greedy),
            read_bits=ctypes.addressof(self._read_bits),
        )  # fmt: skip
        began = time.perf_counter()
        stopped = self.model.runner.run(
            ctypes.byref(self._selection), ctypes.byref(self._view), ctypes.byref(request)
        )
        self.call_ms = (time.perf_counter() - began) * 1e3
        if stopped:
            error, self._error = self._error, None
            assert error is not None
            raise error
        if min(self._greedy[:rows]) < 0:
            raise self._fault(rows, cache)
        cache.advance(rows)
        return request

    def _fault(self, rows: int, cache: KVCache) -> InputError:
        """The error of logits that are not finite; the decoder finds its cause at the same widths."""
        d, chosen = self.decoder, self._bits[:rows]
        ids, start = torch.tensor(self._tokens[:rows]), cache.length
        return fault(d, d.embed(ids), d.rope(start, rows), cache, lambda group, x: chosen[:, group.index])

    @property
    def decides_natively(self) -> bool:
        """Whether the policy that it follows is evaluated without calling back."""
        return not self._selection.choose

    def _make_room(self, rows: int) -> None:
        """Makes memory for the results of `rows` tokens: where one is too few, for as many as there can be."""
        if len(self._logits) < rows:
            self._logits = torch.empty(native.MAX_ROWS, self.decoder.config.vocab_size)
            self._bits = torch.empty(native.MAX_ROWS, len(self.decoder.groups), dtype=torch.int32)

    def follow(self, text: TextPolicy) -> None:
        """Makes a text's policy the one that decides; decoding with another text does so, too."""
        if text is self._text:
            return
        rule = text.rule if text.thresholds is not None else None
        if rule is None or rule is not self._rule:
            self._text = None  # where this policy is refused, the next text is taken over in full
            self._selection = self._select(text)
        self._text = text

    def _point(self, cache: KVCache) -> None:
        """Points the view to a cache's layers."""
        for held, tensors in zip(self._layers, (cache.k, cache.v), strict=True):
            for layer, tensor in enumerate(tensors):
                held[layer] = tensor.data_ptr()
        self._view = native.Cache(
            k=ctypes.addressof(self._layers[0]), v=ctypes.addressof(self._layers[1]),
            storage=STORAGE[cache.k[0].dtype],
        )  # fmt: skip
        self._cache = cache, cache.layout

    # -- who decides -------------------------------------------------------------------------------------

    def _select(self, text: TextPolicy) -> native.Selection:
        groups = self.decoder.groups
        seed = groups[0].seed_bits
        self._rule = None
        if text.fixed_bits is not None:
            fixed = torch.tensor([resident(g, text.fixed_bits[g.index]) for g in groups], dtype=torch.int32)
            self._held = (fixed,)
            return native.Selection(fixed=fixed.data_ptr(), seed=seed)
        if text.rule is not None and text.thresholds is not None and text.rule.own_inputs:
            return self._by_thresholds(text.rule, text.thresholds, seed)
        callback = native.Choose(self._callback(text))
        self._held = (callback,)
        return native.Selection(choose=callback, seed=seed)

    def _by_thresholds(self, rule: ThresholdRule, thresholds: Tensor, seed: int) -> native.Selection:
        assert thresholds.dtype == torch.float32 and thresholds.is_contiguous()
        for g, row in zip(self.decoder.groups, thresholds, strict=True):
            if (row[g.resident_bits - seed :] < torch.inf).any():
                resident(g, seed + len(row))  # raises
        diagonals = [d.to(torch.float16).contiguous() for d in rule.diagonals]
        pointers = (ctypes.c_void_p * len(diagonals))(*(d.data_ptr() for d in diagonals))
        selection = native.Selection(
            diagonal=ctypes.addressof(pointers), thresholds=thresholds.data_ptr(), steps=thresholds.shape[1],
            seed=seed,
        )  # fmt: skip
        weights = None
        if rule.probe is not None:
            weights = rule.probe.probe.float().contiguous()
            selection.probe, selection.limit = weights.data_ptr(), LIMIT
            selection.correction = ctypes.addressof(self._corrections)
        self._held, self._rule = (diagonals, pointers, weights), rule
        return selection

    def _callback(self, text: TextPolicy) -> Callback:
        groups = self.decoder.groups

        def choose(index: int, address: int) -> int:
            group = groups[index]
            values = (ctypes.c_float * group.weight.in_features).from_address(address)
            try:
                x = torch.frombuffer(values, dtype=torch.float32)[None].clone()
                return resident(group, int(text(group, x)[0]))
            except BaseException as e:  # it must not unwind through the library
                self._error = e
                return 0

        return choose


def resident(group: Group, bits: int) -> int:
    """The width, if it can be read at this group: the library trusts its caller."""
    if not group.seed_bits <= bits <= group.resident_bits:
        raise ValueError(
            f"bits {bits} are not resident at {group.name}: {group.seed_bits}..{group.resident_bits} are."
        )
    return bits
