"""The overlay on disk: only what is needed is read, and no damage goes unnoticed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import build_model

from dpllm.base.errors import InputError
from dpllm.kernels import reference
from dpllm.quant.overlay import LinearLayout, Overlay, manifest_sha256, tensor_sha256
from dpllm.quant.quantize import Quantizer
from dpllm.quant.quantize_plan import QuantizeOptions
from dpllm.quant.source import ModelSource, read_json

MANIFEST = "model.safetensors.index.json"
MATRIX = "model.layers.1.mlp.down_proj"  # [64, 96]: three words a row


@pytest.fixture(scope="module")
def overlay_path(tmp_path_factory) -> Path:
    """Planes 2..8, head of 3 planes, in two decoder layers."""
    root = tmp_path_factory.mktemp("format")
    build_model("llama", num_hidden_layers=2).save_pretrained(root / "model")
    options = QuantizeOptions(bits=(2, 8), head_bits=3)
    return Quantizer(ModelSource.open(root / "model"), root / "overlay", options, documents=None).run()


class Tensors(dict):
    def __repr__(self) -> str:  # hypothesis prints its arguments
        return f"{len(self)} tensors"


@pytest.fixture(scope="module")
def tensors(overlay_path) -> Tensors:
    return Tensors(item for f in overlay_path.glob("*.safetensors") for item in load_file(f).items())


@pytest.fixture
def copy(overlay_path, tmp_path) -> Path:
    return shutil.copytree(overlay_path, tmp_path / "overlay")


@pytest.fixture(scope="module")
def arena(overlay_path, tmp_path_factory) -> Path:
    """A copy for hypothesis, which puts back what it changes."""
    return shutil.copytree(overlay_path, tmp_path_factory.mktemp("arena") / "overlay")


def read_all(path: Path) -> dict[str, torch.Tensor]:
    overlay = Overlay.open(path)
    for name in overlay.linears:
        overlay.linear(name)
    return {name: overlay.read(name) for name, _ in overlay.entries()}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and tensor_sha256(a) == tensor_sha256(b)


def header_of(shard: Path) -> tuple[dict, int]:
    """(parsed header, where the data begins) of a safetensors file."""
    raw = shard.read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:begin]), begin


def shard_of(path: Path, tensor: str) -> Path:
    return path / json.loads((path / MANIFEST).read_text())["weight_map"][tensor]


def corrupt(path: Path, tensor: str) -> Path:
    """Flips one bit in the middle of a tensor's data; returns its file."""
    shard = shard_of(path, tensor)
    header, begin = header_of(shard)
    first, last = header[tensor]["data_offsets"]
    raw = bytearray(shard.read_bytes())
    raw[begin + (first + last) // 2] ^= 4
    shard.write_bytes(raw)
    return shard


def edit_config(path: Path, change, seal: bool = True) -> None:
    """Changes quantization_config; sealed, the checksums are made to match as a writer would."""
    config = json.loads((path / "config.json").read_text())
    change(config["quantization_config"])
    (path / "config.json").write_text(json.dumps(config))
    if seal:
        edit_manifest(path, lambda m: None)


def edit_manifest(path: Path, change) -> None:
    from hashlib import sha256

    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"]["config.json"] = sha256((path / "config.json").read_bytes()).hexdigest()
    change(manifest)
    manifest["sha256"] = manifest_sha256(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))


def refused(action, *needles: object) -> None:
    with pytest.raises(InputError) as e:
        action()
    assert "\n" not in str(e.value)
    assert all(str(n) in str(e.value) for n in needles), str(e.value)


# -- partial reads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
def test_only_resident_planes_and_tables_are_read(bits, overlay_path, tensors):
    overlay = Overlay.open(overlay_path)
    assert overlay.bytes_read == 0, "opening reads no weights"
    w = overlay.linear(MATRIX, resident_bits=bits)
    n, words, share = 64, 3, overlay.linears[MATRIX].rows_per_table
    assert share > 1
    table_entries = sum(2**b for b in range(2, min(bits, 6) + 1))
    assert overlay.bytes_read == bits * n * words * 4 + n // share * table_entries * 2 + n * 2
    assert w.resident_bits == bits
    assert torch.equal(w.planes, torch.stack([tensors[f"{MATRIX}.planes.{p}"] for p in range(bits)]))
    assert torch.equal(
        w.lut, torch.cat([tensors[f"{MATRIX}.lut.{b}"] for b in range(2, min(bits, 6) + 1)], 1)
    )
    full = overlay.linear(MATRIX)
    for b in range(2, bits + 1):
        assert torch.equal(reference.dequantize(w, b), reference.dequantize(full, b))


