"""The step's Triton kernels, through the interpreter, against float64 and against the torch definitions.

Not collected by itself: triton must be imported with TRITON_INTERPRET=1, so tests/unit/test_step_kernels.py runs this
file in a process of its own.
"""

from __future__ import annotations

import math

import pytest
import torch
from operator_checks import Checked
from step_cases import HALF, assert_signals, cache_of, limit, policy_table, rng, site_of, table_with_state

from dpllm.calib.runtime.token_sensitivity import DECAY, step_context
from dpllm.kernels import reference
from dpllm.kernels.gpu_step import definition as step_reference
from dpllm.kernels.gpu_step import tables
from dpllm.kernels.gpu_step.tables import CORRECTION, ENTROPY, LOG_TOTAL, MULTIPLIER, OFFSET
from dpllm.kernels.triton import attention, select
from dpllm.kernels.triton import norm_silu_finish as small_ops

SCRATCH = 4096


def scratch():
    return torch.full((SCRATCH,), float("nan")), torch.zeros(8, dtype=torch.int32)


# -- norm, silu ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [33, 64, 1000])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("add", [False, True])
def test_norm(columns, dtype, add):
    x, delta, weight = (torch.randn(1, columns, generator=rng(i)).to(dtype) for i in range(3))
    table, other = (policy_table([columns] * 2) for _ in range(2))
    site = site_of(1, columns=columns)
    kept = x.clone()
    h = small_ops.norm(x, delta if add else None, weight[0], 1e-5, site, table, 3.0)
    total = kept.double() + delta.double() * add
    assert (x.double() - total).abs().max() <= HALF[dtype] * 8
    wide = x.double()
    exact = wide / (wide.square().mean() + 1e-5).sqrt() * weight.double()
    assert (h.double() - exact).abs().max() < 8 * HALF[dtype]
    step_reference._signals(h, site, other)
    assert_signals(table, other, site)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("first", [False, True])
def test_a_norm_and_what_it_decides(count, first):
    columns = 77
    x, weight = torch.randn(1, columns, generator=rng(1)), torch.rand(columns, generator=rng(2))
    table, other = (policy_table([columns] * 4, tables.WEIGHTED) for _ in range(2))
    site = site_of(*range(1, 1 + count), first=first, columns=columns)
    for ops, decide, t in ((small_ops, select.decide, table), (step_reference, step_reference.decide, other)):
        ops.norm(x.clone(), None, weight, 1e-5, site, t, 0.1)
        for g in site.groups:
            decide(g, t)
    assert torch.equal(table.bits, other.bits)
    assert len(table.bits[1 : 1 + count].unique()) == count, "widths differ, so that a mix-up shows"
    assert table.bits[0] == 0
    assert torch.allclose(table.state, other.state, rtol=1e-5)
    assert (table.state[MULTIPLIER] != table_with_state()[MULTIPLIER]) == first


LEFT = (0, 99, 400, 1500, 5000, 2**40, tables.NEVER)


def signals_of(groups: int, seed: int = 13) -> torch.Tensor:
    return torch.rand(groups, tables.PARTS, generator=rng(seed)) * 100


def test_what_a_token_may_cost():
    """The less is left the fewer bits, in each group in turn; what is read is paid, and no more than is there."""
    used = []
    for left in LEFT:
        table, other = (policy_table([600] * 3, tables.WEIGHTED) for _ in range(2))
        for decide, t in ((select.decide, table), (step_reference.decide, other)):
            limit(t, left)
            t.signals.copy_(signals_of(3))
            for g in range(3):
                decide(g, t)
        assert torch.equal(table.bits, other.bits)
        assert torch.equal(table.left, other.left)
        steps = (table.bits - table.base).tolist()
        paid = [int(table.extra[g, s - 1]) if s else 0 for g, s in enumerate(steps)]
        assert table.left.tolist() == [left - sum(paid[:g]) for g in range(4)]
        assert table.left[-1] >= 0
        used.append(sum(steps))
    assert used == sorted(used)
    assert used[0] == 0 < used[2] < used[4] <= used[5] == used[6]
    free = policy_table([600] * 3, tables.WEIGHTED)
    free.signals.copy_(signals_of(3))
    for g in range(3):
        select.decide(g, free)
    assert torch.equal(free.bits, table.bits)
    assert (free.left == tables.NEVER).all()


@pytest.mark.parametrize("what", [float("nan"), 0.0, float("inf")])
def test_a_signal_that_is_no_number_reads_the_seed(what):
    """An infinite one reads all there is."""
    table = policy_table([32], tables.WEIGHTED)
    table.signals[0, 5] = what
    select.decide(0, table)
    assert table.bits.tolist() == [2 if what != float("inf") else 8]


