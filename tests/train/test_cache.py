"""The cache: what is stored is what the autoencoders and text encoders give; what is damaged is refused."""

from __future__ import annotations

import json
import re
import shutil

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from train.batches import Batch
from train.cache import Cache, CacheError
from train.config import parse_recipe
from train.data import FolderData, open_source
from train.disk import size_text
from train.distributed import Ranks
from train.run import dry_run, make_stage, run_recipe

CPU = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def copy(debug_run, tmp_path):
    """A copy of the cache to damage, and the path of one of its shards."""
    folder = tmp_path / "cache"
    shutil.copytree(debug_run / "cache", folder)
    return folder, sorted((folder / "shards").glob("latent-*.safetensors"))[0]


def test_latents_are_the_autoencoders_own(debug_run):
    cache = Cache(debug_run / "cache")
    config = FolderData(type="folder", path="", pixels=64, multiple=16)
    source = open_source(config, debug_run / "tiny" / "pictures")
    kl = diffusers.AutoencoderKL.from_pretrained(debug_run / "tiny" / "release" / "vae")
    dc = diffusers.AutoencoderDC.from_pretrained(debug_run / "tiny" / "dc-ae")
    picked = [0, 7, 3]
    images = torch.stack([source.image(i) for i in picked])
    with torch.no_grad():
        teacher = (kl.encode(images).latent_dist.mean - kl.config.shift_factor) * kl.config.scaling_factor
        student = dc.encode(images).latent * dc.config.scaling_factor
    numbers = [next(n for n, s in enumerate(cache.samples) if s["name"] == source.name(i)) for i in picked]
    torch.testing.assert_close(cache.latents(numbers, "teacher"), teacher, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cache.latents(numbers, "student"), student, rtol=1e-4, atol=1e-5)


def test_text_is_what_the_diffusers_pipeline_makes(debug_run):
    cache = Cache(debug_run / "cache")
    release = debug_run / "tiny" / "release"
    pipeline = diffusers.FluxPipeline(
        scheduler=None,
        vae=None,
        transformer=None,
        text_encoder=transformers.CLIPTextModel.from_pretrained(release / "text_encoder"),
        tokenizer=transformers.PreTrainedTokenizerFast.from_pretrained(release / "tokenizer"),
        text_encoder_2=transformers.T5EncoderModel.from_pretrained(release / "text_encoder_2"),
        tokenizer_2=transformers.PreTrainedTokenizerFast.from_pretrained(release / "tokenizer_2"),
    )
    pipeline.tokenizer_max_length = 16
    numbers = [0, 3, 5]
    captions = [cache.captions[n] for n in numbers]
    assert captions[0] == ""
    embeds, pooled, _ = pipeline.encode_prompt(captions, None, device="cpu", max_sequence_length=16)
    found = cache.text(numbers)
    torch.testing.assert_close(found["prompt_embeds"], embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["pooled"], pooled, rtol=1e-4, atol=1e-5)


def test_every_sample_has_its_own_caption(debug_run):
    cache = Cache(debug_run / "cache")
    for number, sample in enumerate(cache.samples):
        text = (debug_run / "tiny" / "pictures" / sample["name"]).with_suffix(".txt").read_text()
        assert cache.captions[cache.caption_numbers([number])[0]] == text


def test_a_truncated_shard_is_refused_on_opening(copy):
    folder, shard = copy
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(CacheError, match=f"{shard.name} has .* bytes, expected"):
        Cache(folder)


def test_a_missing_shard_is_refused_on_opening(copy):
    folder, shard = copy
    shard.unlink()
    with pytest.raises(CacheError, match=f"{shard.name} is missing"):
        Cache(folder)


def test_one_flipped_bit_is_refused_on_first_use(copy):
    folder, shard = copy
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    cache = Cache(folder)
    with pytest.raises(CacheError, match="sha256 is"):
        cache.latents([0], "student")


def test_a_shard_of_another_cache_is_refused(copy):
    folder, shard = copy
    save_file(load_file(shard), shard, metadata={"fingerprint": "f" * 64})
    index = json.loads((folder / "index.json").read_text())
    from train.files import sha256

    record = next(r for r in index["shards"] if r["file"].endswith(shard.name))
    record |= {"sha256": sha256(shard), "bytes": shard.stat().st_size}
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(CacheError, match="belongs to another cache"):
        Cache(folder).latents([0], "teacher")


def test_an_unfinished_cache_is_refused(copy):
    folder, _ = copy
    (folder / "index.json").unlink()
    with pytest.raises(CacheError, match="has not finished"):
        Cache(folder)


