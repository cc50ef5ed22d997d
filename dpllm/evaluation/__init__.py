"""Evaluation: perplexity of policies, every token at its own widths."""
