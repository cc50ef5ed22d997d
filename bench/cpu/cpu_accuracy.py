"""What the CPU kernels' number of digits costs in accuracy, and what that does to a model.

Limits measured: (1) relative error of a product (norm of the difference over norm) against float64 with the same
codebook, per width and setting, for normal activations and for activations with outliers (1% of them 20 times
larger); random weights, K = 4096. (2) Perplexity of the bundled reference model (trained by us; not a real-world model)
on held-out text at a mean of 3.25 bits and at each fixed width, every token decoded natively at its own widths, against
the torch reference backend.

    python -m bench.cpu.cpu_accuracy [--max-tokens 8000]
"""

from __future__ import annotations

import torch

from bench.common.report import arguments, begin
from dpllm import reference
from dpllm.commands.evaluate import token_documents
from dpllm.evaluation.evaluate import evaluate
from dpllm.kernels import reference as exact
from dpllm.kernels.backend import choose_backend
from dpllm.kernels.cpu.library import ACCURACIES, CpuOptions
from dpllm.kernels.weight import MAX_BITS, MIN_BITS, QuantizedWeight, empty_planes
from dpllm.model.loading import LoadOptions
from dpllm.opening import open_engine
from dpllm.policies.make import make_policy

ROWS, COLUMNS = 256, 4096


def weights() -> QuantizedWeight:
    """Random codes over sorted normal tables."""
    rng = torch.Generator().manual_seed(0)
    planes = empty_planes((MAX_BITS, ROWS, COLUMNS // 32)).random_(-(2**31), 2**31 - 1, generator=rng)
    tables = [torch.randn(ROWS, 2**b, generator=rng).sort(1).values for b in range(MIN_BITS, 7)]
    return QuantizedWeight(planes, torch.cat(tables, 1).half(), COLUMNS, MIN_BITS)


def product_rows() -> list[dict]:
    """Relative errors of every setting and width."""
    w, rng = weights(), torch.Generator().manual_seed(1)
    x = torch.randn(16, COLUMNS, generator=rng)
    outliers = torch.where(torch.rand(x.shape, generator=rng) < 0.01, 20 * x, x)
    rows = []
    for name in ACCURACIES:
        backend = choose_backend("cpu", options=CpuOptions(accuracy=name))
        prepared = backend.prepare(w)
        for kind, values in (("normal", x), ("outliers", outliers)):
            row: dict = {"measured_on": "random weights", "accuracy": name, "activations": kind}
            for bits in range(MIN_BITS, MAX_BITS + 1):
                truth = values.double() @ exact.dequantize(w, bits, torch.float64).T
                y = backend.gemv(values, prepared, torch.full((len(values),), bits, dtype=torch.int32))
                row[f"{bits} bits"] = float(f"{((y - truth).norm() / truth.norm()).item():.2e}")
            rows.append(row)
    return rows


def perplexity_rows(max_tokens: int) -> list[dict]:
    """Perplexity of every setting, and its distance to the reference backend's."""
    settings = {"reference backend": LoadOptions(backend="reference")}
    settings |= {name: LoadOptions(cpu=CpuOptions(accuracy=name)) for name in ACCURACIES}
    cells = [("rate-distortion", 3.25), *(("uniform", float(b)) for b in range(2, 7))]
    rows: list[dict] = []
    base: dict[tuple[str, float], float] = {}
    for name, options in settings.items():
        engine = open_engine(options=options)
        documents = token_documents(engine, reference.heldout_text(), 1024, max_tokens)
        row: dict = {"measured_on": "reference model", "accuracy": name}
        for policy, target in cells:
            result = evaluate(
                engine.decoder, make_policy(policy, target, engine.decoder, engine.profile), target, documents
            )
            base.setdefault((policy, target), result.perplexity)
            row[f"{policy} {target:g}"] = result.perplexity
            row[f"{policy} {target:g} change"] = round(result.perplexity / base[policy, target] - 1, 5)
        row["tokens"] = result.tokens
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--max-tokens", type=int, default=8000)
    args = parser.parse_args()
    run = begin(args)
    run.report("cpu_accuracy", product_rows(), perplexity=perplexity_rows(args.max_tokens))


if __name__ == "__main__":
    main()
