"""DiT's own loss against Bayes' rule written out, torch.distributions and diffusers' DDPM scheduler."""

from __future__ import annotations

import math

import diffusers
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from train.batches import Batch
from train.ddpm import alphas_cumprod, ddpm_loss, variational_bound
from train.families import FAMILIES

BAR = alphas_cumprod()
DIT = FAMILIES["dit"]


def draw(seed: int, count: int = 4):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(count, 3, 2, 2, generator=g) for _ in range(4)]


def posterior(x0, xt, t):
    """q(x_{t-1} | x_t, x_0) as the product of two Gaussians in x_{t-1}."""
    alpha = BAR[t] / BAR[t - 1]
    beta = 1 - alpha
    precision = alpha / beta + 1 / (1 - BAR[t - 1])
    mean = (alpha.sqrt() / beta * xt.double() + BAR[t - 1].sqrt() / (1 - BAR[t - 1]) * x0.double()) / precision
    return mean, 1 / precision, beta


@pytest.mark.parametrize("t", [1, 2, 60, 500, 999])
def test_the_bound_is_the_divergence_of_the_two_posteriors(t):
    latents, noise, predicted, share = draw(t)
    share = share.clamp(-1, 1)
    noised = (BAR[t].sqrt() * latents + (1 - BAR[t]).sqrt() * noise).float()
    mean, variance, beta = posterior(latents, noised, t)
    guess = (noised.double() - (1 - BAR[t]).sqrt() * predicted) / BAR[t].sqrt()
    model_mean, _, _ = posterior(guess, noised, t)
    low, high = variance.log(), beta.log()
    model_log = low + (share.double() + 1) / 2 * (high - low)
    p, q = Normal(model_mean, (model_log / 2).exp()), Normal(mean, variance.sqrt())
    expected = kl_divergence(q, p).flatten(1).mean(1) / math.log(2)
    found = variational_bound(predicted, share, latents, noised, torch.full((4,), t))
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=1e-5)


def test_the_posterior_mean_is_the_schedulers():
    """diffusers' ancestral step, with its noise taken out, is the mean that the bound compares."""
    t = 400
    latents, noise, predicted, _ = draw(0)
    noised = (BAR[t].sqrt() * latents + (1 - BAR[t]).sqrt() * noise).float()
    scheduler = diffusers.DDPMScheduler(variance_type="fixed_small", clip_sample=False)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), BAR, rtol=1e-5, atol=1e-7)
    torch.manual_seed(3)
    stepped = scheduler.step(predicted, t, noised).prev_sample
    torch.manual_seed(3)
    spread = scheduler._get_variance(t).sqrt() * torch.randn_like(noised)
    guess = (noised.double() - (1 - BAR[t]).sqrt() * predicted) / BAR[t].sqrt()
    mean, _, _ = posterior(guess, noised, t)
    torch.testing.assert_close((stepped - spread).double(), mean, rtol=1e-3, atol=1e-4)


def test_the_first_step_is_the_likelihood_of_a_bin():
    latents, noise, predicted, share = draw(7)
    latents, share = latents.clamp(-0.9, 0.9), share.clamp(-1, 1)
    noised = (BAR[0].sqrt() * latents + (1 - BAR[0]).sqrt() * noise).float()
    found = variational_bound(predicted, share, latents, noised, torch.zeros(4, dtype=torch.long))
    guess = (noised.double() - (1 - BAR[0]).sqrt() * predicted) / BAR[0].sqrt()
    low = torch.log((1 - BAR[1] / BAR[0]) * (1 - BAR[0]) / (1 - BAR[1]))
    high = torch.log(1 - BAR[0])
    scale = ((low + (share.double() + 1) / 2 * (high - low)) / 2).exp()
    bins = Normal(guess, scale)
    mass = bins.cdf(latents.double() + 1 / 255) - bins.cdf(latents.double() - 1 / 255)
    expected = -mass.clamp_min(1e-12).log().flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(found.double(), expected, rtol=5e-3, atol=1e-3)


