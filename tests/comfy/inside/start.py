"""Run inside ComfyUI: what the pack imports at the start, what listing looks at, which files loading opens."""

import importlib
import importlib.util
import os
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import folder_paths
import safetensors.torch
from flux import bridge
from quantized import pack_weights, with_conf

HEAVY = ("transformers", "diffusers", "torchvision", "peft", "accelerate")
heard: list[Counter] = []


def hear(event: str, args: tuple) -> None:
    if heard and event in ("open", "os.scandir"):
        heard[-1][event, os.fsdecode(args[0]) if isinstance(args[0], (str, bytes)) else ""] += 1


sys.addaudithook(hear)


@contextmanager
def counted():
    """(event, path) -> how often, of files that Python opens and folders that it lists."""
    heard.append(Counter())
    try:
        yield heard[-1]
    finally:
        heard.pop()


def imported(pack, _tensors, _params):
    """Imports the pack a second time while none of HEAVY can be imported; names of the nodes it gives."""
    root = Path(importlib.import_module(pack).__file__).parent
    hidden = {name: sys.modules.get(name) for name in HEAVY}
    sys.modules.update(dict.fromkeys(HEAVY))  # None: importing one of them is an error
    try:
        spec = importlib.util.spec_from_file_location(
            "second_pack", root / "__init__.py", submodule_search_locations=[str(root)]
        )
        sys.modules["second_pack"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["second_pack"])
        nodes = [node.__name__ for node in importlib.import_module("second_pack.nodes").NODES]
    finally:
        for name, module in hidden.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module
    return {}, {"nodes": nodes}


def listing(pack, _tensors, params):
    """What listing many releases looks at: (files tested, folders listed), and how many names there are."""
    folder_paths.add_model_folder_path("diffusers", params["folder"])
    release, tested = bridge(pack, "release"), Counter()
    original = os.path.isfile

    def isfile(path):
        tested[str(path)] += 1
        return original(path)

    os.path.isfile = isfile
    try:
        with counted() as seen:
            names = release.release_names()
    finally:
        os.path.isfile = original
    inside = {path: count for path, count in tested.items() if path.startswith(params["folder"])}
    scanned = sum(count for (event, path), count in seen.items() if event == "os.scandir" and params["folder"] in path)
    return {}, {"names": names, "tested": sum(inside.values()), "scanned": scanned}


def opened(pack, _tensors, params):
    """How often each JSON file and each header of weights is read while a model or a release is loaded."""
    bridge(pack, "toy").register()
    release, files = bridge(pack, "release"), importlib.import_module(f"{pack}.dcgen.files")
    for folder in params["releases"].values():
        folder_paths.add_model_folder_path("diffusers", str(Path(folder).parent))
    names = {name: Path(folder).name for name, folder in params["releases"].items()}
    names |= {"toy": "toy/flux-base", "sana": "toy/sana-base"}
    jobs = {name: (release.find_release(where), release.load_release, (where,)) for name, where in names.items()}
    deep = Path(params["releases"]["deep"])
    jobs["network"] = (deep, release.load_model, (deep.name, "default", release.FROM_FILE))
    for name, file in quantized(release, Path(params["work"]), deep).items():
        jobs[name] = (file, release.load_weights, (file, "default", "dc-ae-f32c32-sana-1.0"))
    original, found = files.safe_open, {}
    for name, (path, load, args) in jobs.items():
        headers = Counter()

        def safe_open(file, *args, headers=headers, **kwargs):
            headers[os.fsdecode(file)] += 1
            return original(file, *args, **kwargs)

        files.safe_open = safe_open
        try:
            with counted() as seen:
                load(*args)
        finally:
            files.safe_open = original
        headers.update(
            {file: count for (event, file), count in seen.items() if event == "open" and file[-5:] == ".json"}
        )
        root = path if path.is_dir() else path.parent
        found[name] = {
            Path(file).relative_to(root).as_posix(): count
            for file, count in headers.items()
            if Path(file).is_relative_to(root) and "tokenizer" not in Path(file).parent.name  # transformers reads those
        }
    return {}, found


def quantized(release, work, deep):
    """A file in core's fp8 layers and one in bfloat16, of the network of a release."""
    model = release.model_of_release(release.Release(deep))
    weights = {entry.name: model.get_original(rule) for rule, entry in model.original_entries(model.entries)}
    file, _, layers = pack_weights(weights, "float8_e4m3fn")
    metadata = importlib.import_module(f"{type(model).__module__}").model_metadata(model, "a test's")
    made = {"quantized": with_conf(file, layers, format="float8_e4m3fn"), "plain": weights}
    for name, tensors in made.items():
        safetensors.torch.save_file(tensors, work / f"{name}.safetensors", metadata)
    return {name: work / f"{name}.safetensors" for name in made}
