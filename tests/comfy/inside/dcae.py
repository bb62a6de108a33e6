"""Run inside ComfyUI: a DC-AE through core's VAE nodes and ours."""

import importlib
import importlib.util
from pathlib import Path

import comfy.model_management
import comfy.utils
import latent_preview
import numpy as np
import torch

import nodes as core


def everything(pack, tensors, params):
    out, facts = {}, {}
    bridge = importlib.import_module(f"{pack}.nodes.bridge.vae")
    ours = importlib.import_module(f"{pack}.nodes.dcae")
    for name, folder in params["folders"].items():
        vae = bridge.make_vae(folder)
        f = vae.downscale_ratio
        image, odd, latent = tensors[f"{name}/image"], tensors[f"{name}/odd"], tensors[f"{name}/latent"]
        samples = {"samples": latent}
        out[f"{name}/VAEEncode"] = core.VAEEncode().encode(vae, image)[0]["samples"]
        out[f"{name}/VAEEncodeTiled"] = core.VAEEncodeTiled().encode(vae, image, 512, 64)[0]["samples"]
        out[f"{name}/odd"] = core.VAEEncode().encode(vae, odd)[0]["samples"]
        out[f"{name}/VAEDecode"] = core.VAEDecode().decode(vae, samples)[0]
        out[f"{name}/VAEDecodeTiled"] = core.VAEDecodeTiled().decode(vae, samples, 64, 0)[0]
        mask = torch.zeros(1, image.shape[1], image.shape[2])
        mask[:, : f // 2] = 1
        inpaint = core.VAEEncodeForInpaint().encode(vae, image, mask, 0)[0]
        out[f"{name}/inpaint"] = inpaint["samples"]
        out[f"{name}/mask"] = inpaint["noise_mask"]
        encoded = ours.DCAEEncode.execute(image, vae, 1).result[0]
        out[f"{name}/DCAEEncode"] = encoded["samples"]
        out[f"{name}/DCAEDecode"] = ours.DCAEDecode.execute(samples, vae, 1).result[0]
        out[f"{name}/preview"] = preview(pack, bridge, params["files"][name], latent)
        facts[name] = facts_of(ours, vae, samples, encoded)
        facts[name]["memory"] = memory(pack, vae, latent.shape[1])
    return out, facts


def preview(pack, bridge, file, latent):
    """The live preview that ComfyUI draws of a model-space latent, with the factors in the autoencoder's file."""
    formats = importlib.import_module(f"{pack}.nodes.bridge.latent_format")
    latent_preview.args.preview_method = latent_preview.LatentPreviewMethod.Latent2RGB
    drawn = latent_preview.get_previewer("cpu", formats.latent_format(bridge.make_vae(file).space))
    return torch.from_numpy(np.array(drawn.decode_latent_to_preview_image("JPEG", latent)[1]))


def memory(pack, vae, channels):
    """[what the VAE tells ComfyUI that it will take, what it takes] for two sizes, both ways."""
    path = Path(importlib.import_module(pack).__file__).parent / "benchmarks" / "peak_memory.py"
    spec = importlib.util.spec_from_file_location("dcgen_peak_memory", path)
    counted = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(counted)
    known = [*vae.dcae.parameters(), *vae.dcae.buffers()]
    found = {}
    for side in (512, 1024):
        image = torch.rand(1, side, side, 3)
        latent = torch.randn(1, channels, side // vae.downscale_ratio, side // vae.downscale_ratio)
        for way, call, x, shape in (
            ("encode", vae.encode, image, (1, 3, side, side)),
            ("decode", vae.decode, latent, latent.shape),
        ):
            with counted.PeakMemory(x, *known) as counter:
                call(x)
            found[f"{way} {side}"] = [getattr(vae, f"memory_used_{way}")(shape, torch.float32), counter.peak]
    return found


def facts_of(ours, vae, samples, encoded):
    facts = {"ratio": vae.downscale_ratio, "large": vae.memory_used_decode((1, 32, 64, 64), torch.bfloat16)}
    facts["oom"] = {"decode": out_of_memory(vae, "decode", samples["samples"])}
    f = vae.downscale_ratio
    facts["oom"]["encode"] = out_of_memory(vae, "encode", torch.rand(2, 4 * f, 2 * f, 3))
    facts["progress"] = progress(ours, vae, samples)
    facts["cancelled"] = cancelled(ours, vae, samples)
    other = {"samples": samples["samples"], "dcgen_space": type(vae.space)("another-ae", *_numbers(vae.space))}
    facts["foreign"] = error(lambda: ours.DCAEDecode.execute(other, vae, 0))
    facts["own"] = error(lambda: ours.DCAEDecode.execute(encoded, vae, 0))
    facts["channels"] = error(lambda: core.VAEDecode().decode(vae, {"samples": torch.zeros(1, 4, 8, 8)}))
    facts["small"] = error(lambda: core.VAEEncode().encode(vae, torch.zeros(1, 8, 8, 3)))
    facts["not_dcae"] = error(lambda: ours.DCAEDecode.execute(samples, object(), 0))
    return facts


def _numbers(space):
    return space.channels, space.spatial_factor, space.scaling_factor


def error(call):
    try:
        call()
    # A cancel is a BaseException in newer cores.
    except (Exception, comfy.model_management.InterruptProcessingException) as caught:
        return f"{type(caught).__name__}: {caught}"
    return ""


def out_of_memory(vae, way, x):
    """Work while everything above one row fails as a full GPU would: which strips were tried, and the difference."""
    wanted = getattr(vae, way)(x)
    real, tried = getattr(vae.dcae, way), []

    def scarce(one, rows, **options):
        tried.append(rows)
        if rows is None or rows > 1:
            raise comfy.model_management.OOM_EXCEPTION("no memory left")
        return real(one, rows, **options)

    setattr(vae.dcae, way, scarce)
    try:
        found = getattr(vae, way)(x)
    finally:
        setattr(vae.dcae, way, real)
    return {"tried": tried, "difference": ((found - wanted).abs().max() / wanted.abs().max()).item()}


def progress(ours, vae, samples):
    """What the progress bar and the preview were told."""
    seen = []
    comfy.utils.set_progress_bar_global_hook(
        lambda value, total, image, node_id=None: seen.append((value, total, image))
    )
    try:
        ours.DCAEDecode.execute(samples, vae, 1)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    images = [image for _, _, image in seen if image is not None]
    return {"calls": len(seen), "last": list(seen[-1][:2]), "images": len(images), "size": list(images[-1][1].size)}


def cancelled(ours, vae, samples):
    """Interrupt before the first strip is done: the error, and that ComfyUI is not left interrupted."""
    comfy.model_management.interrupt_current_processing(True)
    try:
        return error(lambda: ours.DCAEDecode.execute(samples, vae, 1)).split(":")[0]
    finally:
        comfy.model_management.interrupt_current_processing(False)
