"""Models that say what they are told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from dpllm.decode.options import GenerateOptions
from dpllm.engine import Engine


def save_scripted(path: Path, tokenizer, chain: Sequence[int], **config) -> None:
    """Saves a model that gives after each token of the chain the next one, with its tokenizer.

    The blocks add nothing, and the head's row of each token is the embedding of the one before it. So the tokens of the
    chain must differ. config: other values than those of a tiny Llama.
    """
    assert len(set(chain)) == len(chain), chain
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **{
                "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1,
                "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "bos_token_id": 0,
                "eos_token_id": 1, "pad_token_id": 2,
            } | config
        )
    )  # fmt: skip
    with torch.no_grad():
        rows = torch.randn(len(tokenizer), 64, generator=torch.Generator().manual_seed(0))
        model.model.embed_tokens.weight.copy_(rows / rows.norm(dim=1, keepdim=True))
        for linear in (model.model.layers[0].self_attn.o_proj, model.model.layers[0].mlp.down_proj):
            linear.weight.zero_()
        model.lm_head.weight.zero_()
        model.lm_head.weight[chain[1:]] = 10 * model.model.embed_tokens.weight[chain[:-1]]
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def token_chain(tokenizer, text: str) -> list[int]:
    """Tokens of the text, one a byte. All must differ, because each one names its successor."""
    ids = [i for c in text for i in tokenizer(c, add_special_tokens=False)["input_ids"]]
    assert len(set(ids)) == len(ids), text
    return ids


def pieces(engine: Engine, prompt: str = "A", **options) -> list[str]:
    """The text of each step."""
    return [s.text for s in engine.generate_with(prompt, GenerateOptions(**options))]
