"""The quantiser end to end: what it stores, that a cut-off run ends the same, what it refuses."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_models import build_model
from tiny_text import train_tokenizer
from transformers import AutoModelForCausalLM

from dpllm.base import files
from dpllm.base.errors import InputError
from dpllm.base.text import load_tokenizer
from dpllm.kernels import reference
from dpllm.model.loading import LoadOptions, load_decoder
from dpllm.quant import fisher, quantize
from dpllm.quant.overlay import Overlay
from dpllm.quant.quantize import Quantizer
from dpllm.quant.quantize_plan import QuantizeOptions
from dpllm.quant.source import ModelSource

DOCUMENTS = ["def add(a, b):\n    return a + b\n" * 12, "for i in range(10):\n    print(i)\n" * 12]
FISHER = QuantizeOptions(samples=2, sequence_length=32, refine="tables")  # "full" takes a second a run
PLAIN = QuantizeOptions()


def job(checkpoint: Path, out: Path, options: QuantizeOptions = PLAIN, **extra) -> Quantizer:
    return Quantizer(ModelSource.open(checkpoint), out, options, **{"documents": None} | extra)


def with_fisher(checkpoint: Path) -> dict:
    return {"options": FISHER, "documents": DOCUMENTS, "tokenizer": load_tokenizer(checkpoint)}


def contents(directory: Path) -> dict[str, str]:
    """Every file and folder below a directory, with the sha256 of its bytes."""
    return {
        str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
        for p in directory.rglob("*")
    }


@pytest.fixture(scope="module")
def straight(tiny_checkpoint, tmp_path_factory) -> dict[str, dict[str, str]]:
    """What an undisturbed run writes, with and without Fisher."""
    root = tmp_path_factory.mktemp("straight")
    return {
        "plain": contents(job(tiny_checkpoint, root / "plain").run()),
        "fisher": contents(job(tiny_checkpoint, root / "fisher", **with_fisher(tiny_checkpoint)).run()),
    }


@pytest.fixture
def altered(checkpoints, tmp_path):
    """A copy of the llama checkpoint with one tensor changed."""

    def change(name: str, alter) -> Path:
        path = tmp_path / "altered"
        shutil.copytree(checkpoints / "llama", path)
        tensors = load_file(path / "model.safetensors")
        tensors[name] = alter(tensors[name].clone())
        save_file({n: t for n, t in tensors.items() if t is not None}, path / "model.safetensors")
        return path

    return change


# -- what is stored ----------------------------------------------------------------------------------

CASES = [
    ("llama", (2, 6), 8),
    ("llama", (2, 8), 16),
    ("llama-biased", (2, 8), 5),
    ("llama3-rope", (2, 6), 2),
    ("qwen2", (3, 6), 7),
    ("mistral", (4, 4), 8),
    ("smollm", (2, 6), 8),
    ("smollm", (3, 6), 16),
    ("qwen3", (4, 4), 5),
]
# Relative error that codes of a width leave on Gaussian weights; tables are shared, so chance plays little.
ERROR = {2: 0.37, 3: 0.20, 4: 0.11, 5: 0.06, 6: 0.035, 7: 0.02, 8: 0.012}


def relative_error(found: torch.Tensor, original: torch.Tensor) -> float:
    return ((found - original).norm() / original.norm()).item()


@pytest.fixture(scope="module", params=CASES, ids=lambda c: f"{c[0]}-{c[1][0]}-{c[1][1]}-head{c[2]}")
def stored(request, checkpoints, tmp_path_factory):
    """(overlay, quantiser, original tensors, checkpoint, bits, head bits)."""
    name, bits, head_bits = request.param
    quantizer = job(
        checkpoints / name, tmp_path_factory.mktemp("stored") / "out", QuantizeOptions(bits, head_bits)
    )
    overlay = Overlay.open(quantizer.run())
    original = load_file(checkpoints / name / "model.safetensors")
    return overlay, quantizer, original, checkpoints / name, bits, head_bits


def test_every_matrix_is_close_at_every_width(stored):
    overlay, quantizer, original, _, bits, head_bits = stored
    assert overlay.bits == bits
    layers = {n.removesuffix(".weight"): t for n, t in original.items() if "proj.weight" in n}
    assert set(layers) == set(quantizer.plan.linears) == set(overlay.linears) - {"lm_head"}
    assert len(layers) == 3 * 7
    for name, weight in layers.items():
        w = overlay.linear(name)
        assert (w.seed_bits, w.resident_bits) == bits
        assert (w.out_features, w.in_features) == weight.shape
        errors = [relative_error(reference.dequantize(w, b), weight) for b in range(bits[0], bits[1] + 1)]
        assert errors == sorted(errors, reverse=True)
        assert all(e < ERROR[b] for b, e in enumerate(errors, bits[0])), (name, errors)
    assert ("lm_head" in overlay.linears) == (head_bits < 8)


def test_head_and_embedding(stored):
    overlay, _, original, _, _, head_bits = stored
    tied = "lm_head.weight" not in original
    embedding = original["model.embed_tokens.weight"]
    head = embedding if tied else original["lm_head.weight"]
    if head_bits == 16:
        assert not overlay.has("lm_head.int8")
        assert overlay.has("lm_head.weight") == (not tied)
        assert torch.equal(overlay.read("model.embed_tokens.weight" if tied else "lm_head.weight"), head)
    elif head_bits == 8:
        int8 = overlay.int8("lm_head")
        assert relative_error(int8.rows(torch.arange(96), torch.float32), head) < 0.01
        assert int8.values.abs().max() == 127
        assert overlay.has("model.embed_tokens.weight") == (not tied), "one matrix serves both when tied"
    else:
        w = overlay.linear("lm_head")
        assert w.resident_bits == head_bits
        assert relative_error(reference.dequantize(w, head_bits), head) < ERROR[head_bits]
    if overlay.has("model.embed_tokens.weight"):
        assert torch.equal(overlay.read("model.embed_tokens.weight"), embedding)


def test_vectors_are_kept_as_they_were(stored):
    overlay, _, original, _, _, _ = stored
    vectors = {n: t for n, t in original.items() if t.ndim == 1}
    assert len(vectors) >= 3 * 2 + 1
    for name, tensor in vectors.items():
        assert torch.equal(overlay.read(name), tensor)
        assert overlay.quantization["unquantized"][name] == "vector: too small to matter"
    expected = {t for n, layout in overlay.linears.items() for t in layout.tensors(n)}
    expected |= set(overlay.quantization["plain_tensors"])
    assert expected == {n for n, _ in overlay.entries()}
    assert not any(overlay.has(f"{n}.weight") for n in overlay.linears)


def test_the_directory_holds_nothing_else_and_costs_what_was_planned(stored):
    overlay, quantizer, _, _, _, _ = stored
    names = {p.name for p in overlay.path.iterdir()}
    side = {"config.json", "generation_config.json", "model.safetensors.index.json"}
    assert names - side == {f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)}
    assert not quantizer.partial.exists()
    vectors = sum(n for name, n in overlay.entries() if overlay.read(name).ndim == 1)
    by_kind = overlay.stored_bytes()
    assert sum(by_kind.values()) == sum(n for _, n in overlay.entries())
    assert quantizer.plan.output_bytes <= sum(by_kind.values()) <= quantizer.plan.output_bytes + vectors


def test_a_decoder_of_it_agrees_with_the_model(stored):
    overlay, _, _, checkpoint, bits, head_bits = stored
    ids = torch.randint(3, 96, (24,), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(checkpoint).eval()(ids[None]).logits[0]
        found = load_decoder(overlay.path, LoadOptions()).forward(ids)
    agreement = torch.nn.functional.cosine_similarity(found, expected, dim=-1).mean()
    assert agreement > (0.98 if min(bits[1], head_bits) >= 5 else 0.9)


def test_fisher_is_used_and_recorded(tiny_checkpoint, straight, tmp_path):
    assert straight["plain"].keys() == straight["fisher"].keys()
    shard = "model-00001-of-00004.safetensors"
    assert straight["plain"][shard] != straight["fisher"][shard]
    overlay = Overlay.open(job(tiny_checkpoint, tmp_path / "out", **with_fisher(tiny_checkpoint)).run())
    recorded = overlay.quantization["fisher"]
    assert recorded["samples"] == 2
    assert len(recorded["documents_sha256"]) == 64
    plain = Overlay.open(job(tiny_checkpoint, tmp_path / "plain").run())
    assert plain.quantization["fisher"] is None
    assert plain.hash != overlay.hash


@pytest.mark.parametrize("refine", ["none", "tables", "full"])
def test_refinement_is_stored_and_recorded(refine, tiny_checkpoint, tmp_path):
    """Same planes or not, same bytes; every width still close; none is left out."""
    extra = with_fisher(tiny_checkpoint) | {"options": replace(FISHER, refine=refine)}
    quantizer = job(tiny_checkpoint, tmp_path / "out", **extra)
    overlay = Overlay.open(quantizer.run())
    assert overlay.quantization["refine"] == refine
    assert (quantizer.seconds["refine"] > 0) == (refine != "none")
    plain = replace(FISHER, refine="none")
    other = Overlay.open(
        job(tiny_checkpoint, tmp_path / "plain", **with_fisher(tiny_checkpoint) | {"options": plain}).run()
    )
    assert overlay.stored_bytes() == other.stored_bytes()
    same_planes = all(
        torch.equal(overlay.read(n), other.read(n)) for n, _ in overlay.entries() if ".planes." in n
    )
    same_tables = all(
        torch.equal(overlay.read(n), other.read(n)) for n, _ in overlay.entries() if ".lut." in n
    )
    # With refinement, k-means has other weights: the diagonal of the guided Hessian.
    assert (same_planes, same_tables) == (refine == "none", refine == "none")
    original = load_file(tiny_checkpoint / "model.safetensors")
    for name in overlay.linears:
        errors = [
            relative_error(reference.dequantize(overlay.linear(name), b), original[f"{name}.weight"])
            for b in range(2, 7)
        ]
        # 64 tokens say nothing about some directions of 96 inputs; there a weight may stray.
        assert errors[0] < 0.8 and errors[-1] < 0.3, (name, errors)


def test_without_text_nothing_is_refined(tiny_checkpoint, straight, tmp_path):
    overlay = Overlay.open(job(tiny_checkpoint, tmp_path / "out", QuantizeOptions(refine="full")).run())
    assert overlay.quantization["refine"] == "none"
    none = job(tiny_checkpoint, tmp_path / "none", QuantizeOptions(refine="none")).run()
    assert contents(overlay.path) == contents(none)


def test_refinement_is_planned(tiny_checkpoint, tmp_path):
    plans = [
        job(
            tiny_checkpoint,
            tmp_path / "out",
            **with_fisher(tiny_checkpoint) | {"options": replace(FISHER, refine=r)},
        ).plan
        for r in ("none", "tables", "full")
    ]
    peaks = [p.peak_bytes for p in plans]
    assert peaks[0] + 4 * (6 * 64**2 + 96**2) < peaks[1] == peaks[2]
    assert 0 == plans[0].refine_products < plans[1].refine_products < plans[2].refine_products
    assert job(tiny_checkpoint, tmp_path / "out").plan.refine_products == 0, "no text, no refinement"


def test_rows_that_share_a_table_count_by_their_size(checkpoints, tmp_path):
    """Fisher weights are per unit of the original weights: a tiny row must not bend a big row's table."""
    rng = torch.Generator().manual_seed(0)
    big = torch.rand(1, 2048, generator=rng) * 200 - 100
    tiny = torch.randn(1, 2048, generator=rng) ** 3 * 0.01
    alone, shared = (
        job(checkpoints / "llama", tmp_path / "out", QuantizeOptions(rows_per_table=share)).quantize_matrix(
            "x", matrix, None, (3, 3)
        )
        for share, matrix in ((1, big), (2, torch.cat([big, tiny])))
    )
    scale = shared["x.scale"][0].float()
    assert torch.allclose(
        shared["x.lut.3"][0].float() * scale, alone["x.lut.3"][0].float(), rtol=0.01, atol=0.2
    )


