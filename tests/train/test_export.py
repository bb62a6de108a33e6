"""What export writes loads elsewhere and gives the velocities that training had."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import diffusers
import pytest
import torch

from dcgen.adapter import check_model, load_adapter
from dcgen.folder import read_release
from dcgen.release import open_model
from dcgen.schedule import Schedule
from train.batches import BatchPlan
from train.config import load_recipe, parse_recipe
from train.distributed import Ranks
from train.families import FAMILIES
from train.generate import Pipeline
from train.inputs import tree
from train.run import make_stage, run_recipe

CPU = Ranks(0, 1, torch.device("cpu"))
FLUX = FAMILIES["flux"]


@pytest.fixture(scope="module")
def trained(debug_run):
    """The fine-tuning stage's model with its trained weights in place, a noised latent and its conditioning."""
    stage = make_stage(load_recipe("debug", [f"output={debug_run}"]), "finetune", CPU)
    model = stage.setup().eval()
    adapter = load_adapter(debug_run / "finetune" / "adapter.safetensors")
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in adapter.tensors.items():
            parameters[name].copy_(tensor)
        for path, pair in adapter.lora.items():
            parameters[f"{path}.lora_A.default.weight"].copy_(pair.A)
            parameters[f"{path}.lora_B.default.weight"].copy_(pair.B)
    assert max(pair.B.abs().max() for pair in adapter.lora.values()) > 0
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 4, 6, generator=g)
    cond = stage.cache.text([1, 2])
    call = (x, torch.tensor([0.3, 0.9]), cond, torch.tensor([1.0, 3.5]))
    with torch.no_grad():
        return stage.velocity(*call), call


def test_the_adapter_on_the_base_has_the_velocity_of_training(debug_run, trained):
    expected, call = trained
    tiny = debug_run / "tiny"
    adapter = debug_run / "export" / "debug.safetensors"
    pipeline = Pipeline(tiny / "release", adapter=adapter, autoencoder=tiny / "dc-ae")
    torch.testing.assert_close(pipeline.velocity(*call), expected, rtol=1e-4, atol=1e-5)
    aligned = Pipeline(tiny / "release", adapter=adapter, autoencoder=tiny / "dc-ae", strength=0.0)
    assert (aligned.velocity(*call) - expected).abs().max() > 1e-4


def test_the_single_file_has_the_velocity_of_training(debug_run, trained):
    expected, call = trained
    model = open_model(debug_run / "export" / "debug-merged.safetensors")
    network = diffusers.FluxTransformer2DModel.from_config(model.config)
    network.load_state_dict({key: model.get(key) for key in model.entries})
    with torch.no_grad():
        found = FLUX.velocity(network.eval(), *call)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert model.latent.spatial_factor == 16
    assert model.schedule == Schedule("flux")


def test_the_release_loads_in_diffusers_and_has_the_velocity_of_training(debug_run, trained):
    expected, call = trained
    folder = debug_run / "export" / "release"
    network = diffusers.FluxTransformer2DModel.from_pretrained(folder / "transformer")
    with torch.no_grad():
        found = FLUX.velocity(network, *call)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert isinstance(diffusers.AutoencoderDC.from_pretrained(folder / "vae"), diffusers.AutoencoderDC)
    assert json.loads((folder / "model_index.json").read_text())["vae"] == ["diffusers", "AutoencoderDC"]


def test_training_goes_on_from_a_merged_release(debug_run, trained, tmp_path):
    """The next resolution: the merged model as base, its own ends kept, a fresh LoRA."""
    overrides = [f"output={tmp_path}", f"defaults.base={debug_run}/export/release", "finetune.start=base"]
    overrides += [f"finetune.cache={debug_run}/cache", "finetune.preview_every=0", "finetune.steps=1"]
    overrides += [f"defaults.autoencoder={debug_run}/tiny/dc-ae"]
    stage = make_stage(load_recipe("debug", overrides), "finetune", CPU)
    stage.setup()
    expected, call = trained
    with torch.no_grad():
        torch.testing.assert_close(stage.velocity(*call), expected, rtol=1e-4, atol=1e-5)
    names = {name.split(".lora_")[0] for name, p in stage.model.named_parameters() if p.requires_grad}
    assert {"x_embedder.weight", "x_embedder.bias", "proj_out.weight", "proj_out.bias"} < names
    assert run_recipe(load_recipe("debug", overrides), only="finetune")["finetune"]["parameters"] > 0


