"""What is looked after while any sampler samples one of our models: areas, sizes, text, NaN, replaced files."""

import copy
import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

TOY = Path(__file__).resolve().parents[2] / "toy"
ADAPTER = "toy-flux-dcgen.safetensors"

BASE = {
    "release": ("DCGenReleaseLoader", {"release": "toy/flux-base"}),
    "model": ("DCGenApply", {"model": ["release", 0], "adapter_name": ADAPTER, "strength": 1.0}),
    "vae": ("DCAELoader", {"vae_name": "toy/dc-ae-f32"}),
    "latent": ("DCGenEmptyLatent", {"model": ["model", 0], "width": 128, "height": 128, "batch_size": 1}),
    "text": ("CLIPTextEncode", {"text": "strawberry on a white background", "clip": ["release", 1]}),
    "positive": ("FluxGuidance", {"guidance": 3.5, "conditioning": ["text", 0]}),
    "negative": ("CLIPTextEncode", {"text": "", "clip": ["release", 1]}),
    "sampled": (
        "KSampler",
        {
            **{"model": ["model", 0], "positive": ["positive", 0], "negative": ["negative", 0]},
            **{"latent_image": ["latent", 0], "seed": 7, "steps": 2, "cfg": 1.0, "sampler_name": "euler"},
            **{"scheduler": "simple", "denoise": 1.0},
        },
    ),
    "picture": ("VAEDecode", {"samples": ["sampled", 0], "vae": ["vae", 0]}),
    "dump": ("TestDump", {"images": ["picture", 0], "name": "guard"}),
}
SAMPLER = {
    **{"model": ["model", 0], "positive": ["positive", 0], "latent": ["latent", 0], "seed": 7, "steps": 2},
    **{"guidance": 3.5, "sampler_name": "euler", "denoise": 1.0},
}


def graph(**changes):
    """The toy graph; `name=(class, inputs)` adds or replaces a node, `name={...}` changes inputs."""
    made = {name: {"class_type": kind, "inputs": dict(inputs)} for name, (kind, inputs) in copy.deepcopy(BASE).items()}
    for name, change in changes.items():
        if isinstance(change, tuple):
            made[name] = {"class_type": change[0], "inputs": dict(change[1])}
        else:
            made[name]["inputs"] |= change
    return made


def image(server, **changes):
    server.queue(graph(**changes))
    return server.dumped("guard")


def refusal(server, **changes):
    entry = server.try_queue(graph(**changes))
    assert entry["status"]["status_str"] == "error"
    return server.error(entry)


@pytest.mark.parametrize("sampler", ["core", "ours"])
def test_areas_in_pixels_are_those_in_percent(server, sampler):
    def drawn(node):
        both = ("ConditioningCombine", {"conditioning_1": ["area", 0], "conditioning_2": ["negative", 0]})
        ours = {"sampled": ("DCGen4KSampler", SAMPLER | {"positive": ["both", 0]})} if sampler == "ours" else {}
        return image(server, **{"area": node, "both": both, "sampled": {"positive": ["both", 0]}, **ours})

    where = {"conditioning": ["positive", 0], "strength": 1.0}
    pixels = drawn(("ConditioningSetArea", {**where, "width": 64, "height": 96, "x": 64, "y": 32}))
    percent = {"width": 0.5, "height": 0.75, "x": 0.5, "y": 0.25}
    assert (pixels == drawn(("ConditioningSetAreaPercentage", {**where, **percent}))).all()
    elsewhere = drawn(("ConditioningSetArea", {**where, "width": 64, "height": 96, "x": 0, "y": 0}))
    assert abs(pixels - elsewhere).max() > 0.01


def test_an_area_that_is_rounded_is_said_and_one_outside_refused(server):
    def area(**where):
        return ("ConditioningSetArea", {"conditioning": ["positive", 0], "strength": 1.0, **where})

    start = len(server.log())
    image(server, area=area(width=80, height=64, x=40, y=0), sampled={"positive": ["area", 0]})
    assert "rounded to multiples of 32 pixels" in server.log()[start:]
    outside = area(width=64, height=64, x=128, y=0)
    assert "outside the image of 128x128" in refusal(server, area=outside, sampled={"positive": ["area", 0]})


def test_a_latent_made_for_f8(server):
    """Newer cores bring it to the model's size themselves; on older ones the log says what will come out."""
    start = len(server.log())
    latent = ("EmptyLatentImage", {"width": 128, "height": 128, "batch_size": 1})
    made = image(server, latent=latent)
    said = "image of 512x512" in server.log()[start:]
    assert made.shape[1:3] == (128, 128) or (said and "Empty Latent (DC-Gen)" in server.log()[start:])


def test_the_size_a_model_was_made_for_is_not_complained_about(server):
    start = len(server.log())
    image(server, sampled={"seed": 8})
    assert "this makes an image of" not in server.log()[start:]


def test_text_of_another_family(server):
    sana = ("DCGenReleaseLoader", {"release": "toy/sana-base"})
    text = ("DCGenSanaTextEncode", {"clip": ["sana", 1], "text": "a cat"})
    for sampled in ({"positive": ["other", 0]}, ("DCGen4KSampler", SAMPLER | {"positive": ["other", 0]})):
        said = refusal(server, sana=sana, other=text, sampled=sampled)
        assert "encoded for SANA" in said
        assert "FLUX" in said