def test_whole_shards_are_kept_and_damaged_ones_made_anew(debug_run, tmp_path, monkeypatch):
    from train.config import load_recipe
    from train.run import run_recipe
    from train.stages.cache import CacheStage

    shutil.copytree(debug_run, tmp_path / "run")
    shards = sorted((tmp_path / "run" / "cache" / "shards").glob("latent-*.safetensors"))
    before = [path.read_bytes() for path in shards]
    shards[1].write_bytes(before[1][:-1])
    (tmp_path / "run" / "cache" / "done.json").unlink()
    made = []
    encode = CacheStage._encode_images

    def counting(self, numbers, captions, encoders):
        made.append(len(numbers))
        return encode(self, numbers, captions, encoders)

    monkeypatch.setattr(CacheStage, "_encode_images", counting)
    run_recipe(load_recipe("debug", [f"output={tmp_path / 'run'}"]), only="cache")
    assert len(made) == 1
    assert [path.read_bytes() for path in shards] == before


def test_text_computed_online_trains_to_the_same_weights(debug_run, tmp_path):
    from train.config import load_recipe
    from train.run import run_recipe

    tiny = [f"defaults.base={debug_run}/tiny/release", f"defaults.autoencoder={debug_run}/tiny/dc-ae"]
    short = [f"finetune.start={debug_run}/head", "finetune.steps=2", "finetune.preview_every=0"]
    found = []
    for text in ("cache", "online"):
        data = [f"output={tmp_path / text}", f"cache.text={text}", f"cache.data.path={debug_run}/tiny/pictures"]
        recipe = load_recipe("debug", [*tiny, *short, *data])
        for stage in ("cache", "finetune"):
            run_recipe(recipe, only=stage)
        assert bool(list((tmp_path / text / "cache" / "shards").glob("text-*"))) == (text == "cache")
        found.append(load_file(tmp_path / text / "finetune" / "adapter.safetensors"))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda index: index["shards"][0].update(file="../../secret.safetensors"), r"shards/NAME\.safetensors"),
        (lambda index: index["shards"][0].update(file="/secret.safetensors"), r"shards/NAME\.safetensors"),
        (lambda index: index["shards"][0].update(bytes="1"), "bytes"),
        (lambda index: index["samples"][0].update(row=10**6), "no such place"),
        (lambda index: index["samples"][0].update(shard="shards/absent.safetensors"), "KeyError"),
        (lambda index: index["samples"][0].update(size=[1]), "ValueError"),
        (lambda index: index["spaces"]["student"].update(channels=-1), "channels"),
        (lambda index: index.update(captions=None), "captions"),
        (lambda index: index.pop("made_of"), "made_of"),
    ],
)
def test_the_index_of_a_stranger_is_checked(debug_run, tmp_path, change, words):
    shutil.copytree(debug_run / "cache", tmp_path / "cache")
    path = tmp_path / "cache" / "index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(CacheError, match=rf"index\.json is not the index of a cache .*{words}"):
        Cache(tmp_path / "cache")


def _stages(base, autoencoder, pictures, **cache):
    """A recipe of a cache and a fine-tuning on it."""
    data = {"type": "folder", "path": str(pictures), "pixels": 64, "multiple": 16}
    both = {"base": str(base), "autoencoder": str(autoencoder)}
    finetune = {**both, "start": "", "steps": 1, "batch": 2, "rank": 2, "alpha": 2}
    return {"cache": {**both, "data": data, "batch": 4, **cache}, "finetune": finetune}


def test_text_that_is_embedded_in_training_has_the_length_of_the_recipe(debug_run, tmp_path):
    tiny = debug_run / "tiny"
    shapes = {}
    for name, tokens in (("short", 7), ("release's own", None)):
        stages = _stages(tiny / "release", tiny / "dc-ae", tiny / "pictures", text="online", text_tokens=tokens)
        recipe = parse_recipe({"name": "x", "output": str(tmp_path / name), "stages": stages})
        run_recipe(recipe, only="cache")
        assert Cache(tmp_path / name / "cache").text_tokens == tokens
        stage = make_stage(recipe, "finetune", CPU)
        stage.setup()
        batch = Batch(0, 0, (0, 1), (0, 1), CPU.device)
        shapes[name] = stage.samples(batch)[1]["prompt_embeds"].shape[1], stage.empty["prompt_embeds"].shape[1]
    assert shapes == {"short": (7, 7), "release's own": (16, 16)}


