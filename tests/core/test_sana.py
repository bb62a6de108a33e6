"""SANA: the network against diffusers' for every published configuration, the key maps, detection, the call."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dcgen.backbones import BACKBONES, detect_backbone
from dcgen.backbones.sana import SanaConfig, SanaNet, network, network_timestep
from dcgen.backbones.sana.network import position_table
from dcgen.cpu import onednn_linear
from dcgen.schedule import sigmas
from train.families import FAMILIES

sana, family = BACKBONES["sana"], FAMILIES["sana"]

WIDE = {"num_attention_heads": 70, "num_cross_attention_heads": 20, "cross_attention_head_dim": 112}
WIDE |= {"cross_attention_dim": 2240}
SMALL = {"num_attention_heads": 36, "num_cross_attention_heads": 16, "cross_attention_head_dim": 72}
SMALL |= {"cross_attention_dim": 1152}
NORMED = {"qk_norm": "rms_norm_across_heads"}
# Every published network at full width; depth is 1 here (SANA-1.5's 4.8B is its 1.6B with 60 blocks).
PUBLISHED = {
    "0.6B 512/1K": SMALL,
    "1.6B 1K": WIDE,
    "1.6B 2K": {**WIDE, "sample_size": 64, "interpolation_scale": 1.0},
    "1.6B 4K": {**WIDE, "sample_size": 128, "interpolation_scale": 2.0},
    "1.5 1.6B/4.8B": {**WIDE, **NORMED},
    "Sprint 0.6B": {**SMALL, **NORMED, "guidance_embeds": True},
    "Sprint 1.6B": {**WIDE, **NORMED, "guidance_embeds": True},
    "DC-Gen 1.6B f64c128": {**WIDE, **NORMED, "in_channels": 128, "out_channels": 128},
}
TINY = {"num_attention_heads": 2, "num_cross_attention_heads": 2, "cross_attention_head_dim": 32, "num_layers": 3}
TINY |= {"cross_attention_dim": 64, "caption_channels": 24, "in_channels": 8, "out_channels": 8}
VARIANTS = {
    "plain": {},
    "positions": {"sample_size": 6, "interpolation_scale": 2.0},
    "qk norm": NORMED,
    "sprint": {**NORMED, "guidance_embeds": True},
    "patches": {"patch_size": 2},
    "attention bias": {"attention_bias": True},
}


def make(seed: int = 0, **config):
    """Random SanaTransformer2DModel in eval mode with activations of about 1 through its depth."""
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        model = diffusers.SanaTransformer2DModel(**config)
    buffers = dict(model.named_buffers())
    model = model.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            parameter.uniform_(-1, 1, generator=generator).mul_((3 / fan_in) ** 0.5 if parameter.ndim > 1 else 0.5)
    if buffers:  # the position table, which meta construction left empty
        proj = model.patch_embed.proj
        model.patch_embed = diffusers.models.embeddings.PatchEmbed(
            height=model.config.sample_size,
            width=model.config.sample_size,
            patch_size=model.config.patch_size,
            in_channels=model.config.in_channels,
            embed_dim=proj.out_channels,
            interpolation_scale=model.config.interpolation_scale,
        )
        model.patch_embed.proj = proj
    return model


def ours(model, dtype=None) -> SanaNet:
    """Our network on the same tensors (shared, not copied)."""
    network = SanaNet(SanaConfig.from_diffusers(model.config), device="meta").eval()
    network.load_state_dict(model.state_dict(), strict=True, assign=True)
    return network


def inputs(model, batch: int, size: tuple[int, int], text: int = 7, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    latents = torch.randn(batch, config.in_channels, *size, generator=generator)
    caption = torch.randn(batch, text, config.caption_channels, generator=generator)
    mask = torch.ones(batch, text)
    mask[-1, text // 2 :] = 0
    guided = config.guidance_embeds
    timestep = torch.rand(batch, generator=generator) if guided else torch.tensor([3.0, 870.0])[:batch]
    guidance = torch.rand(batch, generator=generator) if guided else None
    return latents, timestep, caption, mask, guidance


def call_diffusers(model, latents, timestep, caption, mask, guidance):
    return model(
        hidden_states=latents,
        encoder_hidden_states=caption,
        encoder_attention_mask=mask,
        timestep=timestep,
        guidance=guidance,
        return_dict=False,
    )[0]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("name", PUBLISHED)
@torch.no_grad()
def test_parity_at_full_width(name):
    model = make(num_layers=1, **PUBLISHED[name])
    given = inputs(model, 1, (6, 9))
    expected = call_diffusers(model, *given)
    found = ours(model)(*given)
    assert found.shape == given[0].shape
    # float32 and another order of sums; measured 1e-7 to 2e-6
    assert error(found, expected) < 1e-5


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("size", [(6, 6), (4, 10)])
@torch.no_grad()
def test_parity_in_depth(name, size):
    model = make(**{**TINY, **VARIANTS[name]})
    given = inputs(model, 2, size)
    expected = call_diffusers(model, *given)
    network = ours(model)
    assert error(network(*given), expected) < 1e-5
    # the comparison can fail: every input matters
    latents, timestep, caption, mask, guidance = given
    others = [
        (latents.flip(-1), timestep, caption, mask, guidance),
        (latents, timestep + 0.3, caption, mask, guidance),
        (latents, timestep, caption.flip(1), mask, guidance),
        (latents, timestep, caption, torch.ones_like(mask), guidance),
    ]
    if guidance is not None:
        others.append((latents, timestep, caption, mask, guidance + 0.3))
    assert min(error(network(*other), expected) for other in others) > 1e-3


@torch.no_grad()
def test_masked_tokens_do_not_matter():
    model = make(**TINY)
    latents, timestep, caption, mask, _ = inputs(model, 2, (4, 4))
    network = ours(model)
    changed = torch.where(mask[..., None] > 0, caption, caption + 5)
    torch.testing.assert_close(network(latents, timestep, changed, mask), network(latents, timestep, caption, mask))
    assert not torch.allclose(network(latents, timestep, changed), network(latents, timestep, caption))


@torch.no_grad()
def test_a_caption_of_nothing_but_padding_is_read_as_diffusers_reads_it():
    """The other row's padding then stays too."""
    model = make(**TINY)
    latents, timestep, caption, mask, _ = inputs(model, 2, (4, 4))
    mask[1] = 0
    given = (latents, timestep, caption, mask, None)
    assert error(ours(model)(*given), call_diffusers(model, *given)) < 1e-5


