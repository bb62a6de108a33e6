# N steps, n tokens, C latent channels
"""Noise schedules: the sigmas for a model with n tokens, and the maths of the shift."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .fields import Check, check_fields, flag, optional, real, shown, text, whole, words

LINEAR = "flux"  # the rule with mu linear in the number of tokens, as in scheduler_config.json
RULES = (LINEAR, "flux2", "empirical", "static", "sprint")
SHIFT = real(1e-8, 1e8)
# Allowed fields of a stored schedule; shift = e^mu is 3 to 6 for the published models.
SCHEDULE_FIELDS: dict[str, Check] = {
    "rule": words(*RULES),
    "mu": optional(real(-20, 20)),
    "shift": optional(SHIFT),
    "base_shift": real(-20, 20),
    "max_shift": real(-20, 20),
    "base_image_seq_len": whole(1, 1 << 24),
    "max_image_seq_len": whole(1, 1 << 24),
    "sigma_max": optional(real(0, 1)),
}
# Our field in diffusers' scheduler_config.json, which has none for FLUX.2's rule; diffusers ignores fields that start
# with an underscore.
SCHEDULE_KEY = "_dcgen_schedule"
SCHEDULER_FIELDS: dict[str, Check] = {
    "use_dynamic_shifting": optional(flag),
    "use_flow_sigmas": optional(flag),
    "flow_shift": optional(SHIFT),
    "shift": optional(SHIFT),
    "base_shift": optional(SCHEDULE_FIELDS["base_shift"]),
    "max_shift": optional(SCHEDULE_FIELDS["max_shift"]),
    "base_image_seq_len": optional(SCHEDULE_FIELDS["base_image_seq_len"]),
    "max_image_seq_len": optional(SCHEDULE_FIELDS["max_image_seq_len"]),
    "time_shift_type": optional(text(100)),
    "shift_terminal": optional(real(0, 1)),
}
DYNAMIC = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
# Number of latent elements C*h*w without a shift in the FLUX.2-style rule.
FLUX2_ELEMENTS = 4096
# mu of rule "empirical" at 10 and at 200 steps, as (slope, intercept) over the number of image tokens: the fit that the
# FLUX.2 pipelines compute. Above the last count the line for 200 steps holds at any number of steps.
EMPIRICAL_10, EMPIRICAL_200 = (8.73809524e-05, 1.89833333), (0.00016927, 0.45666666)
EMPIRICAL_TOKENS = 4300
# Steps that a rule assumes where only a shift is asked for: the default of those pipelines.
DEFAULT_STEPS = 50
# DPMSolverMultistep's flow grid starts at 1 - 1/1000 (num_train_timesteps), FlowMatchEuler's at 1.
STATIC_SIGMA_MAX = 0.999
# Angle of SANA-Sprint's intermediate step.
SPRINT_MIDDLE = 1.3


@dataclass(frozen=True, eq=False)
class Schedule(Mapping[str, Any]):
    """The shift of a checkpoint's noise schedule: sigma' = r*sigma / (1 + (r-1)*sigma), with r from a rule.

    rule "flux": r = e^mu, mu linear in the number of image tokens from base_shift at base_image_seq_len to max_shift
    at max_image_seq_len (names and defaults of FLUX.1's scheduler_config.json);
    "flux2": r = sqrt(tokens*channels/4096);
    "empirical": r = e^mu, mu linear in the tokens and in the steps (the rule of the published FLUX.2 models);
    "static": r is always `shift` (SANA: 3.0, at 4K 6.0);
    "sprint": r = tan(1.3), which turns an even grid of two steps into SANA-Sprint's.
    `mu` (= ln r) or `shift` (= r) overrides any rule; giving both is a ValueError.
    sigma_max: start of the grid before the shift; None = 1, or 0.999 for "static", as in DPMSolverMultistep.

    Also a mapping of its to_dict(), so that sigmas(..., **schedule) takes it and it equals the JSON it is stored as.
    """

    rule: str
    mu: float | None = None
    shift: float | None = None
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    sigma_max: float | None = None

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"schedule rule {shown(self.rule)} is unknown; use one of {', '.join(RULES)}")
        if self.shift is not None and not (isinstance(self.shift, (int, float)) and 0 < self.shift < math.inf):
            raise ValueError(f"the shift must be finite and above 0, got {shown(self.shift)}")
        if self.sigma_max is not None and not (isinstance(self.sigma_max, (int, float)) and 0 < self.sigma_max <= 1):
            raise ValueError(f"sigma_max must be above 0 and at most 1, got {shown(self.sigma_max)}")
        check_fields(vars(self), SCHEDULE_FIELDS)
        if self.mu is not None and self.shift is not None:
            raise ValueError(f"give mu or shift, not both (got mu={self.mu}, shift={self.shift}; shift = e^mu)")
        if self.rule == "static" and self.mu is None and self.shift is None:
            raise ValueError('schedule rule "static" needs its shift (SANA: 3.0; SANA 4K: 6.0)')
        if self.base_image_seq_len >= self.max_image_seq_len:
            raise ValueError(
                f"base_image_seq_len is {self.base_image_seq_len}, expected less than max_image_seq_len "
                f"({self.max_image_seq_len})"
            )

    def __getitem__(self, name: str) -> Any:
        return self.to_dict()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.to_dict())

    def __len__(self) -> int:
        return len(self.to_dict())

    def __hash__(self) -> int:
        return hash(tuple(sorted(self.to_dict().items())))

    @classmethod
    def parse(cls, values: Any) -> Schedule:
        """A stored schedule, {"rule": ...} with any other fields of this class; ValueError names the problem."""
        if isinstance(values, Schedule):
            return values
        names = [field.name for field in fields(cls)]
        try:
            if not isinstance(values, Mapping) or set(values) - set(names):
                raise ValueError(f"got {shown(values)}")
            check_fields(values, {}, needed=("rule",))
            return cls(**values)
        except ValueError as error:
            raise ValueError(f'schedule must be {{"rule": ...}} with {", ".join(names[1:])} if any: {error}') from error

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, Any]) -> Schedule | None:
        """The schedule in diffusers' scheduler_config.json; None when that leaves the shift to the model (DDPM).

        Also None for dynamic shifting with FLUX.1's own numbers: all published DC-Gen releases have that config,
        whichever rule their pipelines use. ValueError for an unknown rule.
        """
        if SCHEDULE_KEY in config:
            return cls.parse(config[SCHEDULE_KEY])
        check_fields(config, SCHEDULER_FIELDS)
        kind, terminal = config.get("time_shift_type"), config.get("shift_terminal")
        if kind not in (None, "exponential") or terminal:
            raise ValueError(
                f"time_shift_type {shown(kind)} with shift_terminal {shown(terminal)} is a shift that is not known "
                "here; expected exponential without a terminal shift"
            )
        if config.get("use_dynamic_shifting"):
            dynamic = cls("flux", **{name: config[name] for name in DYNAMIC if config.get(name) is not None})
            return dynamic if dynamic != cls("flux") else None
        if config.get("use_flow_sigmas"):
            if config.get("flow_shift") is None:
                raise ValueError("flow_shift is missing, though use_flow_sigmas is true")
            return cls("static", shift=float(config["flow_shift"]))
        if config.get("shift") is not None:
            return cls("static", shift=float(config["shift"]), sigma_max=1.0)
        return None

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the rule, and the fields that differ from their defaults."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}

    def shifted_by(self, shift: float) -> Schedule:
        """The same schedule with another ratio r."""
        return replace(self, mu=None, shift=shift)

    def ratio(self, *, tokens: int, channels: int, steps: int = DEFAULT_STEPS) -> float:
        """r for a latent of `tokens` tokens of `channels` values each, both at least 1.

        steps: sampling steps, for rule "empirical".
        """
        if tokens < 1 or channels < 1:
            raise ValueError(
                f"a schedule needs at least 1 token and 1 channel, got tokens={tokens}, channels={channels}"
            )
        if self.shift is not None:
            return float(self.shift)
        if self.rule == "flux2" and self.mu is None:
            return math.sqrt(tokens * channels / FLUX2_ELEMENTS)
        if self.rule == "sprint" and self.mu is None:
            return math.tan(SPRINT_MIDDLE)
        mu = self.mu
        if mu is None:
            mu = empirical_mu(tokens, steps) if self.rule == "empirical" else self._linear_mu(tokens)
        ratio = math.exp(mu) if mu < 700 else math.inf  # exp overflows above 709
        if not math.isfinite(ratio):
            raise ValueError(f"the shift of {tokens} tokens must be finite, got e^{mu:g}")
        return ratio

    def _linear_mu(self, tokens: int) -> float:
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        return self.base_shift + slope * (tokens - self.base_image_seq_len)

    def sigmas(self, steps: int, *, tokens: int, channels: int) -> Tensor:
        """Sigmas of `steps` sampling steps, (steps+1,) float32, descending to 0.

        Before the shift the grid is even from sigma_max to sigma_max/steps. Rule "sprint" uses sprint_sigmas, unless
        mu or shift is given.
        """
        if steps < 1:
            raise ValueError(f"a schedule needs at least 1 step, got {steps}")
        if self.rule == "sprint" and self.mu is None and self.shift is None:
            return sprint_sigmas(steps)
        ratio = self.ratio(tokens=tokens, channels=channels, steps=steps)
        top = self.sigma_max if self.sigma_max is not None else (STATIC_SIGMA_MAX if self.rule == "static" else 1.0)
        grid = top * torch.arange(steps, -1, -1, dtype=torch.float64) / steps
        return shifted(grid, ratio).float()


def shift_ratio(*, tokens: int, channels: int, rule: str, mu: float | None = None, shift: float | None = None) -> float:
    """The ratio r that a rule gives; see Schedule."""
    return Schedule(rule, mu, shift).ratio(tokens=tokens, channels=channels)


def empirical_mu(tokens: int, steps: int) -> float:
    """mu of rule "empirical" for that many image tokens and sampling steps."""
    at_10, at_200 = (slope * tokens + intercept for slope, intercept in (EMPIRICAL_10, EMPIRICAL_200))
    if tokens > EMPIRICAL_TOKENS:
        return at_200
    return at_200 + (at_200 - at_10) / 190 * (steps - 200)


def shifted(sigma: Tensor, ratio: float) -> Tensor:
    """sigma in 0..1 -> r*sigma / (1 + (r-1)*sigma); the same as e^mu / (e^mu + 1/sigma - 1) with r = e^mu."""
    return ratio * sigma / (1 + (ratio - 1) * sigma)


def sigmas(
    steps: int,
    *,
    tokens: int,
    channels: int,
    rule: str,
    mu: float | None = None,
    shift: float | None = None,
    sigma_max: float | None = None,
    **linear: float,
) -> Tensor:
    """Sigmas of `steps` sampling steps, (steps+1,) float32, descending to 0; see Schedule and Schedule.sigmas.

    tokens and channels: of the latent to sample; linear: base_shift, max_shift and their token counts for rule "flux".
    """
    schedule = Schedule.parse({"rule": rule, "mu": mu, "shift": shift, "sigma_max": sigma_max, **linear})
    return schedule.sigmas(steps, tokens=tokens, channels=channels)


def sprint_sigmas(steps: int) -> Tensor:
    """SANA-Sprint's sigmas (steps+1,) float32: sigma = sin t / (sin t + cos t) at t = pi/2 ... 0.

    t is evenly spaced, except that the published 2 steps have 1.3 in the middle.
    """
    if steps < 1:
        raise ValueError(f"a schedule needs at least 1 step, got {steps}")
    angles = torch.linspace(math.pi / 2, 0, steps + 1, dtype=torch.float64)
    if steps == 2:
        angles[1] = SPRINT_MIDDLE
    levels = angles.sin() / (angles.sin() + angles.cos())
    levels[-1] = 0
    return levels.float()
