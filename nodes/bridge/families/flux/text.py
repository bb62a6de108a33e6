# B batch, T text tokens
"""The two text encoders of a FLUX release folder as one CLIP that encodes like the release's diffusers pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sd
import comfy.supported_models_base
import comfy.text_encoders.flux
import comfy.text_encoders.t5
import torch
from comfy.sd1_clip import SDClipModel

from .....dcgen.folder import Release
from .....dcgen.jsons import read_object
from .....dcgen.tensors import Tensors
from ...loading import Parts, by_layer, fill, is_dynamic
from ...text import LoadedTokenizer, check_length, load_tokenizer, new_clip

# transformers' names for the activations that ComfyUI's encoders have.
_ACTIVATIONS = {"gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh"}
_T5_BUCKETS, _T5_DISTANCE = 32, 128


@torch.inference_mode(False)
def load_flux_text(release: Release, disable_dynamic: bool = False) -> comfy.sd.CLIP:
    """CLIP from text_encoder/ + tokenizer/ (CLIP) and text_encoder_2/ + tokenizer_2/ (T5) of a release.

    T5 is padded and truncated to tokenizer_2's own length (512 in the published releases), without a mask; only the
    pooled vector of CLIP is used. Weights keep the dtype of the files.
    """
    path = release.path
    tokenizers = [load_tokenizer(path / name, release.index.get(name)) for name in ("tokenizer", "tokenizer_2")]
    configs = [_config(path / name, kind) for name, kind in (("text_encoder", "clip"), ("text_encoder_2", "t5"))]
    for name, tokenizer in zip(("tokenizer", "tokenizer_2"), tokenizers, strict=True):
        check_length(tokenizer, path / name)
    _check_clip_end(configs[0], tokenizers[0], path)
    weights = [Tensors.open(path / name) for name in ("text_encoder", "text_encoder_2")]
    target = comfy.supported_models_base.ClipTarget(_tokenizer_class(tokenizers), _model_class(configs, tokenizers))
    target.params = {"dtypes": [files.dtype for files in weights]}
    clip = new_clip(target, weights, disable_dynamic)
    model, as_stored = clip.cond_stage_model, is_dynamic(clip.patcher)
    fill(model.clip_l.transformer, _clip_parts(weights[0]), path / "text_encoder", as_stored)
    fill(model.t5xxl.transformer, _t5_parts(weights[1]), path / "text_encoder_2", as_stored)
    return clip


def _config(folder: Path, kind: str) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{file} is missing; a FLUX release has a {kind.upper()} text encoder there.")
    config = read_object(file)
    config = config.get("text_config", config) if kind == "clip" else config
    if kind == "t5":
        gated, _, act = config.get("feed_forward_proj", "relu").rpartition("-")
        config.setdefault("is_gated_act", gated == "gated")
        act = config.get("dense_act_fn", "gelu_new" if (gated, act) == ("gated", "gelu") else act)
        config["dense_act_fn"] = _ACTIVATIONS.get(act, act)
        buckets = (config.get("relative_attention_num_buckets", 32), config.get("relative_attention_max_distance", 128))
        if buckets != (_T5_BUCKETS, _T5_DISTANCE):
            raise ValueError(
                f"{file}: relative attention with (buckets, distance) = {buckets}; ComfyUI's T5 has {_T5_BUCKETS} and "
                f"{_T5_DISTANCE}."
            )
    return config


def _check_clip_end(config: dict[str, Any], tokenizer: Any, release: Path) -> None:
    """CLIP's pooled vector is read at the end token. transformers finds that token in one of two ways; check that ours
    is the same.
    """
    end = config.get("eos_token_id", 49407)
    legacy = end == 2  # transformers then uses the highest token id of the prompt
    if end != tokenizer.eos_token_id and not (legacy and tokenizer.eos_token_id == max(tokenizer.get_vocab().values())):
        raise ValueError(
            f"{release}: text_encoder/config.json ends prompts with token {end}, tokenizer/ with "
            f"{tokenizer.eos_token_id}. One of the two folders is from another release."
        )


def _tokenizer_class(tokenizers: list) -> type:
    clip, t5 = tokenizers

    class ReleaseTokenizer(comfy.text_encoders.flux.FluxTokenizer):
        def __init__(self, embedding_directory: Any = None, tokenizer_data: dict | None = None):
            shared = {"embedding_directory": embedding_directory, "tokenizer_data": tokenizer_data or {}}
            self.clip_l = LoadedTokenizer(
                clip, None, max_length=clip.model_max_length, embedding_key="clip_l", **shared
            )
            self.t5xxl = LoadedTokenizer(
                t5,
                t5.model_max_length,
                pad_with_end=False,
                pad_token=t5.pad_token_id,
                has_start_token=False,
                pad_to_max_length=False,
                max_length=99999999,
                min_length=t5.model_max_length,
                embedding_key="t5xxl",
                **shared,
            )

    return ReleaseTokenizer


def _model_class(configs: list[dict[str, Any]], tokenizers: list) -> type:
    clip, t5 = tokenizers
    clip_tokens = {"start": clip.bos_token_id, "end": clip.eos_token_id, "pad": clip.eos_token_id}

    class ReleaseTextModel(comfy.text_encoders.flux.FluxClipModel):
        def __init__(self, dtypes: list, device: Any = "cpu", dtype: Any = None, model_options: dict | None = None):
            torch.nn.Module.__init__(self)
            shared = {"device": device, "model_options": model_options or {}}
            self.clip_l = SDClipModel(
                textmodel_json_config=dict(configs[0]),
                max_length=clip.model_max_length,
                special_tokens=clip_tokens,
                return_projected_pooled=False,
                dtype=dtypes[0],
                **shared,
            )
            self.t5xxl = SDClipModel(
                textmodel_json_config=dict(configs[1]),
                special_tokens={"end": t5.eos_token_id, "pad": t5.pad_token_id},
                model_class=comfy.text_encoders.t5.T5,
                dtype=dtypes[1],
                **shared,
            )
            self.dtypes = set(dtypes)
            # Core's class has CLIP-L's vocabulary size built in.
            sizes = (configs[0]["vocab_size"], configs[0]["hidden_size"])
            embedding = self.clip_l.operations.Embedding(*sizes, dtype=dtypes[0], device=device)
            self.clip_l.transformer.set_input_embeddings(embedding)
            _set_epsilon(self.clip_l, configs[0].get("layer_norm_eps", 1e-5))
            _set_epsilon(self.t5xxl, configs[1].get("layer_norm_epsilon", 1e-6))

    return ReleaseTextModel


def _set_epsilon(model: torch.nn.Module, epsilon: float) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = epsilon
        elif isinstance(module, comfy.text_encoders.t5.T5LayerNorm):
            module.variance_epsilon = epsilon


def _clip_parts(weights: Tensors) -> Parts:
    """CLIP's weights by layer. transformers 5 dropped the prefix `text_model.`; position ids are not weights."""
    names = {key.removeprefix("text_model."): key for key in weights.entries if not key.endswith("position_ids")}
    norm = weights.entries[names["final_layer_norm.weight"]]
    key = names.pop("text_projection.weight", None)
    projection = torch.eye(norm.shape[0], dtype=norm.dtype) if key is None else weights.get(key)
    yield {"text_projection.weight": projection}
    for layer in by_layer(names):
        yield {f"text_model.{name}": weights.get(names[name]) for name in layer}


def _t5_parts(weights: Tensors) -> Parts:
    """T5's weights by layer. `encoder.embed_tokens` is the same tensor as `shared`; a file may hold either or both."""
    names = {key: key for key in weights.entries}
    tied = names.pop("encoder.embed_tokens.weight", None)
    if tied is not None:
        names.setdefault("shared.weight", tied)
    for layer in by_layer(names):
        yield {name: weights.get(names[name]) for name in layer}
