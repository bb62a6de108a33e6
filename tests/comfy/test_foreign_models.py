"""DCGenApply on models of other packs, by stand-ins (neither runs on a CPU), and users' LoRA on DC-Gen models."""

import pytest

SCALE = 24 / 16  # alpha / rank of the adapter
DEEP = ("deep4x4", "deep3x5")


@pytest.fixture(scope="module")
def setting(tiny, helper, base_release, deep_release, tmp_path_factory):
    """Files with random content for the tiny base, and what diffusers' merged models are made of."""
    folder = tmp_path_factory.mktemp("foreign")
    base, new = base_release[1].transformer, tiny.transformer(8, seed=77)
    layers = helper.targets(base)
    linears = dict(base.named_modules())
    few = {name: linears[name] for name in ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.ff.net.2")}
    few["single_transformer_blocks.1.proj_out"] = linears["single_transformer_blocks.1.proj_out"]
    few["norm_out.linear"] = linears["norm_out.linear"]
    one = {"transformer_blocks.0.attn.to_q": layers["transformer_blocks.0.attn.to_q"]}
    made = {
        "adapter": helper.make_adapter(folder / "adapter.safetensors", base, new),
        "partial": helper.make_adapter(folder / "partial.safetensors", base, new, layers=few),
        "odd": helper.make_adapter(folder / "odd.safetensors", base, new, rank=4, layers=one),
        "large": helper.make_adapter(folder / "large.safetensors", base, new, rank=336, layers=one),
        "rank256": helper.make_adapter(folder / "rank256.safetensors", base, new, rank=256, layers=one),
    }
    user = helper.pairs(layers, 16, seed=3, size=0.15)
    ends = {name: linears[name] for name in ("x_embedder", "proj_out", "transformer_blocks.0.attn.to_q")}
    files = {name: str(folder / f"{name}.safetensors") for name in made}
    files["lora"] = helper.make_lora(folder / "user.safetensors", user)
    files["ends"] = helper.make_lora(folder / "ends.safetensors", ends := helper.pairs(ends, 4, seed=5))
    files["user80"] = helper.make_lora(folder / "user80.safetensors", helper.pairs(one, 80, seed=6))
    files |= {"release": str(base_release[0]), "deep": str(deep_release[0])}
    return base, new, made, user, ends, files


@pytest.fixture(scope="module")
def ran(comfy, helper, setting, tmp_path_factory):
    return comfy.run("foreign:everything", tmp_path_factory.mktemp("ran"), helper.cases(), setting[-1])


def of_adapter(adapter, strength):
    return strength * SCALE, {name: (pair.A, pair.B) for name, pair in adapter.lora.items()}


@pytest.fixture(scope="module")
def expected(setting, helper, tiny):
    """Velocities of diffusers' merged models, by name and case."""
    base, new, made, user, ends, _ = setting
    fits = {name: pair for name, pair in ends.items() if name.startswith("transformer_blocks")}
    full, partial = of_adapter(made["adapter"], 1.0), of_adapter(made["partial"], 1.0)
    deep = {
        "aligned": [],
        "half": [of_adapter(made["adapter"], 0.5)],
        "deep": [full],
        "lora": [full, (0.7, user)],
        "before": [full, (0.7, user)],
        "partial": [partial],
        "partial core": [partial],
        "ends": [full, (0.7, fits)],
    }
    models = {name: (helper.merged(new, changes, blocks=base), "deep", 1) for name, changes in deep.items()}
    models |= {"base": (base, "base", 2), "user": (helper.merged(base, [(0.7, user)]), "base", 2)}
    return {
        name: {case: tiny.velocity(model, x, patch) for case, x in helper.of(helper.cases(), kind).items()}
        for name, (model, kind, patch) in models.items()
    }


def test_gguf(ran, expected, helper):
    """The base's own patcher goes on owning the packed blocks: it applies LoRA after expanding them."""
    found, facts = ran
    assert facts["gguf"]["base_patchers"] == ["GGUFModelPatcher"] * 2
    assert "ordinary LoRA loader" in facts["gguf"]["said"]["hook"]
    assert facts["gguf"]["still"] == facts["gguf"]["packed"] > 30, "packed weights were replaced"
    for turn, name in enumerate(("deep", "base", "lora", "aligned", "before", "base")):
        for case, velocity in expected[name].items():
            packed, expanded = (found[f"gguf/{kind}-{turn}-{name}-{case}"] for kind in ("packed", "expanded"))
            assert helper.relative(packed, expanded) < 1e-5, (turn, name, case)
            # The 8-bit rounding of the stand-in's weights and nothing else: LoRA and ends move it by far more.
            assert helper.relative(packed, velocity) < 2e-2, (turn, name, case)


def test_nunchaku(ran, expected, helper):
    """Base, user LoRA and DC-Gen take turns on one transformer; a partial LoRA is filled up as its converter needs."""
    found, facts = ran
    order = ("half", "base", "aligned", "user", "before", "base", "partial", "partial core", "base")
    for turn, name in enumerate(order):
        for case, velocity in expected[name].items():
            assert helper.relative(found[f"nunchaku/{turn}-{name}-{case}"], velocity) < 1e-4, (turn, name, case)
    assert facts["nunchaku"]["kept"], "a layer of the shared transformer was replaced for good"
    assert facts["nunchaku"]["base config"] == [2, 16]
    assert facts["nunchaku"]["latent"] == [8, pytest.approx(4)]
    assert facts["nunchaku"]["lora"] == [[".safetensors", 0.7], [".safetensors", 1.0]]


def test_what_nunchaku_cannot_do_is_said(ran):
    said = ran[1]["nunchaku"]["said"]
    wanted = {
        "failing forward": ["stopped with 8 channels"],
        "lora after": ["between nunchaku's loader and Apply DC-Gen"],
        "odd": ["rank 4", "multiples of 16 up to 320"],
        "large": ["rank 336", "up to 320", "convert extract"],
        "crowded": ["rank 256", "user80.safetensors (rank 80)", "330"],
    }
    assert set(said) == set(wanted)
    for name, parts in wanted.items():
        for part in parts:
            assert part in said[name], said[name]
    ((level, line),) = ran[1]["nunchaku"]["core lora"]
    assert level == "WARNING"
    assert "0 of 20 changes" in line
    assert "nunchaku's own loader" in line


@pytest.mark.parametrize("model", ["adapter", "merged"])
def test_lora_report(ran, helper, model):
    """Blocks take a LoRA made for plain FLUX; what it has for the f8 embedder and head is left out, and named."""
    found, facts = ran
    said, (own, whole) = facts["lora"]["said"], facts["lora"]["size"]
    assert said[f"{model}-lora"] == [["INFO", "LoRA on a DC-Gen model: 20 of 20 changes applied."]]
    ((level, line),) = said[f"{model}-ends"]
    assert level == "WARNING"
    assert "1 of 3 changes applied" in line
    assert "final_layer.linear (proj_out), img_in (x_embedder)" in line
    for file in ("lora", "ends"):
        for case in DEEP:
            assert helper.relative(found[f"lora/{model}-{file}-{case}"], found[f"lora/{model}-none-{case}"]) > 1e-3
    assert own < whole / 5, "the shared weights were counted twice"


def test_what_the_report_calls_applied_is_what_changed_the_result(ran, expected, helper):
    for case, velocity in expected["ends"].items():
        assert helper.relative(ran[0][f"lora/adapter-ends-{case}"], velocity) < 1e-4
