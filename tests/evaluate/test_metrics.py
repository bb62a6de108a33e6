"""Metrics against references: FID and Inception score in float64 numpy, CLIP against torchmetrics and transformers."""

import functools
import importlib.util
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from train.evaluate.clip import AestheticMetric, Clip, ClipScoreMetric, load_head
from train.evaluate.geneval import GenEvalMetric
from train.evaluate.images import Drawn, file_name, pixels
from train.evaluate.inception import FidMetric, InceptionScoreMetric, load_inception
from train.evaluate.prompts import Prompt
from train.evaluate.spec import Aesthetic, ClipScore, Fid, GenEval, InceptionScore

CPU = torch.device("cpu")
needs_torchmetrics = pytest.mark.skipif(
    importlib.util.find_spec("torchmetrics") is None, reason="torchmetrics is not installed (the extra `eval`)"
)


def noise_images(folder, count, seed, level=128.0, seeds=(0,), domain=""):
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for s in seeds:
        for index in range(count):
            tint = rng.normal(level, 30, size=3)
            array = np.clip(rng.normal(tint, 40, size=(24, 20, 3)), 0, 255).astype(np.uint8)
            path = folder / file_name(index, s)
            Image.fromarray(array).save(path)
            found.append(Drawn(path, Prompt(f"{'red' if index % 2 else 'blue'} square", domain), index, s))
    return found


