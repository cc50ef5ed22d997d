"""Trains the bundled reference model on Python's own standard library.

Limit measured: what 7 million parameters reach on two CPU cores within a time budget; the log prints
tokens/s, the held-out perplexity of files never trained on, and exact recall (6 facts in 700 tokens of
filler). One schedule serves any budget: progress is the larger of tokens/--tokens and time/--minutes,
the learning rate warms up, stays flat to 55%, then falls linearly, so a slow or shared machine gets a
finished model all the same.

Matrices are updated by Muon (torch.optim.Muon, RMS-matched), embeddings and norms by AdamW; bf16
compute over fp32 master weights. Lengths 512, 1024 and 3072 are mixed from the start.

    python -m bench.reference_model.train_reference --out runs/reference --minutes 120
    python -m bench.reference_model.train_reference --out runs/reference --minutes 60 --init runs/earlier   # continue
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench.reference_model.reference_corpus import (
    CodeTokens,
    read_source,
    recall_document,
    stdlib_files,
    stdlib_root,
    training_sequence,
)

SPECIAL = ["<|bos|>", "<|eos|>", "<|pad|>"]
LENGTHS = {512: 0.5, 1024: 0.4, 3072: 0.1}  # share of steps
MICRO_TOKENS = 3072  # activations of one micro-batch stay within a desktop's last-level cache


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE of 4096 tokens, digits one by one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", 0)]
    )
    return tokenizer


def fresh_model() -> LlamaForCausalLM:
    """Llama, 7.3 M parameters: every matrix dimension a multiple of 256 but the key/value width."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096, hidden_size=256, intermediate_size=768, num_hidden_layers=8,
            num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=4096,
            rms_norm_eps=1e-6, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, pad_token_id=2,
            rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        )
    )  # fmt: skip


class ChunkedLoss(torch.autograd.Function):
    """Weighted cross-entropy over a tied head, 1024 rows at a time; never holds all logits."""

    @staticmethod
    def forward(ctx, hidden, head, targets, weights):
        """hidden [T, H], head [V, H], targets [T], weights [T] -> summed loss (scalar)."""
        head16, hidden = head.bfloat16(), hidden.bfloat16()
        d_hidden, d_head = torch.empty_like(hidden), torch.zeros_like(head)
        total = hidden.new_zeros((), dtype=torch.float32)
        for rows in torch.arange(len(hidden), device=hidden.device).split(1024):
            logits = (hidden[rows] @ head16.T).float()
            log_z = logits.logsumexp(-1)
            total += ((log_z - logits.gather(1, targets[rows, None])[:, 0]) * weights[rows]).sum()
            p = logits.sub_(log_z[:, None]).exp_()
            p[torch.arange(len(rows)), targets[rows]] -= 1
            p = p.mul_(weights[rows, None]).bfloat16()
            d_hidden[rows] = p @ head16
            d_head += (p.T @ hidden[rows]).float()
        ctx.save_for_backward(d_hidden, d_head)
        return total

    @staticmethod
    def backward(ctx, grad):
        """Gradients were formed in forward; only scale them."""
        d_hidden, d_head = ctx.saved_tensors
        return d_hidden.float() * grad, d_head * grad, None, None


def schedule(progress: float) -> float:
    """Learning-rate factor: 2% warm-up, flat to 55%, linear to 2%."""
    if progress < 0.02:
        return progress / 0.02
    return max(0.02, min(1.0, (1 - progress) / 0.45))


