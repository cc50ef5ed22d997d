"""The ways in which byte-level tokenizers split text into words, by their names in GGUF files (tokenizer.ggml.pre).

A pattern is a fact about a model's tokenizer.json. A name that is missing here is refused, because another pattern
would give other tokens than the model was trained on.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Split:
    """Patterns that are applied one after another.

    whole_words: a word that is a token is taken as it is, even if merges do not lead to it. add_bos: whether a file
    without the flag puts the first special token in front of a text.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ENDINGS = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"


def _words(digits: str, marks: str = "", slash: str = "") -> str:
    """The pattern that OpenAI's cl100k began: words with the character before them, digits, signs, line ends."""
    return (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}{marks}]+|{digits}"
        rf"| ?[^\s\p{{L}}{marks}\p{{N}}]+[\r\n{slash}]*{_ENDINGS}"
    )


def _cased(digits: str, suffix: str = "") -> str:
    """The pattern that OpenAI's o200k began: as `_words`, but a capital letter after a small one begins a word."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    lead = r"[^\r\n\p{L}\p{N}]?"
    small, capital = rf"{lead}{upper}*{lower}+{suffix}", rf"{lead}{upper}+{lower}*{suffix}"
    return rf"{small}|{capital}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_ENDINGS}"


_SMOLLM = Split((_DIGIT, _GPT2))
_GPT2_ALONE = Split((_GPT2,))
_LLAMA3 = Split((_words(r"\p{N}{1,3}"),), whole_words=True, add_bos=True)
_LLAMA3_PLAIN = Split((_words(r"\p{N}{1,3}"),))
_QWEN2 = Split((_words(_DIGIT),))
_QWEN35 = Split((_words(_DIGIT, marks=r"\p{M}"),))
_TEKKEN = Split((_cased(_DIGIT),), whole_words=True, add_bos=True)
_GPT4O = Split((_cased(r"\p{N}{1,3}", _CONTRACTIONS + "?"),))
_DEEPSEEK3 = Split((
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*" + _ENDINGS,
))  # fmt: skip

SPLITS = {
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _SMOLLM
    ),
    **dict.fromkeys(
        ("gpt-2", "phi-2", "olmo", "mpt", "trillion", "exaone4", "a.x-4.0", "mellum"), _GPT2_ALONE
    ),
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), _LLAMA3
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), _LLAMA3_PLAIN),
    **dict.fromkeys(
        (
            "qwen2",
            "deepseek-r1-qwen",
            "kormo",
            "f2llmv2",
            "megrez",
            "stablelm2",
            "hunyuan",
            "solar-open",
            "grok-2",
        ),
        _QWEN2,
    ),
    "qwen35": _QWEN35,
    "tekken": _TEKKEN,
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), _GPT4O),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm"), _DEEPSEEK3),
}
