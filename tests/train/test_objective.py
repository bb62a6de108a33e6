"""Eq. 2-7 in the training loss, against a float64 rewrite of the paper's formulas and against autograd."""

from __future__ import annotations

import math

import pytest
import torch

from train.batches import Batch
from train.config import load_recipe
from train.objective import Objective, Timesteps, objective_loss

CHANNELS, SIDE, TOKENS = 3, 2, 4


def batch(rows: int = 6, step: int = 0) -> Batch:
    return Batch(7, step, tuple(range(rows)), tuple(range(rows)), torch.device("cpu"))


class Field:
    """A velocity that is an explicit function of x, sigma, text and guidance, with one trainable number per use."""

    def __init__(self):
        self.a = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        self.calls: list[dict] = []

    def __call__(self, x, sigma, cond, scale):
        self.calls.append({"sigma": sigma, "scale": scale, "text": cond["t"].flatten(1), "rows": len(x)})
        text = cond["t"].double().flatten(1).mean(1).reshape(-1, 1, 1, 1)
        s = sigma.double().reshape(-1, 1, 1, 1)
        g = 0.0 if scale is None else scale.double().reshape(-1, 1, 1, 1)
        return self.a * x.double() * (1 + s) + text * self.a**2 + 0.1 * g * torch.tanh(x.double())


def run(objective: Objective, field: Field, b: Batch, distilled: bool = True):
    g = torch.Generator().manual_seed(1)
    latents = torch.randn(len(b), CHANNELS, SIDE, SIDE, generator=g)
    text = {"t": torch.randn(len(b), 2, 5, generator=g)}
    empty = {"t": torch.full((1, 2, 5), 0.3)}
    loss, metrics = objective_loss(objective, field, b, latents, text, empty, tokens=TOKENS, distilled=distilled)
    return loss, metrics, latents, text, empty


def by_hand(objective: Objective, b: Batch, latents, text, empty, a: float, g: float | None = None):
    """The paper's formulas row by row: x_t = (1-t) x0 + t x1, v = x1 - x0, with x1 the data and t = 1 - sigma.

    g: what the embedding gets, by default from w.
    """
    losses, dropped = [], []
    for row in range(len(b)):
        x1 = latents[row].double()
        x0 = b.normal("noise", x1.shape)[row].double()
        sigma = objective.timesteps.draw(b, TOKENS, CHANNELS)[row].double()
        t = 1 - sigma
        x_t = (1 - t) * x0 + t * x1
        drop = bool(b.uniform("drop")[row] < objective.caption_dropout)
        w = objective.w[0] + (objective.w[1] - objective.w[0]) * b.uniform("w")[row].double()
        scale = (1 + w if objective.guidance_embed == "1+w" else w) if g is None else g

        def model(c, g, x_t=x_t, sigma=sigma):
            # the network gives noise - data, the paper's velocity is data - noise
            c = c.double().mean()
            return -(a * x_t * (1 + sigma) + c * a**2 + 0.1 * g * torch.tanh(x_t))

        caption = empty["t"][0] if drop else text["t"][row]
        v = model(caption, scale)
        if not drop:
            scale_empty = scale if objective.uncond_embed == "same" else 1.0
            v = (v + w * model(empty["t"][0], scale_empty)) / (1 + w)  # Eq. 6
        losses.append((v - (x1 - x0)).square().mean())  # Eq. 7
        dropped.append(drop)
    return torch.stack(losses), torch.tensor(dropped)


