"""Tiny random release folders in the diffusers layout, and what diffusers makes of them. Loaded by path."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from dcgen.adapter import Adapter, LoraPair, save_adapter
from dcgen.backbones import BACKBONES
from dcgen.latent import LatentSpace

flux_sizes = {
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}
t5_tokens = 24


def randomize(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every parameter random, biases and norms too, so that no term is zero or one by construction."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            norm = value.ndim == 1 and name.endswith("weight")
            value.copy_(1 + 0.1 * noise if norm else noise * (0.5 / max(1, value[0].numel()) ** 0.5))
    return module.eval()


def transformer(packed_channels: int, seed: int = 0, **changes):
    import diffusers

    sizes = {**flux_sizes, **changes}
    return randomize(diffusers.FluxTransformer2DModel(in_channels=packed_channels, **sizes), seed)


def dcae(seed: int = 0, channels: int = 8, factor: int = 32, deepest: int = 16):
    """A DC-AE with attention in both halves, with every published kind of block but the widths of a toy.

    deepest: width of its last stage, a multiple of the channels.
    """
    import diffusers

    plain = factor.bit_length() - 2  # stages: one more than halvings; the last two attend
    widths = (8, 8) + (16,) * (plain - 2) + (max(16, deepest // 4), deepest)  # a stage has at most four times the last
    types = ("ResBlock",) * plain + ("EfficientViTBlock",) * 2
    scales = ((),) * plain + ((5,), (5,))
    ae = diffusers.AutoencoderDC(
        latent_channels=channels,
        attention_head_dim=8,
        encoder_block_types=types,
        decoder_block_types=types,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(1,) * len(widths),
        decoder_layers_per_block=(1,) * len(widths),
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        scaling_factor=0.37,
    )
    assert ae.spatial_compression_ratio == factor
    return randomize(ae, seed)


def kl_vae(seed: int = 0):
    import diffusers

    vae = diffusers.AutoencoderKL(
        latent_channels=16,
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        scaling_factor=0.41,
        shift_factor=0.07,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return randomize(vae, seed)


def _clip_tokenizer(folder: Path):
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    merges = [("r", "e"), ("re", "d</w>"), ("c", "a"), ("ca", "t</w>")]
    words = [*letters, *(f"{c}</w>" for c in letters), *("".join(m) for m in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(m) for m in merges)]) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def _t5_tokenizer(folder: Path):
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>")
    text = ["a red cat on a blue background", "a dog on the red background", "an apple, a pear"]
    tokenizer.train_from_iterator(text * 20, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": t5_tokens}
    raw = folder.with_name(folder.name + "-raw")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(raw)
    return transformers.T5TokenizerFast.from_pretrained(raw)


def make_release(folder: Path, *, deep: int = 0, seed: int = 0, shard: str | None = None):
    """Write a tiny random FLUX release and give its pipeline back.

    deep: factor of the DC-AE it is on (32, 64; patch 1); 0 for an f8 VAE (patch 2).

    shard: largest size of one transformer shard, e.g. "100KB".
    """
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip = _clip_tokenizer(folder.with_name(folder.name + "-clip"))
    t5 = _t5_tokenizer(folder.with_name(folder.name + "-t5"))
    sizes = {"hidden_size": flux_sizes["pooled_projection_dim"], "intermediate_size": 48, "num_attention_heads": 2}
    clip_config = CLIPTextConfig(
        vocab_size=len(clip),
        num_hidden_layers=2,
        bos_token_id=clip.bos_token_id,
        eos_token_id=clip.eos_token_id,
        **sizes,
    )
    t5_sizes = {"d_model": flux_sizes["joint_attention_dim"], "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 3}
    t5_config = T5Config(vocab_size=len(t5), feed_forward_proj="gated-gelu", **t5_sizes)
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=None,  # the class cannot hold an AutoencoderDC
        text_encoder=randomize(CLIPTextModel(clip_config), seed + 2),
        tokenizer=clip,
        text_encoder_2=randomize(T5EncoderModel(t5_config), seed + 3),
        tokenizer_2=t5,
        transformer=transformer(8 if deep else 64, seed + 4),
    )
    pipe.vae = dcae(seed + 1, factor=deep) if deep else kl_vae(seed + 1)
    for name in ("scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "vae"):
        getattr(pipe, name).save_pretrained(folder / name)
    pipe.transformer.save_pretrained(folder / "transformer", **({"max_shard_size": shard} if shard else {}))
    (folder / "model_index.json").write_text(
        json.dumps(
            {
                "_class_name": "FluxPipeline",
                "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
                "text_encoder": ["transformers", "CLIPTextModel"],
                "text_encoder_2": ["transformers", "T5EncoderModel"],
                "tokenizer": ["transformers", "CLIPTokenizer"],
                "tokenizer_2": ["transformers", "T5TokenizerFast"],
                "transformer": ["diffusers", "FluxTransformer2DModel"],
                "vae": ["diffusers", "AutoencoderDC" if deep else "AutoencoderKL"],
            }
        )
    )
    return pipe


def velocity(transformer, case, patch):
    """FluxTransformer2DModel called as FluxPipeline does, with the packing written out."""
    batch, channels, height, width = case["x"].shape
    rows, columns = height // patch, width // patch
    cut = case["x"].reshape(batch, channels, rows, patch, columns, patch)
    tokens = cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * patch**2)
    ids = [[0.0, float(row), float(column)] for row in range(rows) for column in range(columns)]
    with torch.no_grad():
        out = transformer(
            hidden_states=tokens,
            timestep=case["sigma"],
            guidance=case["guidance"],
            pooled_projections=case["pooled"],
            encoder_hidden_states=case["context"],
            txt_ids=torch.zeros(case["context"].shape[1], 3),
            img_ids=torch.tensor(ids),
            return_dict=False,
        )[0]
    cut = out.reshape(batch, rows, columns, channels, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return cut.reshape(batch, channels, height, width)


def make_adapter(file: Path, base) -> None:
    """Write a random adapter for a tiny base, whose latent is that of the tiny f32 release's autoencoder."""
    new = transformer(8, seed=5).state_dict()
    keys = ("x_embedder.weight", "x_embedder.bias", "proj_out.weight", "proj_out.bias")
    factors = tuple((0.3 * (i % 3 == 0), 0.3 * (i % 3 == 1), 0.3 * (i % 3 == 2)) for i in range(8))
    draw = torch.Generator().manual_seed(6)
    lora = LoraPair(torch.randn(16, 32, generator=draw), torch.randn(32, 16, generator=draw) / 2, 16.0)
    adapter = Adapter(
        "flux",
        {key: new[key] for key in keys},
        {"transformer_blocks.0.attn.to_q": lora},
        LatentSpace("", 8, 32, 0.37, rgb_factors=factors),
        BACKBONES["flux"].base_signature(dict(base.config)),
        {"rule": "flux2"},
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    save_adapter(file, adapter)
