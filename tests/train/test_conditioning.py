"""Ragged text and fields of samples, through a family made up over SANA: its masked attention is what tells whether
text of several lengths trains as text of one length does.
"""

from __future__ import annotations

import csv
import json
import shutil
from typing import ClassVar

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from train.batches import Batch, drop_captions
from train.cache import Cache, CacheError
from train.conditioning import CondField, Role, pack, pad, ragged_text, replace_rows, trim, under_empty
from train.config import load_recipe
from train.data import FolderData, open_source
from train.distributed import Ranks
from train.families import FAMILIES
from train.families.sana import Sana
from train.generate import Pipeline
from train.objective import Objective, objective_loss
from train.run import make_stage, run_recipe

CPU = Ranks(0, 1, torch.device("cpu"))
RAGGED = {"text": "mask"}
WORDS = ["red", "a blue square", "a green square on the left", "", "yellow light", "a dark red square on the right"]


class Ragged(Sana):
    """SANA whose text is kept at its own length."""

    fields: ClassVar = {"prompt_embeds": CondField(Role.TEXT, ragged=True), "mask": CondField(Role.MASK)}


class Editing(Ragged):
    """The same, which also sees the mirrored image."""

    fields: ClassVar = {**Ragged.fields, "reference": CondField(Role.REFERENCE, of="sample")}

    def sample_conditioning(self, images, autoencoder):
        return {"reference": autoencoder.space.normalize(autoencoder.encode(images.flip(-1)))}

    def velocity(self, model, latents, sigma, cond, guidance=None):
        assert len(cond["reference"]) == len(latents)
        return super().velocity(model, latents + 0.5 * cond["reference"], sigma, cond, guidance)


# ---- the functions


def text_of(lengths, seed=0, width=3):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(length, width, generator=g) for length in lengths]


def test_pack_keeps_the_tokens_that_the_mask_names():
    text = torch.randn(3, 4, 2)
    mask = torch.tensor([[1.0, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]])
    stored = pack({"text": text, "mask": mask, "pooled": torch.ones(3, 5)}, RAGGED)
    assert set(stored) == {"text", "text.lengths", "pooled"}
    assert stored["text.lengths"].tolist() == [2, 2, 0]
    assert torch.equal(stored["text"], torch.stack([text[0, 0], text[0, 1], text[1, 1], text[1, 3]]))
    trimmed = trim({"text": text, "mask": mask}, RAGGED)
    assert trimmed["text"].shape == (3, 2, 2)
    assert torch.equal(trimmed["text"][1], torch.stack([text[1, 1], text[1, 3]]))
    assert trimmed["mask"].tolist() == [[1, 1], [1, 1], [0, 0]]


@pytest.mark.parametrize("lengths", [(3, 1, 5), (2, 2), (0,), (0, 0, 4)])
def test_padding_puts_zeros_behind_and_masks_them(lengths):
    texts = text_of(lengths)
    padded, mask = pad(texts)
    assert padded.shape == (len(lengths), max(1, *lengths), 3) if len(lengths) > 1 else padded.shape[1] == 1
    assert mask.sum(1).tolist() == list(lengths)
    for text, row, seen in zip(texts, padded, mask.bool(), strict=True):
        assert torch.equal(row[: len(text)], text)
        assert not row[len(text) :].any()
        assert torch.equal(row[seen], text)


def test_dropped_captions_of_another_length():
    cond = dict(zip(("text", "mask"), pad(text_of((4, 2, 3))), strict=True)) | {"reference": torch.arange(3.0)}
    for length in (1, 6):
        empty = dict(zip(("text", "mask"), pad(text_of((length,), seed=9)), strict=True))
        mixed = replace_rows(cond, empty, torch.tensor([False, True, False]))
        longest = max(4, length)
        assert mixed["text"].shape == (3, longest, 3)
        assert mixed["mask"].sum(1).tolist() == [4, length, 3]
        assert torch.equal(mixed["text"][1, :length], empty["text"][0])
        assert torch.equal(mixed["text"][2, :4], cond["text"][2])
        assert torch.equal(mixed["reference"], cond["reference"])