@pytest.mark.parametrize("embed", ["1+w", "w"])
@pytest.mark.parametrize("uncond", ["same", "one"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_eq7_row_by_row(embed, uncond, dropout):
    objective = Objective(w=(0.5, 4.0), guidance_embed=embed, uncond_embed=uncond, caption_dropout=dropout)
    b, field = batch(), Field()
    loss, metrics, latents, text, empty = run(objective, field, b)
    expected, dropped = by_hand(objective, b, latents, text, empty, field.a.item())
    assert dropped.any() == (dropout > 0)
    assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-5)
    assert float(metrics["loss_cond"]) == pytest.approx(expected[~dropped].mean().item(), rel=1e-5)
    if dropout:
        assert float(metrics["loss_uncond"]) == pytest.approx(expected[dropped].mean().item(), rel=1e-5)
    else:
        assert math.isnan(float(metrics["loss_uncond"]))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_eq7_at_the_one_w_of_a_base_without_embedding(dropout):
    objective = Objective(implicit_w=2.0, caption_dropout=dropout)
    b, field = batch(), Field()
    loss, _, latents, text, empty = run(objective, field, b, distilled=False)
    expected, _ = by_hand(objective.model_copy(update={"w": (2.0, 2.0)}), b, latents, text, empty, field.a.item(), g=0)
    assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-5)
    assert all(call["scale"] is None for call in field.calls)
    plain, *_ = run(Objective(caption_dropout=dropout), Field(), b, distilled=False)
    assert plain.item() != pytest.approx(loss.item(), rel=1e-3), "without it the loss is Eq. 2"


@pytest.mark.parametrize("grad", [True, False])
def test_gradient_through_the_empty_branch_only_where_asked(grad):
    objective = Objective(w=(2.0, 2.0), caption_dropout=0.0, uncond_grad=grad, uncond_embed="same")
    b, field = batch(), Field()
    loss, _, latents, text, empty = run(objective, field, b)
    loss.backward()
    step = 1e-5

    def shifted(delta: float) -> float:
        """Loss by hand with the conditional branch's number moved, the empty branch's only if it has a gradient."""
        total = []
        for row in range(len(b)):
            x1 = latents[row].double()
            noise = b.normal("noise", x1.shape)[row].double()
            sigma = objective.timesteps.draw(b, TOKENS, CHANNELS)[row].double()
            x = (1 - sigma) * x1 + sigma * noise
            w, g = 2.0, 3.0

            def v(c, a, x=x, sigma=sigma, g=g):
                return a * x * (1 + sigma) + c.double().mean() * a**2 + 0.1 * g * torch.tanh(x)

            a = field.a.item() + delta
            corrected = (v(text["t"][row], a) + w * v(empty["t"][0], a if grad else field.a.item())) / (1 + w)
            total.append((corrected - (noise - x1)).square().mean())
        return torch.stack(total).mean().item()

    numeric = (shifted(step) - shifted(-step)) / (2 * step)
    assert field.a.grad.item() == pytest.approx(numeric, rel=1e-4)


def test_dropped_rows_cost_no_second_pass():
    objective = Objective(caption_dropout=0.4)
    b, field = batch(rows=8), Field()
    run(objective, field, b)
    dropped = int((b.uniform("drop") < 0.4).sum())
    assert [call["rows"] for call in field.calls] == [8, 8 - dropped]
    first = field.calls[0]["text"]
    empty_rows = (first == 0.3).all(1)
    assert int(empty_rows.sum()) == dropped


def test_eq2_feeds_one_pass_and_the_named_guidance():
    objective = Objective(loss="flow", caption_dropout=0.0, flow_guidance=1.0)
    b, field = batch(), Field()
    loss, _, latents, text, _ = run(objective, field, b)
    assert len(field.calls) == 1
    assert field.calls[0]["scale"].tolist() == [1.0] * 6
    noise = b.normal("noise", latents.shape[1:]).double()
    sigma = field.calls[0]["sigma"].double().reshape(-1, 1, 1, 1)
    x = (1 - sigma) * latents + sigma * noise
    a = field.a.item()
    v = a * x * (1 + sigma) + text["t"].double().flatten(1).mean(1).reshape(-1, 1, 1, 1) * a**2 + 0.1 * torch.tanh(x)
    assert loss.item() == pytest.approx((v - (noise - latents)).square().mean().item(), rel=1e-5)


