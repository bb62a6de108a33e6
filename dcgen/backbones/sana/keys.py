"""SANA's original names (NVlabs .pth) and diffusers' names for the same tensors."""

from __future__ import annotations

from typing import Any

from ..keymap import KeyMap, Row

_BLOCK, _ORIGINAL = "transformer_blocks.{i}", "blocks.{i}"
_WEIGHT = (".weight",)


def _row(original: str, *parts: str, **kwargs: Any) -> Row:
    return Row(f"{_ORIGINAL}.{original}", tuple(f"{_BLOCK}.{part}" for part in parts), **kwargs)


_BLOCKS = (
    _row("scale_shift_table", "scale_shift_table", suffixes=("",)),
    # Unlike in DC-AE, the thirds are q, k and v.
    _row("attn.qkv", *(f"attn1.to_{n}" for n in "qkv"), suffixes=_WEIGHT),
    _row("attn.qkv", *(f"attn1.to_{n}" for n in "qkv"), suffixes=(".bias",), optional="attention bias"),
    _row("attn.proj", "attn1.to_out.0"),
    _row("cross_attn.q_linear", "attn2.to_q"),
    _row("cross_attn.kv_linear", "attn2.to_k", "attn2.to_v"),
    _row("cross_attn.proj", "attn2.to_out.0"),
    *(
        _row(f"{original}.{n}_norm", f"{part}.norm_{n}", suffixes=_WEIGHT, optional="qk norm")
        for original, part in (("attn", "attn1"), ("cross_attn", "attn2"))
        for n in "qk"
    ),
    _row("mlp.inverted_conv.conv", "ff.conv_inverted"),
    _row("mlp.depth_conv.conv", "ff.conv_depth"),
    _row("mlp.point_conv.conv", "ff.conv_point", suffixes=_WEIGHT),
)
_TOP = (
    Row("x_embedder.proj", ("patch_embed.proj",)),
    Row("y_embedder.y_proj.fc1", ("caption_projection.linear_1",)),
    Row("y_embedder.y_proj.fc2", ("caption_projection.linear_2",)),
    Row("attention_y_norm", ("caption_norm",), suffixes=_WEIGHT),
    Row("t_block.1", ("time_embed.linear",)),
    Row("final_layer.linear", ("proj_out",)),
    Row("final_layer.scale_shift_table", ("scale_shift_table",), suffixes=("",)),
)
# Not used by the network: the null caption (for training), positions (recomputed), a loss weight of training.
_DROPPED = ("y_embedder.y_embedding", "pos_embed", "logvar_linear.")


def _map(model: str, *embedders: tuple[str, str]) -> KeyMap:
    rows = tuple(
        Row(f"{original}.mlp.{layer}", (f"time_embed.{part}.linear_{n}",))
        for original, part in embedders
        for n, layer in ((1, 0), (2, 2))
    )
    return KeyMap(model=model, top=(*_TOP, *rows), blocks={"block": _BLOCKS}, dropped=_DROPPED)


KEYS = _map("SANA", ("t_embedder", "emb.timestep_embedder"))
SPRINT_KEYS = _map("SANA-Sprint", ("t_embedder", "timestep_embedder"), ("cfg_embedder", "guidance_embedder"))
