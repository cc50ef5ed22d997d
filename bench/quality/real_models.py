"""The paper's protocol on a real model's overlay: see bench/quality/real_models.md, which holds the paper's figures.

python -m bench.quality.real_models OVERLAY --calibration FILE --text FILE [--text FILE] [--device cuda]
"""

from __future__ import annotations

from pathlib import Path

from bench.common.report import arguments, begin, instruction_set
from dpllm.base.text import load_tokenizer, read_documents, sample_sequences
from dpllm.calib.runtime.profile import PROFILE_NAME, CalibrationProfile
from dpllm.evaluation.evaluate import score, summarize
from dpllm.model.loading import LoadOptions, load_decoder
from dpllm.policies.make import make_policy
from dpllm.prepare.calibrate import calibrate
from dpllm.quant.overlay import Overlay

TARGETS = "3.25,3.5,3.75,4,4.25,4.5,4.75"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("overlay", type=Path)
    parser.add_argument(
        "--calibration", required=True, help="text to calibrate on, such as C4's training split"
    )
    parser.add_argument(
        "--text", action="append", required=True, type=Path, help="text to score; may be repeated"
    )
    parser.add_argument("--targets", default=TARGETS)
    parser.add_argument("--budget", default="5")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--pieces", type=int, default=100_000, help="pieces of each text to score at most")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    targets, budget = [float(t) for t in args.targets.split(",")], float(args.budget)
    run = begin(args)
    calibrate(
        args.overlay, targets=targets, memory_bits=budget, data=args.calibration, granularity="linear",
        samples=args.samples, asynchronous=True, dp_llm=True, device=args.device,
    )  # fmt: skip
    profile = CalibrationProfile.load(args.overlay / PROFILE_NAME, Overlay.open(args.overlay).hash)
    planes = dict(zip(profile.group_names, profile.budget(budget).tolist(), strict=True))
    decoder = load_decoder(args.overlay, LoadOptions(planes, "linear", device=args.device))
    tokenizer = load_tokenizer(args.overlay)
    rows = []
    for path in args.text:
        pieces = sample_sequences(read_documents(path), tokenizer, args.pieces, args.context).tolist()
        for target in targets:
            for name in ("static", "dp-llm", "rate-distortion"):
                policy = make_policy(name, target, decoder, profile)
                result = summarize(name, target, score(decoder, policy, pieces), decoder.head_bytes())
                rows.append({"text": path.name} | result.as_json())
    run.report(
        "real_models", rows, device=args.device, instructions=instruction_set(args.device), overlay=str(args.overlay),
        context=args.context,
    )  # fmt: skip


if __name__ == "__main__":
    main()