def test_dc_gen_again_to_a_deeper_autoencoder(debug_run, tmp_path):
    """f16 -> f32 with the merged model as base and its DC-AE as teacher."""
    release = debug_run / "export" / "release"
    overrides = [f"output={tmp_path}", f"defaults.base={release}", f"cache.teacher={release}/vae"]
    overrides += [f"cache.data.path={debug_run}/tiny/pictures", "finetune.preview_every=0", "align.patch_size=2"]
    overrides += [
        "head.patch_size=2",
        "finetune.patch_size=2",
        "gap.patch_size=2",
        f"defaults.autoencoder={debug_run}/tiny/dc-ae",
    ]
    recipe = load_recipe("debug", overrides)
    recipe.stages.pop("tiny")
    numbers = run_recipe(recipe)
    assert 0 < numbers["align"]["loss"] < numbers["align"]["variance"]
    adapter = load_adapter(tmp_path / "export" / "debug.safetensors")
    assert adapter.patch_size == 2
    assert adapter.tensors["x_embedder.weight"].shape[1] == 8 * 4


@pytest.fixture(scope="module")
def two_steps(debug_run, tmp_path_factory):
    """Folders of two steps: from the base, then over what the first exported, against the original base as well."""
    first, second = (tmp_path_factory.mktemp(name) for name in ("first", "second"))
    tiny = debug_run / "tiny"
    common = [f"finetune.cache={debug_run}/cache", "finetune.preview_every=0", "finetune.optimizer={lr: 0.03}"]
    common += [f"defaults.autoencoder={tiny}/dc-ae", "finetune.ema=null"]
    place = [f"output={first}", f"defaults.base={tiny}/release", f"finetune.start={debug_run}/head"]
    place += ["export.forms=[adapter, release]"]
    over = [f"output={second}", f"defaults.base={first}/export/release", "finetune.start=base"]
    over += ["export.forms=[adapter, single]", f"export.original={tiny}/release"]
    for overrides in (place, over):
        recipe = load_recipe("debug", [*common, *overrides])
        numbers = [run_recipe(recipe, only=stage)[stage] for stage in ("finetune", "export")]
    assert numbers[-1]["least_share_kept"] > 0.9999
    return first, second


def test_an_adapter_says_which_base_it_was_trained_over(debug_run, two_steps):
    first, second = two_steps
    bases = {first: debug_run / "tiny" / "release", second: first / "export" / "release"}
    for folder, base in bases.items():
        adapter = load_adapter(folder / "export" / "debug.safetensors")
        assert adapter.base_weights.distance(open_model(base).identity()) < 1e-3
        assert not adapter.base_latent.differences(read_release(base).latent)
        check_model(adapter, open_model(base))


def test_the_adapter_of_a_second_step_is_refused_over_the_first_base(debug_run, two_steps):
    tiny, exported = debug_run / "tiny", two_steps[1] / "export"
    adapter = exported / "debug.safetensors"
    advice = r"not the latent of the base .*the first step's merged model.*dcgen\.convert extract"
    with pytest.raises(ValueError, match=advice):
        check_model(load_adapter(adapter), open_model(tiny / "release"))
    with pytest.raises(ValueError, match=advice):
        Pipeline(tiny / "release", adapter=adapter, autoencoder=tiny / "dc-ae")
    overrides = [f"output={two_steps[1]}", f"export.base={tiny}/release", "export.name=wrong"]
    stage = make_stage(load_recipe("debug", overrides), "export", CPU)
    with pytest.raises(ValueError, match=advice):
        stage.finish({})
    # its latent is the second step's own, its weights are not: the model that the first step was made of
    moved = replace(open_model(tiny / "release"), latent=load_adapter(adapter).base_latent)
    with pytest.raises(ValueError, match=r"trained over other weights .*merged model.*dcgen\.convert extract"):
        check_model(load_adapter(adapter), moved)
    assert not (exported / "wrong.safetensors").exists()


def test_the_adapter_over_the_original_base_does_both_steps(debug_run, two_steps, trained):
    _, call = trained
    tiny, exported = debug_run / "tiny", two_steps[1] / "export"
    model = open_model(exported / "debug-merged.safetensors")
    network = diffusers.FluxTransformer2DModel.from_config(model.config)
    network.load_state_dict({key: model.get(key) for key in model.entries})
    with torch.no_grad():
        expected = FLUX.velocity(network.eval(), *call)
        files = (exported / "debug-over-original.safetensors", two_steps[0] / "export" / "debug.safetensors")
        both, first = (
            Pipeline(tiny / "release", adapter=file, autoencoder=tiny / "dc-ae").velocity(*call) for file in files
        )
    torch.testing.assert_close(both, expected, rtol=1e-4, atol=1e-4)
    assert (first - expected).abs().max() > 1e-2  # the second step changed something
    assert load_adapter(files[0]).metadata["modelspec.title"] == "debug"


