"""What does each step of the nested quantiser buy at equal bytes?

Limit measured: held-out perplexity of the reference model with every linear layer at one width, from the same
planes and tables (so the same bytes a token at each width), after k-means with Fisher weights, after tables are
refitted, and after codes are moved too; with the plain Hessian (X^T X) and the guided one; and for several
balances between widths. Calibrated on the bundled calibration text, scored on held-out files only. Matrices are
dequantised into transformers' model, the head is int8 as stored. `loss` is the balanced guided error that is
minimised, over that of k-means.

    python -m bench.quality.nested_quality [--tokens 24576] [--only "STEP;STEP"]
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from bench.common.report import arguments, begin, torch_instruction_set
from bench.quality.texts import heldout_windows
from dpllm import reference
from dpllm.base.text import load_tokenizer, read_documents, sample_sequences
from dpllm.quant.fisher import FisherPass
from dpllm.quant.kmeans import nested_codes
from dpllm.quant.layerwise import LayerwiseModel
from dpllm.quant.quantize import normalise_rows, quantize_int8
from dpllm.quant.quantize_plan import QuantizeOptions, default_rows_per_table
from dpllm.quant.refine import NestedMatrix, RefineOptions, output_error, refine
from dpllm.quant.source import ModelSource

WIDTHS = range(2, 7)
BALANCE = RefineOptions().balance
# step: (Hessian, options); None keeps what k-means made.
STEPS: dict[str, tuple[str, RefineOptions] | None] = {
    "k-means, Fisher": None,
    "+ tables and codes, guided (default)": ("guided", RefineOptions()),
    "+ tables, guided": ("guided", RefineOptions(codes=False)),
    "+ tables and codes, plain Hessian": ("plain", RefineOptions()),
    "default, narrowest width first": ("guided", RefineOptions(balance=0.02)),
    "default, one round": ("guided", RefineOptions(rounds=1)),
    "default, balance 1": ("guided", RefineOptions(balance=1.0)),
    "default, balance 4": ("guided", RefineOptions(balance=4.0)),
    "+ tables, plain Hessian": ("plain", RefineOptions(codes=False)),
}


class Evaluator:
    """transformers' model of the reference checkpoint, with whatever matrices it is given."""

    def __init__(self, tokens: int):
        self.windows = [torch.tensor(w) for w in heldout_windows(tokens).ids]
        self.model = AutoModelForCausalLM.from_pretrained(reference.model_path(), dtype=torch.float32).eval()
        modules = self.model.named_modules()
        self.linears = {n: m for n, m in modules if isinstance(m, nn.Linear) and "layers." in n}
        self.original = {n: m.weight.detach().clone() for n, m in self.linears.items()}
        head = quantize_int8("head", self.model.lm_head.weight.detach())
        self.model.lm_head.weight.data.copy_(head["head.int8"].float() * head["head.scale"].float()[:, None])

    @torch.no_grad()
    def perplexity(self, matrices: dict[str, Tensor]) -> float:
        """Over all windows, with these weights in place of the model's."""
        for name, weight in matrices.items():
            self.linears[name].weight.data.copy_(weight)
        nll = 0.0
        for ids in self.windows:
            logits = self.model(ids[None, :-1]).logits[0]
            nll += nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item()
        return math.exp(nll / self.tokens)

    @property
    def tokens(self) -> int:
        """Scored tokens."""
        return sum(len(w) - 1 for w in self.windows)

    @torch.no_grad()
    def plain_hessians(self, sequences: Tensor) -> dict[str, Tensor]:
        """X^T X of every linear layer of the unquantised model, float32 [K, K]."""
        total = {n: torch.zeros(m.in_features, m.in_features) for n, m in self.linears.items()}

        def watch(name: str):
            def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                x = inputs[0].flatten(0, -2)
                total[name].addmm_(x.T, x)

            return hook

        hooks = [m.register_forward_hook(watch(n)) for n, m in self.linears.items()]
        for ids in sequences:
            self.model(ids[None])
        for hook in hooks:
            hook.remove()
        return total


