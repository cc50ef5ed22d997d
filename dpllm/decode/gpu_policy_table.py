"""The policy of a text in device memory, where the kernels of a decode step find it.

Thresholds are copied when the text has got others. What the text learns from finished steps (features of the previous
step, correction) is advanced on the device while the text is decoded there; the text's own attributes are those of the
moment when the device took over, until `store` gives the state back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpllm.calib.runtime.bits_correction import Correction
from dpllm.calib.runtime.threshold_rule import ThresholdRule
from dpllm.calib.runtime.token_sensitivity import FEATURES
from dpllm.decode.cpu_step import resident
from dpllm.kernels.gpu_step import tables
from dpllm.kernels.gpu_step.tables import PolicyTable, Site
from dpllm.model.decoder import Decoder
from dpllm.policies.base import TextPolicy, WidthSums
from dpllm.policies.dp_llm import DPLLMPolicy
from dpllm.policies.token_limit import SpendingPace

NOBODY = object()


@dataclass(frozen=True)
class Structure:
    """What a captured step is made for: steps of rules alike in this differ only in device memory. source: the group
    whose input each group's signal is of; probes: whether tokens have multipliers."""

    kind: str
    source: tuple[int, ...] = ()
    probes: bool = False


@dataclass(frozen=True)
class LayerSites:
    """The four vectors of a layer that products read."""

    qkv: Site
    o: Site
    gate_up: Site
    down: Site


def layer_sites(decoder: Decoder, structure: Structure) -> list[LayerSites]:
    """Which groups' signals are of each vector, with room for their diagonals."""

    def site(*own: int) -> Site:
        fed = tuple(g for g, s in enumerate(structure.source) if s in own)
        ids = torch.tensor(fed or (0,), dtype=torch.int32, device=decoder.device)
        assert len(fed) <= tables.MAX_FED
        diagonals = None
        if fed and structure.kind == tables.WEIGHTED:
            columns = decoder.groups[own[0]].weight.in_features
            diagonals = torch.zeros(len(fed), columns, dtype=torch.float16, device=decoder.device)
        return Site(fed, ids, structure.probes and 0 in own, diagonals)

    return [
        LayerSites(
            site(*(g.index for g in layer.qkv)), site(layer.o.index),
            site(*(g.index for g in layer.gate_up)), site(layer.down.index),
        )
        for layer in decoder.layers
    ]  # fmt: skip


