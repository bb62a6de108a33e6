"""Speed and memory of training: `python -m benchmarks.train [--out runs/train-benchmark]`. Table and results.json.

On the toy release: closed form against AdamW on Eq. 1; the fine-tuning step against the same step written plainly with
diffusers and peft; the price of Eq. 7's empty branch; the loader against the step; peak memory with and without
recomputation. Times on a CPU are the process's own, so that a busy machine counts less. Tokens a second and MFU at
FLUX's width, which need a GPU: `python -m benchmarks.gpu --parts training`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from dcgen import schedule
from train.batches import BatchPlan
from train.config import Recipe, load_recipe
from train.distributed import Ranks
from train.files import read_json, write_json
from train.loop import train_stage
from train.run import make_stage, run_recipe

CPU = Ranks(0, 1, torch.device("cpu"))
STEPS, WARM = 25, 5  # steps timed, and how many of them are not counted
SHORT = ["head.steps=10", "finetune.steps=10", "finetune.optimizer.warmup=1"]


def clock() -> float:
    """Seconds: the process's own on a CPU, which other programs do not lengthen; the wall's where a GPU works."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if options.memory:
        print(json.dumps(_memory_of(options)))
        return
    torch.set_num_threads(options.threads)
    recipe = load_recipe("toy-flux", [f"output={options.out}", "cache.data.variants=2", *SHORT])
    for stage in ("cache", "align", "head"):
        run_recipe(recipe, only=stage)
    path = options.out / "results.json"
    machine = {"torch": torch.__version__, "threads": options.threads, "cores": os.cpu_count()}
    for part in options.parts or PARTS:
        found = {part: PARTS[part](options)}
        write_json(path, {**(read_json(path) if path.is_file() else {}), **machine, **found})
    print(table(read_json(path)))


def alignment(options: argparse.Namespace) -> dict[str, float]:
    """Wall time and loss of both solvers of Eq. 1 on the same cache."""
    found: dict[str, float] = {}
    begin = clock()
    for solver, key in (("closed-form", "closed form"), ("adamw", "AdamW")):
        out = options.out / f"align-{solver}"
        overrides = [f"output={out}", f"align.cache={options.out}/cache", f"align.solver={solver}", "align.batch=64"]
        overrides += [f"align.steps={options.align_steps}", "align.checkpoint_every=1000000", "align.log_every=1000"]
        numbers = run_recipe(load_recipe("toy-flux", overrides), only="align", redo=True)["align"]
        found[f"{key}, s"], begin = clock() - begin, clock()
        found[f"{key}, loss / variance"] = numbers["unexplained"]
    return {**found, "AdamW steps": options.align_steps, "times sooner": found["AdamW, s"] / found["closed form, s"]}


