"""DCGenApply: one base model, two ways of running it, against merged weights in diffusers."""

import pytest
import torch
from safetensors.torch import save_file

ALPHA, RANK, USER_STRENGTH = 6.0, 4, 0.7
ORDER = [
    "full",
    "base",
    "full",
    "base",
    "aligned",
    "base_lora",
    "half",
    "lora_after",
    "base",
    "lora_before",
    "full",
    "base",
]


def relative(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


def lora_modules(transformer):
    from dcgen.backbones import BACKBONES

    linears = {name: module for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)}
    return {name: module for name, module in linears.items() if BACKBONES["flux"].is_lora_target(name)}


@pytest.fixture(scope="module")
def setting(tiny, base_release, tmp_path_factory):
    """Adapter and user LoRA files with random content for the tiny base, and the merged diffusers models."""
    from dcgen.adapter import Adapter, LoraPair, save_adapter
    from dcgen.backbones import BACKBONES
    from dcgen.latent import LatentSpace

    _, pipe = base_release
    base, folder = pipe.transformer, tmp_path_factory.mktemp("adapters")
    new = tiny.transformer(8, seed=77)
    generator = torch.Generator().manual_seed(8)

    def pair(module):
        a = torch.randn((RANK, module.in_features), generator=generator) * module.in_features**-0.5
        return a, torch.randn((module.out_features, RANK), generator=generator) * 0.3

    pairs = {name: pair(module) for name, module in lora_modules(base).items()}
    user = {name: pair(module) for name, module in list(lora_modules(base).items())[::2]}
    heads = ("x_embedder.weight", "x_embedder.bias", "proj_out.weight", "proj_out.bias")
    heads += ("norm_out.linear.weight", "norm_out.linear.bias")
    tensors = {key: new.state_dict()[key].clone() for key in heads}
    space = LatentSpace("test-ae", 8, 32, 0.37, rgb_factors=tuple((0.1 * i, 0.2, -0.1) for i in range(8)))
    config = dict(base.config)
    adapter = Adapter(
        "flux",
        tensors,
        {name: LoraPair(a, b, ALPHA) for name, (a, b) in pairs.items()},
        space,
        BACKBONES["flux"].fingerprint(config),
        {"rule": "flux"},
    )
    save_adapter(folder / "test.safetensors", adapter)
    user_file = {f"transformer.{name}.lora_A.weight": a for name, (a, _) in user.items()}
    user_file |= {f"transformer.{name}.lora_B.weight": b for name, (_, b) in user.items()}
    # What a LoRA trained on plain FLUX may hold, and what cannot fit the new embedder.
    user_file["transformer.x_embedder.lora_A.weight"] = torch.randn((RANK, 64), generator=generator)
    user_file["transformer.x_embedder.lora_B.weight"] = torch.randn((32, RANK), generator=generator) * 0.3
    save_file(user_file, folder / "user.safetensors")

    def merged(target, strength, user_strength):
        import copy

        model = copy.deepcopy(target)
        state = model.state_dict()
        blocks = base.state_dict()
        for key in state:
            state[key] = blocks[key].clone() if key not in heads or target is base else state[key]
        for name, (a, b) in pairs.items():
            state[f"{name}.weight"] += strength * (ALPHA / RANK) * (b @ a)
        for name, (a, b) in user.items():
            state[f"{name}.weight"] += user_strength * (b @ a)
        if target is base and user_strength:
            a, b = (user_file[f"transformer.x_embedder.lora_{which}.weight"] for which in "AB")
            state["x_embedder.weight"] += user_strength * (b @ a)
        model.load_state_dict(state)
        return model.eval()

    models = {
        "base": base,
        "base_lora": merged(base, 0.0, USER_STRENGTH),
        "full": merged(new, 1.0, 0.0),
        "aligned": merged(new, 0.0, 0.0),
        "half": merged(new, 0.5, 0.0),
        "lora_after": merged(new, 1.0, USER_STRENGTH),
        "lora_before": merged(new, 1.0, USER_STRENGTH),
    }
    files = {"adapter": str(folder / "test.safetensors"), "lora": str(folder / "user.safetensors")}
    return models, files


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(4)
    found = {}
    for kind, channels, patch in (("base", 16, 2), ("deep", 8, 1)):
        for rows, columns, batch in ((4, 4, 1), (3, 5, 2)):
            case = {
                "x": torch.randn((batch, channels, rows * patch, columns * patch), generator=generator),
                "sigma": torch.rand(batch, generator=generator) * 0.8 + 0.1,
                "context": torch.randn((batch, 24, 24), generator=generator),
                "pooled": torch.randn((batch, 20), generator=generator),
                "guidance": torch.rand(batch, generator=generator) * 5 + 1,
            }
            found |= {f"{kind}{rows}x{columns}/{key}": value for key, value in case.items()}
    return found


