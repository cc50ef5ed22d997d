"""A whole decode step on a GPU, and what there is in it beside reading weights.

Limits measured on random weights of a known shape, every step one CUDA graph, medians of interleaved replays: (1) the
step at fixed widths of mean 3.5 bits after 1024 tokens against the fp16 step under the same kind of graph, and as a
share of what reading its bytes would take; (2) one width after another; (3) choosing widths by our policy, with all
that it does in an engine (it learns from the step before, foretells what the token is worth, corrects, and keeps to an
limit), against replaying the very widths that it chose; and by DP-LLM's estimators against the same widths; (4)
after 32768 tokens with all pairs and with 0.3 of them kept.

    python -m bench.gpu.gpu_decode [--shape 8B]
    python -m bench.gpu.gpu_decode --dry-run      through Triton's interpreter, small: shows that it works
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from bench.gpu.gpu_common import DEVICE, DRY, LAUNCHED, begun, finish, interleaved, our_backend  # isort: skip
from bench.gpu.gpu_common import percentile, read_gb_per_s  # isort: skip

import numpy as np
import torch

from bench.common.report import arguments
from dpllm.calib.lambda_curve import dense_curve
from dpllm.calib.runtime.profile import CalibrationProfile
from dpllm.decode.gpu_step import GpuStep
from dpllm.kernels.backend import choose_backend
from dpllm.kernels.triton import step_operations
from dpllm.kvzip_bridge.cache import KVCache
from dpllm.model.config import ModelConfig
from dpllm.model.decoder import Decoder, Group, Layer
from dpllm.model.loading import LoadOptions
from dpllm.model.random_models import SHAPES, random_decoder, shape
from dpllm.policies.base import TextPolicy
from dpllm.policies.dp_llm import DPLLMPolicy
from dpllm.policies.fixed import StaticPolicy
from dpllm.policies.rate_distortion import RateDistortionPolicy
from dpllm.policies.token_limit import TokenLimit, WidthCosts

CONTEXT, LONG = (5, 20) if DRY else (1024, 32768)
KEPT = 0.3
PLANES, TARGET = 6, 3.5
WIDTHS = () if DRY else (2, 3, 4, 5, 6)
HALF = torch.float16
ROWS = 2 if DRY else 64  # of DP-LLM's projections
TOKENS, BINS = (8, 4) if DRY else (48, 16)  # that the policy is calibrated on, and bins of its signals
ALLOWED = 1.05  # times what a token of TARGET bits costs: what none may exceed
FP16, FIXED = "fp16", "3.5 bits, fixed"
CHOSEN, REPLAYED = "3.5 bits, our policy", "our policy's widths, replayed"


def config_of(name: str) -> ModelConfig:
    """A shape of dpllm/model/random_models.py; a small layer in a dry run."""
    c = shape("tiny" if DRY else name)
    small = {
        "hidden_size": 64, "num_layers": 1, "intermediate_size": 64, "num_heads": 2, "num_kv_heads": 1,
        "head_dim": 32, "inv_freq": c.inv_freq[:16], "vocab_size": 16, "windows": c.windows[:1],
        "uses_rope": c.uses_rope[:1],
    }  # fmt: skip
    return replace(c, **small) if DRY else c


# -- decoders and caches --------------------------------------------------------------------------------------


def quantised_decoder(c: ModelConfig) -> Decoder:
    """Random planes under our kernels, in a dry run too."""
    name = "reference" if DRY else "triton"
    decoder = random_decoder(
        c, PLANES, LoadOptions(backend=name, device=str(DEVICE), dtype=HALF, kv_dtype=HALF)
    )
    if DRY:
        decoder.backend = our_backend()
        for g in decoder.groups:
            g.weight = decoder.backend.prepare(g.weight, DEVICE)
    return decoder


def dense_decoder(c: ModelConfig) -> Decoder:
    """The same shape in fp16, matrices fused alike."""
    where: dict[str, Any] = {"device": DEVICE, "dtype": HALF}
    heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim

    def group(rows: int, columns: int) -> Group:
        return Group("dense", torch.randn(rows, columns, **where).mul_(columns**-0.5), None)

    ones = torch.ones(c.hidden_size, **where)
    layers = [
        Layer(
            i, ones, ones, [group(heads + 2 * kv, c.hidden_size)], group(c.hidden_size, heads),
            [group(2 * c.intermediate_size, c.hidden_size)], group(c.hidden_size, c.intermediate_size),
        )
        for i in range(c.num_layers)
    ]  # fmt: skip
    table = torch.randn(c.vocab_size, c.hidden_size, **where)
    return Decoder(c, choose_backend("reference", DEVICE), layers, table, ones, table, HALF, HALF)


def full_cache(decoder: Decoder, tokens: int) -> KVCache:
    return filled(decoder.new_cache(tokens + 1), tokens)


def pruned_cache(decoder: Decoder, tokens: int) -> KVCache:
    """KEPT of the pairs, the heads keeping unlike numbers of them."""
    cache, c = decoder.new_ragged_cache(tokens + 1), decoder.config
    filled(cache, tokens)
    share = torch.linspace(0.4, 1.6, c.num_kv_heads, device=DEVICE)[None, :, None] * KEPT
    cache.prune(torch.rand(c.num_layers, c.num_kv_heads, tokens, device=DEVICE) < share, c.windows)
    return cache


def filled(cache: Any, tokens: int) -> Any:
    for pairs in (*cache.k, *cache.v):
        pairs.normal_()
    cache.advance(tokens)
    return cache


# -- policies ---------------------------------------------------------------------------------------------------


def mixed(decoder: Decoder) -> list[int]:
    """Three and four bits in turn by layer: 3.5 on average."""
    per_layer = len(decoder.groups) // decoder.config.num_layers
    return [3 + (g.index // per_layer) % 2 for g in decoder.groups]


def our_policy(decoder: Decoder) -> TextPolicy:
    """As an engine has it under a limit: a profile, a target, and a limit that some tokens reach."""
    text = RateDistortionPolicy(profile_of(decoder), decoder, TARGET).begin_text()
    width_costs, low = WidthCosts.in_bytes(decoder.groups), int(TARGET)
    a, b = (width_costs.of([w] * len(decoder.groups)) for w in (low, low + 1))
    text.steer(TARGET, TokenLimit(round(ALLOWED * (a + (TARGET - low) * (b - a))), width_costs))
    return text


def profile_of(decoder: Decoder) -> CalibrationProfile:
    """Gains that are made up, thresholds among the signals that the decoder's groups really see."""
    groups, rng = decoder.groups, np.random.default_rng(0)
    low, high, count = groups[0].seed_bits, groups[0].resident_bits, len(groups)
    columns = [g.weight.in_features for g in groups]
    diagonals = [rng.random(k).astype(np.float16) for k in columns]
    ranked = signals(decoder, diagonals)
    weights = np.asarray([g.weights for g in groups], np.int64)
    size = weights * np.exp(rng.normal(0, 0.7, count))  # some groups matter more than others
    gain = size[:, None, None] * 4.0 ** -np.arange(high - low)[:, None] * np.linspace(0.5, 2.0, BINS)
    whole = np.full(count, high)
    draft = CalibrationProfile(
        overlay_hash="0" * 64, granularity="fused", bits=(low, high), group_names=tuple(g.name for g in groups),
        diagonals=tuple(diagonals), source=np.arange(count),
        probe=rng.normal(0, 0.3 * columns[0] ** -0.5, columns[0]).astype(np.float16),
        context=np.asarray([0.1, -0.01, 0.1, 0, 0, 0, 0.0]),
        knots=ranked[:, np.arange(1, BINS) * TOKENS // BINS].astype(np.float64), gain=gain,
        mean_loss=np.zeros((count, high - low + 1)), weights=weights,
        cost=np.stack([np.asarray(g.bytes_at, np.int64) for g in groups]), resident=whole[None],
        curve_log2_lambda=np.zeros((1, 2)), curve_bits=np.asarray([[low, high]], float), origin={},
    )  # fmt: skip
    log2_lambda, bits = dense_curve(draft, ranked, whole, np.asarray([low, high]), np.zeros(2))
    return replace(draft, curve_log2_lambda=log2_lambda[None], curve_bits=bits[None])


def signals(decoder: Decoder, diagonals: list[np.ndarray]) -> np.ndarray:
    """Each group's signals of a few random tokens, ascending, [G, TOKENS]."""
    seen: dict[int, np.ndarray] = {}

    def look(group: Group, x: torch.Tensor, y: torch.Tensor) -> None:
        d = torch.from_numpy(diagonals[group.index]).to(DEVICE).float()
        seen[group.index] = (x.float() ** 2 @ d).sort().values.cpu().numpy()

    decoder.forward(torch.randint(0, decoder.config.vocab_size, (TOKENS,), device=DEVICE), observe=look)
    return np.stack([seen[g.index] for g in decoder.groups])


def estimating(decoder: Decoder, bits: list[int]) -> DPLLMPolicy:
    """DP-LLM's rule with a projection for every group, each read for every token, always choosing the given widths."""
    policy = object.__new__(DPLLMPolicy)  # without a calibration
    policy.name, policy.exact, policy.low = "dp-llm", False, bits
    policy.fixed = [False] * len(bits)
    policy.source = list(range(len(bits)))
    policy.thresholds, policy.lines = [float("inf")] * len(bits), [[0.0, 0.0]] * len(bits)
    policy.projections = [
        torch.randn(ROWS, g.weight.in_features, device=DEVICE).half() for g in decoder.groups
    ]
    policy.extra_bytes = sum(p.nbytes for p in policy.projections if p is not None)
    return policy


# -- what is timed ------------------------------------------------------------------------------------------------


class Replay:
    """The captured step after a cache: each run decodes the same token again and moves nothing. What a policy learns
    from the run before, it learns in the run. bits: int32 [1, G] in device memory, of the last run. like: the name of
    what its time is compared with."""

    def __init__(self, decoder: Decoder, policy: TextPolicy | None, cache: KVCache, like: str | None = None):
        self.decoder, self.policy, self.cache, self.like = decoder, policy, cache, like
        self.step, self.token = GpuStep(decoder, step_operations), torch.ones(1, dtype=torch.int64)
        self.bits: Any = None
        if not DRY or (policy is not None and policy.stepwise):
            self.decode()
        if not DRY:
            self.again()  # the request that stays is of a token that has one before it
        self.graph = next(iter(self.step.graphs.values()), None)
        if self.graph is None and not DRY:
            print(f"not one graph: {self.step.reason}")

    def __call__(self) -> None:
        if self.graph is not None:
            self.graph.replay()
        else:
            self.again()

    def again(self) -> None:
        if self.bits is not None and self.policy is not None:
            self.step.learn(self.policy, self.last, int(self.token))
        self.decode()

    def decode(self) -> None:
        self.last = self.step(int(self.token), self.cache, self.policy)
        self.bits = None if self.policy is None else self.step.widths
        self.cache.rewind(self.cache.length - 1)

    def widths(self) -> list[int] | None:
        return None if self.policy is None else self.bits[0].tolist()

    def effective_bits(self) -> float:
        bits, groups = self.widths(), self.decoder.groups
        if bits is None:
            return 16.0
        return sum(b * g.weights for b, g in zip(bits, groups, strict=True)) / sum(g.weights for g in groups)

    def nbytes(self) -> int:
        """Bytes that a step reads: weights at these widths, head, pairs, and what choosing takes."""
        bits, groups = self.widths(), self.decoder.groups
        if bits is None:
            read = sum(g.weight.nbytes for g in groups)
        else:
            read = sum(g.bytes_at[b - g.seed_bits] for b, g in zip(bits, groups, strict=True))
        chosen = 0 if self.policy is None else self.policy.extra_bytes
        return read + chosen + self.decoder.head_bytes() + self.cache.nbytes


def timed(
    runs: dict[str, Replay], roofline: float, before: dict[str, Callable[[], Any]] | None = None
) -> list[dict[str, Any]]:
    """A row for each."""
    times = interleaved(runs, before=before)
    return [as_row(name, run, times, roofline) for name, run in runs.items()]


def as_row(name: str, run: Replay, times: dict[str, list[float]], roofline: float) -> dict[str, Any]:
    own, nbytes = times[name], run.nbytes()

    def against(other: str | None) -> float | None:
        if other not in times:
            return None
        return round(statistics.median(a / b for a, b in zip(own, times[other], strict=True)), 4)

    middle = statistics.median(own)
    return {
        "what": name, "bits": round(run.effective_bits(), 3), "ms_p50": round(middle, 4),
        "ms_p90": round(percentile(own, 0.9), 4), "gb": round(nbytes / 1e9, 4),
        "of_byte_limit": round(nbytes / roofline / 1e6 / middle, 4), "time_of_fp16": against(FP16),
        "like": run.like, "time_of_like": against(run.like), "note": LAUNCHED[name] or None if DRY else None,
    }  # fmt: skip


def behind_a_short_text(quantised: Decoder, roofline: float) -> list[dict[str, Any]]:
    plain, bits = dense_decoder(quantised.config), mixed(quantised)
    cache = full_cache(quantised, CONTEXT)
    fixed, estimators = StaticPolicy(bits), estimating(quantised, bits)
    runs = {
        FP16: Replay(plain, None, full_cache(plain, CONTEXT)),
        FIXED: Replay(quantised, fixed, cache),
        CHOSEN: Replay(quantised, our_policy(quantised), cache, REPLAYED),
        REPLAYED: Replay(quantised, StaticPolicy(bits), cache, FIXED),
        "3.5 bits, DP-LLM's estimators": Replay(quantised, estimators.begin_text(), cache, FIXED),
    }
    for b in WIDTHS:
        runs[f"{b} bits"] = Replay(quantised, StaticPolicy([b] * len(bits)), cache, FIXED)

    def follow() -> None:
        if runs[REPLAYED].bits is None:
            runs[REPLAYED].decode()
        runs[REPLAYED].bits.copy_(runs[CHOSEN].bits)

    return timed(runs, roofline, {REPLAYED: follow})


def behind_a_long_text(quantised: Decoder, roofline: float) -> list[dict[str, Any]]:
    policy = StaticPolicy(mixed(quantised))
    pruned = pruned_cache(quantised, LONG)  # first: while it is made it takes as much as the whole one
    whole, kept = (f"3.5 bits after {LONG}, {what}" for what in ("all pairs", f"{KEPT} kept"))
    runs = {
        whole: Replay(quantised, policy, full_cache(quantised, LONG)),
        kept: Replay(quantised, policy, pruned, whole),
    }
    return timed(runs, roofline)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="8B", help="smaller ones for less memory")
    args, run = begun(parser)
    name = args.shape
    torch.manual_seed(0)
    roofline = read_gb_per_s()
    with torch.no_grad():
        quantised = quantised_decoder(config_of(name))
        rows = behind_a_short_text(quantised, roofline)
        gc.collect()  # the fp16 decoder, and graphs that hold memory of their own
        if not DRY:
            torch.cuda.empty_cache()
        rows += behind_a_long_text(quantised, roofline)
    finish(
        run, "gpu_decode" if name == "8B" else f"gpu_decode_{name}", rows, read_gb_per_s=roofline, context=CONTEXT,
        shape=name, backend=quantised.backend.name,
    )  # fmt: skip


if __name__ == "__main__":
    main()
