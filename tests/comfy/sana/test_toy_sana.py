"""The toy SANA that ships with the pack, in the real ComfyUI: its workflow draws what the prompt says."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from train.evaluate.judge import Judge
from train.toy.pictures import Pair

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def judge():
    return Judge(ROOT / "toy" / "evaluator", ROOT / "toy" / "data", variants=2)


@pytest.fixture(scope="module")
def workflow():
    return json.loads((ROOT / "workflows" / "api" / "dcgen_toy_sana.json").read_text())


def prompted(workflow, text):
    """The workflow with another prompt."""
    nodes = json.loads(json.dumps(workflow))
    (positive,) = (n for n in nodes.values() if n["class_type"] == "DCGenSanaTextEncode" and n["inputs"]["text"])
    positive["inputs"]["text"] = text
    return nodes


def score(judge, images, pair):
    found = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1
    return judge.score(found, [pair] * len(images))


@pytest.mark.parametrize("trained", [True, False], ids=["trained pair", "pair never trained"])
def test_its_workflow_draws_the_prompt(server, judge, workflow, trained):
    pairs = judge.pictures.pairs("train" if trained else "held_out")
    pair = pairs[len(pairs) // 2]
    (images,) = server.images(server.queue(prompted(workflow, judge.pictures.caption(pair)))).values()
    found = score(judge, images, pair)
    assert len(images) == 4
    assert found.color == 1
    assert found.subject >= 0.75


def test_the_base_draws_through_the_vae_of_the_toy_flux(server, judge, workflow):
    """It comes without one: its own VAE output refuses when it is used, and says why."""
    pair = Pair(0, 5)
    nodes = prompted(workflow, judge.pictures.caption(pair))
    (load,) = (key for key, node in nodes.items() if node["class_type"] == "DCGenReleaseLoader")
    (apply,) = (key for key, node in nodes.items() if node["class_type"] == "DCGenApply")
    nodes["flux"] = {"class_type": "DCGenReleaseLoader", "inputs": {"release": "toy/flux-base"}}
    for node in nodes.values():
        inputs = {k: [load, 0] if v == [apply, 0] else v for k, v in node["inputs"].items()}
        node["inputs"] = {**inputs, "vae": ["flux", 2]} if "vae" in inputs else inputs
        if node["class_type"] == "DCAEDecode":
            node["class_type"], node["inputs"] = "VAEDecode", {k: v for k, v in node["inputs"].items() if k != "strip"}
    (images,) = server.images(server.queue(nodes)).values()
    found = score(judge, images, pair)
    assert found.color == 1
    assert found.subject >= 0.75
    for node in nodes.values():
        if node["class_type"] == "VAEDecode":
            node["inputs"]["vae"] = [load, 2]
    assert "VAE is invalid" in server.error(server.try_queue(nodes))