@pytest.mark.parametrize("columns", [40, 512, 1300])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_silu_mul(columns, dtype):
    gate_up = (torch.randn(1, 2 * columns, generator=rng(7)) * 3).to(dtype)
    gate_up[0, 0], gate_up[0, 1] = -200.0, 200.0
    table, other = (policy_table([32, columns], tables.WEIGHTED) for _ in range(2))
    site = site_of(1, columns=columns)
    found = small_ops.silu_mul(gate_up, site, table)
    step_reference.silu_mul(gate_up, site, other)
    gate, up = gate_up.double().chunk(2, 1)
    exact = gate.sigmoid() * gate * up
    assert ((found.double() - exact).abs() <= HALF[dtype] * (1 + exact.abs())).all()
    assert_signals(table, other, site, max(1e-4, HALF[dtype]))


def test_silu_mul_of_a_row_that_would_be_too_many_parts():
    gate_up = torch.ones(1, 2 * 17000)
    table, site = policy_table([17000], tables.WEIGHTED), site_of(0, columns=17000)
    small_ops.silu_mul(gate_up, site, table)
    exact = site.diagonals.double().sum() * torch.ones(1).sigmoid().double() ** 2
    assert abs(table.signals.double().sum() / exact - 1) < 1e-5


# -- select and estimates -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 33), (2, 1025), (0, 8)])
def test_select(rows, columns):
    x, d = torch.randn(rows, columns, generator=rng(8)), torch.rand(columns, generator=rng(9)).half()
    error = x.double().square() @ d.double()
    thresholds = torch.tensor([0.3, 0.5, 1.01, 1.4, float("inf")]) * float(error.mean() if rows else 1)
    found = select.select(x, d, thresholds, 2)
    assert found.dtype == torch.int32
    assert found.tolist() == [2 + int((e > thresholds.double()).sum()) for e in error]


@pytest.mark.parametrize("columns", [33, 2050])
def test_estimates(columns, monkeypatch):
    monkeypatch.setattr(select, "ROW_BLOCKS", 4)
    x = torch.randn(1, columns, generator=rng(10))
    table, other = (policy_table([columns] * 5, tables.ESTIMATED) for _ in range(2))
    partial, counter = scratch()
    select.estimate(x, site_of(0, 1, 2, 4), table, partial, counter)
    step_reference.estimate(x, site_of(0, 1, 2, 4), other, partial, counter)
    assert torch.equal(table.bits, other.bits)
    assert sorted(table.bits[[0, 1, 2, 4]].tolist()) == [2, 2, 3, 3]
    assert table.bits[3] == 0
    assert (counter == 0).all()


