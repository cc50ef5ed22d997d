"""What the bundled reference model knows: held-out perplexity and recall.

Limit measured: the model's own quality at full precision (bf16 weights, fp32 arithmetic). Perplexity is over the
first 1024 tokens of every held-out standard-library file, as found in the running interpreter, so it moves a
little between Python versions. Recall is exact answers: 6 facts of 4 surface forms in 700 tokens of code, 4 of
them asked, 200 questions; a guess has no chance.

    python -m bench.reference_model.reference_quality [--against EARLIER_CHECKPOINT]
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from bench.common.report import arguments, begin, torch_instruction_set
from bench.reference_model.reference_corpus import CodeTokens, read_source, stdlib_files, stdlib_root
from bench.reference_model.train_reference import heldout_loss, recall_accuracy
from dpllm import reference


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--against", type=Path, help="another checkpoint with the same tokenizer")
    args = parser.parse_args()
    run = begin(args)
    root = stdlib_root()
    heldout = json.loads((reference.model_path() / "heldout_files.json").read_text())
    texts = {n: t for n in stdlib_files(root) if (t := read_source(root / n))}
    tokenizer = Tokenizer.from_file(str(reference.model_path() / "tokenizer.json"))
    code = CodeTokens.build(tokenizer, [t for n, t in texts.items() if n not in set(heldout)][::8])
    rows = []
    for name, path in (("bundled", reference.model_path()), ("earlier", args.against)):
        if path is None:
            continue
        model = LlamaForCausalLM.from_pretrained(path).float().eval()
        loss, tokens = heldout_loss(model, tokenizer, [texts[n] for n in heldout if n in texts])
        rows.append(
            {
                "checkpoint": name, "parameters": model.num_parameters(),
                "heldout_perplexity": round(math.exp(loss), 3), "heldout_tokens": tokens,
                "recall": recall_accuracy(model, tokenizer, code, questions=200, seed=2), "questions": 200,
            }
        )  # fmt: skip
    run.report(
        "reference_quality",
        rows,
        instructions=torch_instruction_set(),
        measured_on="reference model, full precision",
    )


if __name__ == "__main__":
    main()
