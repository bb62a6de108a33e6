"""Trained here, exported, loaded by the nodes: the velocities in ComfyUI are those of the network in training."""

import pytest
import torch

# debug recipe, what ComfyUI calls the conditioning that training calls otherwise
KINDS = {
    "flux": ("debug", {"prompt_embeds": "c_crossattn", "pooled": "y"}),
    "flux2": ("debug-klein", {"prompt_embeds": "c_crossattn"}),
    "sana": ("debug-sana", {"prompt_embeds": "c_crossattn", "mask": "attention_mask"}),
}
FORMS = ("adapter", "release", "single")


def relative(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


def in_training(recipe):
    """The fine-tuning stage's own network with what it has learnt, LoRA beside the frozen weights."""
    from dcgen.adapter import load_adapter
    from train.distributed import Ranks
    from train.lora import load_lora
    from train.run import make_stage

    stage = make_stage(recipe, "finetune", Ranks(0, 1, torch.device("cpu")))
    model = stage.setup().eval()
    adapter = load_adapter(recipe.folder / "finetune" / "adapter.safetensors")
    stage.load_ends(adapter.tensors)
    load_lora(model, adapter.lora)
    assert min(pair.B.abs().max() for pair in adapter.lora.values()) > 0
    return stage


@pytest.fixture(scope="module")
def ran(comfy, tmp_path_factory):
    from train.config import load_recipe
    from train.lora import scale_lora
    from train.run import run_recipe

    wanted, inputs, files = {}, {}, {}
    for kind, (name, names) in KINDS.items():
        folder = tmp_path_factory.mktemp(kind)
        recipe = load_recipe(
            name, [f"output={folder}", "finetune.optimizer.lr=0.05", "finetune.ema=0.5", "finetune.preview_every=0"]
        )
        for stage in ("tiny", "cache", "align", "head", "finetune", "export"):
            run_recipe(recipe, only=stage)
        stage = in_training(recipe)
        generator = torch.Generator().manual_seed(0)
        x, sigma = torch.randn((2, 8, 4, 6), generator=generator), torch.tensor([0.3, 0.9])
        cond = stage.cache.text([1, 2])
        scale = torch.tensor([1.0, 3.5]) if stage.distilled else None
        with torch.no_grad():
            wanted[kind] = stage.velocity(x, sigma, cond, scale)
            scale_lora(stage.model, 0.0)
            untrained = stage.velocity(x, sigma, cond, scale)
        assert relative(untrained, wanted[kind]) > 1e-2  # a form that lost its LoRA would show
        inputs |= {f"{kind}/x": x, f"{kind}/sigma": sigma}
        inputs |= {f"{kind}/{names[key]}": value for key, value in cond.items()}
        if scale is not None:
            inputs[f"{kind}/guidance"] = scale
        export = folder / "export"
        # ComfyUI knows releases by their folders' names
        base, merged = folder / f"{kind}-base", folder / f"{kind}-merged"
        base.symlink_to(folder / "tiny" / "release")
        merged.symlink_to(export / "release")
        files[kind] = {
            "base": str(base),
            "adapter": str(export / f"{name}.safetensors"),
            "single": str(export / f"{name}-merged.safetensors"),
            "release": str(merged),
        }
    return comfy.run("trained:forms", tmp_path_factory.mktemp("forms"), inputs, files)[0], wanted


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_form_has_the_velocity_of_training(ran, kind, form):
    found, wanted = ran
    assert relative(found[f"{kind}/{form}"], wanted[kind]) < 1e-4
