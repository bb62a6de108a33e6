"""FLUX: the call against diffusers' own pipeline arithmetic, the key maps against the formulas of both namings."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F

from dcgen.backbones import BACKBONES, detect_backbone
from dcgen.backbones.flux import rope_axes
from train.families import FAMILIES
from train.families.flux import position_ids

flux, family = BACKBONES["flux"], FAMILIES["flux"]


def _cond(batch: int, seed: int = 1, text: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "prompt_embeds": torch.randn(batch, text, 20, generator=generator),
        "pooled": torch.randn(batch, 12, generator=generator),
    }


def _pipeline_velocity(model, latents, sigma, cond, guidance, packed: bool):
    """What FluxPipeline does around the transformer, with its own static methods for p=2, by hand for p=1."""
    from diffusers import FluxPipeline

    batch, channels, height, width = latents.shape
    if packed:
        tokens = FluxPipeline._pack_latents(latents, batch, channels, height, width)
        ids = FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, "cpu", torch.float32)
    else:
        tokens = latents.flatten(2).transpose(1, 2)
        ids = FluxPipeline._prepare_latent_image_ids(batch, height, width, "cpu", torch.float32)
    timestep = sigma * 1000
    out = model(
        hidden_states=tokens,
        timestep=timestep / 1000,
        guidance=guidance,
        pooled_projections=cond["pooled"],
        encoder_hidden_states=cond["prompt_embeds"],
        txt_ids=torch.zeros(cond["prompt_embeds"].shape[1], 3),
        img_ids=ids,
        return_dict=False,
    )[0]
    if packed:
        return FluxPipeline._unpack_latents(out, height * 8, width * 8, 8)
    return out.transpose(1, 2).reshape(batch, channels, height, width)


@pytest.mark.parametrize(
    ("channels", "packed", "size", "batch"),
    [(16, True, (6, 6), 2), (16, True, (4, 10), 1), (32, False, (3, 5), 2), (128, False, (4, 2), 1)],
)
def test_velocity_equals_the_pipelines_call(make_flux, channels, packed, size, batch):
    model = make_flux(**flux.config_with_latent({}, channels, 2 if packed else 1))
    latents = torch.randn(batch, channels, *size)
    sigma, guidance = torch.rand(batch), torch.rand(batch) * 5 + 1
    with torch.no_grad():
        found = family.velocity(model, latents, sigma, _cond(batch), guidance)
        expected = _pipeline_velocity(model, latents, sigma, _cond(batch), guidance, packed)
    assert found.shape == latents.shape
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    with torch.no_grad():  # the comparison can fail: position, guidance and sigma all matter
        turned = family.velocity(model, latents.flip(-1), sigma, _cond(batch), guidance).flip(-1)
        unguided = family.velocity(model, latents, sigma, _cond(batch), guidance + 1)
        later = family.velocity(model, latents, sigma * 0.5, _cond(batch), guidance)
    assert min((other - expected).abs().max() for other in (turned, unguided, later)) > 1e-3


def test_embed_is_the_embedder_on_the_grid(make_flux):
    model = make_flux()
    latents = torch.randn(2, 16, 6, 8)
    found = family.embed(model, latents, dict(model.config))
    assert found.shape == (2, 3, 4, 48)
    patch = latents[1, :, 2:4, 6:8].reshape(-1)  # channel-major
    torch.testing.assert_close(found[1, 1, 3], model.x_embedder(patch), rtol=1e-6, atol=1e-6)


def test_velocity_without_guidance_embedding(make_flux):
    model = make_flux(guidance_embeds=False, in_channels=8)
    latents, sigma = torch.randn(1, 8, 2, 3), torch.tensor([0.4])
    with torch.no_grad():
        plain = family.velocity(model, latents, sigma, _cond(1))
        guided = family.velocity(model, latents, sigma, _cond(1), torch.tensor([3.5]))
    assert torch.equal(plain, guided)


def test_velocity_refuses(make_flux):
    model = make_flux()
    with pytest.raises(ValueError, match="pass guidance"):
        family.velocity(model, torch.randn(1, 16, 4, 4), torch.ones(1), _cond(1))
    with pytest.raises(ValueError, match="another autoencoder"):
        family.velocity(model, torch.randn(1, 32, 4, 4), torch.ones(1), _cond(1), torch.ones(1))
    with pytest.raises(ValueError, match="does not divide"):
        family.velocity(model, torch.randn(1, 16, 5, 4), torch.ones(1), _cond(1), torch.ones(1))


def test_velocity_trains_a_peft_injected_model(make_flux):
    peft = pytest.importorskip("peft")
    model = make_flux(in_channels=8).requires_grad_(False)
    model.x_embedder.requires_grad_(True)
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules="|".join(family.lora_targets), init_lora_weights=False)
    latents, sigma, g = torch.randn(2, 8, 2, 2), torch.rand(2), torch.ones(2)
    wrapped = peft.get_peft_model(model, config)
    modules = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    assert len(modules) == 2 * 12 + 3 * 5
    for network in (model, wrapped):
        wrapped.zero_grad()
        family.velocity(network, latents, sigma, _cond(2), g).square().mean().backward()
        trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
        # The last single block feeds everything on; only the text side of the last double block can be left out.
        assert all(parameter.grad is not None for parameter in trained)
        assert sum(parameter.grad.abs().sum() > 0 for parameter in trained) == len(trained)


def test_velocity_follows_a_replaced_embedder(make_flux):
    """Training swaps the embedder and head of a loaded base; the base's own config must not decide the patch."""
    model = make_flux()
    model.x_embedder, model.proj_out = torch.nn.Linear(32, 48), torch.nn.Linear(48, 32)
    with torch.no_grad():
        assert family.velocity(model, torch.randn(1, 32, 2, 3), torch.ones(1), _cond(1), torch.ones(1)).shape[1] == 32
        assert family.embed(model, torch.randn(1, 32, 2, 3), dict(model.config)).shape == (1, 2, 3, 48)