# -- after the head -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [1, 96, 1024, 5000])
def test_finish(vocabulary):
    logits = torch.randn(1, vocabulary, generator=rng(11)) * 3
    best = logits.max()
    logits[0, vocabulary // 2] = logits[0, -1] = best  # a tie: the first one counts
    table, (partial, counter) = policy_table([32]), scratch()
    token = torch.zeros(1, dtype=torch.int32)
    small_ops.finish(logits, token, table, partial, counter)
    assert token.item() == int((logits[0] == best).nonzero()[0])
    wide = logits[0].double()
    p = wide.softmax(0)
    assert abs(float(table.state[LOG_TOTAL]) - float(wide.logsumexp(0))) < 1e-5
    assert abs(float(table.state[ENTROPY]) + float((p * p.log()).sum())) < 1e-5
    assert (counter == 0).all()


def test_finish_of_what_is_no_number_names_a_token():
    table, (partial, counter) = policy_table([32]), scratch()
    token = torch.zeros(1, dtype=torch.int32)
    small_ops.finish(torch.full((1, 1500), float("nan")), token, table, partial, counter)
    assert 0 <= token.item() < 1500


@pytest.mark.parametrize("known", [False, True])
def test_observe(known):
    """Against the policy's own arithmetic."""
    logits = torch.randn(1, 300, generator=rng(12))
    table, (partial, counter) = policy_table([32, 64], tables.WEIGHTED), scratch()
    _, cache = cache_of([1], 1, 16, torch.float32, since=0)
    before = torch.tensor([[0.3, -1.0, 0.9]]) if known else None
    table.state[tables.CONTEXT : tables.CONTEXT + 3] = before[0] if known else float("nan")
    table.bits.copy_(torch.tensor([4, 3]))
    small_ops.finish(logits, torch.zeros(1, dtype=torch.int32), table, partial, counter)
    kept = table.state.clone()
    small_ops.observe(logits, cache, table, DECAY)
    assert torch.equal(table.state[tables.CONTEXT : OFFSET + 1], kept[tables.CONTEXT : OFFSET + 1])
    assert table.left[0] == tables.NEVER
    cache.request.copy_(torch.tensor([17, 0, 0, 1, 2**40]))
    small_ops.observe(logits, cache, table, DECAY)
    assert table.left[0] == 2**40
    context = step_context(logits, torch.tensor([17]), before)
    assert torch.allclose(table.state[tables.CONTEXT : tables.CONTEXT + 3], context[0], atol=1e-5)
    used = float(table.bits.double() @ table.share.double())
    moved = float(kept[CORRECTION]) + float(kept[tables.RATE]) * (float(kept[tables.TARGET]) - used)
    limit = float(kept[tables.LIMIT])
    assert math.isclose(float(table.state[CORRECTION]), min(max(moved, -limit), limit), abs_tol=1e-6)
    weights, means = (kept[i : i + 3] for i in (tables.WEIGHTS, tables.MEANS))
    offset = float(kept[tables.BIAS] + (context[0] - means) @ weights)
    assert math.isclose(float(table.state[OFFSET]), offset, abs_tol=1e-5)


# -- the whole step -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference_decoder():
    from dpllm import reference as bundled
    from dpllm.calib.runtime.profile import PROFILE_NAME, CalibrationProfile
    from dpllm.model.loading import LoadOptions, load_decoder
    from dpllm.quant.overlay import Overlay

    path = bundled.overlay_path()
    profile = CalibrationProfile.load(path / PROFILE_NAME, Overlay.open(path).hash)
    options = LoadOptions(backend="reference", granularity=profile.granularity)
    return load_decoder(path, options), profile


@pytest.mark.parametrize("name", ["rate-distortion"])
def test_a_whole_step(reference_decoder, name):
    """The bundled model, products by the definitions, everything else by the kernels."""
    from dpllm.decode.gpu_step import GpuStep
    from dpllm.decode.step import DecoderStep
    from dpllm.kernels.triton import step_operations
    from dpllm.policies.make import make_policy

    decoder, profile = reference_decoder
    results = []
    for step in (GpuStep(decoder, step_operations), DecoderStep(decoder)):
        text, cache = make_policy(name, 3.5, decoder, profile).begin_text(), decoder.new_ragged_cache(8)
        stepped, found = None, []
        for token in (5, 17, 99):
            if stepped is not None:
                step.learn(text, stepped, token)
            stepped = step(token, cache, text)
            found.append((stepped.logits.clone(), stepped.bits.clone()))
        assert stepped.greedy == int(stepped.logits.argmax())
        results.append([torch.cat(t) for t in zip(*found, strict=True)])
    assert torch.equal(results[0][1], results[1][1])
    assert (results[0][0] - results[1][0]).abs().max() < 1e-3


def test_what_doctor_checks(monkeypatch):
    """On a GPU it runs these on the device; here the same through the interpreter, and it notices a wrong kernel."""
    from unittest.mock import MagicMock

    from dpllm.diagnostics import gpu as gpu_info
    from dpllm.kernels.triton import activations, products

    cpu, launched = torch.device("cpu"), {}
    for module in (activations, attention, products, select, small_ops):
        for name in [n for n in vars(module) if n.endswith("_kernel")]:
            launched[name] = MagicMock()
            launched[name].__getitem__.side_effect = getattr(module, name).__getitem__
            monkeypatch.setattr(module, name, launched[name])
    errors = gpu_info.check_step_kernels(cpu)
    assert set(errors) >= {
        "norm",
        "attend",
        "silu_mul",
        "estimate",
        "select",
        "finish",
        "observe",
    }
    errors |= gpu_info.check_products(cpu, (6, 160))
    for kind in ("float16", "bfloat16"):
        names = ["gemm", "tall gemm", "dequantize", "int8_gemv", "int8_gemm", "halve"]
        names += [f"gemv of {b} bits" for b in range(2, 9)]
        assert set(errors) >= {f"{name}, {kind}" for name in names}
    assert max(errors.values()) < 5e-3, errors
    assert len(launched) >= 14 and all(k.__getitem__.called for k in launched.values()), launched
    wrong = {
        **gpu_info._outputs(
            step_reference, reference, reference.select, reference.decode_attention, cpu, torch.float16
        )
    }
    assert gpu_info._error(wrong["norm"][1], wrong["norm"][0]) > 5e-3
    assert gpu_info._error(torch.tensor([3]), torch.tensor([4])) == float("inf")


def test_operators_are_what_torch_expects():
    from dpllm.diagnostics import gpu as gpu_info

    with Checked() as checked:
        gpu_info.check_step_kernels(torch.device("cpu"))
    assert checked.seen >= {
        "norm", "attend", "silu_mul", "decide", "estimate", "finish", "observe", "select",
        "decode_attention", "chosen_product",
    }  # fmt: skip