class TinyInception(nn.Module):
    """The calls that NVIDIA's archive answers, on nine features and nine classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 9, 3, stride=2)
        self.head = nn.Linear(9, 9)

    def forward(self, img: torch.Tensor, return_features: bool = False, no_output_bias: bool = False) -> torch.Tensor:
        features = self.body(img.float() / 64 - 2).relu().mean((2, 3))
        if return_features:
            return features
        logits = nn.functional.linear(features, self.head.weight)
        return torch.softmax(logits if no_output_bias else logits + self.head.bias, dim=1)


@pytest.fixture
def inception(tmp_path):
    """(file, the network in it)."""
    torch.manual_seed(torch.seed() % 1000)
    network = TinyInception().eval()
    torch.jit.script(network).save(str(tmp_path / "inception.pt"))
    return tmp_path / "inception.pt", network


def reference_fid(first, second):
    """|m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)) in float64; the root by S1's eigenvectors."""
    (m1, s1), (m2, s2) = ((x.mean(0), np.cov(x.astype(np.float64), rowvar=False)) for x in (first, second))
    values, vectors = np.linalg.eigh(s1)
    half = vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T
    root = np.sqrt(np.linalg.eigvalsh(half @ s2 @ half).clip(0)).sum()
    return float(((m1 - m2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * root)


def features_of(network, images):
    with torch.no_grad():
        stack = torch.stack([pixels(image.path) for image in images])
        return network(stack, return_features=True).double().numpy()


@needs_torchmetrics
def test_fid_equals_the_reference_for_images_and_for_statistics(tmp_path, inception):
    file, network = inception
    images = noise_images(tmp_path / "drawn", 40, 1, seeds=(0, 3))
    real = noise_images(tmp_path / "real" / "people", 50, 2, level=90)
    expected = reference_fid(features_of(network, images), features_of(network, real))
    metric = FidMetric(Fid(inception=str(file), reference=str(tmp_path / "real"), batch=7))
    assert metric.check() == []
    found = metric.measure(images, CPU, tmp_path)["fid"]
    assert found.value == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert found.each is None
    of_seed = reference_fid(features_of(network, images[40:]), features_of(network, real))
    assert found.by_seed["3"] == pytest.approx(of_seed, rel=1e-3, abs=1e-5)

    x = features_of(network, real)
    np.savez(tmp_path / "adm.npz", mu=x.mean(0), sigma=np.cov(x, rowvar=False), arr_0=np.zeros((1, 2, 2, 3), np.uint8))
    metric = FidMetric(Fid(inception=str(file), reference=str(tmp_path / "adm.npz")))
    assert metric.measure(images, CPU, tmp_path)["fid"].value == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert [read.files for read in metric.reads().values()] == [(file,), (tmp_path / "adm.npz",)]


@needs_torchmetrics
def test_fid_on_features_as_wide_as_inceptions_agrees_to_a_thousandth(tmp_path):
    from train.evaluate.inception import fid, statistics_of

    generator = torch.Generator().manual_seed(5)
    mixing = torch.randn(256, 256, generator=generator) / 16
    first = torch.randn(600, 256, generator=generator) @ mixing
    second = torch.randn(500, 256, generator=generator) @ mixing.T + 0.1
    expected = reference_fid(first.numpy(), second.numpy())
    assert fid(first, statistics_of(second)) == pytest.approx(expected, abs=1e-3)


@needs_torchmetrics
def test_inception_score_equals_its_definition(tmp_path, inception):
    file, network = inception
    images = noise_images(tmp_path / "drawn", 30, 3)
    with torch.no_grad():
        p = network(torch.stack([pixels(image.path) for image in images]), no_output_bias=True).double().numpy()
    metric = InceptionScoreMetric(InceptionScore(inception=str(file), splits=1, batch=8))
    expected = np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean())
    assert metric.measure(images, CPU, tmp_path)["inception_score"].value == pytest.approx(expected, rel=1e-4)
    split = InceptionScoreMetric(InceptionScore(inception=str(file), splits=3))
    first, again = (split.measure(images, CPU, tmp_path)["inception_score"] for _ in range(2))
    assert (first.value, first.note) == (again.value, again.note)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        q = p[torch.randperm(30).numpy()].reshape(3, 10, 9)
    scores = np.exp((q * (np.log(q) - np.log(q.mean(1, keepdims=True)))).sum(2).mean(1))
    assert first.value == pytest.approx(scores.mean(), rel=1e-4)
    assert f"{scores.std(ddof=1):.2f} over 3 splits" in first.note


@needs_torchmetrics
def test_files_that_are_no_inception_and_no_statistics_are_refused_by_name(tmp_path, inception):
    file, _ = inception
    torch.save({"Conv2d_1a_3x3.conv.weight": torch.zeros(2)}, tmp_path / "weights.pth")
    if "torch_fidelity" not in sys.modules:
        with pytest.raises(ValueError, match=r"weights\.pth.*torch-fidelity"):
            load_inception(tmp_path / "weights.pth", CPU, "features")
    torch.save({"a": print}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match=r"code\.pth"):
        load_inception(tmp_path / "code.pth", CPU, "features")
    np.savez(tmp_path / "other.npz", mean=np.zeros(3))
    images = noise_images(tmp_path / "drawn", 3, 1)
    metric = FidMetric(Fid(inception=str(file), reference=str(tmp_path / "other.npz")))
    with pytest.raises(ValueError, match=r"other\.npz: expected the arrays mu and sigma"):
        metric.measure(images, CPU, tmp_path)
    np.savez(tmp_path / "narrow.npz", mu=np.zeros(3), sigma=np.eye(3))
    metric = FidMetric(Fid(inception=str(file), reference=str(tmp_path / "narrow.npz")))
    with pytest.raises(ValueError, match="3 features, the network 9"):
        metric.measure(images, CPU, tmp_path)
    missing = FidMetric(Fid(inception=str(tmp_path / "none.pt"), reference=str(tmp_path / "none.npz"))).check()
    assert [line.split()[0] for line in missing] == ["metrics.fid.inception", "metrics.fid.reference"]


@pytest.fixture(scope="module")
def clip_folder(root, tmp_path_factory):
    """A random CLIP with the toy's tokenizer."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = CLIPTokenizer.from_pretrained(root / "toy" / "flux-base" / "tokenizer")
    narrow = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**narrow, "vocab_size": len(tokenizer), "max_position_embeddings": 12}
    text |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    config = CLIPConfig(text_config=text, vision_config={**narrow, "image_size": 16, "patch_size": 8}, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def clip_inputs(folder, images):
    """What the model's own processor makes of the images and their prompts."""
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    texts = CLIPTokenizer.from_pretrained(folder)(
        [image.prompt.text for image in images], padding=True, truncation=True, max_length=12, return_tensors="pt"
    )
    opened = [Image.open(image.path) for image in images]
    prepared = CLIPImageProcessor.from_pretrained(folder)(images=opened, return_tensors="pt")
    inputs = {"input_ids": texts["input_ids"], "attention_mask": texts["attention_mask"], **prepared}
    with torch.no_grad():
        return CLIPModel.from_pretrained(folder)(**inputs)


def test_clip_score_is_the_cosine_of_the_whole_model(tmp_path, clip_folder):
    images = noise_images(tmp_path, 5, 4)
    output = clip_inputs(clip_folder, images)
    cosine = torch.nn.functional.cosine_similarity(output.image_embeds.double(), output.text_embeds.double())
    metric = ClipScoreMetric(ClipScore(model=str(clip_folder), batch=2))
    assert metric.check() == []
    found = metric.measure(images, CPU, tmp_path)["clip"]
    assert found.each == pytest.approx((100 * cosine).tolist(), rel=1e-4, abs=1e-4)
    assert found.value == pytest.approx(100 * cosine.mean().item(), rel=1e-4, abs=1e-4)
    assert {path.name for path in metric.reads()["model"].files} >= {"config.json", "model.safetensors"}


def test_a_long_prompt_is_cut_before_its_end_token(clip_folder):
    from transformers import CLIPModel, CLIPTokenizer

    tokenizer, model = CLIPTokenizer.from_pretrained(clip_folder), CLIPModel.from_pretrained(clip_folder)
    prompt = "red square on a blue background " * 5
    tokens = tokenizer(prompt)["input_ids"]
    assert len(tokens) > 12
    cut = torch.tensor([[*tokens[:11], tokenizer.eos_token_id]])
    with torch.no_grad():
        pooled = model.text_model(input_ids=cut).pooler_output
        expected = torch.nn.functional.normalize(model.text_projection(pooled), dim=1)
    torch.testing.assert_close(Clip(clip_folder, CPU).texts([prompt]), expected)


def bare_features(get_features, *inputs):
    """The tensor that transformers 5 gives inside of an output, which torchmetrics 1.9 does not expect."""
    found = get_features(*inputs)
    return getattr(found, "pooler_output", found)


@needs_torchmetrics
def test_clip_score_equals_that_of_torchmetrics(tmp_path, clip_folder):
    from torchmetrics.functional.multimodal.clip_score import _clip_score_update
    from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    images = noise_images(tmp_path, 4, 6)
    model = CLIPModel.from_pretrained(clip_folder)
    processor = CLIPProcessor(*(kind.from_pretrained(clip_folder) for kind in (CLIPImageProcessor, CLIPTokenizer)))
    for name in ("get_image_features", "get_text_features"):
        setattr(model, name, functools.partial(bare_features, getattr(model, name)))
    stack = [pixels(image.path) for image in images]
    expected, _ = _clip_score_update(stack, [image.prompt.text for image in images], model, processor)
    found = ClipScoreMetric(ClipScore(model=str(clip_folder))).measure(images, CPU, tmp_path)["clip"]
    assert found.each == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-3)


