"""Tiny random models of every supported architecture."""

from __future__ import annotations

import torch
import transformers

COMMON = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
ARCHITECTURES = {
    "llama": ("Llama", {}),
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3_ROPE, "head_dim": 32}),
    "llama-biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "smollm": ("Llama", {"tie_word_embeddings": True, "num_attention_heads": 4, "num_key_value_heads": 1}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1]}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "mistral-window": ("Mistral", {"sliding_window": 7, "head_dim": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
}


def build_model(name: str, **extra) -> transformers.PreTrainedModel:
    """A random model of this architecture; norms and biases are random too, so that they matter."""
    family, options = ARCHITECTURES[name]
    config = getattr(transformers, f"{family}Config")(**COMMON | options | extra)
    torch.manual_seed(len(name))
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.3)
            elif "embed" not in parameter_name:
                p.mul_(4.0)
    return model
