"""A policy's rule in device memory, where the kernels of a decode step find it.

Rewriting a rule's thresholds in place retargets the next step: they are copied where they have changed. What it learns
from finished steps (context and correction) lives on the device from its first step on; the policy's own attributes
become views of that, so whoever else asks it sees the truth.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpllm.calib.runtime.token_sensitivity import FEATURES
from dpllm.decode.cpu_step import resident
from dpllm.kernels.gpu_step import tables
from dpllm.kernels.gpu_step.tables import PolicyTable, Site
from dpllm.model.decoder import Decoder
from dpllm.policies.base import PrecisionPolicy
from dpllm.policies.dp_llm import DPLLMPolicy
from dpllm.policies.fixed import StaticPolicy
from dpllm.policies.rate_distortion import RateDistortionPolicy
from dpllm.policies.thresholds import ThresholdRule
from dpllm.policies.token_limit import Pace

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
    """Keeps a table saying what the policy of the moment says. sites: by structure, those of each layer."""

    def __init__(self, decoder: Decoder, logits: Tensor):
        self.decoder, self.logits = decoder, logits
        total = sum(g.weights for g in decoder.groups) or 1
        shares = [g.weights / total for g in decoder.groups]
        parts = max(tables.PARTS, 1 << (decoder.config.num_heads - 1).bit_length())  # a head, a part
        self.table = PolicyTable.empty(shares, decoder.config.hidden_size, decoder.device, parts)
        self.sites: dict[Structure, list[LayerSites]] = {}
        self._diagonals: dict[Structure, list[Tensor]] = {}  # whose copies the sites hold
        self._thresholds: tuple[Tensor, int | None] | None = None  # that the table holds, their version
        self._enter(Structure(tables.NONE))
        state = self.table.state
        self._context = state[tables.CONTEXT : tables.CONTEXT + FEATURES][None]  # [1, 3]
        self._correction = state[tables.CORRECTION : tables.CORRECTION + 1]
        self._policy: object = NOBODY  # whose rule the table holds; None is a rule too
        self._controller: object = None
        self._target = 0.0  # bits, of the controller when it was uploaded
        self._pace: Pace | None = None  # that the table holds, with the prices it is of
        self.spare = tables.NEVER  # what the next token may cost beyond seed widths
        self._tokens: Tensor | None = None  # observed, and not yet taken in
        self._observed = 0  # what of it is to be: see step_tables.OBSERVE

    def follow(self, policy: PrecisionPolicy | None) -> str | None:
        """Makes the table say what this policy says; None reads what is resident. Returns why it cannot, if so."""
        if policy is not self._policy:
            self.release()
            reason = self._describe(policy)
            if reason is not None:
                return reason
            self._policy = policy
        if self._thresholds is not None:
            thresholds, version = self._thresholds
            if version is None or thresholds._version != version:
                self._compare(thresholds)
        if isinstance(policy, RateDistortionPolicy):
            self._limit(policy)
            if not self._is_current(policy):
                self._upload(policy)
            elif policy.controller.target_bits != self._target:
                self._retarget(policy)
        return None

    def observe(self, logits: Tensor, tokens: Tensor) -> bool:
        """Puts off learning from this step to the beginning of the next one, which decodes `tokens`."""
        if logits.data_ptr() != self.logits.data_ptr() or len(tokens) != 1:
            return False
        self._tokens, self._observed = tokens, tables.ALL
        return True

    def take_observed(self) -> int:
        """What the next step is to learn from the one before, for the request; asked once for each step."""
        observed, self._tokens, self._observed = self._observed, None, 0
        return observed

    def release(self) -> None:
        """Gives what the policy has learnt back to it, before another one takes its place."""
        policy, self._policy = self._policy, NOBODY
        if not isinstance(policy, RateDistortionPolicy) or policy.deferred is not self:
            return
        policy.deferred = None
        if self._is_current(policy) and policy.controller.target_bits != self._target:
            self._retarget(policy)
        if policy.context is self._context:
            policy.context = None if bool(self._context.isnan().any()) else self._context.clone()
        if policy.correction is self._correction:
            policy.correction = policy.controller.value = self._correction.clone()
        policy.record(self.table.bits[None])
        if self._tokens is not None:
            tokens, self._tokens, self._observed = self._tokens, None, 0
            policy.observe(self.logits, tokens)

    # -- rules -------------------------------------------------------------------------------------------

    def _describe(self, policy: PrecisionPolicy | None) -> str | None:
        groups, table = self.decoder.groups, self.table
        if policy is None or isinstance(policy, StaticPolicy):
            if policy is not None:
                fixed = [resident(g, policy.bits[g.index]) for g in groups]
            else:
                fixed = [g.resident_bits for g in groups]
            self._enter(Structure(tables.NONE))
            table.bits.copy_(torch.tensor(fixed, dtype=torch.int32))
            return None
        if isinstance(policy, DPLLMPolicy) and not policy.exact:
            self._by_estimates(policy)
            return None
        known = isinstance(policy, RateDistortionPolicy) or not hasattr(policy, "probe")
        if isinstance(policy, ThresholdRule) and known:
            self._by_thresholds(policy)
            return None
        return f"policy '{policy.name}' decides on the host"

    def _by_thresholds(self, policy: ThresholdRule) -> None:
        groups, table, seed = self.decoder.groups, self.table, self.decoder.groups[0].seed_bits
        thresholds = policy.thresholds
        for g, row in zip(groups, thresholds.cpu(), strict=True):
            if (row[g.resident_bits - seed :] < torch.inf).any():
                resident(g, seed + len(row))  # raises
        source = tuple(getattr(policy, "source", range(len(groups))))
        self._enter(Structure(tables.WEIGHTED, source, isinstance(policy, RateDistortionPolicy)))
        self._weigh(policy.diagonals)
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
        self._diagonals.pop(self.structure, None)  # whoever is interrupted begins anew
        for layer in self.sites[self.structure]:
            for site in (layer.qkv, layer.o, layer.gate_up, layer.down):
                if site.diagonals is not None:
                    site.diagonals.copy_(torch.stack([diagonals[g] for g in site.groups]))
        self._diagonals[self.structure] = diagonals

    def _compare(self, thresholds: Tensor) -> None:
        """Takes over a policy's thresholds [G, steps], and will again when they have changed."""
        self.table.compare(thresholds)
        self._thresholds = thresholds, None if thresholds.is_inference() else thresholds._version

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

    def _limit(self, policy: RateDistortionPolicy) -> None:
        """What its tokens may cost."""
        allowance, pace = policy.allowance, policy.pace
        self.spare = tables.NEVER if allowance is None else allowance.spare
        if allowance is not None and pace is not None and pace is not self._pace:
            self.table.limit(allowance.prices.extra, pace.rest, pace.gain)
            self._pace = pace

    # -- what is learnt from finished steps ----------------------------------------------------------------

    def _is_current(self, policy: RateDistortionPolicy) -> bool:
        return (
            policy.context is self._context
            and policy.correction is self._correction
            and policy.controller is self._controller
        )

    def _retarget(self, policy: RateDistortionPolicy) -> None:
        """Another target under way. What is still to be learnt was aimed at the old one."""
        state, target = self.table.state, policy.controller.target_bits
        if self._observed == tables.ALL and policy.corrected:
            state[tables.CORRECTION] += policy.controller.rate * (self._target - target)
        state[tables.TARGET] = self._target = target

    def _upload(self, policy: RateDistortionPolicy) -> None:
        """Takes over what the policy has learnt, or was told, elsewhere: a new text, a new target."""
        state, probe, controller = self.table.state, policy.probe, policy.controller
        self.table.probe.copy_(probe.probe)
        if policy.context is None:
            self._context.fill_(torch.nan)
            self._tokens, self._observed = None, 0  # a new text owes nothing to the last one
        else:
            self._context.copy_(policy.context)
        if isinstance(policy.correction, Tensor):
            self._correction.copy_(policy.correction.reshape(1))
        else:
            self._correction.fill_(policy.correction)
        rate = controller.rate if policy.corrected else 0.0
        if self._tokens is not None:  # the correction has begun anew since
            self._observed = tables.CONTEXT_ONLY
        numbers = ((tables.TARGET, controller.target_bits), (tables.RATE, rate),
                   (tables.LIMIT, controller.limit), (tables.BIAS, probe.bias))  # fmt: skip
        for place, value in numbers:
            state[place] = value
        state[tables.WEIGHTS : tables.WEIGHTS + FEATURES] = probe.weights
        state[tables.MEANS : tables.MEANS + FEATURES] = probe.means
        policy.context, policy.correction, self._controller = self._context, self._correction, controller
        controller.value, self._target = self._correction, controller.target_bits
        policy.deferred = self
