"""The paper's comparison strategies do what their names say."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from dcgen.adapter import load_adapter
from train.batches import BatchPlan
from train.config import load_recipe
from train.distributed import Ranks
from train.run import make_stage, run_recipe
from train.stages import denoising

CPU = Ranks(0, 1, torch.device("cpu"))


def overrides(debug_run, out, *more: str) -> list[str]:
    inputs = [f"output={out}", f"defaults.base={debug_run}/tiny/release", f"finetune.start={debug_run}/head"]
    inputs += [f"finetune.cache={debug_run}/cache", f"defaults.autoencoder={debug_run}/tiny/dc-ae"]
    return [*inputs, "finetune.preview_every=0", "finetune.steps=3", *more]


def stage_of(debug_run, out, *more: str):
    stage = make_stage(load_recipe("debug", overrides(debug_run, out, *more)), "finetune", CPU)
    stage.setup()
    return stage


def test_no_alignment_starts_from_random_ends(debug_run, tmp_path):
    aligned = stage_of(debug_run, tmp_path)
    random = stage_of(debug_run, tmp_path, "finetune.start=")
    assert not torch.equal(aligned.model.x_embedder.weight, random.model.x_embedder.weight)
    assert random.model.x_embedder.bias.abs().max() == 0
    stored = load_adapter(debug_run / "head" / "adapter.safetensors").tensors
    assert torch.equal(aligned.model.x_embedder.weight.detach(), stored["x_embedder.weight"])


def test_full_finetuning_trains_everything_and_writes_a_release(debug_run, tmp_path):
    stage = stage_of(debug_run, tmp_path / "a", "finetune.train=full")
    assert all(p.requires_grad for p in stage.model.parameters())
    assert not any("lora" in name for name, _ in stage.model.named_parameters())
    recipe = load_recipe("debug", overrides(debug_run, tmp_path, "finetune.train=full"))
    run_recipe(recipe, only="finetune")
    trained = load_file(tmp_path / "finetune/release/transformer/diffusion_pytorch_model.safetensors")
    base = load_file(debug_run / "tiny/release/transformer/diffusion_pytorch_model.safetensors")
    key = "transformer_blocks.0.attn.to_q.weight"
    assert not torch.equal(trained[key], base[key])
    index = json.loads((tmp_path / "finetune/release/model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderDC"]


@pytest.mark.parametrize("ratio", [1.0, 3.0])
def test_layer_wise_rates_are_linear_with_mean_one(debug_run, tmp_path, ratio):
    stage = stage_of(debug_run, tmp_path, f"finetune.layer_lr_ratio={ratio}")
    lora = "attn.to_q.lora_A.default.weight"
    first = stage.lr_scale(f"transformer_blocks.0.{lora}")
    last = stage.lr_scale(f"single_transformer_blocks.0.{lora}")
    assert last / first == pytest.approx(ratio)
    assert (first + last) / 2 == pytest.approx(1.0)
    assert stage.lr_scale("x_embedder.weight") == first
    assert stage.lr_scale("proj_out.weight") == last


def test_gradual_lora_grows_alpha_and_ends_whole(debug_run, tmp_path):
    stage = stage_of(debug_run, tmp_path, "finetune.alpha_warmup=2")
    layer = stage.model.transformer_blocks[0].attn.to_q
    seen = []
    for step in range(3):
        stage.before_step(step)
        seen.append(layer.scaling["default"])
    assert seen == [0.5, 1.0, 1.0]
    broken = make_stage(
        load_recipe("debug", overrides(debug_run, tmp_path, "finetune.alpha_warmup=9")), "finetune", CPU
    )
    assert broken.check() == ["alpha_warmup 9 is longer than the 3 steps"]


def test_eq2_on_a_distilled_base_is_a_switch(debug_run, tmp_path):
    recipe = load_recipe("debug", overrides(debug_run, tmp_path, "finetune.objective.loss=flow"))
    run_recipe(recipe, only="finetune")
    assert load_adapter(tmp_path / "finetune" / "adapter.safetensors").lora


def test_autoencoder_alignment_lowers_its_loss_and_writes_an_autoencoder(debug_run, tmp_path):
    import csv

    import diffusers

    from train.config import parse_recipe

    stage = {
        "autoencoder": f"{debug_run}/tiny/dc-ae",
        "teacher": f"{debug_run}/tiny/release/vae",
        "data": {"type": "folder", "path": f"{debug_run}/tiny/pictures", "pixels": 64, "multiple": 16},
        "ratio": 10.0,
        "steps": 30,
        "batch": 6,
        "log_every": 15,
        "optimizer": {"lr": 0.003, "clip": 1.0},
    }
    recipe = parse_recipe({"name": "ae", "output": str(tmp_path), "stages": {"ae-align": stage}})
    numbers = run_recipe(recipe)["ae-align"]
    with open(tmp_path / "ae-align" / "log.csv") as handle:
        rows = list(csv.DictReader(handle))
    assert float(rows[1]["alignment"]) < 0.8 * float(rows[0]["alignment"])
    model = diffusers.AutoencoderDC.from_pretrained(tmp_path / "ae-align" / "model")
    assert model.config.scaling_factor == pytest.approx(numbers["scaling_factor"])


def test_plain_attention_is_the_same_attention(debug_run, tmp_path, monkeypatch):
    """Loss and gradients of a stage, by plain attention as the CPU takes it, and by torch's own choice."""
    stage = stage_of(debug_run, tmp_path)
    batches = BatchPlan(stage.buckets(), stage.config.batch, 0).micro_batches(
        0, rank=0, world=1, accumulate=1, device=CPU.device
    )

    def trained():
        torch.manual_seed(0)
        loss, _ = stage.loss(batches[0])
        loss.backward()
        gradients = [p.grad for p in stage.model.parameters() if p.grad is not None]
        return loss.detach(), gradients, stage.model.zero_grad()

    def operations(profile):
        return {event.key for event in profile.key_averages()}

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss, gradients, _ = trained()
    flash = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert flash not in operations(profile)
    monkeypatch.setattr(denoising, "PLAIN_ATTENTION_TOKENS", 0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        expected, expected_gradients, _ = trained()
    assert flash in operations(profile)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-6)
