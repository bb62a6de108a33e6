"""Text conditioning as each base model's own pipeline makes it, from its release folder."""
# B captions, T tokens, D text width

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
    files = [f for part in ("text_encoder", "text_encoder_2") for f in sorted((base / part).glob("*.safetensors"))]
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
        labels = read_json(base / "model_index.json").get("id2label", {})
        self.numbers = {word.strip(): int(n) for n, words in labels.items() for word in [words, *words.split(",")]}
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


ENCODERS: dict[str, Callable[..., TextEncoder]] = {"flux": FluxText, "sana": SanaText, "dit": ClassLabels}


def _load(base: Path, part: str, dtype: torch.dtype | None = None) -> Any:
    """A tokenizer or text encoder by the class that model_index.json names for it."""
    import transformers

    index = read_json(base / "model_index.json")
    if part not in index:
        raise ValueError(f"{base}/model_index.json names no {part}; this release is incomplete for text encoding")
    cls = getattr(transformers, index[part][1], None)
    if cls is None:
        raise ValueError(
            f"{base}/model_index.json: {part} is a {index[part][1]}, which this transformers does not have"
        )
    folder = release_part(base, part)
    if dtype is None:
        return cls.from_pretrained(folder)
    encoder, found = cls.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    if found["missing_keys"]:
        raise ValueError(
            f"{folder}: transformers {transformers.__version__} finds {len(found['missing_keys'])} weights of "
            f"{cls.__name__} missing there, {sorted(found['missing_keys'])[0]} among them, and would take random ones. "
            "A newer transformers may have written the folder: install that, or download the release again."
        )
    return encoder.eval().requires_grad_(False)