def test_bytes_read_add_up(overlay_path):
    overlay = Overlay.open(overlay_path)
    total = sum(
        overlay.read(name).numel() * overlay.read(name).element_size() for name, _ in overlay.entries()
    )
    assert overlay.bytes_read == 2 * total
    assert total == sum(nbytes for _, nbytes in overlay.entries()) == sum(overlay.stored_bytes().values())


@pytest.mark.parametrize("resident", [2, 4, 5])
def test_damage_beyond_the_resident_planes_does_not_matter(resident, copy, overlay_path):
    """A device that keeps few planes needs no more of the file than those."""
    beyond = f"{MATRIX}.planes.{resident}"
    shard = corrupt(copy, beyond)
    good = Overlay.open(overlay_path).linear(MATRIX, resident_bits=resident)
    low = Overlay.open(copy).linear(MATRIX, resident_bits=resident)
    assert torch.equal(low.planes, good.planes)
    assert torch.equal(low.lut, good.lut)
    refused(lambda: Overlay.open(copy).linear(MATRIX), f"'{beyond}'", shard, "checksum")
    refused(lambda: Overlay.open(copy).linear(MATRIX, resident_bits=resident + 1), f"'{beyond}'")


@pytest.mark.parametrize("part", ["planes.0", "planes.7", "lut.2", "lut.6", "scale"])
def test_damage_to_any_part_is_named(part, copy):
    shard = corrupt(copy, f"{MATRIX}.{part}")
    refused(lambda: Overlay.open(copy).linear(MATRIX), f"'{MATRIX}.{part}'", shard)
    Overlay.open(copy).linear("model.layers.0.mlp.down_proj")


@pytest.mark.parametrize("resident", [0, 1, -3])
def test_fewer_planes_than_the_seed_width_are_refused(resident, overlay_path):
    refused(lambda: Overlay.open(overlay_path).linear(MATRIX, resident_bits=resident), "2..8", overlay_path)


def test_more_planes_than_are_stored_means_all(overlay_path):
    overlay = Overlay.open(overlay_path)
    assert overlay.linear(MATRIX, resident_bits=99).resident_bits == 8
    assert overlay.linear("lm_head", resident_bits=6).resident_bits == 3


# -- damage of any kind ------------------------------------------------------------------------------


@st.composite
def damages(draw):
    """(index of the file, function that damages its bytes). Places are drawn as fractions of the length,
    half of them within the first 4 KB, where the headers are."""
    spot = st.tuples(st.booleans(), st.floats(0, 1, exclude_max=True))
    kind = draw(st.sampled_from(["flip", "flip", "overwrite", "truncate", "swap", "extend", "erase"]))
    places = draw(st.lists(spot, min_size=1, max_size=4))
    byte = draw(st.integers(1, 255))
    filler = draw(st.sampled_from([b"\0", b" ", b"\n", b"}", b'"x"', b"\xff" * 9, b"1" * 5000]))
    length = draw(st.integers(1, 64))

    def apply(raw: bytes) -> bytes:
        at = [int(f * (min(4096, len(raw)) if head else len(raw))) for head, f in places]
        out = bytearray(raw)
        if kind == "flip":
            for i in at:
                out[i] ^= byte
        elif kind == "overwrite":
            out[at[0] : at[0] + len(filler)] = filler
        elif kind == "truncate":
            del out[at[0] :]
        elif kind == "erase":
            del out[at[0] : at[0] + length]
        elif kind == "extend":
            out += filler * length
        else:
            a, b = min(at[0], at[-1]), max(at[0], at[-1])
            out[a : a + length], out[b : b + length] = out[b : b + length], out[a : a + length]
        return bytes(out)

    return draw(st.integers(0, 5)), apply


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=damages())
def test_any_damage_is_refused_or_harmless(damage, arena, tensors):
    """Reading everything gives InputError or exactly the original: never another error, never other data."""
    index, apply = damage
    files = sorted(p for p in arena.iterdir())
    file = files[index % len(files)]
    original = file.read_bytes()
    file.write_bytes(apply(original))
    try:
        found = read_all(arena)
    except InputError as e:
        assert "\n" not in str(e)
    else:
        assert found.keys() == tensors.keys()
        assert all(same(found[n], tensors[n]) for n in tensors)
    finally:
        file.write_bytes(original)