def statistics(sequences: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(Fisher, guided Hessians) of every linear layer, as `dpllm quantize` takes them."""
    model = LayerwiseModel(ModelSource.open(reference.model_path()))
    fisher: dict[str, Tensor] = {}
    hessians: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory() as work:
        passes = FisherPass(model, sequences, Path(work), guided=True)
        passes.forward(lambda: None)
        for index in range(len(model) - 1, -1, -1):
            fisher |= passes.backward(index)
            hessians |= passes.hessians
            passes.keep_gradient(index)
    return fisher, hessians


def clustered(weight: Tensor, fisher: Tensor) -> NestedMatrix:
    """What k-means makes of a matrix."""
    n, k = weight.shape
    share = default_rows_per_table(n, k)
    w, f, scale = weight.numpy(), fisher.numpy(), np.ones(n, np.float16)
    if share > 1:
        scale, w, f = normalise_rows(w, f)
    codes, tables = nested_codes(w.reshape(n // share, -1), f.reshape(n // share, -1), WIDTHS[0], WIDTHS[-1])
    return NestedMatrix(
        torch.from_numpy(w), torch.from_numpy(scale).float(), torch.from_numpy(codes).reshape(n, k),
        {b: torch.from_numpy(t) for b, t in tables.items()}, WIDTHS[-1],
    )  # fmt: skip


def dense(m: NestedMatrix, bits: int) -> Tensor:
    """The b-bit matrix, float32 [N, K]."""
    return (m.error(bits) + m.weight) * m.scale[:, None]


def balanced_error(matrices: dict[str, NestedMatrix], hessians: dict[str, Tensor]) -> float:
    """Sum over matrices and widths of what the default minimises."""
    return sum(
        BALANCE ** (b - 2) * output_error(m, hessians[n], b).sum().item()
        for n, m in matrices.items()
        for b in WIDTHS
    )


def rows(evaluator: Evaluator, only: list[str]) -> Iterator[dict]:
    """One row a step."""
    o = QuantizeOptions()
    sequences = sample_sequences(
        read_documents(reference.calibration_text()), load_tokenizer(reference.model_path()), o.samples,
        o.sequence_length, o.seed,
    )  # fmt: skip
    whole = dict.fromkeys((f"bits_{b}" for b in WIDTHS), round(evaluator.perplexity({}), 4))
    yield {"step": "unquantised (head int8)", **whole, "loss": 0.0, "seconds": 0.0}
    fisher, guided = statistics(sequences)
    hessians = {"guided": guided, "plain": evaluator.plain_hessians(sequences)}
    start = {n: clustered(w, fisher[n]) for n, w in evaluator.original.items()}
    clustered_error = balanced_error(start, guided)
    for step, how in STEPS.items():
        if only and step not in only:
            continue
        began = time.perf_counter()
        made = start if how is None else {n: refine(m, hessians[how[0]][n], how[1]) for n, m in start.items()}
        seconds = time.perf_counter() - began
        found = {
            f"bits_{b}": round(evaluator.perplexity({n: dense(m, b) for n, m in made.items()}), 4)
            for b in WIDTHS
        }
        row = {"step": step, **found, "loss": round(balanced_error(made, guided) / clustered_error, 3)}
        yield row | {"seconds": round(seconds, 1)}
        print(row, flush=True)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=24_576, help="held-out tokens to score")
    parser.add_argument("--only", default="", help="steps, separated by ';'")
    args = parser.parse_args()
    run = begin(args)
    evaluator = Evaluator(args.tokens)
    found = list(rows(evaluator, [s for s in args.only.split(";") if s]))
    run.report(
        "nested_quality", found, instructions=torch_instruction_set(), measured_on="reference model",
        heldout_tokens=evaluator.tokens,
    )  # fmt: skip


if __name__ == "__main__":
    main()
