"""How the tests reach a real ComfyUI: always its own interpreter, in another process; tensors travel as files.

Without a ComfyUI every test here skips and says so. It is looked for in this order: the environment variable
COMFYUI_PATH, the ComfyUI this pack is installed in, ~/ComfyUI, ~/comfy/ComfyUI.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

PACK = Path(__file__).resolve().parents[2]
INSIDE = Path(__file__).resolve().parent / "inside"
PACK_NAME = "ComfyUI-DC-Gen"


def _candidates() -> list[Path]:
    named = os.environ.get("COMFYUI_PATH")
    places = [Path(named).expanduser()] if named else []
    return [*places, PACK.parents[1], Path.home() / "ComfyUI", Path.home() / "comfy" / "ComfyUI"]


def find_comfy() -> Path | None:
    """The first folder of the list that holds a ComfyUI, or None."""
    for place in _candidates():
        if (place / "main.py").is_file() and (place / "comfy" / "model_patcher.py").is_file():
            return place.resolve()
    return None


def _interpreter(root: Path) -> str:
    for name in (".venv", "venv"):
        for tail in ("bin/python", "Scripts/python.exe"):
            if (root / name / tail).exists():
                return str(root / name / tail)
    return sys.executable


def _environment() -> dict[str, str]:
    drop = {"PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME"}
    return {**{k: v for k, v in os.environ.items() if k not in drop}, "OMP_NUM_THREADS": "1"}


# A node for the tests only: SaveImage cuts to 8 bits, this keeps the floats.
DUMP_NODE = """
import os
import folder_paths
from safetensors.torch import save_file


class Dump:
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "dump"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"images": ("IMAGE",), "name": ("STRING", {})}}

    def dump(self, images, name):
        path = os.path.join(folder_paths.get_output_directory(), name + ".safetensors")
        save_file({"images": images.float().cpu().contiguous()}, path)
        return {}


NODE_CLASS_MAPPINGS = {"TestDump": Dump}
"""


# ComfyUI-nunchaku's loader by id and inputs; its MODEL is the stand-in of inside/foreign.py, of a tiny base.
NUNCHAKU_NODE = f"""
import os
import sys
import folder_paths

sys.path.append({str(INSIDE)!r})


class Loader:
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load_model"
    CATEGORY = "Nunchaku"

    @classmethod
    def INPUT_TYPES(cls):
        return {{
            "required": {{
                "model_path": (folder_paths.get_filename_list("diffusion_models"), {{}}),
                "cache_threshold": ("FLOAT", {{"default": 0, "min": 0, "max": 1, "step": 0.001}}),
                "attention": (["nunchaku-fp16", "flash-attention2"], {{}}),
                "cpu_offload": (["auto", "enable", "disable"], {{}}),
                "device_id": ("INT", {{"default": 0, "min": 0, "max": 0}}),
                "data_type": (["bfloat16", "float16"], {{}}),
            }},
            "optional": {{"i2f_mode": (["enabled", "always"], {{}})}},
        }}

    def load_model(self, **kwargs):
        import foreign

        pack = next(name for name in sys.modules if name.endswith({PACK_NAME!r}))
        release = os.path.join(folder_paths.models_dir, "diffusers", "tiny-base")
        return (foreign.nunchaku_model(pack, {{"release": release}}),)


