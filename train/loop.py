"""The training loop: one, flat, in order of execution. It knows parameters and losses, not models."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from train import checkpoint, distributed
from train.batches import Batch, BatchPlan
from train.checkpoint import TrainState
from train.config import FREE_FIELDS, StageConfig
from train.disk import check_space, checkpoint_bytes, folder_bytes
from train.distributed import Ranks
from train.log import Log
from train.optimizer import make_optimizer, set_learning_rate
from train.stages.base import Stage
from train.trackers import tracker_of


class NonFinite(RuntimeError):
    """Loss or gradient norm was not finite; the update was not applied."""


class Stopped(RuntimeError):
    """SIGTERM or SIGINT (`number`) arrived; a checkpoint was written."""

    def __init__(self, text: str, number: int = signal.SIGTERM) -> None:
        super().__init__(text)
        self.number = number


def train_stage(stage: Stage, module: nn.Module, ranks: Ranks, seed: int) -> dict[str, Tensor]:
    """Train `module` for `stage.config.steps` steps, resuming where a checkpoint is found.

    Returns the trained parameters by module path, float32 on the CPU, the moving average's where one is kept.
    Raises NonFinite before an update that would spoil the weights, Stopped after SIGTERM/SIGINT.
    """
    config = stage.config
    _check_division(config, ranks)
    module.to(ranks.device)
    distributed.shard_module(module, stage.shard_units(), ranks, config.shard, stage.forward_methods)
    state = _train_state(stage, module, ranks)
    plan = BatchPlan(stage.buckets(), config.batch, seed)
    settings = {**config.settings(), "seed": seed}
    folder = stage.folder / "checkpoints"
    free = FREE_FIELDS | stage.free_fields
    start = checkpoint.load(folder, state, settings, free, ranks.first, stage.inputs, stage.free_reads)
    if ranks.first:
        _check_room(stage, state, folder, start)
    distributed.barrier()
    log = Log(stage.folder, start, ranks.first, tracker_of(stage) if ranks.first else None)
    bar = tqdm(
        total=config.steps,
        initial=start,
        desc=stage.context.name,
        unit="step",
        disable=not ranks.first,
        mininterval=1.0,
    )
    totals: dict[str, list[float]] = checkpoint.unlogged(folder, start)
    timed, clock = 0, time.perf_counter()
    try:
        with _Signals() as signals:
            for step in range(start, config.steps):
                torch.manual_seed(plan.seed + step)
                stage.before_step(step)
                rate = _learning_rate(config, step)
                set_learning_rate(state.optimizer, rate)

                batches = plan.micro_batches(
                    step, rank=ranks.rank, world=ranks.world, accumulate=config.accumulate, device=ranks.device
                )
                metrics = _accumulate(stage, module, batches)
                norm = _gradient_norm(state, config.optimizer.clip)
                numbers = dict(zip(metrics, distributed.mean(list(metrics.values()), ranks), strict=True))
                if not (math.isfinite(numbers["loss"]) and math.isfinite(norm)):
                    raise NonFinite(_blame(stage, plan, step, numbers["loss"], norm))
                state.optimizer.step()
                state.optimizer.zero_grad(set_to_none=True)
                _update_ema(state, config, step)

                done = step + 1
                for key, value in {**numbers, "grad_norm": norm}.items():
                    totals.setdefault(key, []).append(value)
                timed += 1
                bar.update(1)
                if done % config.log_every == 0 or done == config.steps:
                    speed = timed * config.batch / max(time.perf_counter() - clock, 1e-9)
                    row = {key: _mean(values) for key, values in totals.items()}
                    log.row(done, {**row, "lr": rate, "images_per_s": speed})
                    bar.set_postfix(loss=f"{row['loss']:.4g}", grad=f"{row['grad_norm']:.3g}", img_s=f"{speed:.3g}")
                    totals, timed, clock = {}, 0, time.perf_counter()
                if config.preview_every and done % config.preview_every == 0:
                    with _averaged(state):
                        log.images(done, stage.preview(done))
                if stage.validates and (done % config.validation_every == 0 or done == config.steps):
                    log.validation(done, _validation(stage, state))
                stopping = distributed.any_true(signals.received is not None, ranks)
                if stopping or done % config.checkpoint_every == 0 or done == config.steps:
                    log.sync()
                    _save(folder, done, state, settings, ranks, stage, totals)
                if stopping and done < config.steps:
                    raise Stopped(
                        f"stopped by a signal after step {done}; checkpoint in {folder}; "
                        "the same command goes on from there",
                        signals.received or signal.SIGTERM,  # none: another rank had it
                    )
    finally:
        bar.close()
        log.close()
    return checkpoint.full_weights(state.ema if state.ema is not None else state.parameters)


def _train_state(stage: Stage, module: nn.Module, ranks: Ranks) -> TrainState:
    config = stage.config
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError(f"stage {stage.context.name}: setup() returned a module without a trainable parameter")
    for name, parameter in parameters.items():
        if parameter.dtype != torch.float32:
            raise ValueError(
                f"stage {stage.context.name}: trained parameter {name} is {parameter.dtype}; it must be float32"
            )
    by_scale: dict[float, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        by_scale.setdefault(stage.lr_scale(name), []).append(parameter)
    groups: list[dict[str, Any]] = [{"params": group, "scale": scale} for scale, group in by_scale.items()]
    optimizer = make_optimizer(groups, config.optimizer, ranks.world)
    ema = {name: p.detach().clone() for name, p in parameters.items()} if config.ema else None
    return TrainState(parameters, optimizer, ema)


def _accumulate(stage: Stage, module: nn.Module, batches: list[Batch]) -> dict[str, float]:
    """Backward over the micro-batches; returns the mean of loss and metrics."""
    sums: dict[str, list[float | Tensor]] = {}
    for number, batch in enumerate(batches):
        distributed.sync_gradients(module, last=number == len(batches) - 1)
        loss, metrics = stage.loss(batch)
        (loss / len(batches)).backward()
        for key, value in {"loss": loss.detach(), **metrics}.items():
            sums.setdefault(key, []).append(value.detach() if isinstance(value, Tensor) else value)
    return {key: _mean([float(value) for value in values], skip_nan=key != "loss") for key, values in sums.items()}


def _gradient_norm(state: TrainState, clip: float | None) -> float:
    parameters = list(state.parameters.values())
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip if clip is not None else math.inf)
    return float(distributed.whole(norm))


@torch.no_grad()
def _update_ema(state: TrainState, config: StageConfig, step: int) -> None:
    if state.ema is None or config.ema is None:
        return
    decay = config.ema
    if config.ema_warmup:
        decay *= 1.0 - math.exp(-(step + 1) / config.ema_warmup)
    averages = list(state.ema.values())
    torch._foreach_lerp_(averages, [p.data for p in state.parameters.values()], 1.0 - decay)


@contextlib.contextmanager
def _averaged(state: TrainState) -> Iterator[None]:
    """The moving average's weights in the module, where one is kept; the trained ones are back afterwards, bit for bit.

    Both are exchanged one parameter at a time, so this takes the memory of the largest.
    """
    _exchange(state)
    try:
        yield
    finally:
        _exchange(state)


@torch.no_grad()
def _exchange(state: TrainState) -> None:
    for name, average in (state.ema or {}).items():
        held = average.clone()
        average.copy_(state.parameters[name])
        state.parameters[name].copy_(held)


def _validation(stage: Stage, state: TrainState) -> dict[str, float]:
    """What is measured with the weights as trained, and as ema_NAME with their average where one is kept."""
    numbers = stage.validate()
    if state.ema is not None:
        with _averaged(state):
            numbers |= {f"ema_{name}": value for name, value in stage.validate().items()}
    return numbers


def _learning_rate(config: StageConfig, step: int) -> float:
    o = config.optimizer
    if step < o.warmup:
        return o.lr * (step + 1) / o.warmup
    if o.decay == "constant":
        return o.lr
    progress = (step - o.warmup) / max(config.steps - o.warmup, 1)
    return o.lr * (o.final_lr + (1 - o.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


def _save(
    folder: Path,
    step: int,
    state: TrainState,
    settings: dict[str, Any],
    ranks: Ranks,
    stage: Stage,
    unlogged: dict[str, list[float]],
) -> None:
    try:
        if ranks.first:
            size = checkpoint_bytes(_trained(state), state.ema is not None)
            check_space(folder, {"a checkpoint": size}, "it was not begun")
        checkpoint.save(folder, step, state, settings, ranks, stage.config.keep_checkpoints, unlogged, stage.inputs)
    except OSError as error:
        raise OSError(
            f"checkpoint of step {step} in {folder} failed ({error}); "
            "the one before is intact: free disk space and run the same command"
        ) from error


def _check_room(stage: Stage, state: TrainState, folder: Path, start: int) -> None:
    """NoSpace before the first step where checkpoints, result and later stages will not fit on the disk."""
    c = stage.config
    if start >= c.steps:
        return
    size = checkpoint_bytes(_trained(state), state.ema is not None)
    # one more than are kept: the oldest goes when the newest is there
    checkpoints = max(0, (c.keep_checkpoints + 1) * size - folder_bytes(folder))
    needed = {f"{c.keep_checkpoints} + 1 checkpoints": checkpoints, "the result": stage.result_bytes(_trained(state))}
    needed["later stages"] = stage.later_bytes
    fewer = ", set keep_checkpoints: 1" if c.keep_checkpoints > 1 else ""
    check_space(folder, needed, f"free disk space{fewer}, or name an output= on a larger disk")


def _trained(state: TrainState) -> int:
    return sum(parameter.numel() for parameter in state.parameters.values())


def _blame(stage: Stage, plan: BatchPlan, step: int, loss: float, norm: float) -> str:
    names = ", ".join(stage.describe_samples(plan.indices(step)))
    return (
        f"stage {stage.context.name}, step {step}: loss {loss}, gradient norm {norm}; the update was not applied and "
        f"the last checkpoint is intact. The batch holds samples {names}. Look at those, or lower optimizer.lr"
    )


def _check_division(config: StageConfig, ranks: Ranks) -> None:
    parts = ranks.world * config.accumulate
    if config.batch % parts:
        raise ValueError(
            f"batch={config.batch} is not a multiple of ranks x accumulate = {ranks.world} x {config.accumulate}"
        )


def _mean(values: list[float], skip_nan: bool = True) -> float:
    kept = [value for value in values if not (skip_nan and math.isnan(value))]
    return sum(kept) / len(kept) if kept else math.nan


class _Signals:
    """Notes SIGTERM and SIGINT while the loop runs, so that a step is never cut in two."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self.previous[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: whoever runs us there handles signals
                break
        return self

    def _note(self, number: int, frame: object) -> None:
        self.received = number

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
