"""The toy's tokenizers, made from its captions: CLIP's byte-level BPE, T5's and Gemma's unigram; a word is a token."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from string import printable
from typing import Any

CLIP_TOKENS = 77  # as published
T5_TOKENS = 16  # padding length; FLUX.1 has 512


def save_clip_tokenizer(captions: Iterable[str], folder: Path) -> Any:
    """Write vocab.json, merges.txt and tokenizer.json for CLIPTokenizer; returns the tokenizer."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    merges = bpe_merges(_words(captions))
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CLIP_TOKENS)
    tokenizer.save_pretrained(folder)
    # The two files that older transformers, and so ComfyUI, read.
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tokenizer


def save_t5_tokenizer(captions: Iterable[str], folder: Path) -> Any:
    """Write tokenizer.json for T5TokenizerFast; returns the tokenizer. Other words fall apart into letters."""
    from transformers import T5TokenizerFast

    vocabulary = _unigrams(["<pad>", "</s>", "<unk>"], _words(captions), set(printable) - set(" \t\n\r\x0b\x0c"))
    tokenizer = T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=T5_TOKENS)
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_gemma_tokenizer(captions: Iterable[str], instruction: str, folder: Path) -> Any:
    """Write tokenizer.json of a tokenizer that does what Gemma's does: <bos> in front, nothing behind; returns it.

    The instruction's words are tokens too, so that it is not much longer than to Gemma. Capitals are small letters.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    words = [*_words(captions), *re.findall(r"[a-z]+", instruction.lower())]
    letters = set(printable.lower()) - set(" \t\r\x0b\x0c")
    tokenizer = Tokenizer(models.Unigram(_unigrams(special, words, letters), special.index("<unk>")))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", special.index("<bos>"))]
    )
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    made.save_pretrained(folder)
    return made


def _unigrams(special: list[str], words: Iterable[str], letters: Iterable[str]) -> list[tuple[str, float]]:
    """(token, score): special tokens, whole words, and the letters that other words fall apart into."""
    known = sorted({f"\u2581{word}" for word in words})
    single = [letter for letter in ["\u2581", *sorted(letters)] if letter not in known]
    scored = ((special, 0.0), (known, -4.0), (single, -8.0))
    return [(token, score) for tokens, score in scored for token in tokens]


def bpe_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first, until every word is one symbol (its last letter ends in </w>)."""
    split = {word: [*word[:-1], f"{word[-1]}</w>"] for word in words}
    counts = Counter(words)
    merges: list[tuple[str, str]] = []
    while any(len(symbols) > 1 for symbols in split.values()):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, symbols in split.items():
            for pair in pairwise(symbols):
                pairs[pair] += counts[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        split = {word: _merge(symbols, best) for word, symbols in split.items()}
    return merges


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def _words(captions: Iterable[str]) -> list[str]:
    return [word for caption in captions for word in caption.lower().split()]