def test_eq2_may_be_fed_the_guidance_that_eq7_draws():
    flow, guided = Objective(loss="flow", flow_guidance="w", w=(0.5, 4.0)), Objective(w=(0.5, 4.0))
    b, first, second = batch(), Field(), Field()
    run(flow, first, b)
    run(guided, second, b)
    assert len(first.calls) == 1
    assert torch.equal(first.calls[0]["scale"], second.calls[0]["scale"])
    assert first.calls[0]["scale"].min() >= 1.5
    assert first.calls[0]["scale"].max() <= 5


def test_a_base_without_guidance_embedding_is_trained_by_eq2():
    b, field = batch(), Field()
    run(Objective(), field, b, distilled=False)
    assert len(field.calls) == 1
    assert field.calls[0]["scale"] is None


def test_timesteps_have_the_distribution_they_name():
    b = batch(rows=4000)
    uniform = Timesteps(distribution="uniform", rule="none").draw(b, TOKENS, CHANNELS)
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.02)
    assert uniform.var().item() == pytest.approx(1 / 12, abs=0.005)
    normal = Timesteps(mean=0.4, std=0.8, rule="none").draw(b, TOKENS, CHANNELS)
    logit = torch.logit(normal.double())
    assert logit.mean().item() == pytest.approx(0.4, abs=0.05)
    assert logit.std().item() == pytest.approx(0.8, abs=0.04)
    shifted = Timesteps(mean=0.4, std=0.8, rule="static", shift=3.0).draw(b, TOKENS, CHANNELS)
    torch.testing.assert_close(torch.logit(shifted.double()), logit + math.log(3.0), rtol=1e-3, atol=1e-3)


def test_eq7_is_under_determined_without_dropout():
    """A wrong empty branch made good by the conditional one has the truth's loss in Eq. 7: only loss_uncond sees it."""
    w = 2.5

    def field(error: float):
        def velocity(x, sigma, cond, scale):
            is_empty = (cond["t"] == 0).flatten(1).all(1).reshape(-1, 1, 1, 1)
            v = x * (1 + sigma.reshape(-1, 1, 1, 1))
            return torch.where(is_empty, v + error, v - w * error)

        return velocity

    def losses(error: float, dropout: float):
        objective = Objective(w=(w, w), caption_dropout=dropout)
        b = batch(rows=16)
        latents = torch.randn(16, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
        text, empty = {"t": torch.ones(16, 2, 5)}, {"t": torch.zeros(1, 2, 5)}
        loss, metrics = objective_loss(objective, field(error), b, latents, text, empty, tokens=TOKENS, distilled=True)
        return loss.item(), float(metrics["loss_uncond"])

    assert losses(5.0, 0.0)[0] == pytest.approx(losses(0.0, 0.0)[0], rel=1e-4)
    assert losses(5.0, 0.3)[1] > losses(0.0, 0.3)[1] + 10


@pytest.mark.parametrize(("tokens", "flux", "flux2"), [(256, 1.65, 1.41), (1024, 1.88, 2.83)])
def test_the_shifts_of_the_released_training_guide_and_of_released_inference(tokens, flux, flux2):
    """FLUX at 512 px and 1K on f32c32; calculate_shift by diffusers."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    found = {rule: Timesteps(rule=rule).schedule.ratio(tokens=tokens, channels=32) for rule in ("flux", "flux2")}
    assert found["flux"] == pytest.approx(math.exp(calculate_shift(tokens)))
    assert found == {"flux": pytest.approx(flux, abs=0.005), "flux2": pytest.approx(flux2, abs=0.005)}
    for name in ("flux-512", "flux-1k"):
        objective = load_recipe(name).stages["finetune"].objective
        assert objective.timesteps.rule == "flux2"
        load_recipe(name, ["finetune.objective.timesteps.rule=flux"])
