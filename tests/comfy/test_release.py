"""Releases in ComfyUI against diffusers and transformers with the same random weights."""

import pytest
import torch

PROMPTS = ["a red cat on a blue background", "", "an apple, a pear " * 12]
# (latent rows, latent columns, batch)
SIZES = [(4, 4, 1), (2, 6, 2), (7, 3, 1)]


def velocity_cases(tiny, pipe, channels, patch):
    """Random inputs, and the velocity diffusers' transformer gives for them."""
    generator = torch.Generator().manual_seed(3)
    inputs, wanted = {}, {}
    for rows, columns, batch in SIZES:
        name = f"{rows}x{columns}b{batch}"
        case = {
            "x": torch.randn((batch, channels, rows * patch, columns * patch), generator=generator),
            "sigma": torch.rand(batch, generator=generator) * 0.8 + 0.1,
            "context": torch.randn((batch, 24, 24), generator=generator),
            "pooled": torch.randn((batch, 20), generator=generator),
            "guidance": torch.rand(batch, generator=generator) * 5 + 1,
        }
        wanted[name] = tiny.velocity(pipe.transformer, case, patch)
        inputs |= {f"{name}/{key}": value for key, value in case.items()}
    return inputs, wanted


@pytest.fixture(scope="module")
def ran(comfy, tmp_path_factory, tiny, base_release, deep_release):
    """What ComfyUI made of both releases, the inputs it got, and what diffusers makes of them."""
    inputs, wanted = {}, {}
    for name, (_, pipe), channels, patch in (("base", base_release, 16, 2), ("deep", deep_release, 8, 1)):
        cases, wanted[name] = velocity_cases(tiny, pipe, channels, patch)
        inputs |= {f"{name}/{key}": value for key, value in cases.items()}
    generator = torch.Generator().manual_seed(5)
    inputs["base/z"] = torch.randn((2, 16, 4, 6), generator=generator)
    inputs["base/pixels"] = torch.rand((2, 32, 48, 3), generator=generator)
    params = {"releases": {"base": str(base_release[0]), "deep": str(deep_release[0])}, "prompts": PROMPTS}
    folder = tmp_path_factory.mktemp("release")
    found, facts = comfy.run("flux:everything", folder, inputs, params, ("--cpu", "--fp32-vae"))
    return found, facts, inputs, wanted


@pytest.mark.parametrize("kind", ["base", "deep"])
def test_text_equals_the_pipeline(ran, request, kind, tiny, helper):
    found = ran[0]
    pipe = request.getfixturevalue(f"{kind}_release")[1]
    for i, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            context, pooled, _ = pipe.encode_prompt(prompt, prompt, max_sequence_length=tiny.t5_tokens)
        assert found[f"{kind}/context{i}"].shape == context.shape
        assert helper.relative(found[f"{kind}/context{i}"], context) < 1e-4
        assert helper.relative(found[f"{kind}/pooled{i}"], pooled) < 1e-4


@pytest.mark.parametrize(("kind", "channels", "patch"), [("base", 16, 2), ("deep", 8, 1)])
def test_velocity_of_a_release(ran, request, kind, channels, patch, helper):
    found, facts, _, wanted = ran
    for name, velocity in wanted[kind].items():
        assert helper.relative(found[f"{kind}/{name}"], velocity) < 1e-4, name
    pipe = request.getfixturevalue(f"{kind}_release")[1]
    assert facts[kind] == {
        "channels": channels,
        "factor": 8 if patch == 2 else 32,
        "scaling": pipe.vae.config.scaling_factor,
        # ComfyUI's estimate per latent pixel is for patches of 2; patch 1 has four times the tokens per pixel.
        "memory": pytest.approx(3.1 * 4 / patch**2),
        "schedule": {"rule": "flux" if patch == 2 else "flux2"},
    }


def test_base_vae_equals_diffusers(ran, base_release, helper):
    found, _, inputs, _ = ran
    vae = base_release[1].vae
    with torch.no_grad():
        pixels = vae.decode(inputs["base/z"]).sample.movedim(1, -1)
        latent = vae.encode(inputs["base/pixels"].movedim(-1, 1) * 2 - 1).latent_dist.mode()
    assert (found["base/image"] - ((pixels + 1) / 2).clamp(0, 1)).abs().max() < 1e-4
    assert helper.relative(found["base/z"], latent) < 1e-4