def test_the_original_base_needs_the_base(tmp_path):
    stages = {"export": {"adapter": str(tmp_path), "original": str(tmp_path)}}
    recipe = parse_recipe({"name": "x", "output": str(tmp_path), "stages": stages})
    assert any("`original` needs `base`" in problem for problem in make_stage(recipe, "export", CPU).check())


def test_own_ends_are_refused_on_a_foreign_latent(debug_run, tmp_path):
    overrides = [f"output={tmp_path}", f"defaults.base={debug_run}/tiny/release", "finetune.start=base"]
    overrides += [f"finetune.cache={debug_run}/cache"]
    stage = make_stage(load_recipe("debug", overrides), "finetune", CPU)
    with pytest.raises(ValueError, match="so the cache must hold its own latents"):
        stage.setup()


def test_strength_zero_of_a_head_stage_changes_nothing(debug_run):
    tiny = debug_run / "tiny"
    head = debug_run / "head" / "adapter.safetensors"
    assert load_adapter(head).lora == {}
    pictures = [
        Pipeline(tiny / "release", adapter=head, autoencoder=tiny / "dc-ae", strength=s).images(
            ["a red square"], [1], 64, 64, steps=2, guidance=3.5
        )
        for s in (0.0, 1.0)
    ]
    assert torch.equal(*pictures)


def test_batches_of_training_are_those_of_the_plan(debug_run):
    stage = make_stage(load_recipe("debug", [f"output={debug_run}"]), "finetune", CPU)
    stage.setup()
    (batch,) = BatchPlan(stage.buckets(), 4, 0).micro_batches(2, rank=0, world=1, accumulate=1, device=CPU.device)
    loss, metrics = stage.loss(batch)
    again, _ = stage.loss(batch)
    assert loss.item() == again.item()
    assert set(metrics) == {"loss_cond", "loss_uncond"}


def test_what_lies_beside_a_release_is_neither_copied_nor_read(debug_run, tmp_path):
    """FLUX.1-Krea-dev comes with its 24 GB a second time as one file, and with pictures."""
    tiny = debug_run / "tiny"
    base = shutil.copytree(tiny / "release", tmp_path / "base")
    for name in ("flux1-krea-dev.safetensors", "teaser.jpg", ".cache/huggingface/x.lock", "extra/weights.safetensors"):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_bytes(bytes(1 << 20))
    (base / "LICENSE.md").write_text("a licence")
    overrides = [f"output={tmp_path / 'run'}", f"base={base}", f"autoencoder={tiny / 'dc-ae'}"]
    recipe = load_recipe("debug", [*overrides, f"export.adapter={debug_run / 'finetune'}"])
    stage = make_stage(recipe, "export", CPU)
    planned = stage.result_bytes(0)
    run_recipe(recipe, only="export")
    written = {file.relative_to(stage.folder / "release").as_posix() for file in tree(stage.folder / "release").files}
    own = {file.relative_to(base).as_posix() for file in tree(base).files}
    assert own - written == {"flux1-krea-dev.safetensors", "teaser.jpg", "extra/weights.safetensors"}
    assert written - own == set()
    assert planned == pytest.approx(tree(stage.folder).size, rel=0.02)
    read = {path.relative_to(base).as_posix() for path in stage.reads()["base"].files}
    assert read == {name for name in own & written if not name.startswith("vae/")}


def test_the_split_form_has_the_velocity_of_training(debug_run, trained, tmp_path):
    """Blocks in the base's shape, and an adapter without LoRA that is refused on the base itself."""
    from dcgen.merge import merged_model

    overrides = [f"output={tmp_path}", "export.forms=[split]", f"export.adapter={debug_run}/finetune"]
    overrides += [f"defaults.base={debug_run}/tiny/release", f"defaults.autoencoder={debug_run}/tiny/dc-ae"]
    run_recipe(load_recipe("debug", overrides), only="export")
    folder = tmp_path / "export"
    written = {path.name for path in folder.iterdir() if path.suffix == ".safetensors"}
    assert written == {"debug-blocks.safetensors", "debug-ends.safetensors"}
    blocks, ends = open_model(folder / "debug-blocks.safetensors"), load_adapter(folder / "debug-ends.safetensors")
    assert not ends.lora
    model = merged_model(blocks, ends)
    network = diffusers.FluxTransformer2DModel.from_config(model.config)
    network.load_state_dict({key: model.get(key) for key in model.entries})
    expected, call = trained
    with torch.no_grad():
        torch.testing.assert_close(FLUX.velocity(network.eval(), *call), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="the base without DC-Gen's LoRA"):
        check_model(ends, open_model(debug_run / "tiny" / "release"))
