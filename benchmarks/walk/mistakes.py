"""What a beginner does wrong, and the message that each mistake gets: graphs posted to ComfyUI, and commands.

Every message is the real one: of /prompt, of the run, of the log, or of the command's error output. `must` holds what
it has to name: the file or value, what was expected, what to do.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from train.comfy_client import PACK, ComfyServer, interpreter

TOY = PACK / "toy"
SECONDS = 240
SHOWN = 500  # characters of a message in the table
COMMAND = "by the command"
HEAD = """\
# What mistakes are answered with

Written by `python -m benchmarks.walk mistakes`, which makes each of them and takes down what is said: "at once" is
ComfyUI's answer to a graph that it does not start, "at Run" the message of the node that stops, "log" a line in
ComfyUI's log while the graph runs. The page also says, when a workflow is opened, which models are missing and how to
download them, and greys settings that have no effect. "…" is a folder of the machine.
"""
NOISE = ("Writing model shards", "Loading weights")  # progress bars of libraries


@dataclass(frozen=True)
class Mistake:
    """title: what the user does. must: expressions that the message has to match."""

    title: str
    must: tuple[str, ...]


@dataclass(frozen=True)
class GraphMistake(Mistake):
    """graph: what is posted; files: writes what it needs into models/; logged: it runs, and only the log says so."""

    graph: Callable[[], dict[str, Any]]
    files: Callable[[Path], None] = lambda models: None
    logged: bool = False


@dataclass(frozen=True)
class CommandMistake(Mistake):
    """arguments: of Python, in the repository's folder or `cwd`; files: writes what it needs into a scratch folder."""

    arguments: tuple[str, ...]
    files: Callable[[Path], None] = lambda scratch: None
    cwd: str = ""
    bare: bool = False  # with a Python that has no packages


@dataclass
class Outcome:
    """The message of one mistake; `missing`: what it should name and does not."""

    title: str
    where: str
    message: str
    missing: list[str] = field(default_factory=list)


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


# Graphs ---------------------------------------------------------------------------------------------------------------


def shown(value: dict[str, Any], **more: dict[str, Any]) -> dict[str, Any]:
    """A graph that ends in a VAE Decode of the latent that `value` makes."""
    vae = node("DCAELoader", vae_name="toy/dc-ae-f32")
    decode = node("VAEDecode", samples=["latent", 0], vae=["vae", 0])
    return {"vae": vae, **more, "latent": value, "decode": decode, "end": node("PreviewImage", images=["decode", 0])}


def toy(sampler: dict[str, Any] | None = None, **more: dict[str, Any]) -> dict[str, Any]:
    """The toy's DC-Gen graph with Sampler 4K; `sampler`: its other inputs, `more`: other nodes."""
    values = {"seed": 7, "steps": 2, "guidance": 3.5, "sampler_name": "euler", "denoise": 1.0, "latent": ["empty", 0]}
    graph = {
        "load": node("DCGenReleaseLoader", release="toy/flux-base"),
        "apply": node("DCGenApply", model=["load", 0], adapter_name="toy-flux-dcgen.safetensors", strength=1.0),
        "text": node("CLIPTextEncode", clip=["load", 1], text="strawberry on a white background"),
        "empty": node("DCGenEmptyLatent", model=["apply", 0], width=128, height=128, batch_size=1),
        **more,
    }
    given = {"model": ["apply", 0], "positive": ["text", 0], **values, **(sampler or {})}
    return shown(node("DCGen4KSampler", **{key: value for key, value in given.items() if value is not None}), **graph)


def core_sampler() -> dict[str, Any]:
    """The toy's DC-Gen graph with core's KSampler."""
    values = {"seed": 7, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    ends = {"model": ["apply", 0], "positive": ["text", 0], "negative": ["text", 0], "latent_image": ["empty", 0]}
    return toy() | {"latent": node("KSampler", **ends, **values)}


def model_only(kind: str, **inputs: Any) -> dict[str, Any]:
    """A graph that loads one model and makes an empty latent with it."""
    latent = node("DCGenEmptyLatent", model=["model", 0], width=128, height=128, batch_size=1)
    return shown(latent, model=node(kind, **inputs))


def vae_only(name: str) -> dict[str, Any]:
    image = node("EmptyImage", width=64, height=64, batch_size=1, color=0)
    encode = node("DCAEEncode", image=["image", 0], vae=["deep", 0], strip=0)
    return shown(encode, image=image, deep=node("DCAELoader", vae_name=name))


def half_a_release(models: Path) -> None:
    folder = models / "diffusers" / "half-downloaded"
    shutil.copytree(TOY / "flux-base", folder)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()


def kl_vae(models: Path) -> None:
    """The f8 VAE of the toy under the name of FLUX's, and one with the names of SD's original files."""
    (models / "vae").mkdir(parents=True)
    shutil.copy(TOY / "flux-base" / "vae" / "diffusion_pytorch_model.safetensors", models / "vae" / "ae.safetensors")


def sd_vae(models: Path) -> None:
    names = ("encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.mid.attn_1.q.weight", "quant_conv.weight")
    _tensors(models / "vae" / "sd-vae.safetensors", {name: torch.zeros(4, 4, 3, 3) for name in names})


def plain_model(models: Path) -> None:
    target = models / "diffusion_models" / "flux1-dev.safetensors"
    target.parent.mkdir(parents=True)
    shutil.copy(TOY / "flux-base" / "transformer" / "diffusion_pytorch_model.safetensors", target)


def _tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)