def test_under_the_empty_prompt_a_sample_keeps_its_own():
    cond = {"text": torch.randn(3, 4, 2), "reference": torch.arange(3.0)}
    empty = {"text": torch.randn(1, 7, 2)}
    found = under_empty(cond, empty, torch.tensor([2, 0]))
    assert torch.equal(found["text"], empty["text"].expand(2, 7, 2))
    assert found["reference"].tolist() == [2, 0]


def test_text_of_one_length_is_dropped_as_ever():
    g = torch.Generator().manual_seed(1)
    cond = {"t": torch.randn(8, 3, 2, generator=g), "labels": torch.arange(8)}
    empty = {"t": torch.zeros(1, 3, 2), "labels": torch.tensor([99])}
    batch = Batch(3, 5, tuple(range(8)), tuple(range(8)), torch.device("cpu"))
    found, dropped = drop_captions(batch, cond, empty, 0.5)
    assert 0 < dropped.sum() < 8
    for row in range(8):
        source = empty if dropped[row] else cond
        assert torch.equal(found["t"][row], source["t"][0 if dropped[row] else row])
        assert found["labels"][row] == source["labels"][0 if dropped[row] else row]


def test_the_empty_branch_of_eq7_sees_the_samples_own():
    """Each kept row is asked twice, with the same reference: under its caption and under the empty prompt."""
    seen = []

    def velocity(x, sigma, cond, scale):
        seen.append((cond["reference"].tolist(), cond["mask"].sum(1).tolist()))
        return x * 1.0

    cond = dict(zip(("text", "mask"), pad(text_of((4, 2, 3, 1, 5, 2))), strict=True)) | {"reference": torch.arange(6.0)}
    empty = dict(zip(("text", "mask"), pad(text_of((7,))), strict=True))
    batch = Batch(7, 0, tuple(range(6)), tuple(range(6)), torch.device("cpu"))
    latents = torch.zeros(6, 1, 2, 2)
    objective = Objective(caption_dropout=0.4)
    objective_loss(objective, velocity, batch, latents, cond, empty, tokens=4, distilled=True)
    dropped = batch.uniform("drop") < 0.4
    kept = torch.nonzero(~dropped).flatten().tolist()
    assert 0 < len(kept) < 6
    lengths = [7 if drop else length for drop, length in zip(dropped, (4, 2, 3, 1, 5, 2), strict=True)]
    assert seen == [(list(range(6)), lengths), (kept, [7] * len(kept))]


@pytest.mark.parametrize(
    "fields",
    [
        {"text": CondField(Role.TEXT, ragged=True)},
        {"text": CondField(Role.TEXT, ragged=True), "a": CondField(Role.MASK), "b": CondField(Role.MASK)},
        {"text": CondField(Role.TEXT, ragged=True), "other": CondField(Role.TEXT), "mask": CondField(Role.MASK)},
    ],
)
def test_ragged_text_needs_one_mask_for_all_of_it(fields):
    with pytest.raises(ValueError, match="one mask"):
        ragged_text(fields)
    with pytest.raises(ValueError, match="one mask"):
        type("Wrong", (Sana,), {"fields": fields})


@pytest.mark.parametrize("how", [{"role": Role.POOLED, "ragged": True}, {"role": Role.TEXT, "of": "batch"}])
def test_fields_that_mean_nothing_are_refused(how):
    with pytest.raises(ValueError, match=r"only the text|a caption or to a sample"):
        CondField(**how)


def test_the_families_say_what_their_encoders_give(debug_run, debug_sana, debug_dit):
    for run, family in ((debug_run, "flux"), (debug_sana, "sana"), (debug_dit, "dit")):
        assert set(Cache(run / "cache").text([0])) == set(FAMILIES[family].fields)


