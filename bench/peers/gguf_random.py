"""Writes GGUF files of Llama shapes with random weights, in any llama.cpp quantisation, within seconds.

Which tensor gets which type is llama.cpp's own decision: its quantiser is run on a thin model of the same number
of layers and the same ratio of query to KV heads, which is all that its mixes (Q4_K_M and so on) look at. The
values are its own too: Gaussian weights go through `ggml_quantize_chunk` into a bank of 256-weight blocks, and
every tensor is drawn from that bank at random, so memory stays at one slab whatever the model's size and no two
pages are alike. Needs the packages gguf and llama-cpp-python.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from bench.peers.shapes import Shape
from bench.peers.worker import Peer, PeerError, serve

FORMATS = {
    "Q2_K": 10,
    "Q3_K_M": 12,
    "Q4_0": 2,
    "Q4_K_M": 15,
    "Q5_K_M": 17,
    "Q6_K": 18,
    "Q8_0": 7,
}  # llama_ftype
BLOCK = 256  # weights drawn together: the K-quants' block, eight of the others'
BANK = 16384  # blocks to draw from, per type
SLAB = 1 << 24  # weights written at a time
STD = 0.02
VERSION = 1  # of the files this module writes
CACHE = Path(__file__).resolve().parents[2] / ".cache" / "gguf"
_no_log: Any = None  # llama.cpp keeps a pointer to it


@dataclass(frozen=True)
class RandomModel:
    """A written file and what its bytes are; `linear` counts the decoder's linears and the head."""

    path: str
    format: str
    bytes: int
    weights: int
    linear_bytes: int
    linear_weights: int
    types: dict[str, int] = field(default_factory=dict)  # matrices by GGML type

    @property
    def bits_per_weight(self) -> float:
        """The whole file's bytes over all its weights."""
        return self.bytes * 8 / self.weights

    @property
    def linear_bits_per_weight(self) -> float:
        """What a token reads: linears and head, without embedding and norms."""
        return self.linear_bytes * 8 / self.linear_weights


@dataclass(frozen=True)
class WriteOptions:
    """The worker's options."""

    shape: Shape
    format: str
    folder: str


class Writer:
    """The worker's object: writes the file when it starts."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._model = random_gguf(Shape(**options["shape"]), options["format"], Path(options["folder"]))
        self.info = {"path": self._model.path}

    def model(self) -> dict[str, Any]:
        """The RandomModel as a dictionary."""
        return asdict(self._model)


def random_model(shape: Shape, kind: str, folder: Path = CACHE, python: str = sys.executable) -> RandomModel:
    """`random_gguf` in another interpreter, so that the caller's needs neither gguf nor llama-cpp-python."""
    with Peer("gguf_random", WriteOptions(shape, kind, str(folder)), python, show_errors=True) as worker:
        return RandomModel(**worker.call("model"))


def random_gguf(shape: Shape, kind: str, folder: Path) -> RandomModel:
    """The file of that shape and format in `folder`, written unless it is already there."""
    key = hashlib.sha256(json.dumps([VERSION, asdict(shape)]).encode()).hexdigest()[:8]
    _check(shape, kind)
    path = folder / f"random-{shape.hidden}x{shape.layers}-{key}-{kind}.gguf"
    note = path.with_suffix(".json")
    if path.exists() and note.exists():
        return RandomModel(**json.loads(note.read_text()))
    folder.mkdir(parents=True, exist_ok=True)
    types = tensor_types(shape, kind)
    partial = path.with_suffix(".partial")
    _write(partial, shape, types, FORMATS[kind], f"{path.name}")
    partial.replace(path)
    model = _describe(path, kind, shape, types)
    note.write_text(json.dumps(asdict(model)) + "\n")
    return model


def _check(shape: Shape, kind: str) -> None:
    if kind not in FORMATS:
        raise PeerError(f"format {kind} is not one of {', '.join(FORMATS)}")
    odd = [name for name, (rows, columns) in shape.tensors().items() if columns % BLOCK]
    if odd or shape.heads % shape.kv_heads or shape.vocabulary < 512:
        raise PeerError(
            f"columns must be multiples of {BLOCK}, heads of KV heads, vocabulary >= 512: {shape}"
        )


def tensor_types(shape: Shape, kind: str) -> dict[str, Any]:
    """GGMLQuantizationType of every matrix, as llama.cpp's quantiser chooses for a model of these layers."""
    import llama_cpp
    from gguf import GGMLQuantizationType, GGUFReader

    quiet_llama_cpp()
    ratio = shape.heads // shape.kv_heads
    thin = Shape(BLOCK, shape.layers, BLOCK, ratio, 1, BLOCK, 512)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "f32.gguf", Path(folder) / "quantised.gguf"
        f32 = dict.fromkeys(thin.tensors(), GGMLQuantizationType.F32)
        _write(source, thin, f32, 0, "")
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype, options.nthread = FORMATS[kind], 1
        done = llama_cpp.llama_model_quantize(
            str(source).encode(), str(target).encode(), ctypes.byref(options)
        )
        if done != 0:
            raise RuntimeError(f"llama_model_quantize refused a thin model in {kind} (code {done})")
        found = {t.name: t.tensor_type for t in GGUFReader(target).tensors}
    return {name: found[name] for name in shape.tensors()}


