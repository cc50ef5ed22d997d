"""One tiny tokenizer of each kind that checkpoints come with."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PIECES = ("▁", "a", "b", "'", "n", "t", "s", ".", "v", "e", "▁a", "▁b", "ab", "▁▁", "n't", "▁'", "'s", "é")
BYTES = {f"<0x{b:02X}>": b for b in (0x0A, 0x41, 0x80, 0xA9, 0xAC, 0xC3, 0xE2, 0x82, 0xF0, 0x9F, 0x98, 0xFF)}
SPECIAL = ("<s>", "</s>", "<|eot|>")


def _vocabulary(*more: str) -> dict[str, int]:
    return {piece: i for i, piece in enumerate([*SPECIAL, "<unk>", *BYTES, *PIECES, *more])}


def _bpe(**options) -> Tokenizer:
    return Tokenizer(models.BPE(_vocabulary(), [], unk_token="<unk>", **options))


def _stripping() -> Tokenizer:
    """As Llama 2's: a mark for every space, and a decoder that strips the first space."""
    made = _bpe(byte_fallback=True)
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(parts)
    return made


def _keeping() -> Tokenizer:
    """As Gemma's: a mark for every space, and nothing is stripped."""
    made = _bpe(byte_fallback=True)
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return made


def _metaspace(scheme: str) -> Tokenizer:
    made = _bpe()
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return made


def _unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram([(p, -float(i)) for i, p in enumerate(_vocabulary())], 3, True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return made


def _byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([*SPECIAL, *alphabet, "Ġa", "Ã©", "âĤ"])}
    made = Tokenizer(models.BPE(vocabulary, [("Ġ", "a"), ("Ã", "©"), ("â", "Ĥ")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return made


def _word_piece() -> Tokenizer:
    words = _vocabulary("##a", "##b", "##s", "##'", "?", ",", "!", "##n't", "'m", "'re", "'ve")
    made = Tokenizer(models.WordPiece(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    return made


def _suffixes() -> Tokenizer:
    """As the first GPT's: a mark ends every word."""
    made = Tokenizer(models.BPE(_vocabulary("a</w>", "ab</w>", "'s</w>"), [], unk_token="<unk>"))
    made.decoder = decoders.BPEDecoder()
    return made


def _words() -> Tokenizer:
    """Without a decoder: spaces between words."""
    made = Tokenizer(models.WordLevel(_vocabulary(), unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def tokenizer_kinds() -> dict[str, PreTrainedTokenizerFast]:
    """A tokenizer of each kind, each with three special tokens."""
    made = {
        "byte-level": _byte_level(), "stripping": _stripping(), "keeping": _keeping(), "unigram": _unigram(),
        "metaspace": _metaspace("always"), "metaspace never": _metaspace("never"), "word pieces": _word_piece(),
        "suffixes": _suffixes(), "words": _words(),
    }  # fmt: skip
    kinds = {}
    for name, tokenizer in made.items():
        tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
        cleans = name in ("word pieces", "words")  # as BERT's
        kinds[name] = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=cleans
        )
    return kinds