@pytest.mark.parametrize("strip", [1, 8, 20, 40, 1000])
@torch.no_grad()
def test_any_strip_gives_the_whole(strip, monkeypatch):
    """Rows are convolved some at a time, with the row beyond: 1 to 7 rows of 8 columns, a last strip of fewer."""
    model = make(**{**TINY, **NORMED})
    given = inputs(model, 2, (7, 8))
    monkeypatch.setattr(network, "STRIP_CPU", strip)
    assert error(ours(model)(*given), call_diffusers(model, *given)) < 1e-5


@torch.no_grad()
def test_linear_layers_go_through_onednn():
    """On a float32 CPU outside of training, once a layer is large; the results agree, and nothing is left switched."""
    calls = []
    linear = torch.nn.functional.linear
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("not an x86 processor with AVX")
    weight, bias, x = torch.randn(200, 100), torch.randn(200), torch.randn(3, 5, 100)

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func.name())
            return func(*args, **(kwargs or {}))

    def runs(x, weight, bias=None):
        calls.clear()
        with onednn_linear(x), Spy():
            found = torch.nn.functional.linear(x, weight, bias)
        return found, any("mkldnn::_linear_pointwise" in name for name in calls)

    wide = torch.randn(3, 5, 200)
    strided = {"as it is": x, "rows in another order": x.transpose(0, 1), "part of a wider one": wide[..., 50:150]}
    for name, given in strided.items():
        for shift in (None, bias):
            found, used = runs(given, weight, shift)
            assert used, name
            expected = linear(given.double(), weight.double(), None if shift is None else shift.double())
            torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    # The call takes these for contiguous, so it must not get them.
    assert not runs(x, weight, weight[:, 0])[1]
    assert not runs(x, weight.t().contiguous().t())[1]
    assert not runs(x, weight[:20])[1]  # small
    assert not runs(x.bfloat16(), weight.bfloat16())[1]
    assert not runs(x[:1, :1], weight)[1]  # one row
    with torch.enable_grad():
        assert not runs(x, weight)[1]
    with Spy():
        calls.clear()
        linear(x, weight)
    assert "mkldnn::_linear_pointwise" not in calls