def expected(tiny, models, inputs, name):
    patch = 2 if name.startswith("base") else 1
    kind = "base" if patch == 2 else "deep"
    out = {}
    for case in sorted({key.split("/")[0] for key in inputs if key.startswith(kind)}):
        values = {key.split("/")[1]: value for key, value in inputs.items() if key.startswith(f"{case}/")}
        out[case] = tiny.velocity(models[name], values, patch)
    return out


@pytest.fixture(scope="module")
def ran(comfy, tmp_path_factory, base_release, deep_release, setting, inputs):
    _, files = setting
    params = {"release": str(base_release[0]), "other": str(deep_release[0]), "order": ORDER, "turns": 100, **files}
    return comfy.run("apply:everything", tmp_path_factory.mktemp("apply"), inputs, params)


def test_base_and_dcgen_in_any_order(ran, tiny, setting, inputs):
    models, _ = setting
    found, _ = ran
    for turn, name in enumerate(ORDER):
        for case, velocity in expected(tiny, models, inputs, name).items():
            assert relative(found[f"{turn}-{name}-{case}"], velocity) < 1e-4, (turn, name, case)
    # The models differ by far more than the tolerance, so a wrong one in any turn would show.
    reference = [expected(tiny, models, inputs, name)["deep4x4"] for name in ("full", "aligned", "half", "lora_after")]
    for i, one in enumerate(reference):
        assert all(relative(one, other) > 1e-2 for other in reference[:i])


def test_one_copy_of_the_base_and_its_own_latent_from_the_start(ran):
    _, facts = ran
    assert facts["channels"] == 8
    assert facts["base_channels"] == 16
    assert facts["memory"] == pytest.approx(4)
    assert facts["shared"], "the blocks were copied"
    assert facts["same_keys"]


def test_a_hundred_alternations_do_not_grow(ran):
    (early_bytes, early_alive, early_loaded), (late_bytes, late_alive, late_loaded) = ran[1]["growth"]
    assert late_alive <= early_alive
    assert late_loaded <= early_loaded
    assert late_bytes - early_bytes < 40e6


def test_refusals_come_before_any_compute(ran):
    refused = ran[1]["refused"]
    assert refused["loaded"] == 0
    wanted = {
        "merged model": ["already runs on"],
        "twice": ["already runs on", "test-ae"],
        "f8 latent": ["16", "8 channels at f32", "DCGenEmptyLatent"],
        "deep latent": ["16 channels at f8"],
        "size": ["100x64", "multiples of 32", "96x64"],
        "base": ["num_layers: 2", "19"],
    }
    assert set(refused["said"]) == set(wanted)
    for name, parts in wanted.items():
        for part in parts:
            assert part in refused["said"][name], refused["said"][name]


def test_lowvram(comfy, tmp_path, tiny, base_release, setting, inputs):
    models, files = setting
    found, facts = comfy.run("apply:lowvram", tmp_path, inputs, {"release": str(base_release[0]), **files})
    assert all(facts["partial"]), "nothing was left offloaded, so this was no lowvram run"
    for turn in range(2):
        for name in ("lora_after", "base"):
            for case, velocity in expected(tiny, models, inputs, name).items():
                assert relative(found[f"{turn}-{name}-{case}"], velocity) < 1e-4, (turn, name, case)


def test_every_layer_is_on_the_device(comfy, tmp_path, base_release, setting):
    _, files = setting
    order = ["base", "deep", "base", "deep", "deep", "base", "base", "deep"]
    _, facts = comfy.run("apply:placement", tmp_path, params={"release": str(base_release[0]), "order": order, **files})
    assert len(facts["seen"]) == 4
    for case, places in facts["seen"].items():
        assert places == [["meta"]] * len(order), case