def test_tokenizer_travels_along(tiny_checkpoint, tmp_path):
    out = job(tiny_checkpoint, tmp_path / "out").run()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (tiny_checkpoint / name).read_bytes()


def test_shards_and_half_precision(tmp_path):
    """A sharded bfloat16 checkpoint gives the tensors of a single-file one; plain tensors keep their type."""
    model = build_model("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "single")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    single, sharded = (job(tmp_path / n, tmp_path / f"{n}-out") for n in ("single", "sharded"))
    a, b = contents(single.run()), contents(sharded.run())
    assert all(a[n] == b[n] for n in a if n.endswith(".safetensors"))
    overlay = Overlay.open(tmp_path / "single-out")
    assert overlay.read("model.norm.weight").dtype == torch.bfloat16
    assert sum(overlay.stored_bytes().values()) >= single.plan.output_bytes


def test_job_count_does_not_show(tiny_checkpoint, straight, tmp_path, monkeypatch):
    monkeypatch.setattr(quantize, "BLOCK_WEIGHTS", 512)  # one table a block, so that threads have work
    for jobs in (1, 3):
        out = job(tiny_checkpoint, tmp_path / f"out{jobs}", jobs=jobs, **with_fisher(tiny_checkpoint)).run()
        assert contents(out) == straight["fisher"]


# -- interrupted runs --------------------------------------------------------------------------------


class Killed(BaseException):
    """Like a kill, it runs none of the handlers for errors."""


def stop_after(calls: int):
    """A progress callback that raises at its n-th call."""
    count = 0

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal count
        count += 1
        if count == calls:
            raise Killed

    return progress


@pytest.mark.parametrize("calls", range(1, 5))
def test_resume_without_fisher(calls, tiny_checkpoint, straight, tmp_path):
    with pytest.raises(Killed):
        job(tiny_checkpoint, tmp_path / "out").run(stop_after(calls))
    assert not (tmp_path / "out").exists()
    resumed = job(tiny_checkpoint, tmp_path / "out")
    assert contents(resumed.run()) == straight["plain"]
    total = sum(n * k for n, k in resumed.plan.linears.values())
    assert resumed.weights_done == total * max(0, 3 - calls) // 3, "finished layers are not done again"


@pytest.mark.parametrize("calls", range(1, 8))
def test_resume_with_fisher(calls, tiny_checkpoint, straight, tmp_path):
    """Three layers forward, three layers backward, the rest."""
    with pytest.raises(Killed):
        job(tiny_checkpoint, tmp_path / "out", **with_fisher(tiny_checkpoint)).run(stop_after(calls))
    assert not (tmp_path / "out").exists()
    seen: list[tuple[str, int, int]] = []
    resumed = job(tiny_checkpoint, tmp_path / "out", **with_fisher(tiny_checkpoint))
    assert contents(resumed.run(lambda *stage: seen.append(stage))) == straight["fisher"]
    assert sum(stage == "fisher" for stage, _, _ in seen) == max(0, 3 - calls)
    assert seen[-1] == ("quantize", 4, 4)


def test_resume_with_codes_refined(tiny_checkpoint, tmp_path):
    """Stopped after the first of three layers, the end is byte for byte that of an undisturbed run."""
    full = with_fisher(tiny_checkpoint) | {"options": replace(FISHER, refine="full")}
    with pytest.raises(Killed):
        job(tiny_checkpoint, tmp_path / "out", **full).run(stop_after(4))
    straight = job(tiny_checkpoint, tmp_path / "straight", **full).run()
    assert contents(job(tiny_checkpoint, tmp_path / "out", **full).run()) == contents(straight)


def count_writes(checkpoint: Path, out: Path) -> int:
    """How often a run with Fisher writes a file of tensors."""
    with pytest.MonkeyPatch.context() as patch:
        count = kill_at_write(patch, -1, after=False)
        job(checkpoint, out, **with_fisher(checkpoint)).run()
    return len(count)


def kill_at_write(patch: pytest.MonkeyPatch, number: int, after: bool) -> list[Path]:
    """Makes the n-th write of tensors the last: killed half-way, or just after it was completed."""
    written: list[Path] = []

    def write(path, tensors, *rest):
        written.append(path)
        if len(written) == number and not after:
            path.with_name(path.name + ".tmp").write_bytes(b"half a file")
            raise Killed
        files.write_tensors(path, tensors, *rest)
        if len(written) == number:
            raise Killed

    patch.setattr(quantize, "write_tensors", write)
    patch.setattr(fisher, "write_tensors", write)
    return written


@pytest.mark.slow
def test_resume_after_a_kill_at_any_write(tiny_checkpoint, straight, tmp_path):
    writes = count_writes(tiny_checkpoint, tmp_path / "count")
    assert writes == 4 + 4 + 4, "states, gradients, shards"
    for number in range(1, writes + 1):
        for after in (False, True):
            out = tmp_path / f"out-{number}-{after}"
            with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
                kill_at_write(patch, number, after)
                job(tiny_checkpoint, out, **with_fisher(tiny_checkpoint)).run()
            assert not out.exists()
            resumed = job(tiny_checkpoint, out, **with_fisher(tiny_checkpoint)).run()
            assert contents(resumed) == straight["fisher"], (number, after)


@pytest.mark.parametrize("function", ["touch", "unlink", "copyfile", "file_sha256", "write_text", "replace"])
def test_resume_after_a_kill_between_files(function, tiny_checkpoint, straight, tmp_path, monkeypatch):
    """At the first call of each function that changes the state on disk beside the tensors."""

    def killed(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        if function in ("touch", "unlink"):
            patch.setattr(Path, function, killed)
        elif function == "copyfile":
            patch.setattr(shutil, function, killed)
        elif function == "replace":
            replace, last = Path.replace, tmp_path / "out.partial"
            patch.setattr(Path, function, lambda p, to: killed() if p == last else replace(p, to))
        else:
            patch.setattr(quantize, function, killed)
        with pytest.raises(Killed):
            job(tiny_checkpoint, tmp_path / "out", **with_fisher(tiny_checkpoint)).run()
    assert not (tmp_path / "out").exists()
    assert (
        contents(job(tiny_checkpoint, tmp_path / "out", **with_fisher(tiny_checkpoint)).run())
        == (straight["fisher"])
    )


def interrupted(checkpoint: Path, out: Path, **extra) -> None:
    with pytest.raises(Killed):
        job(checkpoint, out, **extra).run(stop_after(2))
    assert list(out.with_name(out.name + ".partial").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (QuantizeOptions(bits=(3, 6)), "bits was 2-6 and is 3-6"),
        (QuantizeOptions(head_bits=4, seed=7), "head bits was 8 and is 4, seed was 0 and is 7"),
        (QuantizeOptions(rows_per_table=8), "rows per table was 0 and is 8"),
    ],
    ids=["bits", "head-bits", "rows-per-table"],
)
def test_other_options_leave_unfinished_work_alone(options, says, tiny_checkpoint, straight, tmp_path):
    """They are refused before any work. The old options still continue it; --restart gives it up."""
    interrupted(tiny_checkpoint, tmp_path / "out")
    before = contents(tmp_path)
    refused(job(tiny_checkpoint, tmp_path / "out", options), "out.partial holds", says, "--restart")
    assert contents(tmp_path) == before
    shutil.copytree(tmp_path / "out.partial", tmp_path / "other.partial")
    resumed = job(tiny_checkpoint, tmp_path / "out")
    assert contents(resumed.run()) == straight["plain"]
    assert resumed.weights_done < sum(n * k for n, k in resumed.plan.linears.values())
    fresh = contents(job(tiny_checkpoint, tmp_path / "fresh", options).run())
    assert contents(job(tiny_checkpoint, tmp_path / "other", options, restart=True).run()) == fresh


def test_another_checkpoint_at_the_same_place_does_not_continue_the_work(tmp_path):
    """Same shapes, same sizes, other weights: a mixture of two models would be worse than starting again."""
    model = build_model("llama")
    model.save_pretrained(tmp_path / "model")
    interrupted(tmp_path / "model", tmp_path / "out")
    model.model.layers[2].mlp.up_proj.weight.data.neg_()
    model.save_pretrained(tmp_path / "model")
    refused(job(tmp_path / "model", tmp_path / "out"), "model files differ", "--restart")
    fresh = contents(job(tmp_path / "model", tmp_path / "fresh").run())
    assert contents(job(tmp_path / "model", tmp_path / "out", restart=True).run()) == fresh


def test_another_tokenizer_does_not_continue_the_work(tiny_checkpoint, tmp_path):
    """It changes the calibration sequences, and with them the Fisher weights."""
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    with pytest.raises(Killed):
        job(tmp_path / "model", tmp_path / "out", **with_fisher(tmp_path / "model")).run(stop_after(5))
    train_tokenizer(["another text altogether, 0123456789 " * 50], 300).save_pretrained(tmp_path / "model")
    again = with_fisher(tmp_path / "model")
    refused(job(tmp_path / "model", tmp_path / "out", **again), "model files differ")
    fresh = contents(job(tmp_path / "model", tmp_path / "fresh", **again).run())
    assert contents(job(tmp_path / "model", tmp_path / "out", restart=True, **again).run()) == fresh


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"\xff\xfe\x00", b"[1]"], ids=["empty", "cut", "binary", "list"]
)
def test_damaged_state_deletes_nothing_unasked(damage, tiny_checkpoint, straight, tmp_path):
    interrupted(tiny_checkpoint, tmp_path / "out")
    (tmp_path / "out.partial" / ".job" / "job.json").write_bytes(damage)
    refused(job(tiny_checkpoint, tmp_path / "out"), "description is damaged", "--restart")
    assert list(tmp_path.glob("out.partial/*.safetensors"))
    assert contents(job(tiny_checkpoint, tmp_path / "out", restart=True).run()) == straight["plain"]