HEADER_EDITS = {
    "dtype": ('"dtype":"F16"', '"dtype":"I16"'),
    "float-planes": ('"dtype":"I32"', '"dtype":"F32"'),
    "unknown-dtype": ('"dtype":"F32"', '"dtype":"F99"'),
    "shape": ('"shape":[64,3]', '"shape":[3,64]'),
    "flat-shape": ('"shape":[64]', '"shape":[  ]'),
    "one-more-axis": ('"shape":[64,3]', '"shape":[192]'),
    "name": ("planes.0", "planes.9"),
    "swapped": ("planes.0", "planes.1"),
}


@pytest.mark.parametrize("edit", HEADER_EDITS)
def test_altered_headers(edit, copy):
    """The data is untouched, so checksums of the data alone would not notice."""
    old, new = HEADER_EDITS[edit]
    for shard in copy.glob("*.safetensors"):
        raw = shard.read_bytes()
        _, begin = header_of(shard)
        header = raw[8:begin].decode()
        if edit == "swapped":
            header = header.replace(old, "@").replace(new, old).replace("@", new)
        else:
            header = header.replace(old, new)
        header = header.rstrip().encode()
        header += b" " * (-len(header) % 8)
        shard.write_bytes(len(header).to_bytes(8, "little") + header + raw[begin:])
    refused(lambda: read_all(copy), copy, ".safetensors")


def test_scalars_have_checksums_too():
    assert tensor_sha256(torch.tensor(1.5)) == tensor_sha256(torch.tensor([1.5]))
    assert tensor_sha256(torch.tensor(1.5)) != tensor_sha256(torch.tensor(2.5))


# -- what a reader refuses ---------------------------------------------------------------------------


def test_missing_files(overlay_path, tmp_path):
    for file in sorted(overlay_path.iterdir()):
        copy = shutil.copytree(overlay_path, tmp_path / file.name)
        (copy / file.name).unlink()
        refused(lambda copy=copy: read_all(copy), copy / file.name, "missing")
    refused(lambda: Overlay.open(tmp_path / "nowhere"), tmp_path / "nowhere", "is not a directory")


def test_a_file_replaced_by_a_folder(copy):
    for name in ("config.json", MANIFEST, "model-00001-of-00003.safetensors"):
        kept = (copy / name).read_bytes()
        (copy / name).unlink()
        (copy / name).mkdir()
        refused(lambda: read_all(copy), copy)
        (copy / name).rmdir()
        (copy / name).write_bytes(kept)
    read_all(copy)


def test_extra_and_missing_tensors_in_a_shard(copy):
    shard = shard_of(copy, f"{MATRIX}.planes.0")
    inside = load_file(shard)
    save_file(inside | {"zz.uninvited": torch.zeros(3)}, shard)
    refused(lambda: read_all(copy), shard, "'zz.uninvited'")
    del inside[f"{MATRIX}.planes.0"]
    save_file(inside, shard)
    refused(lambda: read_all(copy), shard, f"'{MATRIX}.planes.0'")


def test_tensors_missing_from_or_unknown_to_the_manifest(copy):
    edit_manifest(copy, lambda m: m["tensors"].pop(f"{MATRIX}.lut.4"))
    refused(lambda: Overlay.open(copy), copy, f"'{MATRIX}.lut.4' is missing")
    entry = {
        "file": "model-00001-of-00003.safetensors",
        "shape": [1],
        "dtype": "int8",
        "nbytes": 1,
        "sha256": "",
    }
    edit_manifest(copy, lambda m: m["tensors"].update({f"{MATRIX}.lut.4": entry, "odd": entry}))
    refused(lambda: Overlay.open(copy), copy, "'odd' is not expected")