@pytest.mark.parametrize("name", ["plain", "positions", "qk norm"])
@torch.no_grad()
def test_bfloat16_as_good_as_diffusers(name):
    """Error against float32 on the same rounded weights; the ratio of one seed is 0.92 to 1.09 (12 seeds)."""
    ratios = []
    for seed in range(3):
        model = make(seed, **{**TINY, **VARIANTS[name]}).bfloat16().float()
        given = inputs(model, 2, (6, 6), seed=seed)
        truth = call_diffusers(model, *given)
        half = make(seed, **{**TINY, **VARIANTS[name]}).bfloat16()
        cast = [value if value is None or i == 1 else value.bfloat16() for i, value in enumerate(given)]
        ratios.append(error(ours(half)(*cast), truth) / error(call_diffusers(half, *cast), truth))
    assert sum(ratios) / len(ratios) < 1.15


@torch.no_grad()
def test_float16_stays_finite():
    """Weights and inputs so large that float16 overflows: diffusers' own gives NaN, ours does not."""
    model = make(**TINY)
    for parameter in model.parameters():
        parameter.mul_(4)
    given = inputs(model, 2, (6, 6))
    half = model.half()
    cast = [value if value is None or i == 1 else value.half() for i, value in enumerate(given)]
    assert not call_diffusers(half, *cast).isfinite().all()
    assert ours(half)(*cast).isfinite().all()


def test_gradients_flow_and_agree():
    model = make(**{**TINY, **NORMED})
    given = inputs(model, 2, (4, 4))
    network = ours(model)
    call_diffusers(model, *given).square().mean().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    network(*given).square().mean().backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].view_as(parameter), rtol=1e-3, atol=1e-6)


def test_operations_make_every_weight():
    """All layers come from `operations`, so that a runtime's casting layers reach them; the tables alone are raw."""
    made = []

    class Operations:
        @staticmethod
        def _note(cls):
            def make(*args, **kwargs):
                made.append(cls(*args, **kwargs))
                return made[-1]

            return make

    for name in ("Linear", "Conv2d", "LayerNorm", "RMSNorm"):
        setattr(Operations, name, Operations._note(getattr(torch.nn, name)))
    config = SanaConfig.from_diffusers({**TINY, **NORMED})
    network = SanaNet(config, operations=Operations, dtype=torch.bfloat16, device="meta")
    layers = [module for module in network.modules() if next(module.parameters(recurse=False), None) is not None]
    raw = [module for module in layers if not any(module is one for one in made)]
    assert all(list(dict(module.named_parameters(recurse=False))) == ["scale_shift_table"] for module in raw)
    assert len(raw) == 1 + config.num_layers
    assert all(p.dtype == torch.bfloat16 and p.device.type == "meta" for p in network.parameters())


def test_positions_span_the_same_plane_at_any_size():
    config = SanaConfig(num_attention_heads=2, sample_size=128, interpolation_scale=2.0)
    table = position_table(128, 64, config)
    quarter = config.width // 4
    # lowest index has frequency 1: the sines of 0, 0.5, 1, ... along a 128 side, and of 0, 1, 2, ... along a 64 side
    torch.testing.assert_close(table[:, 0, 2 * quarter], (torch.arange(128) / 2).sin())
    torch.testing.assert_close(table[0, :, 0], torch.arange(64.0).sin())


def test_guidance_must_match():
    with pytest.raises(ValueError, match="has no embedding for guidance"):
        ours(make(**TINY))(*inputs(make(**TINY), 1, (2, 2))[:4], torch.ones(1))
    sprint = make(**{**TINY, "guidance_embeds": True})
    with pytest.raises(ValueError, match="needs guidance"):
        ours(sprint)(*inputs(sprint, 1, (2, 2))[:4])


@pytest.mark.parametrize(
    "config",
    [
        {"qk_norm": "layer_norm"},
        {"cross_attention_dim": 48},
        {"norm_elementwise_affine": True},
        {"num_cross_attention_heads": 3},
    ],
)
def test_strange_configs_are_refused(config):
    with pytest.raises(ValueError, match="unsupported config"):
        SanaConfig.from_diffusers({**TINY, **config})


# ---- the method's side ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "sprint"])
@torch.no_grad()
def test_velocity_is_the_pipelines_call(name):
    model = make(**{**TINY, **VARIANTS[name]})
    latents, _, caption, mask, _ = inputs(model, 2, (4, 6))
    sigma = torch.tensor([0.9997, 0.2498])
    cond = {"prompt_embeds": caption, "mask": mask}
    if name == "plain":
        found = family.velocity(model, latents, sigma, cond)
        # SanaPipeline's scheduler hands the network whole time steps
        expected = call_diffusers(model, latents, torch.tensor([999, 249]), caption, mask, None)
    else:
        found = family.velocity(model, latents, sigma, cond, torch.tensor([4.5, 4.5]))
        expected = call_diffusers(model, latents, sigma, caption, mask, torch.tensor([0.45, 0.45]))
    assert error(found, expected) < 1e-6