def test_the_noise_learns_from_the_error_and_the_variance_from_the_bound():
    g = torch.Generator().manual_seed(5)
    latents = torch.randn(6, 3, 2, 2, generator=g)
    output = torch.randn(6, 6, 2, 2, generator=g).requires_grad_()
    batch = Batch(1, 2, tuple(range(6)), tuple(range(6)), torch.device("cpu"))
    labels, empty = {"labels": torch.arange(6)}, {"labels": torch.tensor([9])}
    seen = {}

    def model(x, step, cond):
        seen.update(x=x, step=step, labels=cond["labels"])
        return output

    loss, metrics = ddpm_loss(model, batch, latents, labels, empty, dropout=0.4)
    loss.backward()
    noise = batch.normal("noise", (3, 2, 2))
    expected = 2 * (output[:, :3] - noise) / (6 * 12)
    torch.testing.assert_close(output.grad[:, :3], expected.detach())
    assert output.grad[:, 3:].abs().min() > 0
    level = BAR[seen["step"]].float().reshape(-1, 1, 1, 1)
    torch.testing.assert_close(seen["x"], level.sqrt() * latents + (1 - level).sqrt() * noise)
    dropped = batch.uniform("drop") < 0.4
    assert dropped.any()
    assert (seen["labels"][dropped] == 9).all()
    assert torch.equal(seen["labels"][~dropped], torch.arange(6)[~dropped])
    errors = (output[:, :3] - noise).square().flatten(1).mean(1)
    assert float(metrics["loss_uncond"]) == pytest.approx(errors[dropped].mean().item())
    assert loss.item() == pytest.approx((errors.mean() + metrics["bound"]).item(), rel=1e-6)


def test_without_a_learned_variance_there_is_no_bound():
    batch = Batch(1, 0, (0, 1), (0, 1), torch.device("cpu"))
    latents = torch.zeros(2, 3, 2, 2)
    labels = {"labels": torch.zeros(2, dtype=torch.long)}
    loss, metrics = ddpm_loss(lambda x, step, cond: x * 0, batch, latents, labels, labels, dropout=0.0)
    assert "bound" not in metrics
    assert loss.item() == pytest.approx(batch.normal("noise", (3, 2, 2)).square().mean().item())


def test_the_network_drops_no_class_of_its_own(debug_dit):
    """diffusers' DiT would, in training, in every block apart, from the process's random numbers."""
    from train.models import moved_network

    model, config = moved_network(debug_dit / "tiny" / "release", 8, 1, 0, torch.float32)
    model.train()
    x, step = torch.randn(4, 8, 4, 4), torch.tensor([1, 300, 600, 900])
    labels = {"labels": torch.arange(4)}
    outputs = [DIT.raw_output(model, x, step, labels) for _ in range(6)]
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])
    empty = {"labels": torch.full((4,), config["num_embeds_ada_norm"])}
    assert (DIT.raw_output(model, x, step, empty) - outputs[0]).abs().max() > 1e-3


def test_a_class_conditional_base_is_trained_by_the_same_stages(tmp_path):
    """toy-dit, a few steps of each stage on a narrow network: labels instead of captions all the way."""
    from dcgen.adapter import load_adapter
    from train.config import load_recipe
    from train.generate import Pipeline
    from train.run import run_recipe

    short = ["cache.data.variants=1", "cache.data.split=held_out"]  # one picture of each subject
    short += ["labels.transformer.num_layers=1", "labels.transformer.num_attention_heads=1"]
    for stage in ("pretrain", "head", "finetune"):
        short += [f"{stage}.steps=2", f"{stage}.batch=4", f"{stage}.optimizer.warmup=1", f"{stage}.preview_every=0"]
    numbers = run_recipe(load_recipe("toy-dit", [f"output={tmp_path}", *short]))
    assert numbers["labels"]["classes"] == 32
    assert numbers["cache"] == {"samples": 32, "captions": 33, "shards": 2}
    adapter = tmp_path / "export" / "toy-dit-dcgen.safetensors"
    assert load_adapter(adapter).lora
    base = tmp_path / "pretrain" / "release"
    pipeline = Pipeline(base, adapter=adapter, autoencoder="toy/dc-ae-f32")
    pictures = pipeline.images(["robot", "5"], [1, 2], 128, 128, steps=2, guidance=1.0, cfg_w=0.5)
    assert tuple(pictures.shape) == (2, 3, 128, 128)
    assert pictures.isfinite().all()
