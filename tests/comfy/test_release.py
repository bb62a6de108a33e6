"""Releases in ComfyUI against diffusers and transformers with the same random weights."""

import pytest
import torch

PROMPTS = ["a red cat on a blue background", "", "an apple, a pear " * 12]
# (latent rows, latent columns, batch)
SIZES = [(4, 4, 1), (2, 6, 2), (7, 3, 1)]


def relative(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


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


@pytest.mark.parametrize("kind", ["base_release", "deep_release"])
def test_text_equals_the_pipeline(comfy, tmp_path, request, kind, tiny):
    folder, pipe = request.getfixturevalue(kind)
    found, _ = comfy.run("flux:text", tmp_path, params={"release": str(folder), "prompts": PROMPTS})
    for i, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            context, pooled, _ = pipe.encode_prompt(prompt, prompt, max_sequence_length=tiny.t5_tokens)
        assert found[f"{i}/context"].shape == context.shape
        assert relative(found[f"{i}/context"], context) < 1e-4
        assert relative(found[f"{i}/pooled"], pooled) < 1e-4


@pytest.mark.parametrize(("kind", "channels", "patch"), [("base_release", 16, 2), ("deep_release", 8, 1)])
def test_velocity_of_a_release(comfy, tmp_path, request, kind, channels, patch, tiny):
    folder, pipe = request.getfixturevalue(kind)
    inputs, wanted = velocity_cases(tiny, pipe, channels, patch)
    found, facts = comfy.run("flux:release_velocity", tmp_path, inputs, {"release": str(folder)})
    for name, velocity in wanted.items():
        assert relative(found[name], velocity) < 1e-4, name
    assert facts["channels"] == channels
    assert facts["factor"] == (8 if patch == 2 else 32)
    assert facts["scaling"] == pipe.vae.config.scaling_factor
    # ComfyUI's estimate per latent pixel is for patches of 2; patch 1 has four times the tokens per pixel.
    assert facts["memory"] == pytest.approx(3.1 * 4 / patch**2)


def test_base_vae_equals_diffusers(comfy, tmp_path, base_release):
    folder, pipe = base_release
    generator = torch.Generator().manual_seed(5)
    z = torch.randn((2, 16, 4, 6), generator=generator)
    image = torch.rand((2, 32, 48, 3), generator=generator)
    found, _ = comfy.run(
        "flux:kl_vae", tmp_path, {"z": z, "image": image}, {"release": str(folder)}, ("--cpu", "--fp32-vae")
    )
    with torch.no_grad():
        pixels = pipe.vae.decode(z).sample.movedim(1, -1)
        latent = pipe.vae.encode(image.movedim(-1, 1) * 2 - 1).latent_dist.mode()
    assert (found["image"] - ((pixels + 1) / 2).clamp(0, 1)).abs().max() < 1e-4
    assert relative(found["z"], latent) < 1e-4
