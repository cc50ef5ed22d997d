"""A policy's rule in device memory, where the kernels of a decode step find it.

What a rule compares with stays the policy's own tensors, found by address: rewriting its thresholds in place retargets
the next step. What it learns from finished steps (context and correction) lives on the device from its first step on;
the policy's own attributes become views of that, so whoever else asks it sees the truth.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpllm.allowance import Pace
from dpllm.calib.sensitivity import FEATURES
from dpllm.decoder import Decoder
from dpllm.dp_policy import DPLLMPolicy
from dpllm.kernels import step_tables as tables
from dpllm.kernels.step_tables import PolicyTable, Site
from dpllm.native import ThresholdRule, resident
from dpllm.policy import PrecisionPolicy, RateDistortionPolicy, StaticPolicy


@dataclass(frozen=True)
class Structure:
    """What a captured step is made for: steps of rules alike in this differ only in device memory. source: the group
    whose input each group's signal is of; steps: thresholds of each group; probes: whether tokens have multipliers."""

    kind: str
    source: tuple[int, ...] = ()
    steps: int = 0
    probes: bool = False


@dataclass(frozen=True)
class LayerSites:
    """The four vectors of a layer that products read."""

    qkv: Site
    o: Site
    gate_up: Site
    down: Site


def layer_sites(decoder: Decoder, structure: Structure) -> list[LayerSites]:
    """Which groups each vector decides for."""

    def site(*own: int) -> Site:
        fed = tuple(g for g, s in enumerate(structure.source) if s in own)
        ids = torch.tensor(fed or (0,), dtype=torch.int32, device=decoder.device)
        assert len(fed) <= tables.MAX_FED
        return Site(fed, ids, structure.probes and 0 in own)

    return [
        LayerSites(
            site(*(g.index for g in layer.qkv)), site(layer.o.index),
            site(*(g.index for g in layer.gate_up)), site(layer.down.index),
        )
        for layer in decoder.layers
    ]  # fmt: skip


def in_order(rest: Tensor, order: list[int]) -> Tensor:
    """What each group and those behind it cost, float32 [G] as in Pace, where they decide in another order."""
    if order == sorted(order):
        return rest
    cost = rest - torch.cat([rest[1:], rest.new_zeros(1)])
    out = torch.empty_like(rest)
    out[order] = cost[order].flip(0).cumsum(0).flip(0)
    return out


class DevicePolicy:
    """Keeps a table saying what the policy of the moment says."""

    def __init__(self, decoder: Decoder, logits: Tensor):
        self.decoder, self.logits = decoder, logits
        total = sum(g.weights for g in decoder.groups) or 1
        shares = [g.weights / total for g in decoder.groups]
        self.table = PolicyTable.empty(shares, decoder.config.hidden_size, decoder.device)
        self.structure = Structure(tables.NONE)
        state = self.table.state
        self._context = state[tables.CONTEXT : tables.CONTEXT + FEATURES][None]  # [1, 3]
        self._correction = state[tables.CORRECTION : tables.CORRECTION + 1]
        self._policy: PrecisionPolicy | None = None
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
        policy, self._policy = self._policy, None
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
            table.kind, self.structure = tables.NONE, Structure(tables.NONE)
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
        diagonals: list[Tensor | None] = [d.to(torch.float16).contiguous() for d in policy.diagonals]
        table.point(diagonals, thresholds)
        table.base.fill_(seed)
        source = tuple(getattr(policy, "source", range(len(groups))))
        probes = isinstance(policy, RateDistortionPolicy)
        self._pace = None
        table.unlimited()
        table.kind = tables.WEIGHTED
        table.state[tables.MULTIPLIER] = 1.0
        self.structure = Structure(tables.WEIGHTED, source, thresholds.shape[1], probes)

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
        table.point(matrices, torch.tensor(limits, device=self.decoder.device)[:, None].contiguous())
        table.kind = tables.ESTIMATED
        self.structure = Structure(tables.ESTIMATED, tuple(policy.source), 1)

    def _limit(self, policy: RateDistortionPolicy) -> None:
        """What its tokens may cost."""
        allowance, pace = policy.allowance, policy.pace
        self.spare = tables.NEVER if allowance is None else allowance.spare
        if allowance is not None and pace is not None and pace is not self._pace:
            self._pace = pace
            self.table.limit(allowance.prices.extra, in_order(pace.rest, self._order()), pace.gain)

    def _order(self) -> list[int]:
        """Groups as the step decides for them: by the vectors they look at."""
        source = self.structure.source
        return sorted(range(len(source)), key=lambda g: (source[g], g))

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
