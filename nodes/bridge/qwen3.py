# B batch, T text tokens, D width, K hidden states
"""Qwen3 of a release folder as CLIP, for the families that read its hidden states."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.supported_models_base
import comfy.text_encoders.llama
import torch
from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer, SDClipModel
from torch import nn

from ...dcgen.folder import Release
from ...dcgen.jsons import read_object
from ...dcgen.tensors import Tensors
from .loading import by_layer, fill, is_dynamic
from .text import LoadedTokenizer, load_tokenizer, new_clip

NAME = "qwen3"
ENCODER, TOKENIZER = "text_encoder", "tokenizer"
_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)


@dataclass(frozen=True)
class Reading:
    """How a family reads Qwen3.

    template: the prompt's surroundings, {} = the prompt; layers: the hidden states that it takes side by side, as
    inputs of these layers (negative: counted from the end); tokens: the longest text; padded: shorter ones are as long.
    """

    template: str
    layers: tuple[int, ...]
    tokens: int
    padded: bool


@torch.inference_mode(False)
def load_qwen3(release: Release, reading: Reading, disable_dynamic: bool = False) -> comfy.sd.CLIP:
    """CLIP from text_encoder/ (Qwen3) + tokenizer/ of a release. Weights keep the dtype of the files.

    ValueError names a file that is missing, or not of a Qwen3 with these layers.
    """
    folder, vocabulary = release.path / ENCODER, release.path / TOKENIZER
    config = _config(folder, reading)
    tokenizer = load_tokenizer(vocabulary, release.index.get(TOKENIZER))
    if tokenizer("")["input_ids"] or tokenizer.pad_token_id is None:
        raise ValueError(
            f"{vocabulary}: Qwen's tokenizer puts nothing around a text and has a padding token; this one "
            "does not. Download the release again."
        )
    files = Tensors.open(folder)
    names = {key.removeprefix("model."): key for key in files.entries if not key.startswith("lm_head.")}
    target = comfy.supported_models_base.ClipTarget(
        _tokenizer_class(tokenizer, reading), _model_class(config, tokenizer.pad_token_id, reading)
    )
    target.params = {"stored": files.dtype}
    clip = new_clip(target, [files], disable_dynamic)
    parts = ({name: files.get(names[name]) for name in layer} for layer in by_layer(names))
    fill(getattr(clip.cond_stage_model, NAME).transformer.model, parts, folder, is_dynamic(clip.patcher))
    return clip


def _config(folder: Path, reading: Reading) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{file} is missing; this release has Qwen3 there. Download it again.")
    config = read_object(file)
    if config.get("model_type") != "qwen3":
        raise ValueError(
            f"{file}: model_type is {config.get('model_type')!r}, and this family's text encoder is qwen3."
        )
    depth = config["num_hidden_layers"]
    if not all(-depth <= layer < depth for layer in reading.layers):
        raise ValueError(f"{file}: {depth} layers; this family reads the input of layer {max(reading.layers)}.")
    rope = config.get("rope_parameters") or {}
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    theta = config.get("rope_theta") or rope.get("rope_theta", 1000000.0)
    return {**config, "head_dim": head_dim, "rope_theta": theta}


class _Tokenizer(LoadedTokenizer):
    """Cuts the text at the family's length, without an end token."""

    def __init__(self, tokenizer: Any, reading: Reading, **kwargs: Any):
        super().__init__(
            tokenizer,
            None,
            pad_with_end=False,
            pad_token=tokenizer.pad_token_id,
            has_start_token=False,
            has_end_token=False,
            pad_to_max_length=False,
            max_length=99999999,
            min_length=reading.tokens if reading.padded else 1,
            embedding_key=NAME,
            **kwargs,
        )
        self.longest = reading.tokens

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs: Any) -> list:
        (tokens,) = super().tokenize_with_weights(text, return_word_ids, **kwargs)
        if len(tokens) > self.longest:
            logging.warning(
                "DC-Gen: the prompt has %d tokens; the text encoder reads the first %d", len(tokens), self.longest
            )
        return [tokens[: self.longest]]


def _tokenizer_class(tokenizer: Any, reading: Reading) -> type:
    def qwen3(embedding_directory: Any = None, tokenizer_data: dict | None = None) -> _Tokenizer:
        return _Tokenizer(
            tokenizer, reading, embedding_directory=embedding_directory, tokenizer_data=tokenizer_data or {}
        )

    class ReleaseTokenizer(SD1Tokenizer):
        def __init__(self, embedding_directory: Any = None, tokenizer_data: dict | None = None):
            super().__init__(embedding_directory, tokenizer_data or {}, tokenizer=qwen3, name=NAME)

        def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs: Any) -> dict:
            kwargs["disable_weights"] = True  # (words:1.2) is plain text here
            return super().tokenize_with_weights(reading.template.format(text), return_word_ids, **kwargs)

    return ReleaseTokenizer


class _Qwen3(comfy.text_encoders.llama.BaseLlama, nn.Module):
    """Core's Qwen3 in any size."""

    def __init__(self, config: dict[str, Any], dtype: Any, device: Any, operations: Any):
        nn.Module.__init__(self)
        sizes = {key: config[key] for key in _FIELDS if key in config}
        qwen = comfy.text_encoders.llama.Qwen3_4BConfig(**sizes, rope_theta=config["rope_theta"])
        qwen.head_dim = config["head_dim"]
        self.num_layers = qwen.num_hidden_layers
        self.model = comfy.text_encoders.llama.Llama2_(qwen, device=device, dtype=dtype, ops=operations)
        self.dtype = dtype


def _model_class(config: dict[str, Any], pad: int, reading: Reading) -> type:
    def qwen3(device: Any = "cpu", dtype: Any = None, model_options: dict | None = None) -> SDClipModel:
        return SDClipModel(
            device=device,
            dtype=dtype,
            layer=[layer % config["num_hidden_layers"] for layer in reading.layers],  # core's own FLUX.2 gives a list
            textmodel_json_config=dict(config),
            special_tokens={"pad": pad},
            layer_norm_hidden_state=False,
            model_class=_Qwen3,
            enable_attention_masks=True,
            return_attention_masks=True,
            model_options=model_options or {},
        )

    class ReleaseTextModel(SD1ClipModel):
        def __init__(self, stored: Any, device: Any = "cpu", dtype: Any = None, model_options: dict | None = None):
            super().__init__(device, stored, model_options or {}, name=NAME, clip_model=qwen3)

        def encode_token_weights(self, token_weight_pairs: Any) -> tuple:
            """(B,T,K*D) features: core gives (B,K,T,D)."""
            out, *rest = super().encode_token_weights(token_weight_pairs)
            return (out.movedim(1, 2).flatten(2), *rest)

    return ReleaseTextModel
