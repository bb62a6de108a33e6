"""Releases of random weights in the layouts in which they are published: file kinds, types, sharding, what lies beside.

The latents have the published shapes (f8c16, f32c32, f64c128, f8c4); everything else is narrow.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import torch
import transformers
from safetensors.torch import load_file

F32, F64 = (8, 8, 8, 8, 8, 32), (8, 8, 8, 8, 8, 32, 128)  # widths of f32c32 and f64c128
TOY = Path(__file__).parents[2] / "toy"


def _kl(channels: int, scale: float, shift: float | None) -> diffusers.AutoencoderKL:
    """f8, of the kind that FLUX.1 (16 channels) and Stable Diffusion (4) have."""
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 8),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        scaling_factor=scale,
        shift_factor=shift,
        use_quant_conv=shift is None,
        use_post_quant_conv=shift is None,
        mid_block_add_attention=False,
    )


def dc_ae(widths: tuple[int, ...], scale: float) -> diffusers.AutoencoderDC:
    """f = 2^(stages-1); the last width is that of the latent. None may be over 4 times the one before."""
    stages, channels = len(widths), widths[-1]
    kinds = ("ResBlock",) * (stages - 1) + ("EfficientViTBlock",)
    return diffusers.AutoencoderDC(
        latent_channels=channels,
        attention_head_dim=4,
        encoder_block_types=kinds,
        decoder_block_types=kinds,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(1,) * stages,
        decoder_layers_per_block=(1,) * stages,
        encoder_qkv_multiscales=((),) * stages,
        decoder_qkv_multiscales=((),) * stages,
        downsample_block_type="pixel_unshuffle",
        upsample_block_type="pixel_shuffle",
        scaling_factor=scale,
    )


def _random(network: torch.nn.Module) -> torch.nn.Module:
    """diffusers' own initialisation leaves modulation near zero: every path is to count."""
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return network


def _write(folder: Path, index: dict, **parts) -> None:
    """Parts as bfloat16, the network and the last text encoder in several files with an index."""
    folder.mkdir(parents=True)
    for name, part in parts.items():
        limit = "40KB" if name in ("transformer", "text_encoder_2") else "10GB"
        part = part.to(torch.bfloat16) if isinstance(part, torch.nn.Module) else part
        part.save_pretrained(folder / name, **({"max_shard_size": limit} if isinstance(part, torch.nn.Module) else {}))
    (folder / "model_index.json").write_text(json.dumps({"_diffusers_version": "0.33.0.dev0", **index}))
    for name in ("README.md", "LICENSE.md", "teaser.png", ".cache/huggingface/download/README.md.lock"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"text\n")


def flux(folder: Path) -> None:
    """FLUX.1-Krea-dev: CLIP's slow tokenizer files, T5 in shards with tokenizer.json and spiece.model."""
    base = TOY / "flux-base"
    config = {
        "in_channels": 64,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 64,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6),
    }
    scheduler = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
    index = {
        "_class_name": "FluxPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    _write(
        folder,
        index,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**scheduler),
        text_encoder_2=transformers.T5EncoderModel.from_pretrained(base / "text_encoder_2"),
        transformer=_random(diffusers.FluxTransformer2DModel(**config)),
        vae=_kl(16, 0.3611, 0.1159),
    )
    shutil.copytree(base / "text_encoder", folder / "text_encoder")
    shutil.copytree(base / "tokenizer", folder / "tokenizer", ignore=shutil.ignore_patterns("tokenizer.json"))
    shutil.copytree(base / "tokenizer_2", folder / "tokenizer_2")
    for tokenizer, names in (("tokenizer", ("bos", "eos", "unk", "pad")), ("tokenizer_2", ("eos", "unk", "pad"))):
        own = json.loads((folder / tokenizer / "tokenizer_config.json").read_text())
        special = {f"{name}_token": own[f"{name}_token"] for name in names}
        (folder / tokenizer / "special_tokens_map.json").write_text(json.dumps(special))
    _sentencepiece(folder / "tokenizer_2" / "spiece.model")
    assert len(list((folder / "transformer").glob("*-of-*.safetensors"))) > 1
    assert len(list((folder / "text_encoder_2").glob("*-of-*.safetensors"))) > 1


