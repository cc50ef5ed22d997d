"""llama.cpp through llama-cpp-python's low-level API: prefill and decode of a random GGUF, in a worker.

Limit measured: llama.cpp's best on this machine. Its defaults are kept: native instruction set, flash attention
chosen by itself, F16 KV cache, 512-token micro-batches, memory-mapped files. Weights are repacked at load where
it has kernels for that (on x86 `REPACKED`, AVX2 or AVX-512). Repacking is not always its best: it made Q4_0
faster but prefill of Q2_K and Q4_K_M slower with gcc 12 on AVX-512, so those formats are to be measured both ways
and the better figure of each kind taken. Time per token is `llama_decode` plus a greedy argmax over the logits.

Optional extra; the package compiles its own llama.cpp:

    CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" \
        pip install --no-binary llama-cpp-python llama-cpp-python==0.3.36 gguf

On processors with AMX, builds by gcc 12 crash in llama.cpp's AMX code; leave that code out with CFLAGS and CXXFLAGS
set to "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16" for the same command.

    python -m bench.peers.llama_cpp_peer      # all formats at the 1.1B shape
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers.gguf_random import CACHE, FORMATS, quiet_llama_cpp, random_model
from bench.peers.shapes import SHAPES
from bench.peers.worker import Peer, PeerError, serve

REPACKED = ("Q2_K", "Q4_0", "Q4_K_M")  # formats whose weights llama.cpp repacks on x86


@dataclass(frozen=True)
class LlamaCppOptions:
    """What to load and how; `context` bounds prompt plus generated tokens."""

    path: str
    threads: int = 2
    context: int = 1024
    mmap: bool = True
    repack: bool = True
    flash_attention: int = -1  # -1 lets llama.cpp choose, 0 off, 1 on


class LlamaCpp:
    """The worker's object: one model and one context."""

    def __init__(self, options: LlamaCppOptions) -> None:
        import llama_cpp as api

        self.api = api
        quiet_llama_cpp()
        api.llama_backend_init()
        model_options = api.llama_model_default_params()
        model_options.load_mode = api.LLAMA_LOAD_MODE_MMAP if options.mmap else api.LLAMA_LOAD_MODE_NONE
        model_options.use_extra_bufts = options.repack
        began = time.perf_counter()
        self.model = api.llama_model_load_from_file(options.path.encode(), model_options)
        if not self.model:
            raise PeerError(f"llama.cpp cannot load {options.path}: delete it to have it written again")
        self.context = self._context(options)
        self.vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.info: dict[str, Any] = {
            "version": api.__version__,
            "load_s": time.perf_counter() - began,
            "system": api.llama_print_system_info().decode(),
        }

    def _context(self, options: LlamaCppOptions) -> Any:
        settings = self.api.llama_context_default_params()
        settings.n_ctx = options.context
        settings.n_batch = max(settings.n_batch, options.context)
        settings.n_threads = settings.n_threads_batch = options.threads
        settings.flash_attn_type = options.flash_attention
        context = self.api.llama_init_from_model(self.model, settings)
        if not context:
            raise PeerError(f"llama.cpp made no context of {options.context} tokens")
        return context

    def prefill(self, tokens: int) -> float:
        """Seconds for a random prompt into an empty cache; only its last logits are computed."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), False)
        prompt = np.random.default_rng(tokens).integers(3, self.vocabulary, tokens, dtype=np.int32)
        began = time.perf_counter()
        self._decode((ctypes.c_int32 * tokens)(*prompt.tolist()), tokens)
        return time.perf_counter() - began

    def decode(self, tokens: int, context: int) -> list[float]:
        """Milliseconds per token, each fed the one before it."""
        one = (ctypes.c_int32 * 1)(1)
        if context:
            self.prefill(context)
            one[0] = self._greedy()
        else:
            self.api.llama_memory_clear(self.api.llama_get_memory(self.context), False)
        times = []
        for _ in range(tokens):
            began = time.perf_counter()
            self._decode(one, 1)
            one[0] = self._greedy()
            times.append((time.perf_counter() - began) * 1e3)
        if not np.isfinite(self._logits()).all():
            raise PeerError("llama.cpp's logits are not finite: these times would flatter nobody")
        return times

    def _decode(self, tokens: Any, count: int) -> None:
        code = self.api.llama_decode(self.context, self.api.llama_batch_get_one(tokens, count))
        if code:
            raise PeerError(f"llama_decode gave {code} for {count} tokens")
        self.api.llama_synchronize(self.context)

    def _greedy(self) -> int:
        return int(self._logits().argmax())

    def _logits(self) -> np.ndarray:
        logits = self.api.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(logits, (self.vocabulary,))


class LlamaCppPeer(Peer):
    """llama.cpp in a child of its own: `prefill` and `decode` of `bench.peers.worker.Peer`."""

    def __init__(self, path: str, threads: int = 2, python: str = sys.executable, **more: Any) -> None:
        options = LlamaCppOptions(path, threads, **more)
        super().__init__("llama_cpp_peer", options, python)


def measure(options: argparse.Namespace) -> None:
    """Prints one line per format and packing: prompt and generation speed, medians, and what was read."""
    for kind in options.formats:
        model = random_model(SHAPES[options.shape], kind, options.folder)
        for repack in (True, False) if kind in REPACKED else (True,):
            with LlamaCppPeer(model.path, options.threads, repack=repack) as peer:
                peer.prefill(64)
                prompt = 512 / min(peer.prefill(512) for _ in range(2))
                ms = statistics.median(peer.decode(64, 512))
            print(
                f"{kind:8} {'repacked' if repack and kind in REPACKED else 'as stored'}"
                f"  {model.bits_per_weight:5.2f} bits/weight ({model.linear_bits_per_weight:.2f} read)"
                f"  pp512 {prompt:6.1f}/s  tg64 {1e3 / ms:5.1f}/s  {model.linear_bytes / ms / 1e6:5.1f} GB/s",
                flush=True,
            )


def main() -> None:
    """All formats at one shape."""
    parser = argparse.ArgumentParser(description="llama.cpp alone, on random weights")
    parser.add_argument("--shape", choices=SHAPES, default="1.1b")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--folder", type=Path, default=CACHE)
    parser.add_argument("--threads", type=int, default=2)
    try:
        measure(parser.parse_args())
    except PeerError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1].startswith("{"):
        serve(lambda options: LlamaCpp(LlamaCppOptions(**options)))
    else:
        main()