def test_lora_targets_are_the_recipes(make_flux):
    names = [name for name, module in make_flux().named_modules() if isinstance(module, torch.nn.Linear)]
    found = {re.sub(r"\d+", "N", name, count=1) for name in names if family.is_lora_target(name)}
    single, double = "single_transformer_blocks.N.", "transformer_blocks.N."
    assert found == {
        *(single + name for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out")),
        *(double + "attn." + name for name in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")),
        *(double + f"attn.add_{name}_proj" for name in "qkv"),
        *(double + f"{name}.net.{layer}" for name in ("ff", "ff_context") for layer in ("0.proj", "2")),
    }


def test_blocks_in_running_order(make_flux):
    model = make_flux()
    assert family.blocks(model) == [*model.transformer_blocks, *model.single_transformer_blocks]


def test_tokens():
    assert flux.tokens(4096, 4096, 8, 2) == 65536
    assert flux.tokens(4096, 4096, 64) == 4096
    assert flux.tokens(1024, 512, 32) == 512
    with pytest.raises(ValueError, match="multiples of 64"):
        flux.tokens(1080, 1920, 64)


def test_base_signature_forgets_the_latent_and_nothing_else(make_flux):
    base = dict(make_flux().config)
    assert flux.base_signature(base) == flux.base_signature(flux.config_with_latent(base, 128))
    for field, value in (
        ("num_layers", 4),
        ("num_single_layers", 9),
        ("num_attention_heads", 5),
        ("joint_attention_dim", 24),
        ("pooled_projection_dim", 7),
        ("guidance_embeds", False),
    ):
        assert flux.base_signature({**base, field: value}) != flux.base_signature(base), field


# ---- key maps ----------------------------------------------------------------------------------------------------


def _state(model) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"guidance_embeds": False},
        {"in_channels": 32, "num_layers": 1, "num_single_layers": 0},
        {
            "in_channels": 128,
            "num_layers": 0,
            "num_single_layers": 2,
            "attention_head_dim": 32,
            "axes_dims_rope": (4, 14, 14),
        },
        {"in_channels": 96, "out_channels": 16},
    ],
)
def test_round_trip_and_detection(make_flux, config):
    model = make_flux(**config)
    state = _state(model)
    expected = {key: value for key, value in model.config.items() if not key.startswith("_")}
    expected["out_channels"] = expected["out_channels"] or expected["in_channels"]
    native = flux.to_original(state)
    back = flux.to_diffusers(native)
    assert set(back) == set(state)
    assert all(torch.equal(back[key], state[key]) for key in state)
    assert sum(value.numel() for value in native.values()) == sum(value.numel() for value in state.values())
    for names, prefix in ((state, ""), (native, ""), (state, "transformer."), (native, "model.diffusion_model.")):
        prefixed = {prefix + key: value.to("meta") for key, value in names.items()}
        backbone, found = detect_backbone(prefixed)
        assert backbone is flux
        assert found == expected


