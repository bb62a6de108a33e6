"""Sampling of a DDPM against diffusers' scheduler, and against a case with a closed form."""

import pytest
import torch

from train.evaluate.ddpm_sampler import ddpm_sample, spaced_steps

SHAPE = (3, 4, 4)


def noises(seeds, count):
    """What the sampler draws: the start, then one noise a step."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return [torch.stack([torch.randn(SHAPE, generator=g) for g in generators]) for _ in range(count)]


def network(weight, variance):
    def model(x, step, cond):
        scaled = torch.einsum("oc,bchw->bohw", weight, x) * (1 + step.float().reshape(-1, 1, 1, 1) / 1000)
        noise = scaled.tanh() + cond["labels"].reshape(-1, 1, 1, 1) * 0.1
        return torch.cat([noise, scaled.sin()], dim=1) if variance else noise

    return model


@pytest.mark.parametrize("variance", [True, False])
def test_it_equals_the_scheduler_of_diffusers_on_the_same_noise(variance):
    from diffusers import DDPMScheduler

    model, cond = network(torch.randn(3, 3), variance), {"labels": torch.tensor([1.0, 4.0])}
    found = ddpm_sample(model, [5, 9], SHAPE, cond, steps=25)
    kind = "learned_range" if variance else "fixed_large"
    scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02, variance_type=kind, clip_sample=False)
    visited = spaced_steps(25).tolist()
    scheduler.set_timesteps(timesteps=visited)
    x, *draws = noises([5, 9], 25)
    draws.append(torch.zeros_like(x))
    for t, noise in zip(visited, draws, strict=True):
        output = model(x, torch.full((2,), t), cond)
        scheduler.custom_timesteps = True
        mean = scheduler.step(output, t, x, generator=torch.Generator().manual_seed(0))
        # the scheduler draws its own noise: it is taken out, and ours put in
        if t > 0:
            own = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
            spread = scheduler._get_variance(t, predicted_variance=output[:, 3:] if variance else None)
            spread = (0.5 * spread).exp() if variance else spread.sqrt()
            x = mean.prev_sample + spread * (noise - own)
        else:
            x = mean.prev_sample
    torch.testing.assert_close(found, x, rtol=2e-4, atol=2e-4)


def test_the_exact_noise_of_gaussian_data_gives_that_data():
    """x0 ~ N(m, s^2): E[noise | x_t] is known, and the samples' mean and spread must be m and s."""
    from train.ddpm import alphas_cumprod

    mean, spread = 0.7, 0.3

    def model(x, step, cond):
        bar = alphas_cumprod()[step].float().reshape(-1, 1, 1, 1)
        return (1 - bar).sqrt() * (x - bar.sqrt() * mean) / (bar * spread**2 + 1 - bar)

    found = ddpm_sample(model, range(400), SHAPE, {}, steps=250)
    assert found.mean().item() == pytest.approx(mean, abs=0.01)
    assert found.std().item() == pytest.approx(spread, rel=0.05)


def test_guidance_mixes_the_two_branches_in_the_channels_it_is_for():
    seen = []

    def model(x, step, cond):
        seen.append(cond["labels"])
        return cond["labels"].reshape(-1, 1, 1, 1).expand(-1, 6, 4, 4) * torch.ones(1, 6, 4, 4)

    cond, empty = {"labels": torch.tensor([0.3, 0.5])}, {"labels": torch.tensor([0.1])}
    guided = ddpm_sample(model, [1, 2], SHAPE, cond, steps=2, empty=empty, guidance=3.0, guided_channels=1)
    assert len(seen) == 4

    def direct(x, step, cond):
        value = cond["labels"].reshape(-1, 1, 1, 1)
        return torch.cat([0.1 + 3 * (value - 0.1), value, value, value, value, value], dim=1).expand(-1, 6, 4, 4)

    torch.testing.assert_close(guided, ddpm_sample(direct, [1, 2], SHAPE, cond, steps=2))
    both = ddpm_sample(model, [1, 2], SHAPE, cond, steps=2, empty=empty, guidance=3.0)
    assert (both[:, 0] == guided[:, 0]).all()
    assert (both[:, 1:] != guided[:, 1:]).all()


def test_steps_are_those_of_the_reference():
    """guided-diffusion's space_timesteps(1000, [250]) and ([50])."""
    assert spaced_steps(250).tolist()[:4] == [999, 995, 991, 987]
    assert spaced_steps(250).tolist()[-3:] == [8, 4, 0]
    assert len(set(spaced_steps(250).tolist())) == 250
    assert spaced_steps(1000).tolist() == list(range(999, -1, -1))
    with pytest.raises(ValueError, match="2 to 1000"):
        spaced_steps(1001)


def test_a_batch_draws_what_each_seed_draws_alone():
    model = network(torch.randn(3, 3), True)
    together = ddpm_sample(model, [3, 8], SHAPE, {"labels": torch.tensor([1.0, 2.0])}, steps=5)
    alone = ddpm_sample(model, [8], SHAPE, {"labels": torch.tensor([2.0])}, steps=5)
    torch.testing.assert_close(together[1:], alone)
