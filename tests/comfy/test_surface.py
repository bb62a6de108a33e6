"""What a user meets on a node: tooltips, help page, picture, and texts in three languages, all complete."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.once_per_core
ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = ("en", "zh", "ja")
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


@pytest.fixture(scope="module")
def kinds(server):
    found = server.get("/object_info")
    return {k: v for k, v in found.items() if v.get("python_module", "").endswith("ComfyUI-DC-Gen")}


def inputs(kind):
    return {n: s for part in ("required", "optional") for n, s in kind["input"].get(part, {}).items()}


def test_names_that_graphs_depend_on(kinds):
    """The table of DESIGN.md: ids, inputs, outputs. More optional inputs may follow. Links are kept by name, what is
    typed by its place among the widgets, which must stay."""
    fixed = {
        "DCGenReleaseLoader": (["release"], ["MODEL", "CLIP", "VAE"]),
        "DCGenModelLoader": (["model_name", "weight_dtype"], ["MODEL"]),
        "DCGenApply": (["model", "adapter_name", "strength"], ["MODEL"]),
        "DCAELoader": (["vae_name"], ["VAE"]),
        "DCAEEncode": (["image", "vae", "strip"], ["LATENT"]),
        "DCAEDecode": (["samples", "vae", "strip"], ["IMAGE"]),
        "DCGenEmptyLatent": (["model", "width", "height", "batch_size"], ["LATENT"]),
        "DCGenScheduler": (["model", "latent", "steps", "denoise"], ["SIGMAS"]),
        "DCGen4KSampler": (
            ["model", "positive", "latent", "seed", "steps", "guidance", "sampler_name", "denoise", "negative", "cfg"],
            ["LATENT"],
        ),
        "DCGenSanaTextEncode": (["clip", "text", "instruction", "negative"], ["CONDITIONING"]),
    }
    for name, (wanted, outputs) in fixed.items():
        kind = kinds[name]
        typed = [name for name, spec in inputs(kind).items() if isinstance(spec[0], list) or spec[0] in WIDGETS]
        first = [name for name in wanted if name in typed]
        assert set(inputs(kind)) >= set(wanted), name
        assert typed[: len(first)] == first, name
        assert kind["output"] == outputs, name
        assert kind["category"] == "DC-Gen"
        assert set(kind["input"]["required"]) <= set(wanted), "what is added later must be optional"


def test_sizes_are_the_published_buckets(kinds):
    """The aspect-ratio buckets of the official pipelines at 1K (f32) and 4K (f64); 2K is 1K doubled, for f64."""
    published = {
        "1K": "1024x1024 1152x896 896x1152 1152x832 832x1152 1344x768 768x1344 1728x576 576x1728",
        "4K": "4096x4096 4608x3328 3328x4608 4608x3584 3584x4608 5376x3072 3072x5376",
    }
    wanted = {name: {tuple(map(int, size.split("x"))) for size in sizes.split()} for name, sizes in published.items()}
    wanted["2K"] = {(2 * width, 2 * height) for width, height in wanted["1K"]}
    for kind in ("DCGenEmptyLatent", "DCGen4KSampler"):
        found = {}
        for option in inputs(kinds[kind])["size"][1]["options"][1:]:
            name, _, size = option.partition(": ")
            found.setdefault(name, set()).add(tuple(map(int, size.split(" x "))))
        assert found == wanted
    assert all(side % 32 == 0 for size in wanted["1K"] for side in size)
    assert all(side % 64 == 0 for name in ("2K", "4K") for size in wanted[name] for side in size)


def test_every_input_has_a_tooltip(kinds):
    bare = [f"{k}.{n}" for k, kind in kinds.items() for n, s in inputs(kind).items() if not s[1].get("tooltip")]
    assert bare == []


def test_help_page_and_picture_are_served(server, kinds):
    for name in kinds:
        page = server.raw(f"/extensions/ComfyUI-DC-Gen/docs/{name}.md").decode()
        assert f"img/{name}.png" in page
        assert server.raw(f"/extensions/ComfyUI-DC-Gen/docs/img/{name}.png")[:4] == b"\x89PNG"
        for shown in inputs(kinds[name]):
            assert f"`{shown}`" in page, f"{name}.md does not explain {shown}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_node_texts_are_complete(server, kinds, language):
    texts = server.get("/i18n")[language]["nodeDefs"]
    assert set(texts) >= set(kinds)
    for name, kind in kinds.items():
        entry = texts[name]
        assert entry["display_name"]
        assert entry["description"]
        assert set(entry["inputs"]) == set(inputs(kind)), name
        assert all(text["name"] and text["tooltip"] for text in entry["inputs"].values())
    if language == "en":
        for name, kind in kinds.items():
            assert texts[name]["display_name"] == kind["display_name"]
            assert texts[name]["description"] == kind["description"]
            for shown, spec in inputs(kind).items():
                assert texts[name]["inputs"][shown]["tooltip"] == spec[1]["tooltip"], f"{name}.{shown}"


def test_no_language_is_left_in_english(kinds):
    english, *others = (json.loads((ROOT / "locales" / lang / "nodeDefs.json").read_text()) for lang in LANGUAGES)
    for texts in others:
        for name in kinds:
            assert texts[name]["description"] != english[name]["description"]
