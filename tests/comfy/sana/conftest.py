"""Tiny random SANA releases in the diffusers layout, and Gemma as a file for core's CLIPLoader."""

from __future__ import annotations

import inspect
import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

WIDTH, CAPTION = 64, 24
SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 32,
    "cross_attention_dim": WIDTH,
    "num_layers": 2,
    "caption_channels": CAPTION,
    "sample_size": 4,
}
# head_dim 256 is Gemma-2-2B's, and the one size that core's class does not take from a config.
GEMMA = {
    "hidden_size": CAPTION,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def transformer(tiny, channels, seed, **changes):
    import diffusers

    model = diffusers.SanaTransformer2DModel(in_channels=channels, out_channels=channels, **{**SIZES, **changes})
    return tiny.randomize(model, seed)


def dcae_f64(tiny, channels, seed):
    """An f64 DC-AE, a toy's widths, without attention."""
    import diffusers

    blocks, widths, layers = ("ResBlock",) * 7, (8, 8, 8, 8, 16, 16, 16), (0, 1, 1, 1, 1, 1, 1)
    ae = diffusers.AutoencoderDC(
        latent_channels=channels,
        attention_head_dim=8,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=layers,
        decoder_layers_per_block=layers,
        encoder_qkv_multiscales=((),) * 7,
        decoder_qkv_multiscales=((),) * 7,
        upsample_block_type="interpolate",
        downsample_block_type="Conv",
        scaling_factor=0.29,
    )
    return tiny.randomize(ae, seed)


def gemma_tokenizer(folder: Path):
    """(tokenizer, the bytes of its SentencePiece model): bytes for what the few words do not cover."""
    import sentencepiece
    from transformers import GemmaTokenizer

    written = io.BytesIO()
    text = ["a red cat on a blue background", "given a user prompt, generate the enhanced description"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text * 30),
        model_writer=written,
        vocab_size=340,
        model_type="bpe",
        **{"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3},
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=["\n"],
        minloglevel=2,
    )
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "GemmaTokenizer", **names, "add_bos_token": True, "add_eos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return GemmaTokenizer.from_pretrained(folder), written.getvalue()


def gemma(tiny, words, seed):
    """A random Gemma 2 whose attention scores are large enough for their bound of 50 to matter."""
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config(
        vocab_size=words,
        head_dim=256,
        query_pre_attn_scalar=256,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
        **GEMMA,
    )
    model = tiny.randomize(Gemma2Model(config), seed)
    with torch.no_grad():
        for layer in model.layers:
            layer.self_attn.q_proj.weight *= 30
    return model


def scheduler(sprint: bool, flow_shift: float):
    """What a published release has: trigflow for Sprint, else DPM-Solver++ along the flow."""
    import diffusers

    if sprint:
        return diffusers.SCMScheduler(prediction_type="trigflow", sigma_data=0.5)
    return diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift
    )


def make_release(
    tiny, folder: Path, *, f64: bool = False, seed: int = 0, flow_shift: float = 3.0, sprint: bool = False, **changes
):
    """Write a tiny random SANA release; its pipeline back. changes: fields of the transformer's config."""
    import diffusers

    channels = 16 if f64 else 8
    tokenizer, pieces = gemma_tokenizer(folder.with_name(folder.name + "-tokenizer"))
    if sprint:
        changes = {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads", **changes}
    kind = diffusers.SanaSprintPipeline if sprint else diffusers.SanaPipeline
    pipe = kind(
        tokenizer=tokenizer,
        text_encoder=gemma(tiny, 340, seed + 1),
        vae=dcae_f64(tiny, channels, seed + 2) if f64 else tiny.dcae(seed + 2, channels),
        transformer=transformer(tiny, channels, seed + 3, **changes),
        scheduler=scheduler(sprint, flow_shift),
    )
    pipe.save_pretrained(folder)
    return pipe, pieces


def clip_file(pipe, pieces: bytes, path: Path) -> Path:
    """The release's Gemma in the one file that core's CLIPLoader reads."""
    tensors = {f"model.{key}": value.contiguous().clone() for key, value in pipe.text_encoder.state_dict().items()}
    tensors["spiece_model"] = torch.frombuffer(bytearray(pieces), dtype=torch.uint8)
    save_file(tensors, path)
    return path


def velocity(model, case):
    """SanaTransformer2DModel called as SanaPipeline does."""
    with torch.no_grad():
        return model(
            hidden_states=case["x"],
            encoder_hidden_states=case["context"],
            encoder_attention_mask=case["mask"],
            timestep=(case["sigma"].double() * 1000).floor(),
            return_dict=False,
        )[0]


class Sana:
    """The helpers above for the tests."""

    transformer = staticmethod(transformer)
    make_release = staticmethod(make_release)
    clip_file = staticmethod(clip_file)
    velocity = staticmethod(velocity)
    sizes, gemma_sizes = SIZES, GEMMA

    @staticmethod
    def instruction() -> list[str]:
        """The instruction as SanaPipeline has it."""
        import diffusers

        return inspect.signature(diffusers.SanaPipeline.__call__).parameters["complex_human_instruction"].default


@pytest.fixture(scope="session")
def sana() -> type[Sana]:
    return Sana


@pytest.fixture(scope="session")
def sana_release(tmp_path_factory: pytest.TempPathFactory, tiny):
    """(folder, pipeline, Gemma as a file) of a tiny f32 SANA without positions."""
    folder = tmp_path_factory.mktemp("sana") / "tiny-sana"
    pipe, pieces = make_release(tiny, folder, seed=30)
    return folder, pipe, clip_file(pipe, pieces, folder.with_name("gemma.safetensors"))


@pytest.fixture(scope="session")
def deep_sana_release(tmp_path_factory: pytest.TempPathFactory, tiny):
    """(folder, pipeline) of a tiny f64 SANA with positions, qk norm and the 4K shift."""
    folder = tmp_path_factory.mktemp("sana") / "tiny-dcgen-sana"
    changes = {"interpolation_scale": 2.0, "qk_norm": "rms_norm_across_heads", "sample_size": 8}
    return folder, make_release(tiny, folder, f64=True, seed=40, flow_shift=6.0, **changes)[0]


@pytest.fixture(scope="session")
def sprint_release(tmp_path_factory: pytest.TempPathFactory, tiny):
    """(folder, pipeline) of a tiny f32 SANA-Sprint: guidance embedding, qk norm, trigflow scheduler."""
    folder = tmp_path_factory.mktemp("sana") / "tiny-sprint"
    return folder, make_release(tiny, folder, seed=50, sprint=True)[0]