def test_native_layout_slice_by_slice(make_flux):
    """Every slice at the place where the original code reads it (Linear(D,3D) as q|k|v, linear1 as q|k|v|mlp, ...)."""
    state = _state(make_flux())
    native = flux.to_original(state)
    D, M = 48, 192
    for side, names, norm in (
        ("img", ("to_q", "to_k", "to_v"), "norm_"),
        ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), "norm_added_"),
    ):
        for i in range(2):
            attn = f"transformer_blocks.{i}.attn."
            for suffix in ("weight", "bias"):
                qkv = native[f"double_blocks.{i}.{side}_attn.qkv.{suffix}"]
                for j, name in enumerate(names):
                    assert torch.equal(qkv[j * D : (j + 1) * D], state[f"{attn}{name}.{suffix}"])
            for short, long in (("q", "query"), ("k", "key")):
                scale = native[f"double_blocks.{i}.{side}_attn.norm.{long}_norm.scale"]
                assert torch.equal(scale, state[f"{attn}{norm}{short}.weight"])
    for i in range(3):
        block = f"single_transformer_blocks.{i}."
        linear1 = native[f"single_blocks.{i}.linear1.weight"]
        assert linear1.shape == (3 * D + M, D)
        for start, stop, name in ((0, D, "attn.to_q"), (D, 2 * D, "attn.to_k"), (2 * D, 3 * D, "attn.to_v")):
            assert torch.equal(linear1[start:stop], state[f"{block}{name}.weight"])
        assert torch.equal(linear1[3 * D :], state[f"{block}proj_mlp.weight"])
        assert torch.equal(native[f"single_blocks.{i}.linear2.bias"], state[f"{block}proj_out.bias"])
    swapped, plain = native["final_layer.adaLN_modulation.1.weight"], state["norm_out.linear.weight"]
    assert torch.equal(swapped[:D], plain[D:])
    assert torch.equal(swapped[D:], plain[:D])


