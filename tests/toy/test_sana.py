"""The toy SANA: its recipes run, and what is shipped draws what its prompts say, at 64 tokens and at 16.

Figures over all captions and three seeds are in toy/README.md; the bounds here are far outside the spread found there.
"""

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from benchmarks.toy import draw
from dcgen.adapter import load_adapter
from dcgen.schedule import Schedule
from train.config import load_recipe, parse_recipe
from train.evaluate.judge import Judge
from train.families.sana import sana_instruction
from train.files import read_json
from train.generate import Pipeline
from train.run import run_recipe
from train.toy.pictures import ToyPictures

SEED = 3  # none of the benchmark's
TEXT = 16  # text positions; no caption needs more
ADAPTER = "toy/adapter/toy-sana-dcgen.safetensors"


@pytest.fixture(autouse=True)
def _as_from_the_root(root, monkeypatch):
    """Recipes name folders from the repository's root; one thread, for waiting threads cost more than they bring."""
    monkeypatch.chdir(root)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


STAMPS = ("transformers_version", "dtype", "torch_dtype")  # who wrote a file and how it was held, not what it says


def same_network(made, shipped, asked):
    """Whether two config.json say the same, and both say what was asked for.

    Either may have fields that the other's library does not write (another release of it made the file).
    """
    made, shipped = read_json(made), read_json(shipped)
    common = {key for key in made.keys() & shipped.keys() if not key.startswith("_") and key not in STAMPS}
    assert common >= set(asked)
    assert {key: made[key] for key in common} == {key: shipped[key] for key in common}


def test_the_base_recipe_makes_what_is_shipped(root, tmp_path):
    """One step of every stage, at full width."""
    few = ("cache.data.variants=1", "text.steps=1", "text.batch=4", "pretrain.steps=1", "pretrain.batch=2")
    recipe = load_recipe("toy-sana-base", [f"output={tmp_path}", "device=cpu", *few])
    run_recipe(recipe)
    made, shipped = tmp_path / "pretrain" / "release", root / "toy" / "sana-base"
    asked = {
        "transformer/config.json": recipe.stages["text"].transformer,
        "text_encoder/config.json": ("vocab_size", "hidden_size", "num_hidden_layers", "head_dim", "pad_token_id"),
        "scheduler/scheduler_config.json": ("flow_shift", "use_flow_sigmas", "prediction_type"),
    }
    for part, names in asked.items():
        same_network(made / part, shipped / part, names)
    pictures = ToyPictures(root / "toy" / "data")
    texts = [sana_instruction()[0], *map(pictures.caption, pictures.pairs("train")), "Zebra 7!"]
    tokens, expected = (PreTrainedTokenizerFast.from_pretrained(f / "tokenizer") for f in (made, shipped))
    assert tokens.get_vocab() == expected.get_vocab()
    assert tokens(texts).input_ids == expected(texts).input_ids
    index, expected = (read_json(f / "model_index.json") for f in (made, shipped))
    expected |= {"vae": ["diffusers", "AutoencoderKL"], "_diffusers_version": index["_diffusers_version"]}
    assert index == expected


def test_the_dcgen_recipe_makes_what_is_shipped(root, tmp_path):
    """One step of head and LoRA on the shipped base."""
    few = ("cache.data.variants=1", "head.steps=1", "head.batch=2", "finetune.steps=1", "finetune.batch=2")
    run_recipe(load_recipe("toy-sana", [f"output={tmp_path}", "device=cpu", *few]))
    made, shipped = load_adapter(tmp_path / "export" / "toy-sana-dcgen.safetensors"), load_adapter(root / ADAPTER)
    assert made.base == shipped.base
    assert made.schedule == shipped.schedule == Schedule("static", shift=2.0)
    assert not made.latent.differences(shipped.latent)
    assert {k: t.shape for k, t in made.tensors.items()} == {k: t.shape for k, t in shipped.tensors.items()}
    assert {k: pair.A.shape for k, pair in made.lora.items()} == {k: pair.A.shape for k, pair in shipped.lora.items()}


@pytest.fixture(scope="module")
def judged(root):
    """(judge, captions' pairs: an eighth of all, and as many of those never trained)."""
    judge = Judge(root / "toy" / "evaluator", root / "toy" / "data", variants=2)
    held = judge.pictures.pairs("held_out")
    return judge, [*judge.pictures.pairs("train")[::7], *held[::2]]


@pytest.mark.parametrize(
    ("how", "tokens"),
    [({"autoencoder": "toy/flux-base/vae"}, 64), ({"autoencoder": "toy/dc-ae-f32", "adapter": ADAPTER}, 16)],
    ids=["base", "dcgen"],
)
def test_pictures_show_what_the_prompt_says(judged, how, tokens):
    judge, pairs = judged
    pipeline = Pipeline("toy/sana-base", text_tokens=TEXT, **how)
    assert pipeline.tokens(128, 128) == tokens
    found = judge.score(draw(pipeline, judge, pairs, SEED), pairs)
    # Over three other seeds: at most 16.3, at least 1.0, 0.937 and 0.937.
    assert found.frechet < 25
    assert found.color > 0.95
    assert found.both > 0.85
    assert found.both_held_out > 0.75


def test_the_base_is_drawn_through_its_own_autoencoder_only():
    with pytest.raises(FileNotFoundError, match="without its autoencoder"):
        Pipeline("toy/sana-base")
    with pytest.raises(ValueError, match=r"not the autoencoder of toy/sana-base: channels: 16 against 32"):
        Pipeline("toy/sana-base", autoencoder="toy/dc-ae-f32")


def test_a_merged_release_runs_in_diffusers_own_pipeline(root, judged, tmp_path):
    """The whole of it as SanaPipeline has it: text at 300 positions, DPM-Solver++, CFG, AutoencoderDC."""
    import diffusers

    parts = {"base": "toy/sana-base", "autoencoder": "toy/dc-ae-f32", "forms": ["release"], "adapter": str(tmp_path)}
    (tmp_path / "adapter.safetensors").symlink_to(root / ADAPTER)
    stages = {"export": {**parts, "store": "float32"}}
    recipe = parse_recipe({"name": "t", "output": str(tmp_path / "run"), "device": "cpu", "stages": stages})
    run_recipe(recipe)
    pipe = diffusers.SanaPipeline.from_pretrained(recipe.folder / "export" / "release")
    pipe.set_progress_bar_config(disable=True)
    judge, pairs = judged
    pairs = pairs[::4]
    images = pipe(
        judge.captions(pairs),
        height=128,
        width=128,
        guidance_scale=3.5,
        num_inference_steps=20,
        generator=torch.Generator().manual_seed(SEED),
        use_resolution_binning=False,
        output_type="pt",
    ).images
    found = judge.score(images * 2 - 1, pairs)
    assert found.color > 0.9
    assert found.both > 0.7
