"""FLOPs of training: against sums worked out by hand at the published sizes, and against PyTorch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from train.config import load_recipe
from train.cost import CARDS, Card, forward_work, gpu_hours, hours_line, lora_step_flops, sample_flops
from train.distributed import Ranks
from train.families import FAMILIES
from train.lora import inject_lora
from train.plan import geometry, network, stage_flops
from train.run import dry_run, make_stage

CPU = Ranks(0, 1, torch.device("cpu"))


def planned(recipe, stage="finetune", overrides=()):
    """A stage of a recipe and its geometry."""
    made = make_stage(load_recipe(recipe, overrides), stage, CPU)
    autoencoder = made.context.recipe.stages["cache"].autoencoder
    return made, geometry(made.context, made.config.base, autoencoder, made.config.architecture, 1)


# By hand, in 1e12 FLOPs a forward pass. FLUX: 19 blocks of two streams and 38 of one, D = 3072, 12 D^2 weights a token
# in each, and attention 4 S^2 D over all S tokens; SANA: 20 blocks, D = 2240, 6 D^2 and a feed-forward of 37.7 million
# weights an image token, 2 D^2 a text token, cross-attention 4 N T D, linear attention 4 N D 32.
FLUX_LAYERS = 2 * 12 * 3072**2 * (19 + 38)
# klein: 5 blocks of two streams and 20 of one, 13 D^2 weights a token in each (a gated MLP of 3 D). Z-Image: 30 blocks
# on all tokens, 2 on image or text each, D = 3840, 4 D^2 and a gated MLP of 8/3 D: 12 D^2.
KLEIN_LAYERS = 2 * 13 * 3072**2 * 25
BY_HAND = [
    ("klein-2k", (1024, 512), (KLEIN_LAYERS * 1536 + 25 * 4 * 1536**2 * 3072) / 1e12),  # 10.1
    ("z-image-1k", (1024, 512), (2 * 12 * 3840**2 * 32 * 1536 + 30 * 4 * 1536**2 * 3840) / 1e12),  # 18.5
    ("flux-512", (256, 256), (FLUX_LAYERS * 512 + 57 * 4 * 512**2 * 3072) / 1e12),  # 6.8
    ("flux-1k", (1024, 512), (FLUX_LAYERS * 1536 + 57 * 4 * 1536**2 * 3072) / 1e12),  # 21.5
    ("flux-4k", (4096, 512), 74.4),
    (
        "sana-1.6b",
        (256, 300),
        20 * (2 * 256 * (6 * 2240**2 + 37.7e6) + 2 * 300 * 2 * 2240**2 + 256 * 4 * 2240 * (300 + 32)) / 1e12,  # 0.83
    ),
]


@pytest.mark.parametrize(("recipe", "tokens", "expected"), BY_HAND)
def test_a_forward_pass_costs_what_it_does_by_hand(recipe, tokens, expected):
    _, geo = planned(recipe)
    work = forward_work(geo.family, network(geo.family, geo.moved), geo.moved, tokens)
    assert work.forward / 1e12 == pytest.approx(expected, rel=0.02)


def test_a_finetune_stage_costs_what_it_does_by_hand():
    """FLUX at 512 px: 1.046 billion LoRA weights, Eq. 7 with 0.9 of the rows in the second branch, recomputation."""
    stage, geo = planned("flux-512")
    base = FLUX_LAYERS * 512
    attention = 57 * 4 * 512**2 * 3072
    lora = 2 * 1.046e9 * 512 * 0.75  # of the 19 blocks of two streams a token sees half: 0.526 + 0.520 / 2
    branch = 2 * (base + attention + lora) + base + 2 * attention + 2 * lora
    flops = stage_flops(geo, stage.config, 256, False, (256, 256))
    assert flops == pytest.approx(1.9 * branch * 10_000 * 256, rel=0.02)


@pytest.mark.parametrize(
    ("override", "ratio"),
    [
        ("finetune.objective.loss=flow", 1 / 1.9),
        ("finetune.objective.caption_dropout=0.5", 1.5 / 1.9),
        ("finetune.steps=20000", 2),
        ("finetune.batch=64", 1 / 4),
    ],
)
def test_branches_and_samples_scale_the_cost(override, ratio):
    costs = []
    for overrides in ([], [override]):
        stage, geo = planned("flux-512", overrides=overrides)
        costs.append(stage_flops(geo, stage.config, 8, False, (256, 256)))
    assert costs[1] / costs[0] == pytest.approx(ratio)


def test_the_empty_branch_of_a_base_without_embedding_costs_as_much():
    costs = []
    for overrides in ([], ["finetune.objective.implicit_w=null"]):
        stage, geo = planned("z-image-1k", overrides=overrides)
        costs.append(stage_flops(geo, stage.config, 8, False, (256, 256)))
    assert costs[1] / costs[0] == pytest.approx(1 / 1.9)


def test_recomputation_adds_a_third_to_full_training_of_layers_without_attention():
    _, geo = planned("sana-1.6b")
    work = forward_work(geo.family, network(geo.family, geo.moved), geo.moved, (256, 0))
    plain, recomputed = (sample_flops(work, full=True, checkpointing=on) for on in (False, True))
    assert recomputed / plain == pytest.approx(4 / 3, rel=0.01)


SMALL = {
    "flux": {"num_layers": 2, "num_single_layers": 3, "attention_head_dim": 16, "num_attention_heads": 4},
    "flux2": {"num_layers": 2, "num_single_layers": 3, "attention_head_dim": 16, "num_attention_heads": 4},
    "zimage": {"n_layers": 3, "n_refiner_layers": 1, "dim": 64, "n_heads": 4, "n_kv_heads": 4, "all_patch_size": [1]},
    "sana": {"num_layers": 3, "num_attention_heads": 4, "attention_head_dim": 16},
    "dit": {"num_layers": 3, "num_attention_heads": 4, "attention_head_dim": 16},
}


def conditioning(name, config, text):
    """Random conditioning of one image."""
    if name == "dit":
        return {"labels": torch.zeros(1, dtype=torch.long)}
    widths = {"sana": "caption_channels", "zimage": "cap_feat_dim"}
    width = config[widths.get(name, "joint_attention_dim")]
    others = {
        "flux": lambda: {"pooled": torch.randn(1, config["pooled_projection_dim"])},
        "flux2": dict,
        "sana": lambda: {"mask": torch.ones(1, text)},
        "zimage": lambda: {"mask": torch.ones(1, text)},
    }
    return {"prompt_embeds": torch.randn(1, text, width)} | others[name]()


@pytest.mark.parametrize("name", FAMILIES)
def test_pytorch_counts_the_same_forward_and_nearly_the_same_backward(name):
    family = FAMILIES[name]
    config = dict(family.tiny(True).config) | SMALL[name]
    if name == "sana":
        config |= {"num_cross_attention_heads": 4, "cross_attention_dim": 64}
    side, text = 16, 32 if name == "zimage" else 24  # a multiple of 32, to which that one pads
    config["sample_size"] = side
    model = family.prepare(family.network_class().from_config(config))
    patch = config.get("patch_size", 1) if name != "flux" else 1
    image = (side // patch) ** 2
    latents = torch.randn(1, config["in_channels"], side, side)
    cond = conditioning(name, config, text)
    guidance = torch.ones(1) if name == "flux" else None
    inject_lora(model, family, 4, 4.0, seed=0)
    for path in family.backbone.ends(config):
        model.get_submodule(path).requires_grad_(True)
    names = {n.replace(".base_layer", "") for n, _ in model.named_parameters() if ".lora_" not in n}
    bare = family.network_class().from_config(config)
    assert names == {n for n, _ in bare.named_parameters()}
    work = forward_work(family, bare, config, (image, text if name != "dit" else 0), rank=4)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            output = family.velocity(model, latents, torch.full((1,), 0.5), cond, guidance)
        with FlopCounterMode(display=False) as backward:
            output.sum().backward()
    assert work.forward == pytest.approx(forward.get_total_flops(), rel=0.01)
    assert work.backward(full=False) == pytest.approx(backward.get_total_flops(), rel=0.1)


def test_gpu_hours_are_flops_over_what_a_card_reaches():
    assert gpu_hours(3.6e15, Card(peak=2.0, memory=1), mfu=0.5) == pytest.approx(1.0)
    assert gpu_hours(1e18, CARDS["H100"]) == pytest.approx(1e18 / (989.4e12 * 0.35 * 3600))


def test_a_line_marks_the_cards_that_are_too_small():
    line = hours_line(1e19, gigabytes=30)
    assert "not measured" in line
    assert "RTX 4090 48 (24 GB: too small), RTX 5090 37.9, A100 25.4, H100 8.02" in line


def test_a_dry_run_prints_gpu_hours_of_each_stage_that_trains(capsys):
    assert dry_run(load_recipe("sana-1.6b")) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "GPU-hours" in line]
    assert len(lines) == 2
    assert all("estimate at 35% MFU, not measured" in line for line in lines)


def test_mfu_counts_the_flops_that_pytorch_counts():
    """Where most weights are in double blocks, each of whose streams only its own tokens pass."""
    flux = FAMILIES["flux"]
    config = {**flux.tiny(True).config, "num_layers": 4, "attention_head_dim": 16, "num_attention_heads": 8}
    bare = flux.network_class().from_config(config)
    model = flux.network_class().from_config(config).requires_grad_(False)
    inject_lora(model, flux, 8, 8.0, seed=0)
    x, sigma, scale = torch.randn(1, config["in_channels"], 8, 8), torch.full((1,), 0.5), torch.ones(1)
    cond = {
        "prompt_embeds": torch.randn(1, 40, config["joint_attention_dim"]),
        "pooled": torch.randn(1, config["pooled_projection_dim"]),
    }
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        flux.velocity(model, x, sigma, cond, scale).sum().backward()
    assert lora_step_flops(flux, bare, config, (64, 40), 8) == pytest.approx(counter.get_total_flops(), rel=0.06)