def test_aesthetic_score_equals_the_published_predictor(tmp_path, clip_folder):
    head = nn.Sequential()  # the layers of sac+logos+ava1-l14-linearMSE.pth, narrower
    layers = [nn.Linear(8, 7), nn.Dropout(0.2), nn.Linear(7, 6), nn.Dropout(0.2), nn.Linear(6, 4), nn.Dropout(0.1)]
    for place, layer in enumerate([*layers, nn.Linear(4, 3), nn.Linear(3, 1)]):
        head.add_module(str(place), layer)
    torch.save({f"layers.{name}": value for name, value in head.state_dict().items()}, tmp_path / "head.pth")
    images = noise_images(tmp_path / "drawn", 5, 7)
    with torch.no_grad():
        expected = head.eval()(clip_inputs(clip_folder, images).image_embeds).flatten()
    metric = AestheticMetric(Aesthetic(model=str(clip_folder), head=str(tmp_path / "head.pth"), batch=2))
    assert metric.measure(images, CPU, tmp_path)["aesthetic"].each == pytest.approx(
        expected.tolist(), rel=1e-4, abs=1e-5
    )
    with pytest.raises(ValueError, match=r"layers\.0\.weight is \(7, 8\), expected a layer that takes 9"):
        load_head(tmp_path / "head.pth", 9)
    torch.save({"layers.0.weight": torch.zeros(2, 8), "layers.0.bias": torch.zeros(2)}, tmp_path / "short.pth")
    with pytest.raises(ValueError, match="end in 2 values"):
        load_head(tmp_path / "short.pth", 8)


