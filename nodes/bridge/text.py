# B batch, T text tokens
"""The two text encoders of a FLUX release folder as one CLIP, encoding as the release's own pipeline does."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.supported_models_base
import comfy.text_encoders.flux
import comfy.text_encoders.t5
import folder_paths
import torch
import transformers
from comfy.sd1_clip import SDClipModel, SDTokenizer

from ...dcgen.jsons import read_object
from ...dcgen.tensors import Tensors
from .loading import Parts, by_layer, fill, is_dynamic

# transformers' names for the activations that ComfyUI's encoders have.
_ACTIVATIONS = {"gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh"}
_T5_BUCKETS, _T5_DISTANCE = 32, 128
LONGEST_PROMPT = 32768  # tokens; far more than any encoder here reads


@torch.inference_mode(False)
def load_flux_text(release: Path, index: dict[str, Any], disable_dynamic: bool = False) -> comfy.sd.CLIP:
    """CLIP from text_encoder/ + tokenizer/ (CLIP) and text_encoder_2/ + tokenizer_2/ (T5) of a release.

    T5 is padded to tokenizer_2's own length (512 in the published releases), cut there, and not masked; of CLIP only
    the pooled vector is used. Weights keep the dtype of the files.
    """
    tokenizers = [load_tokenizer(release / name, index.get(name)) for name in ("tokenizer", "tokenizer_2")]
    configs = [_config(release / name, kind) for name, kind in (("text_encoder", "clip"), ("text_encoder_2", "t5"))]
    for name, tokenizer in zip(("tokenizer", "tokenizer_2"), tokenizers, strict=True):
        _check_length(tokenizer, release / name)
    _check_clip_end(configs[0], tokenizers[0], release)
    weights = [Tensors.open(release / name) for name in ("text_encoder", "text_encoder_2")]
    target = comfy.supported_models_base.ClipTarget(_tokenizer_class(tokenizers), _model_class(configs, tokenizers))
    target.params = {"dtypes": [stored_dtype(files) for files in weights]}
    clip = new_clip(target, weights, disable_dynamic)
    model, assign = clip.cond_stage_model, is_dynamic(clip.patcher)
    fill(model.clip_l.transformer, _clip_parts(weights[0]), release / "text_encoder", assign)
    fill(model.t5xxl.transformer, _t5_parts(weights[1]), release / "text_encoder_2", assign)
    return clip


class ReleaseCLIP(comfy.sd.CLIP):
    """The core's CLIP, which always encodes with the model of its patcher.

    The core's own keeps the first model, also where a node gives its patcher another one (Set CLIP Hooks under dynamic
    VRAM, Select CLIP Device), so that the node has no effect.
    """

    @property
    def cond_stage_model(self) -> Any:
        return self.patcher.model if "patcher" in self.__dict__ else self.__dict__["made"]

    @cond_stage_model.setter
    def cond_stage_model(self, model: Any) -> None:
        self.__dict__["made"] = model  # by the constructor, before there is a patcher

    def clone(self, *args: Any, **kwargs: Any) -> comfy.sd.CLIP:
        twin = super().clone(*args, **kwargs)
        twin.__class__ = ReleaseCLIP
        return twin


def new_clip(target: Any, weights: list[Tensors], disable_dynamic: bool) -> comfy.sd.CLIP:
    """A CLIP of random weights, as large as `weights`, which belong into it."""
    size = sum(tensor.numel() for files in weights for tensor in files.meta().values())
    kwargs = {"disable_dynamic": True} if disable_dynamic else {}
    return ReleaseCLIP(
        target, embedding_directory=folder_paths.get_folder_paths("embeddings"), parameters=size, **kwargs
    )


def stored_dtype(weights: Tensors) -> torch.dtype:
    """The dtype most numbers are stored in."""
    sizes: dict[torch.dtype, int] = {}
    for entry in weights.entries.values():
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def load_tokenizer(folder: Path, entry: list[str] | None) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer class that model_index.json names, as diffusers loads it; else what the folder says.

    A class may fail on a folder that another transformers wrote. tokenizer.json alone then says the same.
    """
    kind = getattr(transformers, entry[1], None) if entry and entry[0] == "transformers" else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedTokenizerBase)):
        kind = transformers.AutoTokenizer
    _check_files(folder)
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever a class trips over; nothing in here can be cancelled
        if not (folder / "tokenizer.json").is_file():
            raise ValueError(_unreadable(folder, error)) from error
        logging.info("DC-Gen: %s: %s failed (%s); tokenizer.json is read by itself", folder, kind.__name__, error)
    try:
        return _plain_tokenizer(folder)
    except Exception as error:  # tokenizers raises no narrower kind
        raise ValueError(_unreadable(folder, error)) from error