# ---- a made-up family, from the cache to the adapter


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny release and images whose captions have many lengths."""
    folder = tmp_path_factory.mktemp("captions")
    run_recipe(load_recipe("debug-sana", [f"output={folder}"]), only="tiny")
    for number, path in enumerate(sorted((folder / "tiny" / "pictures").glob("*.txt"))):
        path.write_text(WORDS[number % len(WORDS)])
    return folder / "tiny"


def train(tiny, folder, *more):
    """The run of debug-sana on it, with half of the captions dropped."""
    overrides = [f"output={folder}", f"defaults.base={tiny}/release", f"defaults.autoencoder={tiny}/dc-ae"]
    overrides += [f"cache.data.path={tiny}/pictures", "cache.text_tokens=12", "finetune.ema=null"]
    for stage in ("head", "finetune"):
        overrides += [f"{stage}.objective.caption_dropout=0.5", f"{stage}.log_every=1"]
    recipe = load_recipe("debug-sana", [*overrides, *more])
    recipe.stages.pop("tiny")
    run_recipe(recipe)
    return recipe


@pytest.fixture(scope="module")
def fixed(tiny, tmp_path_factory):
    return train(tiny, tmp_path_factory.mktemp("fixed"))


@pytest.fixture(scope="module")
def ragged(tiny, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "sana", Ragged())
        return train(tiny, tmp_path_factory.mktemp("ragged"))


def test_the_cache_holds_the_tokens_alone(fixed, ragged):
    whole, short = Cache(fixed.folder / "cache"), Cache(ragged.folder / "cache")
    assert json.loads((ragged.folder / "cache" / "index.json").read_text())["ragged"] == {"prompt_embeds": "mask"}
    assert short.captions == whole.captions
    lengths = whole.text(range(len(whole.captions)))["mask"].sum(1).int().tolist()
    assert len(set(lengths)) > 3
    stored = [load_file(path) for path in sorted((ragged.folder / "cache" / "shards").glob("text-*.safetensors"))]
    assert [length for shard in stored for length in shard["prompt_embeds.lengths"].tolist()] == lengths
    assert sum(len(shard["prompt_embeds"]) for shard in stored) == sum(lengths)
    for numbers in ([0], [3, 1], list(range(len(lengths)))):
        found, expected = short.text(numbers), whole.text(numbers)
        longest = max(lengths[number] for number in numbers)
        assert found["prompt_embeds"].shape[:2] == found["mask"].shape == (len(numbers), longest)
        for row, number in enumerate(numbers):
            assert found["mask"][row].sum() == lengths[number]
            real = expected["mask"][row].bool()
            assert torch.equal(found["prompt_embeds"][row][: lengths[number]], expected["prompt_embeds"][row][real])


def logged(recipe, stage):
    """Loss and gradient norm of every step, each of which depends on the steps before it: (steps, 2)."""
    with open(recipe.folder / stage / "log.csv", newline="") as handle:
        return torch.tensor([[float(row["loss"]), float(row["grad_norm"])] for row in csv.DictReader(handle)])


def assert_trained_alike(first, second):
    """The same steps and weights. LoRA weights are left out: AdamW makes a step of rounding errors in a gradient of
    nearly 0, so that a few of them differ by the size of a step."""
    for stage in ("head", "finetune"):
        steps = logged(first, stage)
        assert len(steps) == 3
        torch.testing.assert_close(logged(second, stage), steps, rtol=1e-5, atol=0)
    expected, found = (load_file(r.folder / "head" / "adapter.safetensors") for r in (first, second))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_text_of_its_own_length_trains_as_padded_text_does(fixed, ragged):
    start, end = (load_file(fixed.folder / stage / "adapter.safetensors") for stage in ("head", "finetune"))
    assert max((end[name] - value).abs().max() for name, value in start.items()) > 1e-3
    assert_trained_alike(fixed, ragged)


def test_ragged_text_online_is_as_cached(tiny, ragged, tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, "sana", Ragged())
    online = train(tiny, tmp_path, "cache.text=online")
    assert_trained_alike(ragged, online)


def test_lengths_that_do_not_fit_are_refused(ragged, tmp_path):
    cache = shutil.copytree(ragged.folder / "cache", tmp_path / "cache")
    opened = Cache(cache)
    file = next(name for name in opened.shards if "text-" in name)
    opened._tensors(file)["prompt_embeds.lengths"][0] += 1
    with pytest.raises(CacheError, match="its lengths say others"):
        opened.text([0])


@pytest.fixture(scope="module")
def editing(tiny, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "sana", Editing())
        previews = ["finetune.preview_every=3", "finetune.preview_prompts=[red, a blue square]"]
        return train(tiny, tmp_path_factory.mktemp("editing"), *previews, "finetune.preview_steps=2")


def test_what_belongs_to_samples_is_stored_beside_their_latents(tiny, editing):
    cache = Cache(editing.folder / "cache")
    source = open_source(FolderData(type="folder", path="", pixels=64, multiple=16), tiny / "pictures")
    images = torch.stack([source.image(i).flip(-1) for i in (5, 2)])
    numbers = [next(n for n, s in enumerate(cache.samples) if s["name"] == source.name(i)) for i in (5, 2)]
    for side, folder in (("teacher", tiny / "release" / "vae"), ("student", tiny / "dc-ae")):
        autoencoder = diffusers.AutoencoderDC.from_pretrained(folder)
        with torch.no_grad():
            expected = autoencoder.encode(images).latent * autoencoder.config.scaling_factor
        found = cache.of_samples(numbers, side)
        assert set(found) == {"reference"}
        torch.testing.assert_close(found["reference"], expected, rtol=1e-4, atol=1e-5)


def test_one_autoencoder_for_both_sides_encodes_once(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, "sana", Editing())
    overrides = [f"output={tmp_path}", f"defaults.base={tiny}/release", f"defaults.autoencoder={tiny}/release/vae"]
    run_recipe(load_recipe("debug-sana", [*overrides, f"cache.data.path={tiny}/pictures"]), only="cache")
    cache = Cache(tmp_path / "cache")
    for stored in (cache.latents, lambda indices, side: cache.of_samples(indices, side)["reference"]):
        assert torch.equal(stored([1, 4], "student"), stored([1, 4], "teacher"))


def test_stages_hand_it_to_the_network(editing, ragged, monkeypatch):
    monkeypatch.setitem(FAMILIES, "sana", Editing())
    stage = make_stage(editing, "finetune", CPU)
    stage.setup()
    batch = Batch(0, 0, (0, 1, 2), (4, 0, 7), torch.device("cpu"))
    latents, cond = stage.samples(batch)
    assert torch.equal(cond["reference"], stage.cache.of_samples((4, 0, 7), "student")["reference"])
    assert latents.shape == cond["reference"].shape
    assert list((editing.folder / "finetune" / "previews").glob("*.png"))
    assert (editing.folder / "gap" / "gap.csv").is_file()
    first, second = (load_file(r.folder / "head" / "adapter.safetensors") for r in (editing, ragged))
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_a_pipeline_says_what_prompts_leave_out(editing, tiny, monkeypatch):
    monkeypatch.setitem(FAMILIES, "sana", Editing())
    with pytest.raises(ValueError, match="SANA also takes reference"):
        Pipeline(tiny / "release")


def test_a_family_that_forgets_a_field_of_samples_is_told(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(Editing, "sample_conditioning", lambda self, images, autoencoder: {})
    monkeypatch.setitem(FAMILIES, "sana", Editing())
    with pytest.raises(ValueError, match=r"a sample's conditioning is \[\], its fields say \['reference'\]"):
        train(tiny, tmp_path)