def _native_forward(sd, tokens, rows, columns, text, pooled, sigma, guidance, heads, axes):
    """FLUX.1's forward written from its formulas on native names: an independent reading of what each tensor means."""

    def linear(x, name):
        return F.linear(x, sd[f"{name}.weight"], sd[f"{name}.bias"])

    def embed(value):  # 256-d sinusoid, cosines first
        frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128)
        angle = (value * 1000)[:, None] * frequencies
        return torch.cat((angle.cos(), angle.sin()), dim=-1)

    def mlp_in(x, name):
        return linear(F.silu(linear(x, f"{name}.in_layer")), f"{name}.out_layer")

    def rms(x, name):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * sd[f"{name}.scale"]

    def norm(x, shift, scale):
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    def qkv(x, name_norm):
        batch, length, _ = x.shape
        q, k, v = x.reshape(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
        return rms(q, f"{name_norm}.query_norm"), rms(k, f"{name_norm}.key_norm"), v

    def rotate(x):
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)

    def attend(q, k, v):
        weights = (rotate(q) @ rotate(k).transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    ids = torch.cat((torch.zeros(text.shape[1], 3), F.pad(grid, (1, 0)).float()))
    angles = [ids[:, i : i + 1] * 10000 ** (-torch.arange(0, n, 2) / n) for i, n in enumerate(axes)]
    cos, sin = torch.cat(angles, -1).cos(), torch.cat(angles, -1).sin()

    vec = mlp_in(embed(sigma), "time_in") + mlp_in(pooled, "vector_in") + mlp_in(embed(guidance), "guidance_in")
    img, txt = linear(tokens, "img_in"), linear(text, "txt_in")
    length = txt.shape[1]
    for i in range(sum(key.endswith("img_mod.lin.bias") for key in sd)):
        block = f"double_blocks.{i}."
        mods = {side: linear(F.silu(vec), f"{block}{side}_mod.lin").chunk(6, -1) for side in ("img", "txt")}
        parts = {
            side: qkv(linear(norm(x, *mods[side][:2]), f"{block}{side}_attn.qkv"), f"{block}{side}_attn.norm")
            for side, x in (("txt", txt), ("img", img))
        }
        joint = attend(*(torch.cat((t, m), dim=2) for t, m in zip(parts["txt"], parts["img"], strict=True)))
        streams = []
        for side, x, out in (("txt", txt, joint[:, :length]), ("img", img, joint[:, length:])):
            _, _, gate, shift, scale, gate2 = mods[side]
            x = x + gate[:, None] * linear(out, f"{block}{side}_attn.proj")
            hidden = F.gelu(linear(norm(x, shift, scale), f"{block}{side}_mlp.0"), approximate="tanh")
            streams.append(x + gate2[:, None] * linear(hidden, f"{block}{side}_mlp.2"))
        txt, img = streams
    x = torch.cat((txt, img), dim=1)
    width = x.shape[-1]
    for i in range(sum(key.endswith("linear1.bias") for key in sd)):
        block = f"single_blocks.{i}."
        shift, scale, gate = linear(F.silu(vec), f"{block}modulation.lin").chunk(3, -1)
        hidden = linear(norm(x, shift, scale), f"{block}linear1")
        out = attend(*qkv(hidden[..., : 3 * width], f"{block}norm"))
        mlp = F.gelu(hidden[..., 3 * width :], approximate="tanh")
        x = x + gate[:, None] * linear(torch.cat((out, mlp), -1), f"{block}linear2")
    shift, scale = linear(F.silu(vec), "final_layer.adaLN_modulation.1").chunk(2, -1)
    return linear(norm(x[:, length:], shift, scale), "final_layer.linear")


def test_native_weights_compute_the_same(make_flux):
    model = make_flux(in_channels=8)
    cond, sigma, g = _cond(2), torch.tensor([0.9, 0.2]), torch.tensor([3.5, 1.0])
    latents = torch.randn(2, 8, 3, 4)
    with torch.no_grad():
        expected = family.velocity(model, latents, sigma, cond, g)
        found = _native_forward(
            flux.to_original(_state(model)),
            latents.flatten(2).transpose(1, 2),
            *(3, 4),
            cond["prompt_embeds"],
            cond["pooled"],
            sigma,
            g,
            3,
            (4, 6, 6),
        )
    torch.testing.assert_close(found.transpose(1, 2).reshape(latents.shape), expected, rtol=1e-4, atol=1e-5)


def test_renamed_norms_are_read(make_flux):
    state = _state(make_flux())
    native = flux.to_original(state)
    renamed = {key.replace("_norm.scale", "_norm.weight"): value for key, value in native.items()}
    assert set(renamed) != set(native)
    assert detect_backbone(renamed)[1] == detect_backbone(native)[1]
    back = flux.to_diffusers(renamed)
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_partial_maps(make_flux):
    model = make_flux()
    state, config = _state(model), dict(model.config)
    part = {key: value for key, value in state.items() if key.startswith(("x_embedder", "proj_out", "norm_out"))}
    native = flux.to_original(part, config, partial=True)
    assert set(native) == {
        f"{name}.{suffix}"
        for name in ("img_in", "final_layer.linear", "final_layer.adaLN_modulation.1")
        for suffix in ("weight", "bias")
    }
    back = flux.to_diffusers(native, config, partial=True)
    assert all(torch.equal(back[key], part[key]) for key in part)
    query = "transformer_blocks.0.attn.to_q.weight"
    with pytest.raises(ValueError, match=r"^(?!.*unknown).*2 missing: .*attn.to_k.weight, .*attn.to_v.weight$"):
        flux.to_original({query: state[query]}, config, partial=True)


def test_refusals_name_the_keys(make_flux):
    state = _state(make_flux())
    native = flux.to_original(state)
    lacking = {key: value for key, value in state.items() if key != "transformer_blocks.1.attn.to_out.0.bias"}
    with pytest.raises(ValueError, match=r"1 missing: transformer_blocks.1.attn.to_out.0.bias"):
        flux.to_original(lacking)
    with pytest.raises(ValueError, match=r"1 unknown: double_blocks.0.img_attn.qkv.lora_up"):
        flux.to_diffusers({**native, "double_blocks.0.img_attn.qkv.lora_up": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"time_text_embed.guidance_embedder.linear_2.bias"):
        flux.to_original({key: value for key, value in state.items() if "guidance_embedder.linear_2" not in key})
    holed = {key: value for key, value in native.items() if not key.startswith("double_blocks.0.")}
    with pytest.raises(ValueError, match=r"double_blocks.0. is absent"):
        flux.detect(holed)
    with pytest.raises(ValueError, match=r"it has no proj_out.weight"):
        flux.detect({key: value for key, value in state.items() if key != "proj_out.weight"})
    with pytest.raises(ValueError, match="no known model"):
        detect_backbone({"conv_in.weight": torch.zeros(1)})
    ragged = {**native, "double_blocks.0.img_attn.qkv.weight": torch.zeros(145, 48)}
    with pytest.raises(ValueError, match=r"145 rows cannot be split"):
        flux.to_diffusers(ragged)


@pytest.mark.parametrize(
    ("head_dim", "axes"), [(128, (16, 56, 56)), (64, (8, 28, 28)), (32, (4, 14, 14)), (16, (4, 6, 6)), (8, (4, 2, 2))]
)
def test_rope_axes(head_dim, axes):
    assert rope_axes(head_dim) == axes
    assert sum(axes) == head_dim


def test_rope_axes_need_room():
    with pytest.raises(ValueError, match="head dimension 4"):
        rope_axes(4)


def test_position_ids_are_one_step_a_token():
    assert position_ids(2, 3).tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2]]