def _check_files(folder: Path) -> None:
    """Of a folder without vocabulary transformers 5 makes a tokenizer that knows no word."""
    files = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if not any(name.startswith(("tokenizer.", "vocab.", "spiece.")) for name in files):
        raise ValueError(
            f"{folder} has no tokenizer: found {', '.join(files) or 'nothing'}, expected tokenizer.json. "
            "Download the release again."
        )


def _plain_tokenizer(folder: Path) -> transformers.PreTrainedTokenizerFast:
    """tokenizer.json as it is, with the special tokens and the length that tokenizer_config.json names."""
    file = folder / "tokenizer_config.json"
    config = read_object(file) if file.is_file() else {}
    names = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
    found = {name: config[name] for name in names if config.get(name)}
    settings = {name: token["content"] if isinstance(token, dict) else token for name, token in found.items()}
    settings |= {name: config[name] for name in ("model_max_length", "padding_side") if config.get(name)}
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **settings)


def _unreadable(folder: Path, error: Exception) -> str:
    return (
        f"{folder}: transformers {transformers.__version__} cannot read the tokenizer there ({error}). A newer release "
        "may have written it: update transformers in ComfyUI's Python, as ComfyUI's requirements.txt says."
    )


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
        found = (config.get("relative_attention_num_buckets", 32), config.get("relative_attention_max_distance", 128))
        if found != (_T5_BUCKETS, _T5_DISTANCE):
            raise ValueError(
                f"{file}: relative attention with (buckets, distance) = {found}; ComfyUI's T5 has {_T5_BUCKETS} and "
                f"{_T5_DISTANCE}."
            )
    return config


def _check_length(tokenizer: Any, folder: Path) -> None:
    """Prompts are padded to the tokenizer's own length; transformers makes up 1e30 where a file says none."""
    if not 1 <= tokenizer.model_max_length <= LONGEST_PROMPT:
        raise ValueError(
            f"{folder}: tokenizer_config.json gives model_max_length {tokenizer.model_max_length:g}, expected 1 to "
            f"{LONGEST_PROMPT}. The file is not the release's; download it again."
        )


def _check_clip_end(config: dict[str, Any], tokenizer: Any, release: Path) -> None:
    """CLIP's pooled vector is read at the end token; transformers finds it in two ways that must agree with ours."""
    end = config.get("eos_token_id", 49407)
    legacy = end == 2  # transformers then takes the highest token id of the prompt
    if end != tokenizer.eos_token_id and not (legacy and tokenizer.eos_token_id == max(tokenizer.get_vocab().values())):
        raise ValueError(
            f"{release}: text_encoder/config.json ends prompts with token {end}, tokenizer/ with "
            f"{tokenizer.eos_token_id}. One of the two folders is from another release."
        )


class LoadedTokenizer(SDTokenizer):
    """ComfyUI's tokenizer around one that is already loaded; `limit` cuts the prompt as the release's pipeline does."""

    def __init__(self, tokenizer: Any, limit: int | None, **kwargs: Any):
        class Loaded:
            @staticmethod
            def from_pretrained(_path: str, **_kwargs: Any) -> Any:
                return tokenizer

        super().__init__("", tokenizer_class=Loaded, **kwargs)
        self.limit = limit

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs: Any) -> list:
        # Half of an emoji, which a prompt cut at some length may end in, is no text to any tokenizer.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        batches = super().tokenize_with_weights(text, return_word_ids, **kwargs)
        if self.limit is None or len(batches[0]) <= self.limit:
            return batches
        logging.warning(
            "DC-Gen: the prompt has %d tokens; the text encoder reads the first %d", len(batches[0]), self.limit
        )
        end = next(token for token in reversed(batches[0]) if token[0] == self.end_token)
        return [[*batches[0][: self.limit - 1], end]]


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
            # The core's class has CLIP-L's vocabulary built in.
            words = (configs[0]["vocab_size"], configs[0]["hidden_size"])
            embedding = self.clip_l.operations.Embedding(*words, dtype=dtypes[0], device=device)
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
    """CLIP's weights by layer. transformers 5 dropped the `text_model.` of earlier releases; ids are made anew."""
    found = {key.removeprefix("text_model."): key for key in weights.entries if not key.endswith("position_ids")}
    norm = weights.entries[found["final_layer_norm.weight"]]
    projection = found.pop("text_projection.weight", None)
    square = torch.eye(norm.shape[0], dtype=norm.dtype) if projection is None else weights.get(projection)
    yield {"text_projection.weight": square}
    for names in by_layer(found):
        yield {f"text_model.{name}": weights.get(found[name]) for name in names}


def _t5_parts(weights: Tensors) -> Parts:
    """T5's weights by layer. `encoder.embed_tokens` is the same tensor as `shared`; a file may hold either or both."""
    found = {key: key for key in weights.entries}
    tied = found.pop("encoder.embed_tokens.weight", None)
    if tied is not None:
        found.setdefault("shared.weight", tied)
    for names in by_layer(found):
        yield {name: weights.get(found[name]) for name in names}