def _adapter(models: Path, name: str) -> Path:
    path = models / "model_patches" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def cut_short(models: Path) -> None:
    data = (TOY / "adapter" / "toy-flux-dcgen.safetensors").read_bytes()
    _adapter(models, "cut-short.safetensors").write_bytes(data[: len(data) // 2])


def web_page(models: Path) -> None:
    _adapter(models, "page.safetensors").write_text(
        "<!doctype html><html><body>Sign in</body></html>" * 20, encoding="utf-8"
    )


def lfs_pointer(models: Path) -> None:
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 24000000000\n"
    _adapter(models, "pointer.safetensors").write_text(text, encoding="utf-8")


def adapter_as_lora(models: Path) -> None:
    (models / "loras").mkdir(parents=True)
    shutil.copy(TOY / "adapter" / "toy-flux-dcgen.safetensors", models / "loras" / "adapter-in-loras.safetensors")


def apply(name: str, base: str = "toy/flux-base") -> dict[str, Any]:
    load = node("DCGenReleaseLoader", release=base)
    return {**model_only("DCGenApply", model=["load", 0], adapter_name=name, strength=1.0), "load": load}


F8 = node("EmptySD3LatentImage", width=256, height=256, batch_size=1)
GRAPHS = (
    GraphMistake(
        "Run a template whose release folder was not downloaded",
        (r"DC-Gen-FLUX\.1-Krea-Dev-Res4K", r"not in"),
        lambda: model_only("DCGenReleaseLoader", release="DC-Gen-FLUX.1-Krea-Dev-Res4K"),
    ),
    GraphMistake(
        "Load a release folder whose download was stopped",
        (r"half-downloaded/transformer", r"not complete: run it again"),
        lambda: model_only("DCGenReleaseLoader", release="half-downloaded"),
        half_a_release,
    ),
    GraphMistake(
        "Select plain FLUX in Load Model (DC-Gen)",
        (r"flux1-dev\.safetensors", r"Load Diffusion Model", r"Apply DC-Gen"),
        lambda: model_only("DCGenModelLoader", model_name="flux1-dev.safetensors", weight_dtype="default"),
        plain_model,
    ),
    GraphMistake(
        "Apply an adapter to another base",
        (r"toy-sana-dcgen", r"(?i)flux", r"(?i)sana"),
        lambda: apply("toy-sana-dcgen.safetensors"),
    ),
    GraphMistake(
        "Use an adapter whose download was cut short",
        (r"cut-short\.safetensors", r"(?i)download|copy|complete"),
        lambda: apply("cut-short.safetensors"),
        cut_short,
    ),
    GraphMistake(
        "Save the download page in place of the adapter",
        (r"page\.safetensors", r"(?i)HTML|web page", r"(?i)download"),
        lambda: apply("page.safetensors"),
        web_page,
    ),
    GraphMistake(
        "Clone a repository without Git LFS",
        (r"pointer\.safetensors", r"LFS", r"(?i)download|pull"),
        lambda: apply("pointer.safetensors"),
        lfs_pointer,
    ),
    GraphMistake(
        "Put the adapter into models/loras and load it as a LoRA",
        (r"(?i)apply dc-gen",),
        lambda: (
            toy(
                {"model": ["lora", 0]},
                lora=node(
                    "LoraLoaderModelOnly",
                    model=["load", 0],
                    lora_name="adapter-in-loras.safetensors",
                    strength_model=1.0,
                ),
            )
            | {"empty": node("DCGenEmptyLatent", model=["lora", 0], width=128, height=128, batch_size=1)}
        ),
        adapter_as_lora,
    ),
    GraphMistake(
        "Select FLUX's f8 VAE in Load DC-AE",
        (r"ae\.safetensors", r"DC-AE", r"Load VAE"),
        lambda: vae_only("ae.safetensors"),
        kl_vae,
    ),
    GraphMistake(
        "Select a Stable Diffusion VAE in Load DC-AE",
        (r"sd-vae\.safetensors", r"DC-AE", r"Load VAE"),
        lambda: vae_only("sd-vae.safetensors"),
        sd_vae,
    ),
    GraphMistake(
        "Encode the start image with the base's VAE",
        (r"16", r"32", r"DC-AE Encode|autoencoder"),
        lambda: toy(
            {"latent": ["encode", 0], "denoise": 0.5},
            image=node("EmptyImage", width=128, height=128, batch_size=1, color=255),
            encode=node("VAEEncode", pixels=["image", 0], vae=["load", 2]),
        ),
    ),
    GraphMistake(
        "Decode with the base's VAE",
        (r"not a DC-AE", r"Load DC-AE", r"VAE Decode"),
        lambda: toy() | {"decode": node("DCAEDecode", samples=["latent", 0], vae=["load", 2], strip=0)},
    ),
    GraphMistake(
        "Take core's empty latent (8 pixels per latent pixel)",
        (r"1024x1024", r"Empty Latent \(DC-Gen\)"),
        lambda: core_sampler() | {"empty": F8},
        logged=True,
    ),
    GraphMistake(
        "Type a size that is not a multiple",
        (r"144", r"32", r"128|160"),
        lambda: toy(empty=node("DCGenEmptyLatent", model=["apply", 0], width=144, height=128, batch_size=1)),
    ),
    GraphMistake(
        "Encode the prompt for another model",
        (r"SANA", r"FLUX", r"CLIP Text Encode"),
        lambda: toy(
            {"positive": ["other", 0]},
            sana=node("DCGenReleaseLoader", release="toy/sana-base"),
            other=node("DCGenSanaTextEncode", clip=["sana", 1], text="panda"),
        ),
    ),
    GraphMistake(
        "Connect an image to Sampler 4K without its VAE",
        (r"vae", r"image"),
        lambda: toy(
            {"image": ["image", 0], "denoise": 0.5},
            image=node("EmptyImage", width=128, height=128, batch_size=1, color=255),
        ),
    ),
)

# Commands -------------------------------------------------------------------------------------------------------------


def images(captions: bool, count: int = 1) -> Callable[[Path], None]:
    """Writes count images into a folder `images`, with or without captions."""

    def write(scratch: Path) -> None:
        from PIL import Image

        (scratch / "images").mkdir()
        for number in range(count):
            Image.new("RGB", (64, 64)).save(scratch / "images" / f"{number}.png")
            if captions:
                (scratch / "images" / f"{number}.txt").write_text("a square", encoding="utf-8")

    return write


def without_text_encoder(scratch: Path) -> None:
    shutil.copytree(TOY / "flux-base", scratch / "base")
    shutil.rmtree(scratch / "base" / "text_encoder_2")


TRAIN = ("-m", "train.run")
DRY = (*TRAIN, "toy-flux", "output=SCRATCH/run")
FOLDER = ("--stage", "cache", "cache.data.type=folder", "cache.data.path=SCRATCH/images")
COMMANDS = (
    CommandMistake(
        "Start the training with a Python that has no torch",
        (r"torch", r"setup_env\.py"),
        (*TRAIN, "--list"),
        bare=True,
    ),
    CommandMistake(
        "Start a script by its file",
        (r"python -m train\.run",),
        ("train/run.py", "--list"),
    ),
    CommandMistake("Mistype a recipe", (r"'toy-fulx'", r"toy-flux"), (*TRAIN, "toy-fulx")),
    CommandMistake("Mistype a stage", (r"'finetun'", r"finetune"), (*DRY, "--stage", "finetun")),
    CommandMistake("Mistype a setting", (r"'stepz'", r"'steps'"), (*DRY, "finetune.stepz=10")),
    CommandMistake("Give a word for a number", (r"'many'", r"steps", r"integer"), (*DRY, "finetune.steps=many")),
    CommandMistake(
        "Override a default that each stage sets itself", (r"rank", r"finetune\.rank"), (*DRY, "rank=16", "--dry-run")
    ),
    CommandMistake(
        "Train on a folder that does not exist", (r"images", r"(?i)not found|no such|does not exist"), (*DRY, *FOLDER)
    ),
    CommandMistake(
        "Train on an empty folder",
        (r"images", r"no captioned image", r"\.png"),
        (*DRY, *FOLDER),
        lambda scratch: (scratch / "images").mkdir(),
    ),
    CommandMistake(
        "Train on images without captions", (r"images", r"caption", r"\.txt"), (*DRY, *FOLDER), images(captions=False)
    ),
    CommandMistake(
        "Name a base that was not downloaded",
        (r"FLUX\.1-Krea-dev", r"hf download"),
        (*DRY, "base=models/FLUX.1-Krea-dev"),
    ),
    CommandMistake(
        "Train on a base without its text encoder",
        (r"text_encoder_2", r"(?i)download|copy"),
        (*DRY, "base=SCRATCH/base", "--stage", "cache"),
        without_text_encoder,
    ),
    CommandMistake(
        "Convert a file that is not there",
        (r"nowhere\.safetensors",),
        ("-m", "dcgen.convert", "info", "nowhere.safetensors"),
    ),
)


# Running them ---------------------------------------------------------------------------------------------------------


def walk(comfyui: Path | None) -> list[Outcome]:
    """All mistakes; those in graphs only with a ComfyUI."""
    outcomes = list(graphs(comfyui)) if comfyui else []
    return [*outcomes, *commands()]


def graphs(comfyui: Path, wanted: str = "") -> Iterator[Outcome]:
    """Post each graph to a fresh server's /prompt."""
    with ComfyServer(comfyui) as server:
        for mistake in GRAPHS:
            if wanted in mistake.title:
                mistake.files(server.folder / "models")
                yield graph_outcome(server, mistake)


def graph_outcome(server: ComfyServer, mistake: GraphMistake) -> Outcome:
    """What ComfyUI shows the user: the refusal, the failed node's message, or what the log says of it."""
    said = len(server.log.read_text(encoding="utf-8", errors="replace"))
    message, refused = server.failure(mistake.graph())
    message = refusal(message) if refused else message
    if mistake.logged:
        lines = server.log.read_text(encoding="utf-8", errors="replace")[said:].splitlines()
        message = " ".join(line for line in lines if "DC-Gen" in line) or message
    return judged(mistake, "at once" if refused else "log" if mistake.logged else "at Run", message, server.folder)


def refusal(message: str) -> str:
    """What /prompt says of each node, out of its JSON."""
    answer = json.loads(message[message.index("{") :])
    errors = [(entry["class_type"], error) for entry in answer["node_errors"].values() for error in entry["errors"]]
    return "; ".join(f"{kind}: {error['message']}: {error['details']}" for kind, error in errors)


def commands(wanted: str = "") -> Iterator[Outcome]:
    with tempfile.TemporaryDirectory(prefix="dcgen-walk-") as place:
        for number, mistake in enumerate(COMMANDS):
            if wanted in mistake.title:
                scratch = Path(place) / str(number)
                scratch.mkdir()
                mistake.files(scratch)
                yield command_outcome(scratch, mistake)


def command_outcome(scratch: Path, mistake: CommandMistake) -> Outcome:
    python = sys.executable
    if mistake.bare:
        venv.create(scratch / ".venv", with_pip=False)
        python = interpreter(scratch)
    arguments = [part.replace("SCRATCH", str(scratch)) for part in mistake.arguments]
    done = subprocess.run(
        [python, *arguments],
        cwd=PACK,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        timeout=SECONDS,
        check=False,
    )
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line and not line.startswith(NOISE)]
    message = "\n".join(lines) or done.stdout
    outcome = judged(mistake, COMMAND, message, scratch)
    if done.returncode == 0:
        outcome.missing.append("an exit code that is not 0")
    if "Traceback" in message:
        outcome.missing.append("no traceback")
    return outcome


def judged(mistake: Mistake, where: str, message: str, scratch: Path) -> Outcome:
    """The outcome, with the machine's own paths left out."""
    for path, name in ((scratch, "…"), (PACK, "."), (Path.home(), "~")):
        message = message.replace(str(path), name)
    message = re.sub(r"\x1b\[[0-9;]*m", "", message).strip()
    return Outcome(mistake.title, where, message, [must for must in mistake.must if not re.search(must, message)])


def page(outcomes: list[Outcome]) -> str:
    """docs/mistakes.md: a section for graphs and one for commands, with every message."""
    parts = [HEAD]
    for title, kept in (("In ComfyUI", False), ("On the command line", True)):
        rows = [outcome for outcome in outcomes if (outcome.where == COMMAND) is kept]
        parts.append(f"## {title}\n\n{table(rows)}\n" if rows else "")
    return "\n".join(parts)


def table(outcomes: list[Outcome]) -> str:
    """Markdown: what the user does, when it is said, and the message."""
    lines = ["| what a user does | said | message |", "|---|---|---|"]
    for outcome in outcomes:
        message = " ".join(outcome.message.split())
        message = message if len(message) <= SHOWN else message[:SHOWN] + " …"
        lines.append(f"| {outcome.title} | {outcome.where} | {escaped(message)} |")
    return "\n".join(lines)


def escaped(text: str) -> str:
    return re.sub(r"([|<>*_`])", r"\\\1", text)


def as_json(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    return [asdict(outcome) for outcome in outcomes]