def sana(folder: Path) -> None:
    """SANA1.5_1.6B_1024px_diffusers: Gemma, DC-AE f32c32, DPM-Solver++ on flow sigmas."""
    base = TOY / "sana-base"
    config = {
        "in_channels": 32,
        "out_channels": 32,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 16,
        "cross_attention_dim": 32,
        "caption_channels": 64,
        "sample_size": 32,
        "patch_size": 1,
        "qk_norm": "rms_norm_across_heads",
    }
    solver = {"flow_shift": 3.0, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    index = {
        "_class_name": "SanaPipeline",
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "text_encoder": ["transformers", "Gemma2Model"],
        "tokenizer": ["transformers", "GemmaTokenizerFast"],
        "transformer": ["diffusers", "SanaTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderDC"],
    }
    _write(
        folder,
        index,
        scheduler=diffusers.DPMSolverMultistepScheduler(**solver),
        text_encoder=transformers.Gemma2Model.from_pretrained(base / "text_encoder"),
        transformer=_random(diffusers.SanaTransformer2DModel(**config)),
        vae=dc_ae(F32, 0.41407),
    )
    shutil.copytree(base / "tokenizer", folder / "tokenizer")
    _sentencepiece(folder / "tokenizer" / "tokenizer.model")


def dit(folder: Path) -> None:
    """DiT-XL-2: pickles in float32, the names of the classes in model_index.json."""
    config = {
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "num_attention_heads": 1,
        "attention_head_dim": 72,
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_zero",
        "sample_size": 32,
        "patch_size": 2,
    }
    folder.mkdir(parents=True)
    network = _random(diffusers.DiTTransformer2DModel(**config))
    for block in network.transformer_blocks[1:]:  # one embedder of step and class, of which every block has a copy
        block.norm1.emb.load_state_dict(network.transformer_blocks[0].norm1.emb.state_dict())
    for name, part in (("transformer", network), ("vae", _kl(4, 0.18215, None))):
        part.save_pretrained(folder / name)
        file = folder / name / "diffusion_pytorch_model.safetensors"
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()
    diffusers.DDIMScheduler(beta_end=0.02, beta_start=0.0001, clip_sample=False).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "DiTPipeline",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "id2label": {str(number): f"class {number}, other {number}" for number in range(1000)},
    }
    (folder / "model_index.json").write_text(json.dumps(index))


def imagenet(folder: Path) -> None:
    """ILSVRC/imagenet-1k: parquet with images and class numbers."""
    import io

    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    rows = []
    for number in range(4):
        buffer = io.BytesIO()
        Image.new("RGB", (90, 80), (60 * number, 90, 200)).save(buffer, format="JPEG")
        rows.append({"image": {"bytes": buffer.getvalue(), "path": f"n0_{number}.JPEG"}, "label": 7 * number})
    (folder / "data").mkdir(parents=True)
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, folder / "data" / "train-00000-of-00294.parquet")


def _sentencepiece(path: Path) -> None:
    import sentencepiece

    words = iter(["a photograph of a lighthouse on a cliff", "a bowl of oranges on a blue table"] * 4)
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=words, model_writer=file, vocab_size=40, hard_vocab_limit=False, minloglevel=2
        )


REPOSITORIES = {
    "black-forest-labs/FLUX.1-Krea-dev": flux,
    "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers": sana,
    "Efficient-Large-Model/SANA1.5_4.8B_1024px_diffusers": sana,
    "facebook/DiT-XL-2-256": dit,
    "facebook/DiT-XL-2-512": dit,
    "mit-han-lab/dc-ae-f32c32-in-1.0-diffusers": lambda folder: dc_ae(F32, 0.3189).save_pretrained(folder),
    "dc-ai/dc-ae-1.5-f64c128-diffusers": lambda folder: dc_ae(F64, 0.5935).save_pretrained(folder),
    "ILSVRC/imagenet-1k": imagenet,
}