def batch(code, tokenizer, rng, length: int, tokens: int, device) -> tuple[torch.Tensor, ...]:
    """(ids [B, length+1], weights [B, length]) of about `tokens` tokens."""
    rows = [training_sequence(code, tokenizer, rng, length + 1) for _ in range(max(1, tokens // length))]
    ids = torch.tensor([r[0] for r in rows], device=device)
    return ids, torch.tensor([r[1][1:] for r in rows], device=device)


def heldout_loss(model, tokenizer, texts: list[str]) -> tuple[float, int]:
    """Mean next-token loss over the first 1024 tokens of each held-out file, and the tokens scored."""
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer.encode(text).ids[:1024]], device=model.device)
        if ids.shape[1] < 2:
            continue
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return total / count, count


def recall_accuracy(model, tokenizer, code, questions: int = 200, seed: int = 1) -> float:
    """Share of exact answers: 6 facts in 700 tokens of filler; each asked alone would be no easier."""
    rng, right, asked = random.Random(seed), 0, 0
    while asked < questions:
        doc = recall_document(code, tokenizer, rng, n_facts=6, filler=700)
        ids = torch.tensor([doc.tokens], device=model.device)
        with torch.no_grad():
            best = model(input_ids=ids).logits[0].argmax(-1).tolist()
        for a, b in doc.answers:
            right, asked = right + (best[a - 1 : b - 1] == doc.tokens[a:b]), asked + 1
    return right / asked


class Trainer:
    """Model, optimisers and the loop's state; `save` writes an HF directory, `resume` reads the state."""

    def __init__(self, model: LlamaForCausalLM, lr: float):
        self.model = model
        matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
        rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
        self.optimizers = [
            torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.lr, self.tokens, self.seconds = lr, 0, 0.0
        self.body = torch.compile(model.model, dynamic=False)

    def step(self, ids: torch.Tensor, weights: torch.Tensor, progress: float) -> float:
        """One update; returns the weighted mean loss."""
        for group in (g for o in self.optimizers for g in o.param_groups):
            group["lr"] = self.lr * schedule(progress)
        n = max(1, MICRO_TOKENS // (ids.shape[1] - 1))
        total, norm = 0.0, weights.sum()
        for rows, w in zip(ids.split(n), weights.split(n), strict=True):
            with torch.autocast(ids.device.type, torch.bfloat16):
                hidden = self.body(input_ids=rows[:, :-1], use_cache=False).last_hidden_state
            hidden = hidden.reshape(-1, hidden.shape[-1])
            head = self.model.get_output_embeddings().weight
            loss = ChunkedLoss.apply(hidden, head, rows[:, 1:].reshape(-1), w.reshape(-1)) / norm
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.tokens += weights.numel()
        return total

    def save(self, out: Path, tokenizer: Tokenizer, facts: dict) -> None:
        """bf16 checkpoint + tokenizer + `training.json`, and the resumable state beside them."""
        state = {k: v.to(torch.bfloat16) for k, v in self.model.state_dict().items()}
        copy = LlamaForCausalLM(self.model.config).to(torch.bfloat16)
        copy.load_state_dict(state)
        copy.save_pretrained(out)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token=SPECIAL[0], eos_token=SPECIAL[1], pad_token=SPECIAL[2]
        ).save_pretrained(out)
        (out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
        torch.save(
            {
                "model": self.model.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers],
                "tokens": self.tokens, "seconds": self.seconds,
            },
            out / "state.pt.tmp",
        )  # fmt: skip
        (out / "state.pt.tmp").replace(out / "state.pt")

    def resume(self, path: Path) -> None:
        """Continues an interrupted run (weights_only: nothing is unpickled)."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.tokens, self.seconds = state["tokens"], state["seconds"]


def corpus(args) -> tuple[Tokenizer, CodeTokens, list[str], list[str]]:
    """(tokenizer, training tokens, held-out texts, held-out names)."""
    root = stdlib_root()
    names = stdlib_files(root)
    heldout = json.loads(args.heldout.read_text()) if args.heldout else names[::20]
    texts = {n: t for n in names if (t := read_source(root / n))}
    train = [t for n, t in texts.items() if n not in set(heldout)]
    saved = args.init / "tokenizer.json" if args.init else None
    tokenizer = Tokenizer.from_file(str(saved)) if saved else train_tokenizer(train)
    return tokenizer, CodeTokens.build(tokenizer, train), [texts[n] for n in heldout if n in texts], heldout


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--init", type=Path, help="start from this checkpoint and its tokenizer")
    parser.add_argument("--heldout", type=Path, help="JSON list of held-out files; default: every 20th")
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--tokens", type=float, default=math.inf)
    parser.add_argument("--batch-tokens", type=int, default=9216)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def main() -> None:
    """Trains, and saves a checkpoint every ten minutes."""
    args = arguments()
    torch.manual_seed(args.seed)
    tokenizer, code, heldout_texts, heldout = corpus(args)
    model = LlamaForCausalLM.from_pretrained(args.init).float() if args.init else fresh_model()
    trainer = Trainer(model.to(args.device), args.lr)
    args.out.mkdir(parents=True, exist_ok=True)
    if (args.out / "state.pt").exists():
        trainer.resume(args.out / "state.pt")
    (args.out / "heldout_files.json").write_text(json.dumps(heldout))
    rng = random.Random(f"{args.seed}/{trainer.tokens}")
    print(f"{len(code.tokens):,} training tokens, {len(heldout_texts)} held-out files", flush=True)

    def evaluate() -> dict:
        loss, count = heldout_loss(model, tokenizer, heldout_texts)
        facts = {
            "tokens_seen": trainer.tokens, "train_seconds": round(trainer.seconds),
            "heldout_loss": round(loss, 4), "heldout_perplexity": round(math.exp(loss), 3),
            "heldout_tokens": count, "recall": recall_accuracy(model, tokenizer, code),
        }  # fmt: skip
        print(json.dumps(facts), flush=True)
        trainer.save(args.out, tokenizer, facts | {"init": str(args.init or ""), "lr": args.lr})
        return facts

    steps, smooth, saved_at = 0, None, trainer.seconds
    while True:
        progress = max(trainer.tokens / args.tokens, trainer.seconds / 60 / args.minutes)
        if progress >= 1:
            break
        began = time.perf_counter()
        length = rng.choices(list(LENGTHS), list(LENGTHS.values()))[0]
        loss = trainer.step(*batch(code, tokenizer, rng, length, args.batch_tokens, args.device), progress)
        trainer.seconds += time.perf_counter() - began
        smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
        steps += 1
        if steps % 20 == 0:
            print(
                f"{progress:6.1%} step {steps} tokens {trainer.tokens / 1e6:.2f}M loss {smooth:.3f}",
                flush=True,
            )
        if trainer.seconds - saved_at > 600:
            evaluate()
            saved_at = trainer.seconds
    print(json.dumps({"bench": "train_reference", **evaluate()}))


if __name__ == "__main__":
    main()
