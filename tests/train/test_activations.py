"""The largest inputs of layers over prompts, against a network whose inputs are known."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from train.activations import largest_inputs, main

ROOT = Path(__file__).resolve().parents[2]


def test_the_largest_of_all_calls():
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    x = torch.randn(5, 2, 6, 3)
    with largest_inputs(network, ["0", "1"]) as largest:
        for part in x:
            network(part)
    network(torch.full((1, 3), 1e6))  # after the context nothing is seen
    assert largest["0"].equal(x.abs().amax((0, 1, 2)))
    assert largest["1"].allclose(network[0](x).abs().amax((0, 1, 2)))


def test_the_command(tmp_path, capsys):
    """What it writes fits SVDQuant's reader; an empty list of prompts is refused."""
    from dcgen.adapter import load_adapter
    from dcgen.merge import merged_model, split
    from dcgen.quantize.nunchaku_file import write_nunchaku
    from dcgen.quantize.svdquant import SvdQuant
    from dcgen.release import open_model

    base, adapter = ROOT / "toy/flux-base", ROOT / "toy/adapter/toy-flux-dcgen.safetensors"
    out, prompts = tmp_path / "largest.safetensors", tmp_path / "prompts.txt"
    prompts.write_text("a red apple on a blue background\n\n")
    where = ["--adapter", adapter, "--autoencoder", ROOT / "toy/dc-ae-f32", "--prompts", prompts, "-o", out]
    assert main([str(part) for part in (base, *where, "--side", 128, "--steps", 2)]) == 0
    values = load_file(out)
    blocks, _ = split(merged_model(open_model(base), load_adapter(adapter)))
    write_nunchaku(blocks, tmp_path / "a.safetensors", SvdQuant(True), activations=values)
    prompts.write_text("\n")
    assert main([str(part) for part in (base, *where)]) == 1
    assert "prompts.txt: no prompt" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["release", "prompts"])
def test_missing_files_are_named(tmp_path, capsys, part):
    prompts = tmp_path / "prompts.txt"
    if part == "release":
        prompts.write_text("a cat\n")
    release = tmp_path / "release" if part == "release" else ROOT / "toy/flux-base"
    assert main([str(release), "--prompts", str(prompts), "-o", str(tmp_path / "a.safetensors")]) == 1
    assert part in capsys.readouterr().err
