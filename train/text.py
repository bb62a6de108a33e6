"""Text conditioning as each base model's own pipeline makes it, from its release folder."""
# B captions, T tokens, D text width

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcgen.fields import items, shown, text, words
from dcgen.files import naming, weight_files
from train.files import read_json, sha256
from train.models import base_backbone, release_part

TextEncoder = Callable[[Sequence[str]], dict[str, Tensor]]


def load_text(
    base: str | Path, device: torch.device | str, dtype: torch.dtype, tokens: int | None = None
) -> TextEncoder:
    """A function from captions to the `cond` that the base's Backbone.velocity takes ((B,...) tensors by name)."""
    kind = base_backbone(base)[0].name
    if kind not in ENCODERS:
        raise ValueError(f"{base}: no text encoding is known for {kind}; known: {', '.join(ENCODERS)}")
    return ENCODERS[kind](Path(base), device, dtype, tokens)


def text_identity(base: str | Path, tokens: int | None = None) -> dict[str, Any]:
    """What decides the embeddings: part of a cache's fingerprint."""
    base = Path(base)
    encoders = [base / part for part in ("text_encoder", "text_encoder_2") if (base / part).is_dir()]
    files = [file for folder in encoders for file in weight_files(folder)]
    names = [f for part in ("tokenizer", "tokenizer_2") for f in sorted((base / part).glob("*")) if f.is_file()]
    digests = {str(file.relative_to(base)): sha256(file) for file in [*files, *names]}
    return {"tokens": tokens, "files": digests}


class FluxText:
    """CLIP's pooled output and T5's hidden states, as FluxPipeline has them (T5 padded, without a mask)."""

    def __init__(self, base: Path, device: torch.device | str, dtype: torch.dtype, tokens: int | None) -> None:
        self.clip_tokenizer = _load(base, "tokenizer")
        self.t5_tokenizer = _load(base, "tokenizer_2")
        self.clip = _load(base, "text_encoder", dtype).to(device)
        self.t5 = _load(base, "text_encoder_2", dtype).to(device)
        self.device = device
        self.tokens = tokens or min(self.t5_tokenizer.model_max_length, 512)

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """prompt_embeds (B,T,D) and pooled (B,D'), float32."""
        pooled = self.clip(self._ids(self.clip_tokenizer, captions, self.clip_tokenizer.model_max_length))
        hidden = self.t5(self._ids(self.t5_tokenizer, captions, self.tokens))
        return {"prompt_embeds": hidden[0].float(), "pooled": pooled.pooler_output.float()}

    def _ids(self, tokenizer: Any, captions: Sequence[str], length: int) -> Tensor:
        batch = tokenizer(list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return batch.input_ids.to(self.device)


def sana_instruction() -> list[str]:
    """The lines that SANA reads in front of every prompt; the prompt follows the last without a break."""
    from diffusers import SanaPipeline

    return inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default


class SanaText:
    """Gemma's hidden states through SanaPipeline's own encode_prompt: instruction before a prompt, none before ""."""

    def __init__(self, base: Path, device: torch.device | str, dtype: torch.dtype, tokens: int | None) -> None:
        from diffusers import SanaPipeline

        parts = {"tokenizer": _load(base, "tokenizer"), "text_encoder": _load(base, "text_encoder", dtype).to(device)}
        self.pipeline: Any = SanaPipeline(**parts, vae=None, transformer=None, scheduler=None)
        self.instruction = sana_instruction()
        self.device = device
        self.tokens = tokens or 300

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """prompt_embeds (B,T,D) and mask (B,T), float32."""
        rows = [self._encode(caption) for caption in captions]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def _encode(self, caption: str) -> dict[str, Tensor]:
        embeds, mask, _, _ = self.pipeline.encode_prompt(
            caption,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.tokens,
            complex_human_instruction=self.instruction if caption else None,
        )
        return {"prompt_embeds": embeds.float(), "mask": mask.float()}


class ClassLabels:
    """DiT's conditioning: captions are class numbers, or names out of the release's id2label; "" is no class."""

    def __init__(self, base: Path, device: torch.device | str, dtype: torch.dtype, tokens: int | None) -> None:
        self.none = base_backbone(base)[1]["num_embeds_ada_norm"]
        self.numbers = _classes(base / "model_index.json")
        self.device = device

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """labels (B,) int64."""
        return {"labels": torch.tensor([self._number(caption) for caption in captions], device=self.device)}

    def _number(self, caption: str) -> int:
        if not caption:
            return self.none
        number = int(caption) if caption.isdecimal() else self.numbers.get(caption)
        if number is None or number >= self.none:
            raise ValueError(f"caption {caption!r} is no class: a number below {self.none} or a name of id2label")
        return number


def _classes(index: Path) -> dict[str, int]:
    """Class number by name, from a release's id2label, where a class may have several names with commas between."""
    labels = read_json(index).get("id2label", {})
    if not isinstance(labels, dict) or not all(n.isdecimal() and isinstance(names, str) for n, names in labels.items()):
        raise ValueError(f"{index}: id2label is {shown(labels)}, expected class numbers and their names")
    return {name.strip(): int(n) for n, names in labels.items() for name in [names, *names.split(",")]}


ENCODERS: dict[str, Callable[..., TextEncoder]] = {"flux": FluxText, "sana": SanaText, "dit": ClassLabels}


# Parts of a release that make the conditioning, by backbone.
PARTS = {
    "flux": ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"),
    "sana": ("tokenizer", "text_encoder"),
}
# The transformers classes that a release may name. None runs code out of the folder, as an Auto class could.
TOKENIZERS = (
    "CLIPTokenizer",
    "CLIPTokenizerFast",
    "GemmaTokenizer",
    "GemmaTokenizerFast",
    "PreTrainedTokenizerFast",
    "T5Tokenizer",
    "T5TokenizerFast",
    "TokenizersBackend",
)
TEXT_ENCODERS = ("CLIPTextModel", "Gemma2Model", "T5EncoderModel")


def check_text(base: str | Path) -> None:
    """An error that names the file unless a release's text side can be loaded as far as its files tell."""
    parts = PARTS.get(base_backbone(base)[0].name, ())
    for part in parts:
        _part_class(Path(base), part)
        release_part(base, part)


def _part_class(base: Path, part: str) -> Any:
    """The transformers class that model_index.json names for a part."""
    import transformers

    index = base / "model_index.json"
    named = read_json(index).get(part)
    if named is None:
        raise ValueError(f"{index} names no {part}; this release is incomplete for text encoding")
    known = TOKENIZERS if part.startswith("tokenizer") else TEXT_ENCODERS
    with naming(index):
        items(text(100), 2, 2)(part, named)
        words(*known)(f"class of {part}", named[1])
        cls = getattr(transformers, named[1], None)
        if cls is None:
            raise ValueError(f"{part} is a {named[1]}, which this transformers does not have")
    return cls


def _load(base: Path, part: str, dtype: torch.dtype | None = None) -> Any:
    """A tokenizer or text encoder by the class that model_index.json names for it."""
    import transformers

    cls, folder = _part_class(base, part), release_part(base, part)
    if dtype is None:
        return cls.from_pretrained(folder, trust_remote_code=False)
    encoder, found = cls.from_pretrained(
        folder, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True
    )
    if found["missing_keys"]:
        raise ValueError(
            f"{folder}: transformers {transformers.__version__} finds {len(found['missing_keys'])} weights of "
            f"{cls.__name__} missing there, {sorted(found['missing_keys'])[0]} among them, and would take random ones. "
            "A newer transformers may have written the folder: install that, or download the release again."
        )
    return encoder.eval().requires_grad_(False)