class DevicePolicy:
    """Keeps a table in device memory that says what the policy of one text says.

    What the text learns from its steps, features and correction, is advanced on the device; `store` gives it back to
    the text. sites: by structure, those of each layer.
    """

    def __init__(self, decoder: Decoder, logits: Tensor):
        self.decoder, self.logits = decoder, logits
        total = sum(g.weights for g in decoder.groups) or 1
        shares = [g.weights / total for g in decoder.groups]
        parts = max(tables.PARTS, 1 << (decoder.config.num_heads - 1).bit_length())  # a head, a part
        self.table = PolicyTable.empty(shares, decoder.config.hidden_size, decoder.device, parts)
        self.sums = WidthSums(decoder.groups)
        self.sites: dict[Structure, list[LayerSites]] = {}
        self._diagonals: dict[Structure, list[Tensor]] = {}  # whose copies the sites hold
        self._enter(Structure(tables.NONE))
        state = self.table.state
        self._features = state[tables.CONTEXT : tables.CONTEXT + FEATURES][None]  # [1, 3]
        self._correction = state[tables.CORRECTION : tables.CORRECTION + 1]
        self._text: object = NOBODY  # whose rule the table holds; None is a rule too
        self._thresholds: Tensor | None = None  # that the table holds
        self._target = 0.0  # effective bits, in the table
        self._pace: SpendingPace | None = None  # the pace that the table holds
        self.spare = tables.NEVER  # what the next token may spend beyond seed widths
        self._next: int | None = None  # the token after the last step, not learnt from yet

    def follow(self, text: TextPolicy | None) -> str | None:
        """Makes the table say what this text's policy says; None reads every resident plane. Returns the reason where
        the policy must decide on the host."""
        if text is not self._text:
            self.store()
            reason = self._describe(text)
            if reason is not None:
                return reason
            self._text = text
            if text is not None and text.bits_correction is not None:
                self._load(text, text.bits_correction)
        if text is None or text.thresholds is None:
            return None
        if text.thresholds is not self._thresholds:
            self._compare(text.thresholds)
        self._limit(text)
        if text.bits_correction is not None and text.bits_correction.target_bits != self._target:
            self._retarget(text.bits_correction)
        return None

    def learn_later(self, text: TextPolicy, token: int) -> bool:
        """Puts off learning from the last step to the beginning of the next one, which decodes `token`. False where the
        table does not hold this text."""
        if text is not self._text or text.bits_correction is None:
            return False
        self._next = token
        return True

    def take_learning(self) -> int:
        """What the next step is to learn from the one before, for the request; asked once for each step."""
        waiting, self._next = self._next, None
        return 0 if waiting is None else tables.ALL

    def store(self) -> None:
        """Gives the text what has been learnt for it, before the table holds another one."""
        text, self._text = self._text, NOBODY
        if not isinstance(text, TextPolicy) or text.bits_correction is None:
            return
        if text.bits_correction.target_bits != self._target:
            self._retarget(text.bits_correction)
        text.previous = None if bool(self._features.isnan().any()) else self._features.clone()
        text.correction = text.bits_correction.value = float(self._correction)
        if self._next is not None:
            token, self._next = self._next, None
            read = float(self.sums.effective_bits(self.table.bits[None].cpu())[0])
            text.learn(self.logits, torch.tensor([token]), read)

    # -- rules -------------------------------------------------------------------------------------------

    def _describe(self, text: TextPolicy | None) -> str | None:
        groups, table = self.decoder.groups, self.table
        if text is None or text.fixed_bits is not None:
            fixed = [g.resident_bits for g in groups]
            if text is not None and text.fixed_bits is not None:
                fixed = [resident(g, text.fixed_bits[g.index]) for g in groups]
            self._enter(Structure(tables.NONE))
            table.bits.copy_(torch.tensor(fixed, dtype=torch.int32))
            return None
        if isinstance(text.estimates, DPLLMPolicy):
            self._by_estimates(text.estimates)
            return None
        learns = text.bits_correction is not None
        if text.rule is not None and text.thresholds is not None and (learns or text.rule.probe is None):
            self._by_thresholds(text.rule, text.thresholds)
            return None
        return f"policy '{text.name}' decides on the host"

    def _by_thresholds(self, rule: ThresholdRule, thresholds: Tensor) -> None:
        groups, table, seed = self.decoder.groups, self.table, self.decoder.groups[0].seed_bits
        for g, row in zip(groups, thresholds.cpu(), strict=True):
            if (row[g.resident_bits - seed :] < torch.inf).any():
                resident(g, seed + len(row))  # raises
        self._enter(Structure(tables.WEIGHTED, tuple(rule.source), rule.probe is not None))
        self._weigh(rule.diagonals)
        self._compare(thresholds)
        self._pace = None
        table.unlimited()
        table.base.fill_(seed)
        table.signals.zero_()
        table.state[tables.MULTIPLIER] = 1.0

    def _enter(self, structure: Structure) -> None:
        """Makes this the structure of the steps to come."""
        self.structure, self.table.kind, self._thresholds = structure, structure.kind, None
        if structure not in self.sites:
            self.sites[structure] = layer_sites(self.decoder, structure)

    def _weigh(self, diagonals: list[Tensor]) -> None:
        """Takes over what inputs are weighted with; texts of one policy share it."""
        if self._diagonals.get(self.structure) is diagonals:
            return
        self._diagonals.pop(self.structure, None)  # an interruption must not leave half of them valid
        for layer in self.sites[self.structure]:
            for site in (layer.qkv, layer.o, layer.gate_up, layer.down):
                if site.diagonals is not None:
                    site.diagonals.copy_(torch.stack([diagonals[g] for g in site.groups]))
        self._diagonals[self.structure] = diagonals

    def _compare(self, thresholds: Tensor) -> None:
        """Takes over a text's thresholds [G, steps], which are never written to."""
        self.table.compare(thresholds)
        self._thresholds = thresholds

    def _by_estimates(self, policy: DPLLMPolicy) -> None:
        table, fixed = self.table, policy.fixed
        matrices = [None if p is None else p.contiguous() for p in policy.projections]
        lines = [
            (0.0, 0.0) if never else tuple(line) if p is None else (1.0, 0.0)
            for line, p, never in zip(policy.lines, matrices, fixed, strict=True)
        ]
        limits = [torch.inf if never else t for t, never in zip(policy.thresholds, fixed, strict=True)]
        table.rows.copy_(torch.tensor([0 if p is None else len(p) for p in matrices], dtype=torch.int32))
        table.line.copy_(torch.tensor(lines))
        table.base.copy_(torch.tensor(policy.low, dtype=torch.int32))
        table.point(matrices)
        table.compare(torch.tensor(limits, device=self.decoder.device)[:, None])
        self._enter(Structure(tables.ESTIMATED, tuple(policy.source)))

    def _limit(self, text: TextPolicy) -> None:
        """Takes over what the text's tokens may cost."""
        limit, pace = text.limit, text.pace
        self.spare = tables.NEVER if limit is None else limit.beyond_seed
        if limit is not None and pace is not None and pace is not self._pace:
            self.table.limit(limit.width_costs.extra, pace.expected_rest, pace.gain)
            self._pace = pace

    # -- what is learnt from finished steps ----------------------------------------------------------------

    def _retarget(self, wanted: Correction) -> None:
        """Takes over another target between two steps. What is still to be learnt was aimed at the old one."""
        state, target = self.table.state, wanted.target_bits
        if self._next is not None:
            state[tables.CORRECTION] += wanted.rate * (self._target - target)
        state[tables.TARGET] = self._target = target

    def _load(self, text: TextPolicy, wanted: Correction) -> None:
        """Takes over what the text has learnt so far."""
        assert text.rule is not None and text.rule.probe is not None
        state, probe = self.table.state, text.rule.probe
        self.table.probe.copy_(probe.probe)
        if text.previous is None:
            self._features.fill_(torch.nan)
        else:
            self._features.copy_(text.previous)
        self._correction.fill_(float(text.correction))
        numbers = ((tables.TARGET, wanted.target_bits), (tables.RATE, wanted.rate),
                   (tables.LIMIT, wanted.limit), (tables.BIAS, probe.bias))  # fmt: skip
        for place, value in numbers:
            state[place] = value
        state[tables.WEIGHTS : tables.WEIGHTS + FEATURES] = probe.weights
        state[tables.MEANS : tables.MEANS + FEATURES] = probe.means
        self._next, self._target = None, wanted.target_bits
