"""Held-out quality of a policy at its measured bits: `dpllm eval`.

Every scored token takes the decode path: its own widths, from its own signal, over the keys and values
that such decoding produced. Where a width depends on nothing but its token's input, the pass is batched over
a document's tokens, which equals step-by-step decoding (tests/model/test_policies.py shows it). A policy that
also learns from finished steps decodes step by step: one document after the other where a native step can do it,
else many documents side by side (dpllm/evaluation/side_by_side.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from dpllm.base.quantities import field, perplexity
from dpllm.calib.dequantised import dequantised_view
from dpllm.decode.cpu_step import NativeModel, NativeStep
from dpllm.decode.step import TokenStep
from dpllm.evaluation.forced_steps import forced_nats
from dpllm.evaluation.side_by_side import steps
from dpllm.model.decoder import Decoder
from dpllm.policies.base import PrecisionPolicy, Recorder


@dataclass(frozen=True)
class EvalResult:
    """One policy at one target. `weight_bytes_per_token` counts planes, tables, scales, the selector's
    tables and the head. `perplexity` is infinite where it exceeds the largest float; `nll_mean` is finite then."""

    policy: str
    target_bits: float
    effective_bits: float
    perplexity: float
    nll_mean: float
    tokens: int
    weight_bytes_per_token: int

    def as_json(self) -> dict[str, object]:
        """The object of `dpllm eval --json`."""
        return asdict(self) | field("perplexity", self.perplexity)


@torch.no_grad()
def evaluate(
    decoder: Decoder,
    policy: PrecisionPolicy,
    target_bits: float,
    documents: Sequence[Sequence[int]],
    progress: Callable[[int], None] = lambda tokens: None,
) -> EvalResult:
    """Perplexity of the next token over documents of token ids (each from an empty cache)."""
    return summarize(
        policy.name, target_bits, score(decoder, policy, documents, progress), decoder.head_bytes()
    )


@dataclass(frozen=True)
class DocumentScore:
    """Sums over one document, enough for paired comparisons between policies."""

    nll: float
    tokens: int
    bits: float
    weight_bytes: float


@torch.no_grad()
def score(
    decoder: Decoder,
    policy: PrecisionPolicy,
    documents: Sequence[Sequence[int]],
    progress: Callable[[int], None] = lambda tokens: None,
) -> list[DocumentScore]:
    """One score per document of at least two tokens, in their order."""
    kept = [torch.tensor(d, device=decoder.device) for d in documents if len(d) > 1]
    # The native kernels are quick as they are, and what they compute is what is to be scored.
    decoder = dequantised_view(decoder, products=decoder.backend.cpu is None)
    policy = policy.reading_from(decoder)
    text = policy.begin_text()
    if not text.stepwise:
        return [_score_batch(decoder, policy, ids, progress) for ids in kept]
    model = NativeModel.of(decoder)
    if model is not None and text.rule is not None and text.rule.own_inputs:
        return [_score_one(decoder, NativeStep(model), policy, ids, progress) for ids in kept]
    return _score_together(decoder, policy, kept, progress)


def _score_batch(
    decoder: Decoder, policy: PrecisionPolicy, ids: torch.Tensor, progress: Callable[[int], None]
) -> DocumentScore:
    recorder = Recorder(policy.begin_text(), decoder.groups)
    logits = decoder.forward(ids[:-1], select=recorder)
    nll = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none").double().sum().item()
    bits, nbytes = recorder.effective_bits().sum().item(), recorder.weight_bytes().sum().item()
    progress(len(ids) - 1)
    return DocumentScore(nll, len(ids) - 1, bits, nbytes)


def _score_one(
    decoder: Decoder,
    step: TokenStep,
    policy: PrecisionPolicy,
    ids: torch.Tensor,
    progress: Callable[[int], None],
) -> DocumentScore:
    """One document, token by token, as `dpllm generate` decodes."""
    nats, steps = forced_nats(step, policy, decoder.new_cache(len(ids)), ids.tolist())
    progress(len(ids) - 1)
    head = decoder.head_bytes()
    return DocumentScore(
        sum(nats), len(nats), sum(s.effective_bits for s in steps), sum(s.weight_bytes - head for s in steps)
    )


def _score_together(
    decoder: Decoder, policy: PrecisionPolicy, documents: list[torch.Tensor], progress: Callable[[int], None]
) -> list[DocumentScore]:
    sums = torch.zeros(len(documents), 3, dtype=torch.float64)
    for numbers, logits, after, recorder in steps(decoder, policy, documents):
        nll = torch.nn.functional.cross_entropy(logits, after, reduction="none").double().cpu()
        sums[numbers] += torch.stack([nll, recorder.effective_bits(), recorder.weight_bytes()], dim=1)
        progress(len(numbers))
    return [DocumentScore(n, len(d) - 1, b, w) for (n, b, w), d in zip(sums.tolist(), documents, strict=True)]


def summarize(name: str, target_bits: float, scores: Sequence[DocumentScore], head_bytes: int) -> EvalResult:
    """Means over all tokens."""
    tokens = sum(s.tokens for s in scores)
    nll = sum(s.nll for s in scores) / tokens
    return EvalResult(
        policy=name,
        target_bits=target_bits,
        effective_bits=round(sum(s.bits for s in scores) / tokens, 4),
        perplexity=round(perplexity(nll), 4),
        nll_mean=round(nll, 5),
        tokens=tokens,
        weight_bytes_per_token=round(sum(s.weight_bytes for s in scores) / tokens) + head_bytes,
    )