@pytest.mark.parametrize(
    ("node", "name"),
    [("sampled", "guidance"), ("sampled", "denoise"), ("sampled", "shift"), ("model", "strength")],
)
def test_a_number_that_is_none(server, node, name):
    changes = {"sampled": ("DCGen4KSampler", dict(SAMPLER))}
    if node == "sampled":
        changes["sampled"][1][name] = float("nan")
    else:
        changes[node] = {name: float("nan")}
    answer = server.post("/prompt", {"prompt": graph(**changes), "client_id": "tests"})
    said = json.dumps(answer) if "prompt_id" not in answer else server.error(server.wait(answer["prompt_id"]))
    assert name in said
    server.post("/history", {"clear": True})  # a page cannot read one with NaN in it


def test_half_an_emoji_is_a_prompt(server):
    assert image(server, text={"text": "strawberry \ud83c"}).shape == (1, 128, 128, 3)


def test_only_names_that_are_listed_are_opened(comfy, tmp_path):
    """A stranger's graph may bring any text to a loader through a link."""
    shutil.copytree(TOY / "flux-base", tmp_path / "elsewhere")
    shutil.copytree(TOY / "dc-ae-f32", tmp_path / "ae")
    shutil.copy(TOY / "adapter" / ADAPTER, tmp_path / "mine.safetensors")
    _, found = comfy.run("core_nodes:stray_paths", tmp_path, params={"folder": str(tmp_path)})
    assert found["opened"] == []
    assert found["good"]


@pytest.fixture
def own_adapter(server):
    target = server.base / "models" / "model_patches" / "mine.safetensors"
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(TOY / "adapter" / ADAPTER, target)
    yield target
    target.unlink()


def test_a_replaced_adapter_is_read_anew(server, own_adapter):
    before = image(server, model={"adapter_name": "mine.safetensors"})
    again = image(server, model={"adapter_name": "mine.safetensors"}, sampled={"seed": 9})
    with safe_open(own_adapter, "pt") as file:
        notes = {key: value for key, value in file.metadata().items() if key != "dcgen.sha256"}
    tensors = load_file(own_adapter)
    tensors["proj_out.weight"] = tensors["proj_out.weight"] * 0
    save_file(tensors, own_adapter.with_suffix(".new"), notes)
    own_adapter.with_suffix(".new").replace(own_adapter)
    after = image(server, model={"adapter_name": "mine.safetensors"})
    assert abs(before - again).max() > 0.01
    assert abs(before - after).max() > 0.01


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ({"width": 96, "height": 64}, (64, 96)),
        ({"width": 64}, (64, 64)),
        ({"height": 96}, (96, 96)),
        ({"size": "width x height", "width": 64, "height": 96}, (96, 64)),
    ],
)
def test_a_posted_graph_that_leaves_sizes_out(server, given, size):
    inputs = {key: value for key, value in SAMPLER.items() if key != "latent"} | given
    made = image(server, sampled=("DCGen4KSampler", inputs))
    assert made.shape[1:3] == size


def picture(color, width, height):
    return ("EmptyImage", {"width": width, "height": height, "batch_size": 1, "color": color})


def dumped(server, **nodes):
    made = {name: {"class_type": kind, "inputs": dict(inputs)} for name, (kind, inputs) in nodes.items()}
    made["vae"] = {"class_type": "DCAELoader", "inputs": {"vae_name": "toy/dc-ae-f32"}}
    made["dump"] = {"class_type": "TestDump", "inputs": {"images": ["out", 0], "name": "guard"}}
    server.queue(made)
    return server.dumped("guard")


@pytest.mark.parametrize(("fit", "size"), [("crop", (64, 96)), ("pad", (75, 100)), ("resize", (64, 96))])
def test_sides_that_the_factor_does_not_divide(server, fit, size):
    encoded = ("DCAEEncode", {"image": ["image", 0], "vae": ["vae", 0], "strip": 0, "fit": fit})
    decoded = ("DCAEDecode", {"samples": ["latent", 0], "vae": ["vae", 0], "strip": 0})
    made = dumped(server, image=picture(0x4080C0, 100, 75), latent=encoded, out=decoded)
    assert made.shape[1:3] == size
    if fit == "pad":
        # the same as the padded image, cut
        big = dumped(
            server,
            image=picture(0x4080C0, 128, 96),
            latent=("DCAEEncode", {"image": ["image", 0], "vae": ["vae", 0], "strip": 0}),
            out=decoded,
        )
        assert (made == big[:, :75, :100]).all()


def pasted(server, x, y, **mask):
    latent = {name: ("DCAEEncode", {"image": [f"{name}_image", 0], "vae": ["vae", 0], "strip": 0}) for name in "ab"}
    return dumped(
        server,
        **latent,
        a_image=picture(0x0000FF, 128, 128),
        b_image=picture(0xFF0000, 64, 64),
        pasted=(
            "DCGenLatentComposite",
            {"destination": ["a", 0], "source": ["b", 0], "x": x, "y": y, **mask.pop("i", {})},
        ),
        out=("DCAEDecode", {"samples": ["pasted", 0], "vae": ["vae", 0], "strip": 0}),
        **mask,
    )


def test_a_latent_is_pasted_where_the_pixels_say(server):
    made = pasted(server, 64, 32)[0]
    red = made[..., 0] - made[..., 2] > 0.3
    assert red[48:80, 80:112].all()
    assert not red[:16].any()
    assert not red[:, :48].any()
    nothing = {"mask": ("SolidMask", {"value": 0.0, "width": 64, "height": 64}), "i": {"mask": ["mask", 0]}}
    masked = pasted(server, 64, 32, **nothing)[0]
    assert not (masked[..., 0] - masked[..., 2] > 0.3).any()


def test_pasting_between_latent_pixels_is_refused(server):
    with pytest.raises(pytest.fail.Exception, match=r"not a multiple of 32 pixels.*\(32, 64\)"):
        pasted(server, 40, 56)
