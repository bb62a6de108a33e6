"""DCGenApply: one base model, two ways of running it, against merged weights in diffusers."""

import pytest

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


@pytest.fixture(scope="module")
def setting(tiny, helper, base_release, tmp_path_factory):
    """Adapter and user LoRA files with random content for the tiny base, and the merged diffusers models."""
    base, folder = base_release[1].transformer, tmp_path_factory.mktemp("adapters")
    new = tiny.transformer(8, seed=77)
    adapter = helper.make_adapter(folder / "test.safetensors", base, new, rank=RANK, alpha=ALPHA)
    own = {name: (pair.A, pair.B) for name, pair in adapter.lora.items()}
    user = helper.pairs(dict(list(helper.targets(base).items())[::2]), RANK, seed=9)
    # What a LoRA trained on plain FLUX may hold, and what cannot fit the new embedder.
    whole = {**user, **helper.pairs({"x_embedder": base.x_embedder}, RANK, seed=10)}

    def deep(strength, user_strength=0.0):
        changes = [(strength * ALPHA / RANK, own), (user_strength, user)]
        return helper.merged(new, changes, blocks=base)

    models = {
        "base": base,
        "base_lora": helper.merged(base, [(USER_STRENGTH, whole)]),
        "full": deep(1.0),
        "aligned": deep(0.0),
        "half": deep(0.5),
        "lora_after": deep(1.0, USER_STRENGTH),
        "lora_before": deep(1.0, USER_STRENGTH),
    }
    lora = helper.make_lora(folder / "user.safetensors", whole)
    return models, {"adapter": str(folder / "test.safetensors"), "lora": lora}


@pytest.fixture(scope="module")
def inputs(helper):
    return helper.cases()


def expected(tiny, helper, models, inputs, name):
    """Velocities of a diffusers model by case."""
    kind, patch = ("base", 2) if name.startswith("base") else ("deep", 1)
    return {case: tiny.velocity(models[name], x, patch) for case, x in helper.of(inputs, kind).items()}


@pytest.fixture(scope="module")
def ran(comfy, tmp_path_factory, base_release, deep_release, setting, inputs):
    _, files = setting
    params = {"release": str(base_release[0]), "other": str(deep_release[0]), "order": ORDER, "turns": 100, **files}
    return comfy.run("apply:everything", tmp_path_factory.mktemp("apply"), inputs, params)


def test_base_and_dcgen_in_any_order(ran, tiny, helper, setting, inputs):
    models, _ = setting
    found, _ = ran
    for turn, name in enumerate(ORDER):
        for case, velocity in expected(tiny, helper, models, inputs, name).items():
            assert helper.relative(found[f"{turn}-{name}-{case}"], velocity) < 1e-4, (turn, name, case)
    # The models differ by far more than the tolerance, so a wrong one in any turn would show.
    names = ("full", "aligned", "half", "lora_after")
    reference = [expected(tiny, helper, models, inputs, name)["deep4x4"] for name in names]
    for i, one in enumerate(reference):
        assert all(helper.relative(one, other) > 1e-2 for other in reference[:i])


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
        "f8 latent": ["16", "8 channels at f32", "Empty Latent (DC-Gen)"],
        "deep latent": ["16 channels at f8"],
        "size": ["100x64", "multiples of 32", "96x64"],
        "base": ["num_layers: 2", "19"],
    }
    assert set(refused["said"]) == set(wanted)
    for name, parts in wanted.items():
        for part in parts:
            assert part in refused["said"][name], refused["said"][name]


def test_lowvram(comfy, tmp_path, tiny, helper, base_release, setting, inputs):
    models, files = setting
    found, facts = comfy.run("apply:lowvram", tmp_path, inputs, {"release": str(base_release[0]), **files})
    assert all(facts["partial"]), "nothing was left offloaded, so this was no lowvram run"
    for turn in range(2):
        for name in ("lora_after", "base"):
            for case, velocity in expected(tiny, helper, models, inputs, name).items():
                assert helper.relative(found[f"{turn}-{name}-{case}"], velocity) < 1e-4, (turn, name, case)


def test_every_layer_is_on_the_device(comfy, tmp_path, base_release, setting):
    _, files = setting
    order = ["base", "deep", "base", "deep", "deep", "base", "base", "deep"]
    _, facts = comfy.run("apply:placement", tmp_path, params={"release": str(base_release[0]), "order": order, **files})
    assert len(facts["seen"]) == 4
    for case, places in facts["seen"].items():
        assert places == [[facts["device"]]] * len(order), case
