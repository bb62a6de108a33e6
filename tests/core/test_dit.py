"""DiT: noise into velocity against diffusers' DDIM, the call, the key maps with their copies."""

from __future__ import annotations

import pytest
import torch

from dcgen.backbones import BACKBONES, detect_backbone
from dcgen.convert import pack
from dcgen.release import open_model
from train.ddpm import alphas_cumprod, flow_sigmas
from train.families import FAMILIES

diffusers = pytest.importorskip("diffusers")
dit, family = BACKBONES["dit"], FAMILIES["dit"]
TINY = {"num_attention_heads": 2, "attention_head_dim": 72, "num_layers": 3, "in_channels": 4, "out_channels": 8}
TINY |= {"num_embeds_ada_norm": 10, "sample_size": 8}


def make(seed: int = 0, **config):
    """Random DiTTransformer2DModel in eval mode, the blocks' copies of the embedders equal as in published files."""
    torch.manual_seed(seed)
    model = diffusers.DiTTransformer2DModel(**{**TINY, **config}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.08 if parameter.ndim > 1 else 0.3))
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


def test_levels_are_the_schedulers():
    scheduler = diffusers.DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    torch.testing.assert_close(alphas_cumprod().float(), scheduler.alphas_cumprod, rtol=1e-4, atol=1e-7)
    assert flow_sigmas()[0].item() == pytest.approx(0.0099, abs=1e-4)
    assert flow_sigmas()[-1].item() == pytest.approx(0.9937, abs=1e-4)


@torch.no_grad()
def test_euler_along_the_velocity_is_ddim():
    """A deterministic DDIM step on the DDPM path and an Euler step on the flow are the same move."""
    model = make()
    scheduler = diffusers.DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False, set_alpha_to_one=False
    )
    scheduler.set_timesteps(8)
    steps = scheduler.timesteps.tolist()
    labels = {"labels": torch.tensor([3, 10])}
    levels = flow_sigmas()

    def length(step: int) -> torch.Tensor:
        return ((1 - levels[step]) ** 2 + levels[step] ** 2).sqrt()

    expected = torch.randn(2, 4, 8, 8)
    found = expected * length(steps[0])
    for here, after in zip(steps, [*steps[1:], 0], strict=True):
        noise = model(expected, timestep=torch.tensor([here, here]), class_labels=labels["labels"]).sample[:, :4]
        expected = scheduler.step(noise, here, expected).prev_sample
        v = family.velocity(model, found, levels[here].expand(2), labels)
        found = found + (levels[after] - levels[here]) * v
    torch.testing.assert_close(found / length(0), expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_velocity_of_the_true_noise():
    """With a network that knows the noise, the velocity is noise - x0 at any sigma in reach, also between steps."""
    x0, noise = torch.randn(5, 4, 4, 4), torch.randn(5, 4, 4, 4)
    sigma = torch.tensor([0.0100, 0.123, 0.5, 0.9, 0.9936])
    seen = []

    class Knowing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = {"in_channels": 4}

        def forward(self, latents, timestep, class_labels, return_dict):
            seen.append((latents, timestep))
            return (torch.cat((noise, torch.full_like(noise, 7.0)), dim=1),)

    level = sigma[:, None, None, None]
    found = family.velocity(Knowing(), (1 - level) * x0 + level * noise, sigma, {"labels": torch.zeros(5).long()})
    torch.testing.assert_close(found, noise - x0, rtol=1e-3, atol=2e-3)
    latents, step = seen[0]
    low, high = alphas_cumprod()[step.floor().long()], alphas_cumprod()[step.ceil().long()]
    assert ((step >= 0) & (step <= 999)).all()
    for i in range(5):  # the step's own abar rebuilds the latent that the network was given
        abar = torch.lerp(low[i], high[i], (step[i] % 1).double()).float()
        rebuilt = abar.sqrt() * x0[i] + (1 - abar).sqrt() * noise[i]
        torch.testing.assert_close(latents[i], rebuilt, rtol=1e-3, atol=2e-3)


@torch.no_grad()
def test_ends_are_held():
    """sigma 1 and 0 lie beyond DDPM's steps: finite, and nothing is divided by zero."""
    model = make()
    found = family.velocity(model, torch.randn(2, 4, 8, 8), torch.tensor([1.0, 0.0]), {"labels": torch.tensor([0, 1])})
    assert found.isfinite().all()


@torch.no_grad()
def test_embed_adds_positions():
    model = make()
    latents = torch.randn(2, 4, 8, 8)
    found = family.embed(model, latents, dict(model.config))
    assert found.shape == (2, 4, 4, 144)
    torch.testing.assert_close(found.flatten(1, 2), model.pos_embed(latents))
    assert family.blocks(model) == list(model.transformer_blocks)


def test_refusals():
    model = make()
    with pytest.raises(ValueError, match=r"square latents of 4 channels, got \(4, 8, 10\)"):
        family.velocity(model, torch.randn(1, 4, 8, 10), torch.ones(1), {"labels": torch.zeros(1).long()})
    with pytest.raises(ValueError, match=r"got \(32, 8, 8\)"):
        family.velocity(model, torch.randn(1, 32, 8, 8), torch.ones(1), {"labels": torch.zeros(1).long()})


def test_config_with_latent():
    config = dict(make().config)
    moved = dit.config_with_latent(config, 32)
    assert [moved[key] for key in ("in_channels", "out_channels", "patch_size", "sample_size")] == [32, 64, 1, 4]
    model = diffusers.DiTTransformer2DModel(**{key: value for key, value in moved.items() if key[0] != "_"})
    assert model.pos_embed.base_size == make().pos_embed.base_size
    assert dit.base_signature(moved) == dit.base_signature(config)
    assert dit.base_signature({**config, "out_channels": 4}) != dit.base_signature(config)


def test_shape_tables_are_the_models():
    model = make()
    state, base = model.state_dict(), dit.base_signature(dict(model.config))
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)} - {"proj_out_2"}
    shapes = dit.linears(base)
    assert set(shapes) == linear
    assert all(tuple(state[f"{path}.weight"].shape) == shape for path, shape in shapes.items())
    ends = {**dit.latent_shapes(base, 4, 2), **dit.extra_shapes(base)}
    assert all(tuple(state[key].shape) == shape for key, shape in ends.items())
    assert sum(family.is_lora_target(path) for path in shapes) == 3 * 6


