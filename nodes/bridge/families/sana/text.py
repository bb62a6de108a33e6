# B batch, T text tokens, H heads, d head width
"""SANA's text encoder, Gemma-2-2B-it: from a release folder or core's CLIP, with instruction, 300 positions, mask."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.supported_models_base
import comfy.text_encoders.llama
import torch
from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer, SDClipModel
from torch import Tensor, nn

from .....dcgen.backbones import BACKBONES
from .....dcgen.folder import Release
from .....dcgen.jsons import read_object
from .....dcgen.tensors import Tensors
from ...latent_format import TEXT_KEY
from ...loading import by_layer, fill, is_dynamic
from ...text import LoadedTokenizer, load_tokenizer, new_clip

# Text positions that SANA reads: the first (the start token) and the last 299 of instruction + prompt.
POSITIONS = 300
GEMMA = "gemma2_2b"
# SANA was trained with this instruction before every prompt, so its wording is part of the model. From diffusers'
# SanaPipeline (arXiv:2410.10629 section 3.3 shows the idea); the user's prompt follows directly.
INSTRUCTION = "\n".join(
    (
        "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions suitable for "
        "image generation. Evaluate the level of detail in the user prompt:",
        "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial "
        "relationships to create vivid and concrete scenes.",
        "- If the prompt is already detailed, refine and enhance the existing details slightly without "
        "overcomplicating.",
        "Here are examples of how to transform or refine prompts:",
        "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping "
        "peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers.",
        "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street "
        "lamps, a diverse crowd of people in colorful clothing, and a double-decker bus passing by towering glass "
        "skyscrapers.",
        "Please generate only the enhanced description for the prompt below and avoid including any additional "
        "commentary or evaluations:",
        "User Prompt: ",
    )
)
# Gemma 2's attention: scores are bounded to +-50 by tanh. Core's classes omit this.
SOFTCAP = 50.0
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


def encode(clip: comfy.sd.CLIP, text: str, instruction: str) -> list:
    """CONDITIONING of one prompt: Gemma's last hidden state after its final norm (1,300,Dt), and the mask (1,300).

    instruction goes before the text, and is "" for a negative prompt. ValueError when the CLIP is not Gemma 2.
    """
    name, gemma = _gemma(clip)
    prompt = text.lower().strip()
    tokens = _tokens(clip, name, instruction + prompt)
    length = POSITIONS
    if instruction:
        length += len(_tokens(clip, name, instruction)) - 2
    padding = (gemma.special_tokens["pad"], 1.0)
    tokens = [*tokens, *([padding] * (length - len(tokens)))][:length]
    clip = clip.clone()
    clip.layer_idx = None  # SANA reads the last layer, whatever CLIPSetLastLayer says
    with _as_trained(gemma):
        out = clip.encode_from_tokens({name: [tokens]}, return_pooled=True, return_dict=True)
    features, mask = (
        torch.cat((part[:, :1], part[:, 1 - POSITIONS :]), 1) for part in (out["cond"], out["attention_mask"])
    )
    rest = {key: value for key, value in out.items() if key not in ("cond", "attention_mask")}
    return [[features, {**rest, "attention_mask": mask, TEXT_KEY: BACKBONES["sana"].name}]]


def _gemma(clip: comfy.sd.CLIP) -> tuple[str, Any]:
    """(name in the CLIP's tokens, its SDClipModel)."""
    for name, part in clip.cond_stage_model.named_children():
        config = getattr(getattr(getattr(part, "transformer", None), "model", None), "config", None)
        if getattr(config, "transformer_type", None) == "gemma2":
            return name, part
    raise ValueError(
        f"SANA reads text through Gemma-2-2B-it, and this CLIP is a {type(clip.cond_stage_model).__name__}. Load "
        "gemma-2-2b-it with CLIPLoader (type lumina2), or a SANA release with DCGenReleaseLoader."
    )


def _tokens(clip: comfy.sd.CLIP, name: str, text: str) -> list[tuple]:
    """(token, weight) with the start token first. (words:1.2) is plain text here: SANA has no prompt weights."""
    (tokens,) = clip.tokenize(text, disable_weights=True)[name]
    return tokens


@contextlib.contextmanager
def _as_trained(gemma: Any) -> Iterator[None]:
    """Within this context the encoder returns its last layer after the final norm, with Gemma's own attention."""

    def swap(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, {**kwargs, "optimized_attention": attention}

    layers = [layer.self_attn for layer in gemma.transformer.model.layers]
    handles = [layer.register_forward_pre_hook(swap, with_kwargs=True) for layer in layers]
    # Not through CLIP.clip_layer: core resets it to the default layer when it sets the device.
    defaults = gemma.options_default
    gemma.options_default = ("last", None, *defaults[2:])
    try:
        yield
    finally:
        gemma.options_default = defaults
        gemma.reset_clip_options()
        for handle in handles:
            handle.remove()


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None, **_: Any) -> Tensor:
    """softmax(cap * tanh(q k^T / (cap sqrt(d))) + mask) v: query, key, value (B,H,T,d) -> (B,T,H*d)."""
    scores = (query @ key.transpose(2, 3)) * query.shape[-1] ** -0.5
    scores = SOFTCAP * torch.tanh(scores / SOFTCAP)
    if mask is not None:
        scores = scores + mask
    mixed = scores.float().softmax(-1).to(value.dtype) @ value
    return mixed.transpose(1, 2).flatten(2)


@torch.inference_mode(False)
def load_sana_text(release: Release, disable_dynamic: bool = False) -> comfy.sd.CLIP:
    """CLIP from text_encoder/ (Gemma 2) + tokenizer/ of a SANA release. Weights keep the dtype of the files."""
    folder, vocabulary = release.path / "text_encoder", release.path / "tokenizer"
    config = _config(folder)
    tokenizer = load_tokenizer(vocabulary, release.index.get("tokenizer"))
    if tokenizer("")["input_ids"] != [tokenizer.bos_token_id] or tokenizer.pad_token_id is None:
        raise ValueError(
            f"{vocabulary}: Gemma's tokenizer puts a start token, and only that, around a text and has a "
            "padding token; this one does not. Download the release again."
        )
    files = Tensors.open(folder)
    names = _names(files, folder)
    target = comfy.supported_models_base.ClipTarget(_tokenizer_class(tokenizer), _model_class(config, tokenizer))
    target.params = {"stored": files.dtype}
    clip = new_clip(target, [files], disable_dynamic)
    parts = ({name: files.get(names[name]) for name in layer} for layer in by_layer(names))
    fill(getattr(clip.cond_stage_model, GEMMA).transformer.model, parts, folder, is_dynamic(clip.patcher))
    return clip


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{file} is missing; a SANA release has Gemma 2 there. Download the release again.")
    config = read_object(file)
    kind, head = config.get("model_type"), config.get("head_dim", 256)
    attention = (kind, config.get("attn_logit_softcapping", SOFTCAP), config.get("query_pre_attn_scalar", 256))
    if attention != ("gemma2", SOFTCAP, head):
        raise ValueError(
            f"{file}: (model_type, attn_logit_softcapping, query_pre_attn_scalar) = {attention}; SANA's text encoder "
            f"is a Gemma 2 with ('gemma2', {SOFTCAP}, {head})."
        )
    rope = config.get("rope_parameters") or {}
    return {**config, "head_dim": head, "rope_theta": config.get("rope_theta", rope.get("rope_theta", 10000.0))}


def _names(files: Tensors, folder: Path) -> dict[str, str]:
    """Names in Gemma2Model -> names in the files, which hold a Gemma2Model or a Gemma2ForCausalLM."""
    names = {key.removeprefix("model."): key for key in files.entries if not key.startswith("lm_head.")}
    if "norm.weight" not in names:
        raise ValueError(
            f"{folder}: the text encoder has no final norm (norm.weight), which SANA's text features go through. "
            "Download the release again, or use the CLIPLoader with a whole gemma-2-2b-it file."
        )
    return names


def _tokenizer_class(tokenizer: Any) -> type:
    def gemma(embedding_directory: Any = None, tokenizer_data: dict | None = None) -> LoadedTokenizer:
        return LoadedTokenizer(
            tokenizer,
            None,
            pad_with_end=False,
            pad_token=tokenizer.pad_token_id,
            has_end_token=False,
            pad_to_max_length=False,
            max_length=99999999,
            min_length=1,
            embedding_key=GEMMA,
            embedding_directory=embedding_directory,
            tokenizer_data=tokenizer_data or {},
        )

    class ReleaseTokenizer(SD1Tokenizer):
        def __init__(self, embedding_directory: Any = None, tokenizer_data: dict | None = None):
            super().__init__(embedding_directory, tokenizer_data or {}, tokenizer=gemma, name=GEMMA)

    return ReleaseTokenizer


class _Gemma(comfy.text_encoders.llama.BaseLlama, nn.Module):
    """Core's Gemma 2 in any size."""

    def __init__(self, config: dict[str, Any], dtype: Any, device: Any, operations: Any):
        nn.Module.__init__(self)
        sizes = {key: config[key] for key in _FIELDS if key in config}
        gemma = comfy.text_encoders.llama.Gemma2_2B_Config(**sizes, rope_theta=config["rope_theta"])
        gemma.head_dim = config["head_dim"]
        self.num_layers = gemma.num_hidden_layers
        self.model = comfy.text_encoders.llama.Llama2_(gemma, device=device, dtype=dtype, ops=operations)
        self.dtype = dtype


def _model_class(config: dict[str, Any], tokenizer: Any) -> type:
    special = {"start": tokenizer.bos_token_id, "pad": tokenizer.pad_token_id}

    def gemma(device: Any = "cpu", dtype: Any = None, model_options: dict | None = None) -> SDClipModel:
        return SDClipModel(
            device=device,
            dtype=dtype,
            textmodel_json_config=dict(config),
            special_tokens=special,
            model_class=_Gemma,
            enable_attention_masks=True,
            return_attention_masks=True,
            model_options=model_options or {},
        )

    class ReleaseTextModel(SD1ClipModel):
        def __init__(self, stored: Any, device: Any = "cpu", dtype: Any = None, model_options: dict | None = None):
            super().__init__(device, stored, model_options or {}, name=GEMMA, clip_model=gemma)

    return ReleaseTextModel
