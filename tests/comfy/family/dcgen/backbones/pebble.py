# C latent channels, p patch size, D width
"""Pebble, a family made up for a test: ends named by patch size, fused q k v in the original files, ragged text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from ..fields import Check
from ..latent import LatentSpace
from ..schedule import Schedule
from .base import FIELDS, SIZE, Backbone, Config, Ends, dimension
from .keymap import KeyMap, Row, count_blocks


def _keys(p: int) -> KeyMap:
    block, original = "transformer_blocks.{i}", "layers.{i}"
    return KeyMap(
        model="Pebble",
        top=(
            Row(f"embed.{p}x{p}", (f"x_embedders.p{p}",)),
            Row(f"final.{p}x{p}", (f"proj_outs.p{p}",)),
            Row("text_in", ("context_embedder",)),
            Row("time.0", ("time_embed.linear_1",)),
            Row("time.2", ("time_embed.linear_2",)),
        ),
        blocks={
            "block": (
                Row(f"{original}.qkv", tuple(f"{block}.attn.to_{part}" for part in "qkv")),
                Row(f"{original}.out", (f"{block}.attn.to_out",)),
                Row(f"{original}.mlp.0", (f"{block}.ff.0",)),
                Row(f"{original}.mlp.2", (f"{block}.ff.2",)),
            )
        },
    )


class Pebble(Backbone):
    """Pebble on disk."""

    name = "pebble"
    title = "Pebble"
    diffusers_class = "PebbleTransformer2DModel"
    modelspec = "pebble"
    keys = _keys(1)
    original_signature = ("text_in.weight", "layers.0.qkv.weight")
    diffusers_signature = (
        "context_embedder.weight",
        "transformer_blocks.0.attn.to_q.weight",
        "time_embed.linear_1.weight",
    )
    stacks: ClassVar[dict[str, tuple[str, str, str]]] = {"block": ("num_layers", "transformer_blocks", "layers")}
    identity_layers: ClassVar[dict[str, str]] = {"block": "attn.to_q"}
    signature_fields = ("num_layers", "num_attention_heads", "text_dim")
    fields: ClassVar[dict[str, Check]] = {**FIELDS, "text_dim": SIZE}
    needed_fields = ("in_channels", "patch_size", "attention_head_dim", *signature_fields)

    def ends(self, config: Mapping[str, Any]) -> Ends:
        return Ends(f"x_embedders.p{config['patch_size']}", f"proj_outs.p{config['patch_size']}")

    def key_map(self, config: Mapping[str, Any]) -> KeyMap:
        return _keys(config["patch_size"])

    def embedder_shape(self, width: int, channels: int, p: int) -> tuple[int, ...]:
        return width, channels * p * p

    def config_with_latent(self, config: Config, channels: int, patch_size: int = 1) -> Config:
        return {**config, "in_channels": channels, "patch_size": patch_size}

    def extra_shapes(self, base: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        return {}

    def layers(self, base: Mapping[str, Any]) -> Mapping[str, Mapping[str, tuple[int, ...]]]:
        D = base["width"]
        top = {"context_embedder": (D, base["text_dim"]), "time_embed.linear_1": (D, 64), "time_embed.linear_2": (D, D)}
        block = {f"attn.to_{part}": (D, D) for part in ("q", "k", "v", "out")}
        return {"": top, "block": {**block, "ff.0": (2 * D, D), "ff.2": (D, 2 * D)}}

    def others(self, config: Mapping[str, Any]) -> Mapping[str, Mapping[str, tuple[int, ...]]]:
        return {}

    def detect(self, state_dict: Mapping[str, Tensor]) -> Config:
        keys = self.bare_keys(state_dict)
        embedders = [key for key in keys if key.startswith(("x_embedders.p", "embed.")) and key.endswith(".weight")]
        if len(embedders) != 1:
            raise ValueError(f"this is not a Pebble state dict: {len(embedders)} patch embedders")
        p = int(embedders[0].split(".")[1].removeprefix("p").partition("x")[0])
        original = self.is_original(keys)
        text = "text_in.weight" if original else "context_embedder.weight"
        width = dimension(keys[embedders[0]], 0, embedders[0])
        return {
            "in_channels": dimension(keys[embedders[0]], 1, embedders[0]) // p**2,
            "patch_size": p,
            "num_layers": count_blocks(keys, "layers." if original else "transformer_blocks."),
            "num_attention_heads": width // 16,
            "attention_head_dim": 16,
            "text_dim": dimension(keys[text], 1, text),
        }

    def default_schedule(self, latent: LatentSpace, config: Mapping[str, Any]) -> Schedule:
        return Schedule("static", shift=2.0)


BACKBONE = Pebble()