def test_timesteps_are_the_schedulers():
    """Every step of the published schedules falls on the whole number that DPMSolverMultistep gives the network."""
    diffusers = pytest.importorskip("diffusers")
    for shift in (3.0, 6.0):
        scheduler = diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
        )
        for steps in (14, 20, 28):
            scheduler.set_timesteps(steps)
            found = network_timestep(sigmas(steps, tokens=1024, channels=32, rule="static", shift=shift)[:-1])
            assert found.long().tolist() == scheduler.timesteps.tolist()


def test_velocity_refuses():
    model = make(**{**TINY, "guidance_embeds": True})
    latents, _, caption, mask, _ = inputs(model, 1, (4, 4))
    cond = {"prompt_embeds": caption, "mask": mask}
    with pytest.raises(ValueError, match="pass guidance"):
        family.velocity(model, latents, torch.ones(1), cond)
    with pytest.raises(ValueError, match=r"channels, got 32: the latent belongs to another autoencoder"):
        family.velocity(model, torch.zeros(1, 32, 4, 4), torch.ones(1), cond, torch.ones(1))
    patched = make(**{**TINY, "patch_size": 2})
    with pytest.raises(ValueError, match="does not divide"):
        family.velocity(patched, torch.zeros(1, 8, 3, 4), torch.ones(1), cond)


@torch.no_grad()
def test_embed_and_blocks():
    model = make(**{**TINY, **VARIANTS["positions"]})
    latents = torch.randn(2, 8, 3, 5)
    found = family.embed(model, latents, dict(model.config))
    assert found.shape == (2, 3, 5, 64)
    weight = model.patch_embed.proj.weight[:, :, 0, 0]
    torch.testing.assert_close(found[1, 2, 4], weight @ latents[1, :, 2, 4] + model.patch_embed.proj.bias)
    assert family.blocks(model) == list(model.transformer_blocks)


def test_config_with_latent_and_base_signature():
    config = dict(make(**{**TINY, **VARIANTS["positions"]}).config)
    moved = sana.config_with_latent(config, 128, 2)
    assert (moved["in_channels"], moved["out_channels"], moved["patch_size"], moved["sample_size"]) == (128, 128, 2, 12)
    make(**moved)
    assert sana.base_signature(moved) == sana.base_signature(config)
    for field, value in (("num_layers", 4), ("caption_channels", 25), ("qk_norm", NORMED["qk_norm"])):
        assert sana.base_signature({**config, field: value}) != sana.base_signature(config)


@pytest.mark.parametrize("name", VARIANTS)
def test_shape_tables_are_the_models(name):
    model = make(**{**TINY, **VARIANTS[name]})
    base = sana.base_signature(dict(model.config))
    state = model.state_dict()
    shapes = sana.linears(base)
    assert all(tuple(state[f"{path}.weight"].shape) == shape for path, shape in shapes.items())
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)} - {"proj_out"}
    assert linear <= set(shapes)
    assert all("conv_" in path for path in set(shapes) - linear)
    ends = {**sana.latent_shapes(base, 8, model.config.patch_size), **sana.extra_shapes(base)}
    assert all(tuple(state[key].shape) == shape for key, shape in ends.items())
    targets = {path for path in shapes if family.is_lora_target(path)}
    assert len(targets) == 3 * (4 + 4 + 2)


# ---- key maps ------------------------------------------------------------------------------------------------------