def test_misshapen_tensor_with_a_matching_checksum(copy):
    """A writer's mistake rather than damage: everything agrees but the layout in config.json."""
    edit_manifest(copy, lambda m: m["tensors"][f"{MATRIX}.planes.1"].update(shape=[3, 64]))
    refused(lambda: Overlay.open(copy).linear(MATRIX), copy, f"'{MATRIX}.planes.1'", "[3, 64]")
    edit_manifest(copy, lambda m: m["tensors"][f"{MATRIX}.planes.1"].update(shape=[64, 3], dtype="int64"))
    refused(lambda: Overlay.open(copy).linear(MATRIX), copy, f"'{MATRIX}.planes.1'")


@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "hand-edited"])
@pytest.mark.parametrize(
    ("key", "value", "needles"),
    [
        ("format_version", 2, ["format_version is 2", "Upgrade dpllm", "config.json"]),
        ("format_version", "1", ["format_version is '1'", "config.json"]),
        ("format_version", None, ["format_version is None", "config.json"]),
        ("quant_method", "gptq", ["not a dpllm overlay"]),
        ("quant_method", None, ["not a dpllm overlay"]),
        ("codebook", "uniform", ["'uniform'", "config.json"]),
    ],
)
def test_foreign_formats(key, value, needles, sealed, copy):
    edit_config(copy, lambda q: q.update({key: value}), sealed)
    refused(lambda: Overlay.open(copy), copy, *needles)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [64]}, {"shape": [64, 0]}, {"shape": ["64", 96]}, {"bits": [2]}, {"bits": [5, 4]}, {"bits": [1, 6]},
        {"bits": [2, 9]}, {"bits": [7, 8]}, {"rows_per_table": 5}, {"rows_per_table": 0}, {"rows_per_table": None},
        {"shape": None},
    ],
    ids=str,
)  # fmt: skip
def test_impossible_layouts(change, copy):
    entry = {"shape": [64, 96], "bits": [2, 8], "rows_per_table": 1} | change
    refused(lambda: LinearLayout.of("x", entry), "linears['x']", "config.json")
    edit_config(copy, lambda q: q["linears"].update({MATRIX: entry}))
    refused(lambda: Overlay.open(copy), MATRIX, "config.json")


def test_the_manifest_is_sealed(copy):
    """Even where no tensor is concerned: the overlay's hash is what profiles are bound to."""
    file = copy / MANIFEST
    manifest = json.loads(file.read_text())
    for change in ({"metadata": {"total_size": 1}}, {"sha256": "0" * 64}, {"sha256": None}, {"note": "mine"}):
        file.write_text(json.dumps(manifest | change))
        refused(lambda: Overlay.open(copy), file, "its checksum does not match")
    for key in ("tensors", "files"):
        file.write_text(json.dumps({k: v for k, v in manifest.items() if k != key}))
        refused(lambda: Overlay.open(copy), file, "not a dpllm manifest")
    file.write_text(json.dumps(manifest, indent=4))
    assert Overlay.open(copy).hash == manifest["sha256"], "white space is no change"


def test_side_files_are_sealed(copy):
    """Editing config.json or the tokenizer by hand would change what the model is."""
    edit_config(copy, lambda q: q.update(bits=[2, 7]), seal=False)
    refused(lambda: Overlay.open(copy), copy / "config.json", "altered after quantisation")


@given(text=st.binary(max_size=40))
@example(text=b"[" * 100_000)
@example(text=b"1" * 5000)
@example(text=b'{"a": NaN}')
@example(text=b"")
@example(text=b"[]")
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_read_json_takes_any_bytes(text, tmp_path):
    file = tmp_path / "some.json"
    file.write_bytes(text)
    try:
        assert isinstance(read_json(file), dict)
    except InputError as e:
        assert str(file) in str(e)
        assert "\n" not in str(e)
