"""Follows an engine's targets for one text: which policy decides, and what the controller orders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from dpllm.control.controller import LatencyController, QueryBudget
from dpllm.policies.base import PrecisionPolicy, TextPolicy
from dpllm.policies.token_time import Rest, Shortfall


class Piloted(Protocol):
    """What has a policy and perhaps a controller: an engine."""

    policy: PrecisionPolicy | None
    controller: LatencyController | QueryBudget | None


class Pilot:
    """Follows an engine's policy and controller for one text.

    Both may be exchanged between two tokens (`Engine.set_target`). A policy of the text's own stays.
    """

    def __init__(self, source: Piloted, pairs: Callable[[], float], policy: PrecisionPolicy | None = None):
        """source: the engine. pairs: gives the pairs in the text's cache. policy: instead of the engine's policy and
        controller."""
        self.source, self.pairs, self._own = source, pairs, policy
        self._policy: PrecisionPolicy | None = None
        self._followed: LatencyController | QueryBudget | None = None
        self.controller: LatencyController | QueryBudget | None = None  # of this text
        self._follow()

    def choose(self, text: TextPolicy | None) -> TextPolicy | None:
        """The policy of the next token: the text's own, steered to the controller's order, or another one."""
        policy = self._own or self.source.policy
        if policy is not self._policy:
            self._policy = policy
            text = None if policy is None else policy.begin_text()
        if self._own is None and self.source.controller is not self._followed:
            self._follow()
        if self.controller is not None and text is not None:
            order = self.controller.order(self.pairs())
            text.steer(order.bits, order.limit)
        return text

    def record(self, ms: float, bits: Sequence[int], rest: Rest) -> Shortfall | None:
        """Tells the controller how long a token took, how much of that was not the step, and what the token read. The
        prompt, without bits, says nothing. Returns why the target is out of reach, where it is."""
        if self.controller is None or not bits:
            return None
        self.controller.record(ms, self.controller.width_costs.of(bits), self.pairs(), rest)
        return self.controller.shortfall

    def _follow(self) -> None:
        self._followed = None if self._own is not None else self.source.controller
        self.controller = None if self._followed is None else self._followed.begin_text()