def test_another_length_of_text_in_training_encodes_no_image_again(debug_run, tmp_path):
    tiny = debug_run / "tiny"
    stages = _stages(tiny / "release", tiny / "dc-ae", tiny / "pictures", text="online", text_tokens=7)
    run_recipe(parse_recipe({"name": "x", "output": str(tmp_path), "stages": stages}), only="cache")
    shard = next((tmp_path / "cache" / "shards").glob("*.safetensors"))
    before = shard.stat().st_mtime_ns
    (tmp_path / "cache" / "done.json").unlink()
    stages["cache"]["text_tokens"] = 9
    run_recipe(parse_recipe({"name": "x", "output": str(tmp_path), "stages": stages}), only="cache")
    assert Cache(tmp_path / "cache").text_tokens == 9
    assert shard.stat().st_mtime_ns == before


def test_latents_of_one_autoencoder_are_stored_once_and_take_the_bytes_of_the_plan(debug_run, tmp_path, capsys):
    """flux-1k and flux-4k keep their base's latent."""
    release, pictures = debug_run / "export" / "release", debug_run / "tiny" / "pictures"
    sizes, planned = {}, {}
    for name, autoencoder in (("one", release / "vae"), ("two", shutil.copytree(release / "vae", tmp_path / "ae"))):
        stages = _stages(release, autoencoder, pictures, text="online", text_tokens=7)
        recipe = parse_recipe({"name": "x", "output": str(tmp_path / name), "stages": stages})
        run_recipe(recipe, only="cache")
        cache = Cache(tmp_path / name / "cache")
        capsys.readouterr()
        dry_run(recipe, only="cache")
        planned[name] = re.search(r"12 images; latents (.*)", capsys.readouterr().out)[1]
        tensors = [load_file(cache.folder / file) for file in cache.shards]
        sizes[name] = size_text(sum(t.nbytes for shard in tensors for t in shard.values()))
        assert torch.equal(cache.latents([3, 1], "student"), cache.latents([3, 1], "teacher"))
    assert sizes == planned == {"one": "3.07 kB", "two": "6.14 kB"}


@pytest.mark.parametrize("text", ["cache", "online"])
def test_each_step_takes_one_of_several_captions_by_weight(debug_run, tmp_path, text):
    tiny, pictures = debug_run / "tiny", tmp_path / "pictures"
    shutil.copytree(tiny / "pictures", pictures)
    several = ["a red square", {"text": "a dark square on the left", "weight": 3}]
    for number in range(4):
        (pictures / f"{number:03d}.txt").unlink()
        (pictures / f"{number:03d}.json").write_text(json.dumps({"caption": several}))
    stages = _stages(tiny / "release", tiny / "dc-ae", pictures, text=text, text_tokens=8)
    stages["cache"]["data"]["captions"] = "all"
    recipe = parse_recipe({"name": "x", "output": str(tmp_path / "run"), "stages": stages})
    run_recipe(recipe, only="cache")
    stage = make_stage(recipe, "finetune", CPU)
    stage.setup()
    cache = stage.cache
    index = next(i for i, sample in enumerate(cache.samples) if sample["name"].startswith("000"))
    alone = next(i for i, sample in enumerate(cache.samples) if sample["name"].startswith("007"))
    drawn = []
    for step in range(400):
        batch = Batch(0, step, (0, 1), (index, alone), CPU.device)
        numbers = cache.drawn_captions(batch.indices, batch.uniform("caption"))
        drawn.append(cache.captions[numbers[0]])
        assert cache.captions[numbers[1]] == (pictures / "007.txt").read_text()
    assert set(drawn) == {"a red square", "a dark square on the left"}
    assert drawn.count("a dark square on the left") / 400 == pytest.approx(0.75, abs=0.07)
    first = drawn.index("a dark square on the left")
    batch = Batch(0, first, (0,), (index,), CPU.device)
    found = stage.samples(batch)[1]["prompt_embeds"]
    encode = stage.family.text_encoder(tiny / "release", "cpu", torch.float32, 8)
    wanted = encode(["a dark square on the left"])["prompt_embeds"]
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)  # stored in bfloat16
    assert (found - encode(["a red square"])["prompt_embeds"]).abs().max() > 0.1


def test_weights_of_captions_are_part_of_the_cache(debug_run, tmp_path):
    pictures = shutil.copytree(debug_run / "tiny" / "pictures", tmp_path / "pictures")
    (pictures / "000.txt").unlink()
    digests = set()
    for weight in (1, 2):
        (pictures / "000.json").write_text(json.dumps({"caption": ["a", {"text": "b", "weight": weight}]}))
        config = FolderData(type="folder", path="", pixels=64, multiple=16, captions="all")
        digests.add(json.dumps(open_source(config, pictures).identity()["captions"]))
    assert len(digests) == 2
    assert "captions" not in FolderData(type="folder", path="").model_dump()