@pytest.mark.parametrize("restart", [False, True])
def test_a_folder_of_the_users_with_the_name_of_unfinished_work(restart, tiny_checkpoint, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine.txt").write_text("keep")
    refused(job(tiny_checkpoint, tmp_path / "out", restart=restart), "out.partial is in the way")
    assert contents(tmp_path).keys() == {"out.partial", "out.partial/mine.txt"}


# -- two processes, and places that change -------------------------------------------------------------------


def test_a_second_quantiser_is_refused_while_the_first_goes_on(tiny_checkpoint, straight, tmp_path):
    def meanwhile(*stage: object) -> None:
        for options in ({}, {"options": QuantizeOptions(bits=(3, 6)), "restart": True}):
            second = job(tiny_checkpoint, tmp_path / "out", **options)
            refused(second, f"{tmp_path / 'out'} is being written by process {os.getpid()}")

    assert contents(job(tiny_checkpoint, tmp_path / "out").run(meanwhile)) == straight["plain"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_something_takes_the_place_on_the_way(kind, tiny_checkpoint, straight, tmp_path):
    out = tmp_path / "out"

    def take(stage: str, done: int, total: int) -> None:
        if done == 2:
            out.write_text("mine") if kind == "file" else (out / "mine").mkdir(parents=True)

    with pytest.raises(InputError, match=r"out cannot be made: .* finished work is in .*out\.partial") as e:
        job(tiny_checkpoint, out).run(take)
    assert "\n" not in str(e.value)
    out.rename(tmp_path / "moved")
    again = job(tiny_checkpoint, out)
    assert contents(again.run()) == straight["plain"]
    assert again.weights_done == 0, "the finished work was kept"


def test_links(tiny_checkpoint, straight, tmp_path):
    (tmp_path / "disk" / "empty").mkdir(parents=True)
    (tmp_path / "out").symlink_to("disk/empty")
    assert job(tiny_checkpoint, tmp_path / "out").run() == tmp_path / "out"
    assert (tmp_path / "out").is_symlink()
    assert contents(tmp_path / "disk" / "empty") == straight["plain"]
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["empty"]
    (tmp_path / "gone").symlink_to("/nowhere/disk")
    refused(job(tiny_checkpoint, tmp_path / "gone"), "gone is a link to /nowhere/disk, which does not exist")
    refused(job(tiny_checkpoint, tmp_path / "out"), "exists already")


def test_memory_is_checked_before_any_work(tiny_checkpoint, tmp_path, monkeypatch):
    quantizer = job(tiny_checkpoint, tmp_path / "out")
    monkeypatch.setattr(quantize, "available_bytes", lambda: quantizer.plan.peak_bytes - 1)
    refused(quantizer, "GB of memory", "are free")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(quantize, "available_bytes", lambda: quantizer.plan.peak_bytes)
    quantizer.run()


# -- refusals ----------------------------------------------------------------------------------------


def refused(quantizer: Quantizer, *needles: str) -> str:
    """Runs, expects InputError with one line that holds the needles. Returns the line."""
    with pytest.raises(InputError) as e:
        quantizer.run()
    message = str(e.value)
    assert "\n" not in message
    assert all(n in message for n in needles), message
    return message


def test_existing_output_is_never_touched(checkpoints, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for out in (tmp_path / "out", tmp_path / "file"):
        refused(job(checkpoints / "llama", out), f"{out} exists already")
    monkeypatch.chdir(tmp_path / "out")
    for out in (Path("."), Path("/")):
        refused(job(checkpoints / "llama", out), "exists already")
    refused(job(checkpoints / "llama", tmp_path / "no" / "out"), f"{tmp_path / 'no'} is not a directory")
    assert contents(tmp_path).keys() == {"out", "out/mine.txt", "file"}
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


def poke(value: float):
    def alter(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[7] = value
        return tensor

    return alter


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name",
    ["model.layers.1.mlp.down_proj.weight", "model.layers.0.input_layernorm.weight", "lm_head.weight",
     "model.embed_tokens.weight"],
)  # fmt: skip
def test_non_finite_weights(name, value, altered, tmp_path):
    path = altered(name, poke(value))
    refused(job(path, tmp_path / "out"), f"'{name}'", "NaN or infinite", "model.safetensors")
    assert not (tmp_path / "out").exists()


def test_values_beyond_float16(altered, tmp_path):
    name = "model.layers.1.mlp.down_proj"
    path = altered(f"{name}.weight", poke(70_000.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(
            job(path, tmp_path / "out", QuantizeOptions(rows_per_table=1)), f"'{name}'", "float16", "7e+04"
        )
    shared = Overlay.open(job(path, tmp_path / "shared").run()).linear(name)
    assert reference.dequantize(shared, 6)[0, 7].item() == pytest.approx(70_000, rel=2**-9)


@pytest.mark.parametrize("head_bits", [8, 5])
def test_head_beyond_float16(head_bits, altered, tmp_path):
    path = altered("lm_head.weight", poke(1e12))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(job(path, tmp_path / "out", QuantizeOptions(head_bits=head_bits)), "'lm_head'", "float16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-6])
def test_tiny_and_zero_matrices_are_stored(scale, altered, tmp_path):
    name = "model.layers.1.mlp.down_proj"
    path = altered(f"{name}.weight", lambda t: t * scale)
    w = Overlay.open(job(path, tmp_path / "out").run()).linear(name)
    found = reference.dequantize(w, 6)
    assert torch.isfinite(found).all()
    assert found.abs().max() <= 10 * scale
    if scale == 1e-6:
        assert relative_error(found, load_file(path / "model.safetensors")[f"{name}.weight"]) < 0.05


@pytest.mark.parametrize("name", ["model.layers.2.mlp.gate_proj.weight", "lm_head.weight"])
def test_missing_tensor(name, altered, tmp_path):
    path = altered(name, lambda t: None)
    with pytest.raises(InputError, match=f"no tensor '{name}'"):
        job(path, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_rows_per_table_must_divide(checkpoints, tmp_path):
    """Said before any work, for the matrices and for a head that is stored as planes."""
    build_model("llama", vocab_size=100).save_pretrained(tmp_path / "odd")
    for options, model, name in (
        (QuantizeOptions(rows_per_table=5), checkpoints / "llama", "_proj'"),
        (QuantizeOptions(rows_per_table=8, head_bits=4), tmp_path / "odd", "the 100 rows of 'lm_head'"),
    ):
        with pytest.raises(InputError, match=f"--rows-per-table {options.rows_per_table} .*{name}"):
            job(model, tmp_path / "out", options)


@pytest.mark.parametrize(
    "wrong",
    [{"bits": (1, 6)}, {"bits": (2, 9)}, {"bits": (5, 4)}, {"bits": (7, 8)}, {"head_bits": 1}, {"head_bits": 9},
     {"samples": 0}, {"sequence_length": 15}, {"refine": "codes"}],
    ids=str,
)  # fmt: skip
def test_impossible_options(wrong):
    with pytest.raises(InputError):
        QuantizeOptions(**wrong)


# -- full disks --------------------------------------------------------------------------------------


def test_disk_too_small_is_noticed_before_any_work(tiny_checkpoint, tmp_path, monkeypatch):
    quantizer = job(tiny_checkpoint, tmp_path / "out", **with_fisher(tiny_checkpoint))
    needed = quantizer.plan.output_bytes + quantizer.plan.work_bytes
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    refused(quantizer, f"{tmp_path} has", "GB are needed")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    quantizer.run()


@pytest.mark.parametrize("number", [1, 5, 6, 7, 12])
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("I/O error: No space left (os error 28)"),
    ],
    ids=["oserror", "safetensors"],
)
def test_disk_full_on_the_way(number, error, tiny_checkpoint, straight, tmp_path, monkeypatch):
    """At the n-th file, after part of it was written."""
    calls = 0

    def full(tensors, path, **extra):
        nonlocal calls
        calls += 1
        if calls == number:
            Path(path).write_bytes(b"part of it")
            raise error
        save_file(tensors, path, **extra)

    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", full)
        message = refused(
            job(tiny_checkpoint, tmp_path / "out", **with_fisher(tiny_checkpoint)), "No space left"
        )
    assert "out.partial" in message
    assert not list(tmp_path.rglob("*.tmp"))
    found = contents(job(tiny_checkpoint, tmp_path / "out", **with_fisher(tiny_checkpoint)).run())
    assert found == straight["fisher"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own of 4 MB, where this machine lets us mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system can be mounted by root only")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)  # a failed test may still hold a map


@pytest.mark.parametrize("stop", [("fisher", 2), ("quantize", 2)], ids=str)
def test_a_disk_that_really_fills_up(stop, small_disk, tiny_checkpoint, straight):
    """Somebody else takes the rest of it while we work; given back, the run continues."""

    def fill(stage: str, done: int, total: int) -> None:
        if (stage, done) == stop:
            free = shutil.disk_usage(small_disk).free
            (small_disk / "filler").write_bytes(bytes(free - 4096))

    quantizer = job(tiny_checkpoint, small_disk / "out", **with_fisher(tiny_checkpoint))
    with pytest.raises(InputError, match=r"out\.partial/.* cannot be written: .*[Ss]pace") as e:
        quantizer.run(fill)
    assert "\n" not in str(e.value)
    assert not quantizer.out.exists()
    assert not list(small_disk.rglob("*.tmp"))
    (small_disk / "filler").unlink()
    resumed = job(tiny_checkpoint, small_disk / "out", **with_fisher(tiny_checkpoint))
    assert contents(resumed.run()) == straight["fisher"]


def test_config_and_manifest_are_json_objects(tiny_checkpoint, tmp_path):
    out = job(tiny_checkpoint, tmp_path / "out").run()
    original = json.loads((tiny_checkpoint / "config.json").read_text())
    config = json.loads((out / "config.json").read_text())
    assert {k: v for k, v in config.items() if k != "quantization_config"} == original
    manifest = json.loads((out / "model.safetensors.index.json").read_text())
    assert manifest["weight_map"].keys() == manifest["tensors"].keys()
    assert manifest["metadata"]["total_size"] == sum(t["nbytes"] for t in manifest["tensors"].values())
    assert manifest["files"].keys() == {p.name for p in out.iterdir() if p.suffix == ".json"} - {
        "model.safetensors.index.json"
    }
