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

from train.files import write_json

CLIP_TOKENS = 77  # as published
T5_TOKENS = 16  # padding length; FLUX.1 has 512
# What CLIP takes for a word: its end tokens, an English clitic, letters, one digit, or signs.
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def save_clip_tokenizer(captions: Iterable[str], folder: Path) -> Any:
    """Write vocab.json, merges.txt and tokenizer.json for CLIPTokenizer; returns the tokenizer."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    merges = bpe_merges(_words(captions))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    start, end = "<|startoftext|>", "<|endoftext|>"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges), start, end]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    parts = {"unk_token": end, "continuing_subword_prefix": "", "end_of_word_suffix": "</w>"}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, **parts))
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    ends = ((end, vocabulary[end]), (start, vocabulary[start]))
    tokenizer.post_processor = processors.RobertaProcessing(*ends, add_prefix_space=False, trim_offsets=False)
    names = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    made = _save(tokenizer, folder, "CLIPTokenizer", model_max_length=CLIP_TOKENS, **names)
    # The two files that transformers 4, and so an older ComfyUI, reads instead.
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return made


def save_t5_tokenizer(captions: Iterable[str], folder: Path) -> Any:
    """Write tokenizer.json for T5TokenizerFast; returns the tokenizer. Other words fall apart into letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    special = ["<pad>", "</s>", "<unk>"]
    vocabulary = _unigrams(special, _words(captions), set(printable) - set(" \t\n\r\x0b\x0c"))
    tokenizer = Tokenizer(models.Unigram(vocabulary, special.index("<unk>")))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", special.index("</s>"))]
    )
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return _save(tokenizer, folder, "T5TokenizerFast", extra_ids=0, model_max_length=T5_TOKENS, **names)


def save_gemma_tokenizer(captions: Iterable[str], instruction: str, folder: Path) -> Any:
    """Write tokenizer.json of a tokenizer that does what Gemma's does: <bos> in front, nothing behind; returns it.

    The instruction's words are tokens too, so that it is not much longer than to Gemma. Capitals are small letters.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

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
    return _save(tokenizer, folder, "PreTrainedTokenizerFast", **names)


def _save(tokenizer: Any, folder: Path, kind: str, **settings: Any) -> Any:
    """Write tokenizer.json and a tokenizer_config.json that transformers 4 and 5 read alike; returns the tokenizer.

    save_pretrained would write what only its own release understands: transformers 4 fails on a list of extra special
    tokens, which transformers 5 writes.
    """
    from transformers import PreTrainedTokenizerFast

    names = {key: value for key, value in settings.items() if key.endswith("_token")}
    tokenizer.add_special_tokens(sorted(set(names.values()), key=tokenizer.token_to_id))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {**settings, "tokenizer_class": kind})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)


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