def _original(model) -> dict[str, torch.Tensor]:
    """The state dict under NVlabs' names, written out by hand."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    guided = model.config.guidance_embeds
    time = "time_embed." if guided else "time_embed.emb."
    found = {}

    def both(new: str, old: str) -> None:
        for suffix in ("weight", "bias"):
            if f"{old}.{suffix}" in state:
                found[f"{new}.{suffix}"] = state[f"{old}.{suffix}"]

    both("x_embedder.proj", "patch_embed.proj")
    for n in (1, 2):
        both(f"y_embedder.y_proj.fc{n}", f"caption_projection.linear_{n}")
        both(f"t_embedder.mlp.{2 * n - 2}", f"{time}timestep_embedder.linear_{n}")
        if guided:
            both(f"cfg_embedder.mlp.{2 * n - 2}", f"time_embed.guidance_embedder.linear_{n}")
    both("t_block.1", "time_embed.linear")
    both("attention_y_norm", "caption_norm")
    both("final_layer.linear", "proj_out")
    found["final_layer.scale_shift_table"] = state["scale_shift_table"]
    for i in range(model.config.num_layers):
        old, new = f"transformer_blocks.{i}.", f"blocks.{i}."
        found[f"{new}scale_shift_table"] = state[f"{old}scale_shift_table"]
        for suffix in ("weight", "bias"):
            if f"{old}attn1.to_q.{suffix}" in state:
                thirds = [state[f"{old}attn1.to_{n}.{suffix}"] for n in "qkv"]
                found[f"{new}attn.qkv.{suffix}"] = torch.cat(thirds)
            found[f"{new}cross_attn.kv_linear.{suffix}"] = torch.cat(
                [state[f"{old}attn2.to_{n}.{suffix}"] for n in "kv"]
            )
        both(f"{new}attn.proj", f"{old}attn1.to_out.0")
        both(f"{new}cross_attn.q_linear", f"{old}attn2.to_q")
        both(f"{new}cross_attn.proj", f"{old}attn2.to_out.0")
        for n in "qk":
            both(f"{new}attn.{n}_norm", f"{old}attn1.norm_{n}")
            both(f"{new}cross_attn.{n}_norm", f"{old}attn2.norm_{n}")
        for conv in ("inverted", "depth", "point"):
            both(f"{new}mlp.{conv}_conv.conv", f"{old}ff.conv_{conv}")
    return found


def bytes_like(model) -> None:
    """Random bytes in place of every weight: quickly drawn, and as good for telling tensors apart."""
    generator = torch.Generator().manual_seed(7)
    for module in model.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            drawn = torch.empty(value.shape, dtype=torch.uint8).random_(generator=generator)
            module._parameters[name] = torch.nn.Parameter(drawn, requires_grad=False)


# Every published network at its width (one block) and, narrow, at its depth; and what else the names may depend on.
NAMED = {**{name: {**TINY, **variant} for name, variant in VARIANTS.items()}}
NAMED |= {f"width of {name}": {"num_layers": 1, **config} for name, config in PUBLISHED.items()}
NAMED |= {f"depth {depth}": {**TINY, **NORMED, "num_layers": depth} for depth in (20, 28, 60)}


@pytest.mark.parametrize("name", NAMED)
def test_key_maps_both_ways(name):
    """Bit for bit, both ways; what only the original files have (null caption, positions, a loss weight) is dropped."""
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        model = diffusers.SanaTransformer2DModel(**NAMED[name])
    bytes_like(model)
    state, original = model.state_dict(), _original(model)
    native = sana.to_original(state)
    assert set(native) == set(original)
    assert all(torch.equal(native[key], original[key]) for key in original)
    extra = {"y_embedder.y_embedding": torch.zeros(300, 24), "pos_embed": torch.zeros(1, 9, 64)}
    extra |= {"logvar_linear.weight": torch.zeros(1, 64), "logvar_linear.bias": torch.zeros(1)}
    back = sana.to_diffusers({**original, **extra})
    assert set(back) == set(state)
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_detection(name, prefix):
    model = make(**{**TINY, **VARIANTS[name]})
    expected = {key: value for key, value in dict(model.config).items() if key in sana.detect(model.state_dict())}
    for untold in ("sample_size", "interpolation_scale"):
        expected[untold] = {"sample_size": 32, "interpolation_scale": None}[untold]
    for state in (model.state_dict(), _original(model)):
        named = {prefix + key: value.to("meta") for key, value in state.items()}
        backbone, found = detect_backbone(named)
        assert backbone is sana
        assert found == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_heads_are_found(name):
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        model = diffusers.SanaTransformer2DModel(num_layers=2, **PUBLISHED[name])
    found = sana.detect(model.state_dict())
    for key, value in PUBLISHED[name].items():
        if key not in ("sample_size", "interpolation_scale"):
            assert found[key] == value
    assert found["num_layers"] == 2


def test_key_refusals():
    state = make(**{**TINY, **NORMED}).state_dict()
    lacking = {key: value for key, value in state.items() if key != "transformer_blocks.1.attn2.norm_k.weight"}
    with pytest.raises(ValueError, match=r"1 missing: transformer_blocks.1.attn2.norm_k.weight"):
        sana.to_original(lacking)
    with pytest.raises(ValueError, match=r"1 unknown: transformer_blocks.0.attn3.to_q.weight"):
        sana.to_original({**state, "transformer_blocks.0.attn3.to_q.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"it has no proj_out.weight"):
        sana.detect({key: value for key, value in state.items() if key != "proj_out.weight"})