SCORER = """
import argparse, json, pathlib
parser = argparse.ArgumentParser()
parser.add_argument("imagedir"); parser.add_argument("--outfile"); parser.add_argument("--model-path")
options = parser.parse_args()
lines = []
for folder in pathlib.Path(options.imagedir).iterdir():
    record = json.loads((folder / "metadata.jsonl").read_text())
    for image in sorted((folder / "samples").iterdir()):
        right = int(image.stem) < record["right"]
        lines.append(json.dumps({"filename": str(image), "tag": record["tag"], "correct": right}))
pathlib.Path(options.outfile).write_text("\\n".join(lines))
"""


def test_geneval_gets_its_folder_and_its_score_is_the_mean_of_the_tasks(tmp_path):
    rights = [4, 1, 0, 2, 2]
    tags = ["counting", "counting", "counting", "colors", "position"]
    images = []
    for image in noise_images(tmp_path / "drawn", 5, 8, seeds=(0, 1, 2, 3)):
        record = {"tag": tags[image.index], "prompt": "x", "right": rights[image.index]}
        images.append(Drawn(image.path, Prompt("x", record["tag"], record), image.index, image.seed))
    unscored = GenEvalMetric(GenEval()).measure(images, CPU, tmp_path)["geneval"]
    assert unscored.value is None
    assert "metrics.geneval.scorer" in unscored.note
    folder = tmp_path / "geneval"
    assert sorted(path.name for path in folder.iterdir()) == [f"{k:05d}" for k in range(5)]
    assert json.loads((folder / "00003" / "metadata.jsonl").read_text())["tag"] == "colors"
    assert (folder / "00002" / "samples" / "0001.png").read_bytes() == images[7].path.read_bytes()

    (tmp_path / "scorer.py").write_text(SCORER)
    metric = GenEvalMetric(GenEval(scorer=str(tmp_path / "scorer.py"), detector=str(tmp_path)))
    assert metric.check() == []
    found = metric.measure(images, CPU, tmp_path)["geneval"]
    counting, colors, position = (4 + 1 + 0) / 12, 2 / 4, 2 / 4
    assert found.value == pytest.approx((counting + colors + position) / 3)
    assert "counting 0.42" in found.note

    (tmp_path / "scorer.py").write_text("raise SystemExit(3)")
    shutil.rmtree(folder)
    (tmp_path / "geneval.jsonl").unlink()
    with pytest.raises(ValueError, match="ended with 3"):
        metric.measure(images, CPU, tmp_path)
    with pytest.raises(ValueError, match=r"prompts\.kind: geneval"):
        metric.measure([Drawn(images[0].path, Prompt("x"), 0)], CPU, tmp_path)