def step_against_plain(options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds a step of the fine-tuning stage and of the plain script, in turns, the best of each.

    No caption is dropped: a dropped one skips the empty branch, and the two draw different ones.
    """
    ours, plain = [], []
    same = "finetune.objective.caption_dropout=0"
    for _ in range(options.rounds):
        ours.append(stage_step(options, same))
        plain.append(plain_step(options, same))
    return {"ours, ms": min(ours), "plain diffusers + peft, ms": min(plain), "ratio": min(ours) / min(plain)}


def empty_branch(options: argparse.Namespace) -> dict[str, float]:
    """Cost of a step without the empty branch (Eq. 2), with it, and with its gradient (Eq. 7)."""
    kinds = {
        "Eq. 2": ["finetune.objective.loss=flow"],
        "Eq. 7, no gradient in the empty branch": ["finetune.objective.uncond_grad=false"],
        "Eq. 7 as written": ["finetune.objective.uncond_grad=true"],
    }
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(options.rounds):
        for name, overrides in kinds.items():
            times[name].append(stage_step(options, *overrides, "finetune.objective.caption_dropout=0"))
    best = {name: min(values) for name, values in times.items()}
    return {**{f"{name}, ms": value for name, value in best.items()},
            "no gradient / Eq. 2": best["Eq. 7, no gradient in the empty branch"] / best["Eq. 2"],
            "as written / Eq. 2": best["Eq. 7 as written"] / best["Eq. 2"]}  # fmt: skip


def loader(options: argparse.Namespace) -> dict[str, float]:
    """Samples a second of the cache alone (latents, text, random numbers) against what a step uses up."""
    stage = finetune_stage(options)
    stage.setup()
    plan = BatchPlan(stage.buckets(), stage.config.batch, 0)

    def read(step: int) -> None:
        for batch in plan.micro_batches(step, rank=0, world=1, accumulate=1, device=CPU.device):
            latents = stage.cache.latents(batch.indices, "student")
            stage.cache.text(stage.cache.caption_numbers(batch.indices))
            batch.normal("noise", latents.shape[1:])

    read(0)
    begin = clock()
    for step in range(1, 31):
        read(step)
    supply = 30 * stage.config.batch / (clock() - begin)
    use = stage.config.batch / stage_step(options) * 1000
    return {"loader, samples/s": supply, "step, samples/s": use, "loader / step": supply / use}


def memory(options: argparse.Namespace) -> dict[str, float]:
    """Peak resident memory of a few steps, each kind in a process of its own."""
    found = {}
    for name, checkpointing, dtype in (
        ("float32 base", False, "float32"),
        ("float32 base, recomputed blocks", True, "float32"),
        ("bfloat16 base, recomputed blocks", True, "bfloat16"),
    ):
        command = [sys.executable, "-m", "benchmarks.train", "--out", str(options.out), "--memory", dtype]
        command += ["--checkpointing"] if checkpointing else []
        command += ["--threads", str(options.threads), "--memory-batch", str(options.memory_batch)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[f"{name}, MB over the loaded model"] = json.loads(done.stdout.splitlines()[-1])
    return found


def _memory_of(options: argparse.Namespace) -> float:
    """Peak memory of two steps over what the process held before them, MB."""
    torch.set_num_threads(options.threads)
    stage = finetune_stage(
        options,
        f"finetune.dtype={options.memory}",
        f"finetune.gradient_checkpointing={str(options.checkpointing).lower()}",
        f"finetune.batch={options.memory_batch}",
    )
    stage.setup()
    (batch,) = BatchPlan(stage.buckets(), options.memory_batch, 0).micro_batches(
        0, rank=0, world=1, accumulate=1, device=CPU.device
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        stage.loss(batch)[0].backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000


def finetune_stage(options: argparse.Namespace, *overrides: str) -> Any:
    """The fine-tuning stage of toy-flux on the benchmark's cache, in a fresh folder."""
    return make_stage(bench_recipe(options, *overrides), "finetune", CPU)


def bench_recipe(options: argparse.Namespace, *overrides: str) -> Recipe:
    """toy-flux with its inputs already made."""
    inputs = [f"finetune.cache={options.out}/cache", f"finetune.start={options.out}/head"]
    folder = options.out / "steps" / str(time.perf_counter_ns())
    return load_recipe("toy-flux", [*inputs, f"output={folder}", *overrides])


def stage_step(options: argparse.Namespace, *overrides: str) -> float:
    """Median milliseconds of a step in train_stage, everything included but checkpoints."""
    settings = [f"finetune.steps={STEPS + 1}", "finetune.log_every=5", "finetune.checkpoint_every=1000000"]
    stage = finetune_stage(options, *settings, "finetune.optimizer.warmup=1", *overrides)
    begins: list[float] = []
    stage.before_step = lambda step: begins.append(clock())
    train_stage(stage, stage.setup(), CPU, seed=0)
    return 1000 * median(after - before for before, after in list(pairwise(begins))[WARM:])


def plain_step(options: argparse.Namespace, *overrides: str) -> float:
    """Median milliseconds of the same step as a short script with diffusers and peft would have it."""
    from diffusers import FluxTransformer2DModel
    from peft import LoraConfig, get_peft_model

    stage = finetune_stage(options, *overrides)
    config, cache = stage.config, None
    stage.setup()
    cache = stage.cache
    dtype = getattr(torch, config.dtype)
    model = FluxTransformer2DModel.from_config(dict(stage.moved_config)).to(dtype)
    targets = "|".join(stage.family.lora_targets)
    model = get_peft_model(model, LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets))
    for module in (model.base_model.model.x_embedder, model.base_model.model.proj_out):
        module.float().requires_grad_(True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.optimizer.lr, weight_decay=config.optimizer.weight_decay)
    average = [p.detach().clone() for p in trained]
    rows, columns = cache.latents([0], "student").shape[2:]
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1], ids[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)[None]
    low, high = config.objective.w
    empty = cache.text([0])

    def step() -> None:
        picked = torch.randint(len(cache), (config.batch,)).tolist()
        x0 = cache.latents(picked, "student").flatten(2).transpose(1, 2)
        text = cache.text(cache.caption_numbers(picked))
        noise, w = torch.randn_like(x0), low + (high - low) * torch.rand(config.batch)
        ratio = schedule.shift_ratio(tokens=rows * columns, channels=x0.shape[-1], rule="flux")
        sigma = schedule.shifted(torch.sigmoid(torch.randn(config.batch)), ratio)
        dropped = torch.rand(config.batch) < config.objective.caption_dropout
        x = (1 - sigma[:, None, None]) * x0 + sigma[:, None, None] * noise

        @torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
        def velocity(picks: Tensor, embeds: Tensor, pooled: Tensor) -> Tensor:
            return model(
                hidden_states=x[picks], timestep=sigma[picks], guidance=1 + w[picks], pooled_projections=pooled,
                encoder_hidden_states=embeds, txt_ids=torch.zeros(embeds.shape[1], 3), img_ids=ids.reshape(-1, 3),
                return_dict=False,
            )[0].float()  # fmt: skip

        embeds = torch.where(dropped[:, None, None], empty["prompt_embeds"], text["prompt_embeds"])
        pooled = torch.where(dropped[:, None], empty["pooled"], text["pooled"])
        v = velocity(torch.arange(config.batch), embeds, pooled)
        kept = torch.nonzero(~dropped).flatten()
        nothing = (value.expand(len(kept), *value.shape[1:]) for value in (empty["prompt_embeds"], empty["pooled"]))
        share = w[kept][:, None, None]
        v = v.index_copy(0, kept, (v[kept] + share * velocity(kept, *nothing)) / (1 + share))
        torch.nn.functional.mse_loss(v, noise - x0).backward()
        torch.nn.utils.clip_grad_norm_(trained, config.optimizer.clip)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for mean, p in zip(average, trained, strict=True):
                mean.lerp_(p, 1 - config.ema)

    return _median_ms(step, STEPS)


def _median_ms(step: Callable[[], None], count: int) -> float:
    times = []
    for _ in range(count):
        begin = clock()
        step()
        times.append(clock() - begin)
    return 1000 * median(times[WARM:])


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, float]]] = {
    "alignment": alignment,
    "step": step_against_plain,
    "empty branch": empty_branch,
    "loader": loader,
    "memory": memory,
}


def table(results: dict[str, Any]) -> str:
    """Every number on a line, Markdown."""
    lines = ["| what | figure |", "|---|---|"]
    for topic, numbers in results.items():
        if isinstance(numbers, dict):
            lines += [f"| {topic}: {name} | {value:.4g} |" for name, value in numbers.items()]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/train-benchmark"))
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), help="measure these alone, keep the others' figures")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="repetitions, taken in turns; the best counts")
    parser.add_argument("--align-steps", type=int, default=20_000, help="AdamW steps on Eq. 1 (Table 7: 20k)")
    parser.add_argument("--memory-batch", type=int, default=64)
    parser.add_argument("--memory", choices=["float32", "bfloat16"], help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