def test_key_maps_both_ways(tmp_path):
    model = make()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    native = dit.to_original(state)
    assert len(native) == 6 + 5 + 3 * 10
    assert torch.equal(
        native["t_embedder.mlp.0.weight"], state["transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.weight"]
    )
    assert torch.equal(native["blocks.1.attn.qkv.weight"][144:288], state["transformer_blocks.1.attn1.to_k.weight"])
    back = dit.to_diffusers({**native, "pos_embed": torch.zeros(1, 16, 144)})
    assert set(back) == set(state)
    assert all(torch.equal(back[key], state[key]) for key in state)
    told = {key: value for key, value in dict(model.config).items() if key in dit.detect(state)}
    expected = {**told, "sample_size": 32}  # not in the tensors: 16 patches a side
    for names in (state, native):
        backbone, found = detect_backbone({key: value.to("meta") for key, value in names.items()})
        assert backbone is dit
        assert found == expected
    # and as a file: original names hold one copy, reading it gives every block its own again
    model.save_pretrained(tmp_path / "transformer")
    out = open_model(pack(open_model(tmp_path), tmp_path / "one.safetensors"))
    assert set(out.tensors.entries) == set(native)
    assert out.config["sample_size"] == 8
    assert set(out.entries) == set(state)
    assert all(torch.equal(out.get(key), state[key]) for key in state)


def test_unequal_copies_are_refused():
    model = make()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state["transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"] += 1
    with pytest.raises(ValueError, match=r"y_embedder.embedding_table.weight is one tensor in the original format"):
        dit.to_original(state)
