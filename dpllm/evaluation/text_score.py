"""Log probabilities of a text, every token decoded at its own widths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dpllm.base.quantities import perplexity
from dpllm.decode.step import TokenStep
from dpllm.evaluation.forced_steps import forced_nats
from dpllm.kvzip_bridge.cache import KVCache
from dpllm.policies.base import PrecisionPolicy


@dataclass(frozen=True)
class TextScore:
    """Log probabilities (nats) of a text's tokens. log_probs[i] is that of tokens[i + 1] after tokens[: i + 1]."""

    tokens: list[int]
    log_probs: list[float]
    effective_bits: float

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log probability; infinite beyond what a float holds."""
        mean = -sum(self.log_probs) / max(1, len(self.log_probs))
        return perplexity(mean)


def score_text(
    step: TokenStep, policy: PrecisionPolicy | None, cache: KVCache, ids: Sequence[int]
) -> TextScore:
    """Scores token ids from an empty cache. policy: None for a model that is not quantised."""
    nats, steps = forced_nats(step, policy, cache, ids)
    return TextScore(list(ids), [-n for n in nats], sum(s.effective_bits for s in steps) / len(steps))