def quiet_llama_cpp() -> None:
    """Stops llama.cpp from logging every tensor; errors are seen by return codes."""
    import llama_cpp

    global _no_log
    _no_log = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(_no_log, ctypes.c_void_p(0))


def _block_bytes(kind: Any) -> int:
    from gguf import GGML_QUANT_SIZES

    weights, size = GGML_QUANT_SIZES[kind]
    return BLOCK // weights * size


def _describe(path: Path, kind: str, shape: Shape, types: dict[str, Any]) -> RandomModel:
    sizes = shape.tensors()
    linear = {n: rows * columns for n, (rows, columns) in sizes.items() if n != "token_embd.weight"}
    counts: dict[str, int] = {}
    for t in types.values():
        counts[t.name] = counts.get(t.name, 0) + 1
    return RandomModel(
        path=str(path), format=kind, bytes=path.stat().st_size,
        weights=sum(r * c for r, c in sizes.values()) + shape.hidden * len(shape.norms()),
        linear_bytes=sum(n // BLOCK * _block_bytes(types[name]) for name, n in linear.items()),
        linear_weights=sum(linear.values()), types=counts,
    )  # fmt: skip


def _bank(kind: Any) -> np.ndarray:
    """BANK blocks of BLOCK Gaussian weights in that type, [BANK, bytes of a block]."""
    values = np.random.default_rng(0).standard_normal((BANK, BLOCK), np.float32) * np.float32(STD)
    if kind.name == "F32":
        return values.view(np.uint8)
    from llama_cpp._ggml import libggml

    quantise = libggml.ggml_quantize_chunk
    quantise.restype = ctypes.c_size_t
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    quantise.argtypes = [ctypes.c_int, pointer, pointer, size, size, size, pointer]
    out = np.zeros((BANK, _block_bytes(kind)), np.uint8)
    written = quantise(int(kind), values.ctypes.data, out.ctypes.data, 0, BANK, BLOCK, None)
    if written != out.nbytes:
        raise RuntimeError(f"ggml_quantize_chunk wrote {written} bytes of {kind.name}, expected {out.nbytes}")
    return out


def _slabs(blocks: int, bank: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """A tensor's bytes, a slab at a time."""
    step = SLAB // BLOCK
    for start in range(0, blocks, step):
        yield bank[rng.integers(0, len(bank), min(step, blocks - start), dtype=np.int32)]


def _write(path: Path, shape: Shape, types: dict[str, Any], ftype: int, label: str) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    _describe_model(writer, shape, ftype)
    sizes = shape.tensors()
    for name in shape.norms():
        writer.add_tensor_info(name, [shape.hidden], np.dtype(np.float32), shape.hidden * 4)
    for name, (rows, columns) in sizes.items():
        row = columns // BLOCK * _block_bytes(types[name])  # gguf takes a quantised shape in bytes
        if types[name].name == "F32":
            writer.add_tensor_info(name, [rows, columns], np.dtype(np.float32), rows * row)
        else:
            writer.add_tensor_info(name, [rows, row], np.dtype(np.uint8), rows * row, types[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout
    output = writer.fout[0]
    writer.write_padding(output, output.tell())
    one = np.ones(shape.hidden, np.float32)
    for _ in shape.norms():
        _padded(writer, output, [one.view(np.uint8)])
    banks: dict[Any, np.ndarray] = {}
    rng = np.random.default_rng(1)
    for i, (name, (rows, columns)) in enumerate(sizes.items()):
        if types[name] not in banks:
            banks[types[name]] = _bank(types[name])
        _padded(writer, output, _slabs(rows * columns // BLOCK, banks[types[name]], rng))
        if label and (i == len(sizes) - 1 or i % 16 == 0):
            end = "\n" if i == len(sizes) - 1 else ""
            print(f"\r{label}: {100 * (i + 1) // len(sizes)}%", end=end, file=sys.stderr, flush=True)
    writer.close()


def _padded(writer: Any, output: BinaryIO, parts: Any) -> None:
    total = 0
    for part in parts:
        output.write(part.tobytes())
        total += part.nbytes
    writer.write_padding(output, total)


def _describe_model(writer: Any, shape: Shape, ftype: int) -> None:
    """Metadata and the smallest vocabulary that llama.cpp loads: three specials, 256 bytes, made-up words."""
    from gguf import TokenType

    writer.add_context_length(8192)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_size)
    writer.add_value_length(shape.head_size)
    writer.add_rope_dimension_count(shape.head_size)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_file_type(ftype)
    specials = ["<unk>", "<s>", "</s>"]
    coded = [f"<0x{i:02X}>" for i in range(256)]
    words = [f"w{i}" for i in range(shape.vocabulary - len(specials) - len(coded))]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    kinds += [TokenType.BYTE] * len(coded) + [TokenType.NORMAL] * len(words)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*specials, *coded, *words])
    writer.add_token_scores([0.0] * len(kinds))
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


if __name__ == "__main__":
    serve(Writer)