NODE_CLASS_MAPPINGS = {{"NunchakuFluxDiTLoader": Loader}}
NODE_DISPLAY_NAME_MAPPINGS = {{"NunchakuFluxDiTLoader": "Nunchaku FLUX DiT Loader"}}
"""


class Comfy:
    """A ComfyUI on this machine, and how to run a function of tests/comfy/inside/*.py in it."""

    def __init__(self, root: Path):
        self.root = root
        self.python = _interpreter(root)

    def run(
        self,
        where: str,
        tmp_path: Path,
        tensors: dict[str, torch.Tensor] | None = None,
        params: dict | None = None,
        flags: tuple[str, ...] = ("--cpu",),
        timeout: float = 850,
    ) -> tuple[dict[str, torch.Tensor], dict]:
        """Call `where` ("script:function") inside ComfyUI. Returns the tensors and the JSON it gave back.

        The function gets (name of the pack's package, tensors, params) and runs under inference mode.
        """
        script, function = where.split(":")
        work = tmp_path / f"job-{time.monotonic_ns()}"
        work.mkdir(parents=True)
        if tensors:
            save_file({k: v.contiguous().clone() for k, v in tensors.items()}, work / "in.safetensors")
        job = {
            "comfy": str(self.root),
            "pack": str(PACK),
            "script": str(INSIDE / f"{script}.py"),
            "function": function,
            "params": params or {},
            "work": str(work),
        }
        (work / "job.json").write_text(json.dumps(job))
        base = work / "base"
        (base / "custom_nodes").mkdir(parents=True)
        command = [self.python, str(INSIDE / "runner.py"), *flags, "--base-directory", str(base)]
        env = {**_environment(), "DCGEN_JOB": str(work / "job.json")}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)
        if done.returncode:
            pytest.fail(f"{where} failed inside ComfyUI:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}", pytrace=False)
        return load_file(work / "out.safetensors"), json.loads((work / "out.json").read_text())


class Listener:
    """A websocket to a server, read in a thread: the previews and progress that a browser would get."""

    def __init__(self, port: int, client_id: str):
        self.previews: list[np.ndarray] = []
        self.messages: list[dict] = []
        self.socket = _helper("browser").WebSocket("127.0.0.1", port, f"/ws?clientId={client_id}")
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError, struct.error):
            while True:
                kind, data = self.socket.receive()
                if kind == 1:
                    self.messages.append(json.loads(data))
                elif kind == 2 and (start := data.find(b"\xff\xd8")) >= 0:  # a JPEG after the event's header
                    self.previews.append(np.asarray(Image.open(io.BytesIO(data[start:])).convert("RGB")))

    def close(self) -> None:
        self.socket.close()
        self.thread.join(5)


class Server:
    """A running ComfyUI with its own base directory, in which the pack is linked as a user would install it."""

    def __init__(self, comfy: Comfy, base: Path, flags: tuple[str, ...] = ()):
        self.base = base
        for name in ("custom_nodes", "user", "output"):
            (base / name).mkdir(parents=True)
        # Else dialogs lie over the canvas: the template browser at first, then offers to download models.
        settings = base / "user" / "default" / "comfy.settings.json"
        settings.parent.mkdir()
        quiet = {"Comfy.TutorialCompleted": True, "Comfy.Workflow.ShowMissingModelsWarning": False}
        settings.write_text(json.dumps(quiet))
        (base / "custom_nodes" / PACK_NAME).symlink_to(PACK, target_is_directory=True)
        for name, text in {"test_dump": DUMP_NODE, "ComfyUI-nunchaku": NUNCHAKU_NODE}.items():
            (base / "custom_nodes" / name).mkdir()
            (base / "custom_nodes" / name / "__init__.py").write_text(text)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = base / "server.log"
        command = [
            *(comfy.python, str(comfy.root / "main.py"), "--cpu", "--port", str(self.port)),
            *("--base-directory", str(base), "--user-directory", str(base / "user")),
            *("--database-url", f"sqlite:///{base / 'comfy.db'}", "--disable-api-nodes", "--disable-auto-launch"),
            *flags,
        ]
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=_environment())
        self._wait_until_up()

    def _wait_until_up(self, seconds: float = 600) -> None:
        stop = time.monotonic() + seconds
        while time.monotonic() < stop:
            if self.process.poll() is not None:
                pytest.fail(f"ComfyUI stopped while starting:\n{self.log()[-4000:]}", pytrace=False)
            try:
                self.get("/system_stats")
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.3)
        else:
            pytest.fail(f"ComfyUI did not answer within {seconds:g} s:\n{self.log()[-4000:]}", pytrace=False)
        failed = [line for line in self.log().splitlines() if "IMPORT FAILED" in line and PACK_NAME in line]
        assert not failed, f"the pack did not load:\n{self.log()[-6000:]}"

    def log(self) -> str:
        """Everything the server has printed so far, without colour codes."""
        return re.sub(r"\x1b\[[0-9;]*m", "", self.log_path.read_text(errors="replace"))

    def raw(self, path: str, body: dict | None = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, headers={"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def get(self, path: str) -> dict:
        return json.loads(self.raw(path))

    def post(self, path: str, body: dict) -> dict:
        """POST; an HTTP error comes back as {"http_error": code, ...body}."""
        try:
            return json.loads(self.raw(path, body) or b"{}")
        except urllib.error.HTTPError as error:
            return {"http_error": error.code, **json.loads(error.read() or b"{}")}

    def queue(self, prompt: dict, seconds: float = 180) -> dict:
        """Queue an API-format prompt, wait, and return its history entry. Fails on any error, naming the node."""
        entry = self.try_queue(prompt, seconds)
        if entry["status"]["status_str"] != "success":
            pytest.fail(f"the graph failed: {self.error(entry)}", pytrace=False)
        return entry

    def try_queue(self, prompt: dict, seconds: float = 180) -> dict:
        """Like queue, but hands an entry back that failed while running. A prompt refused outright fails the test."""
        answer = self.post("/prompt", {"prompt": prompt, "client_id": "tests"})
        if "prompt_id" not in answer:
            pytest.fail(f"ComfyUI refused the graph: {json.dumps(answer)[:3000]}", pytrace=False)
        return self.wait(answer["prompt_id"], seconds)

    def wait(self, prompt_id: str, seconds: float = 180) -> dict:
        stop = time.monotonic() + seconds
        while time.monotonic() < stop:
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                return history[prompt_id]
            time.sleep(0.1)
        pytest.fail(f"no result after {seconds} s; the log ends:\n{self.log()[-2000:]}", pytrace=False)

    @staticmethod
    def error(entry: dict) -> str:
        """The message of a failed history entry, "" if it succeeded."""
        for kind, data in entry["status"]["messages"]:
            if kind == "execution_error":
                return f"{data['node_type']}: {data['exception_message']}"
            if kind == "execution_interrupted":
                return "interrupted"
        return ""

    @contextlib.contextmanager
    def listening(self) -> Iterator[Listener]:
        """What the server sends to the client that `queue` queues for."""
        listener = Listener(self.port, "tests")
        try:
            yield listener
        finally:
            listener.close()

    def images(self, entry: dict) -> dict[str, list[np.ndarray]]:
        """The pictures of a history entry as uint8 (H, W, 3), by node id."""
        found: dict[str, list[np.ndarray]] = {}
        for node_id, output in entry["outputs"].items():
            for image in output.get("images", []):
                data = self.raw("/view?" + urllib.parse.urlencode(image))
                found.setdefault(node_id, []).append(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
        return found

    def dumped(self, name: str) -> np.ndarray:
        """The float images (B,H,W,3) that a TestDump node of that name wrote."""
        return load_file(self.base / "output" / f"{name}.safetensors")["images"].numpy()

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="session")
def comfy() -> Comfy:
    root = find_comfy()
    if root is None:
        pytest.skip("no ComfyUI found: set COMFYUI_PATH, or put one in ~/ComfyUI")
    return Comfy(root)


def _helper(name: str):
    """A module of this folder (test files cannot import each other under importlib mode)."""
    spec = importlib.util.spec_from_file_location(f"comfy_tests_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def helper():
    """adapters.py: random adapters, LoRA files and network inputs."""
    return _helper("adapters")


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory):
    """A headless Chromium; skips where there is none."""
    module = _helper("browser")
    program = module.find_chromium()
    if program is None:
        pytest.skip("no Chromium found: install chromium, or set CHROMIUM_PATH")
    page = module.Browser(program, tmp_path_factory.mktemp("chromium"))
    yield page
    page.close()


@pytest.fixture(scope="session")
def server(comfy: Comfy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for the whole session, with live previews on: the previews are part of what is tested."""
    running = Server(comfy, tmp_path_factory.mktemp("comfy") / "base", ("--preview-method", "latent2rgb"))
    yield running
    running.close()


# Tiny release folders with random weights, in the diffusers layout ----------------------------------------------------

FLUX_SIZES = {
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}
T5_TOKENS = 24


def randomize(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every parameter random, biases and norms too, so that no term is zero or one by construction."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            norm = value.ndim == 1 and name.endswith("weight")
            value.copy_(1 + 0.1 * noise if norm else noise * (0.5 / max(1, value[0].numel()) ** 0.5))
    return module.eval()


def tiny_transformer(packed_channels: int, seed: int = 0, **changes):
    import diffusers

    sizes = {**FLUX_SIZES, **changes}
    return randomize(diffusers.FluxTransformer2DModel(in_channels=packed_channels, **sizes), seed)


def tiny_dcae(seed: int = 0, channels: int = 8, factor: int = 32):
    """A DC-AE with attention in both halves, with every published kind of block but the widths of a toy."""
    import diffusers

    plain = factor.bit_length() - 2  # stages: one more than halvings; the last two attend
    widths = (8, 8) + (16,) * plain
    types = ("ResBlock",) * plain + ("EfficientViTBlock",) * 2
    scales = ((),) * plain + ((5,), (5,))
    ae = diffusers.AutoencoderDC(
        latent_channels=channels,
        attention_head_dim=8,
        encoder_block_types=types,
        decoder_block_types=types,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(1,) * len(widths),
        decoder_layers_per_block=(1,) * len(widths),
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        scaling_factor=0.37,
    )
    assert ae.spatial_compression_ratio == factor
    return randomize(ae, seed)


def tiny_kl_vae(seed: int = 0):
    import diffusers

    vae = diffusers.AutoencoderKL(
        latent_channels=16,
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        scaling_factor=0.41,
        shift_factor=0.07,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return randomize(vae, seed)


def _clip_tokenizer(folder: Path):
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    merges = [("r", "e"), ("re", "d</w>"), ("c", "a"), ("ca", "t</w>")]
    words = [*letters, *(f"{c}</w>" for c in letters), *("".join(m) for m in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(m) for m in merges)]) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def _t5_tokenizer(folder: Path):
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>")
    text = ["a red cat on a blue background", "a dog on the red background", "an apple, a pear"]
    tokenizer.train_from_iterator(text * 20, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": T5_TOKENS}
    raw = folder.with_name(folder.name + "-raw")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(raw)
    return transformers.T5TokenizerFast.from_pretrained(raw)


def make_release(folder: Path, *, deep: int = 0, seed: int = 0, shard: str | None = None):
    """Write a tiny random FLUX release and give its pipeline back.

    deep: factor of the DC-AE it is on (32, 64; patch 1); 0 for an f8 VAE (patch 2).

    shard: largest size of one transformer shard, e.g. "100KB".
    """
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip = _clip_tokenizer(folder.with_name(folder.name + "-clip"))
    t5 = _t5_tokenizer(folder.with_name(folder.name + "-t5"))
    sizes = {"hidden_size": FLUX_SIZES["pooled_projection_dim"], "intermediate_size": 48, "num_attention_heads": 2}
    clip_config = CLIPTextConfig(
        vocab_size=len(clip),
        num_hidden_layers=2,
        bos_token_id=clip.bos_token_id,
        eos_token_id=clip.eos_token_id,
        **sizes,
    )
    t5_sizes = {"d_model": FLUX_SIZES["joint_attention_dim"], "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 3}
    t5_config = T5Config(vocab_size=len(t5), feed_forward_proj="gated-gelu", **t5_sizes)
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=None,  # the class cannot hold an AutoencoderDC
        text_encoder=randomize(CLIPTextModel(clip_config), seed + 2),
        tokenizer=clip,
        text_encoder_2=randomize(T5EncoderModel(t5_config), seed + 3),
        tokenizer_2=t5,
        transformer=tiny_transformer(8 if deep else 64, seed + 4),
    )
    pipe.vae = tiny_dcae(seed + 1, factor=deep) if deep else tiny_kl_vae(seed + 1)
    for name in ("scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "vae"):
        getattr(pipe, name).save_pretrained(folder / name)
    pipe.transformer.save_pretrained(folder / "transformer", **({"max_shard_size": shard} if shard else {}))
    (folder / "model_index.json").write_text(
        json.dumps(
            {
                "_class_name": "FluxPipeline",
                "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
                "text_encoder": ["transformers", "CLIPTextModel"],
                "text_encoder_2": ["transformers", "T5EncoderModel"],
                "tokenizer": ["transformers", "CLIPTokenizer"],
                "tokenizer_2": ["transformers", "T5TokenizerFast"],
                "transformer": ["diffusers", "FluxTransformer2DModel"],
                "vae": ["diffusers", "AutoencoderDC" if deep else "AutoencoderKL"],
            }
        )
    )
    return pipe


def diffusers_velocity(transformer, case, patch):
    """FluxTransformer2DModel called as FluxPipeline does, with the packing written out."""
    batch, channels, height, width = case["x"].shape
    rows, columns = height // patch, width // patch
    cut = case["x"].reshape(batch, channels, rows, patch, columns, patch)
    tokens = cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * patch**2)
    ids = [[0.0, float(row), float(column)] for row in range(rows) for column in range(columns)]
    with torch.no_grad():
        out = transformer(
            hidden_states=tokens,
            timestep=case["sigma"],
            guidance=case["guidance"],
            pooled_projections=case["pooled"],
            encoder_hidden_states=case["context"],
            txt_ids=torch.zeros(case["context"].shape[1], 3),
            img_ids=torch.tensor(ids),
            return_dict=False,
        )[0]
    cut = out.reshape(batch, rows, columns, channels, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return cut.reshape(batch, channels, height, width)


class Tiny:
    """The helpers above for tests (test files cannot import each other under importlib mode)."""

    make_release = staticmethod(make_release)
    transformer = staticmethod(tiny_transformer)
    randomize = staticmethod(randomize)
    dcae = staticmethod(tiny_dcae)
    velocity = staticmethod(diffusers_velocity)
    flux_sizes = FLUX_SIZES
    t5_tokens = T5_TOKENS


@pytest.fixture(scope="session")
def tiny() -> type[Tiny]:
    return Tiny


@pytest.fixture(scope="session")
def base_release(tmp_path_factory: pytest.TempPathFactory):
    """(folder, pipeline) of a tiny random FLUX on an f8 VAE."""
    folder = tmp_path_factory.mktemp("releases") / "tiny-flux"
    return folder, make_release(folder, seed=10)


@pytest.fixture(scope="session")
def deep_release(tmp_path_factory: pytest.TempPathFactory):
    """(folder, pipeline) of a tiny random merged DC-Gen FLUX on an f32 DC-AE, its transformer in several shards."""
    folder = tmp_path_factory.mktemp("releases") / "tiny-dcgen-flux"
    return folder, make_release(folder, deep=32, seed=20, shard="100KB")


@pytest.fixture(scope="session")
def deeper_release(tmp_path_factory: pytest.TempPathFactory):
    """(folder, pipeline) of a tiny random merged DC-Gen FLUX on an f64 DC-AE."""
    folder = tmp_path_factory.mktemp("releases") / "tiny-dcgen-flux-f64"
    return folder, make_release(folder, deep=64, seed=30)


# The tiny releases and an adapter between them, installed in the server


def install(server: Server, folder: Path, name: str) -> str:
    """Link a release folder into the server's models/diffusers."""
    target = server.base / "models" / "diffusers" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(folder, target_is_directory=True)
    return name


@pytest.fixture(scope="session")
def deep_name(server, deep_release):
    """The tiny f32 DC-Gen release in the server's models/diffusers."""
    return install(server, deep_release[0], "tiny-dcgen")


@pytest.fixture(scope="session")
def deeper_name(server, deeper_release):
    """The tiny f64 one."""
    return install(server, deeper_release[0], "tiny-dcgen-f64")


@pytest.fixture(scope="session")
def base_name(server, base_release):
    """The tiny base release there."""
    return install(server, base_release[0], "tiny-base")


@pytest.fixture(scope="session")
def adapter_name(server, base_release, tiny):
    """A random adapter for the tiny base, whose latent is that of the tiny DC-Gen release's autoencoder."""
    from dcgen.adapter import Adapter, LoraPair, save_adapter
    from dcgen.backbones import BACKBONES
    from dcgen.latent import LatentSpace

    new = tiny.transformer(8, seed=5).state_dict()
    keys = ("x_embedder.weight", "x_embedder.bias", "proj_out.weight", "proj_out.bias")
    factors = tuple((0.3 * (i % 3 == 0), 0.3 * (i % 3 == 1), 0.3 * (i % 3 == 2)) for i in range(8))
    adapter = Adapter(
        "flux",
        {key: new[key] for key in keys},
        {"transformer_blocks.0.attn.to_q": LoraPair(torch.randn(16, 32), torch.randn(32, 16) / 2, 16.0)},
        LatentSpace("", 8, 32, 0.37, rgb_factors=factors),
        BACKBONES["flux"].fingerprint(dict(base_release[1].transformer.config)),
        {"rule": "flux2"},
    )
    folder = server.base / "models" / "model_patches"
    folder.mkdir(parents=True, exist_ok=True)
    save_adapter(folder / "tiny.safetensors", adapter)
    return "tiny.safetensors"
