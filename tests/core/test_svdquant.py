"""SVDQuant for nunchaku: the order of values against the PTX documentation, the arithmetic against float64, and files.

That the packed tensors equal deepcompressor's bit for bit was checked beside these tests, with its own packer.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dcgen.adapter import load_adapter
from dcgen.files import opened
from dcgen.merge import merged_model, split
from dcgen.quantize import packing
from dcgen.quantize.__main__ import main
from dcgen.quantize.nunchaku_file import open_nunchaku, packed_layers, write_nunchaku
from dcgen.quantize.svdquant import (
    SHIFT,
    SvdQuant,
    dequantize_modulation,
    low_rank,
    nearest_e2m1,
    quantize_modulation,
    smoothing,
)
from dcgen.release import open_model

TOY = Path(__file__).resolve().parents[2] / "toy"
ADAPTER = TOY / "adapter" / "toy-flux-dcgen.safetensors"


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def blocks():
    return split(merged_model(open_model(TOY / "flux-base"), load_adapter(ADAPTER)))[0]


# The order of values ----------------------------------------------------------------------------------------------


def test_codes_lie_where_the_lanes_of_mma_read_them():
    """B fragment of mma.m16n8k64 for 4 bits: lane = 4 * column + row group; its registers hold 8 consecutive k each.

    Each lane reads 16 bytes: two tiles of 8 outputs times two registers (k 0-31 and 32-63).
    """
    N, K = 256, 128
    codes = torch.randint(0, 16, (N, K), dtype=torch.uint8)
    stream = packing.packed_codes(codes).view(torch.uint8).flatten().tolist()
    for n in range(0, N, 5):
        for k in range(0, K, 3):
            tile, pair, half, column = n // 128, n % 128 // 16, n % 16 // 8, n % 8
            step, register, group, within = k // 64, k % 64 // 32, k % 32 // 8, k % 8
            lane = 4 * column + group
            words = (((tile * (K // 64) + step) * 8 + pair) * 32 + lane) * 4 + half * 2 + register
            byte = stream[4 * words + within // 2]
            assert (byte >> 4 if within % 2 else byte & 0xF) == codes[n, k], (n, k)


def test_scales_lie_as_deepcompressor_documents():
    """Its table for 128 outputs: 0 1 8 9 are lane 0's, 2 3 10 11 lane 1's, ..., 118 119 126 127 lane 31's."""
    order = packing.packed_vector(torch.arange(128.0)).reshape(32, 4).tolist()
    assert order[0] == [0, 1, 8, 9]
    assert order[1] == [2, 3, 10, 11]
    assert order[4] == [16, 17, 24, 25]
    assert order[31] == [118, 119, 126, 127]
    # Micro scales: lane 0 loads outputs 0 32 64 96, lane 1 those of 8 40 72 104, lane 4 those of 1 33 65 97.
    values = torch.arange(128, dtype=torch.uint8)[:, None].expand(128, 4).contiguous().view(torch.float8_e4m3fn)
    lanes = packing.packed_micro_scales(values).view(torch.uint8).reshape(32, 4, 4)
    assert lanes[0, :, 0].tolist() == [0, 32, 64, 96]
    assert lanes[1, :, 0].tolist() == [8, 40, 72, 104]
    assert lanes[4, :, 0].tolist() == [1, 33, 65, 97]
    assert lanes[31, :, 0].tolist() == [31, 63, 95, 127]
    assert (lanes == lanes[..., :1]).all()  # the four of a lane are consecutive groups of inputs


def test_every_packing_has_its_inverse():
    for N, K in ((128, 128), (384, 256)):
        codes = torch.randint(0, 16, (N, K), dtype=torch.uint8)
        assert packing.unpacked_codes(packing.packed_codes(codes)).equal(codes)
        assert packing.unpacked_modulation(packing.packed_modulation(codes)).equal(codes)
        scales = torch.randn(N, K // 64)
        assert packing.unpacked_scales(packing.packed_scales(scales)).equal(scales)
        micro = (torch.rand(N, K // 16) * 400).to(torch.float8_e4m3fn)
        found = packing.unpacked_micro_scales(packing.packed_micro_scales(micro))
        assert found.float().equal(micro.float())
        for rank in (16, 48):
            down, up = torch.randn(rank, K), torch.randn(N, rank)
            assert packing.unpacked_down(packing.packed_down(down)).equal(down)
            assert packing.unpacked_up(packing.packed_up(up)).equal(up)


def test_low_rank_tiles_are_mma_fragments_of_16_bits():
    """m16n8k16: lane 4 * row + column pair holds rows 0 and 8 at columns 0, 1 and 8, 9."""
    up = torch.arange(16.0)[:, None] * 16 + torch.arange(16.0)
    lanes = packing.packed_up(up).reshape(32, 8)
    for lane in (0, 5, 31):
        row, column = lane // 4, 2 * (lane % 4)
        wanted = [16 * r + c for r in (row, row + 8) for c in (column, column + 1, column + 8, column + 9)]
        assert lanes[lane].tolist() == wanted


# The arithmetic ---------------------------------------------------------------------------------------------------


def weight(outputs, inputs, seed=0):
    """With outlier inputs and a few large directions, as trained weights have."""
    generator = torch.Generator().manual_seed(seed)
    plain = torch.randn(outputs, inputs, generator=generator) * 0.03
    plain += torch.randn(outputs, 4, generator=generator) @ torch.randn(4, inputs, generator=generator) * 0.02
    return plain.bfloat16()


@pytest.mark.parametrize(("fp4", "bound"), [(True, 0.1), (False, 0.12)])
@pytest.mark.parametrize("outputs", [(192,), (128, 128, 128)])
def test_a_layer_is_the_sum_of_branch_and_residual(fp4, bound, outputs):
    """The stored layer applied in float64 as the kernel's documentation has it, on inputs that are not rounded."""
    weights = [weight(n, 192, seed) for seed, n in enumerate(outputs)]
    fmt, whole = SvdQuant(fp4, 32), torch.cat(weights).float()
    bias = torch.randn(len(whole)).bfloat16()
    largest = torch.rand(192) * 4 + 0.1
    smooth = smoothing(largest, weights)
    parts = fmt.quantize(weights, bias, smooth=smooth)
    entries = fmt.entries((len(whole), 192), len(outputs) > 1)
    assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == {
        entry.name: (entry.dtype, entry.shape) for entry in entries
    }
    back = fmt.dequantize(parts, (len(whole), 192))
    assert float((back - whole).norm() / whole.norm()) < bound
    plain = SvdQuant(fp4, 16).quantize(weights, bias)
    assert float((back - whole).norm()) < float((SvdQuant(fp4, 16).dequantize(plain, back.shape) - whole).norm()) * 1.5
    assert fmt.bias(parts, back.shape, False).equal(bias.float())
    x = torch.randn(5, 192, dtype=torch.float64) * largest
    down, up = packing.unpacked_down(parts["lora_down"]).double(), packing.unpacked_up(parts["lora_up"]).double()
    branch = (x @ down[:, :192].T) @ up[: len(whole)].T
    divisor = packing.unpacked_vector(parts["smooth"]).double()[:192]
    residual = (back.double() - (up @ down)[: len(whole), :192]) * divisor
    assert ((x / divisor) @ residual.T + branch - x @ back.double().T).abs().max() < 1e-4


@pytest.mark.parametrize("fp4", [True, False])
def test_the_branch_takes_the_large_directions(fp4):
    """Against a full SVD in float64: what is left of a matrix of rank 4 plus noise is the noise."""
    plain = weight(256, 192).double()
    down, up = (part.double() for part in low_rank(plain.float(), 16))
    singular = torch.linalg.svdvals(plain)
    left = float((plain - up @ down).norm())
    assert left == pytest.approx(float(singular[16:].norm()), rel=0.01)
    error = {}
    for rank in (16, 64):
        parts = SvdQuant(fp4, rank).quantize([plain.bfloat16()], None)
        error[rank] = float((SvdQuant(fp4, rank).dequantize(parts, (256, 192)) - plain).norm())
    assert error[64] < 0.85 * error[16]


def test_int4_kernels_shift_the_output_of_a_gelu():
    """With inputs x + SHIFT for the residual and x for the branch, the stored bias makes it W x + b."""
    fmt, w, b = SvdQuant(False, 16), weight(128, 128), torch.randn(128).bfloat16()
    parts = fmt.quantize([w], b, shifted=True)
    back = fmt.dequantize(parts, (128, 128)).double()
    down, up = packing.unpacked_down(parts["lora_down"]).double(), packing.unpacked_up(parts["lora_up"]).double()
    x = torch.randn(7, 128, dtype=torch.float64)
    stored = packing.unpacked_vector(parts["bias"]).double()
    found = (x + SHIFT) @ (back - up @ down).T + x @ (up @ down).T + stored
    assert (found - (x @ back.T + b.double())).abs().max() < 0.02  # of the bias, which is bfloat16
    assert (fmt.bias(parts, (128, 128), True) - b.float()).abs().max() < 0.02
    assert fmt.bias(SvdQuant(True, 16).quantize([w], b, shifted=True), (128, 128), False).equal(b.float())


@pytest.mark.parametrize("splits", [3, 6])
def test_modulation(splits):
    """Interleaved, with 1 added to the bias of scales; error of 15 even steps over 64 normal values."""
    w, b = weight(splits * 64, 192), torch.randn(splits * 64).bfloat16()
    parts = quantize_modulation(w, b, splits)
    back, bias = dequantize_modulation(parts, splits)
    assert float((back - w.float()).norm() / w.float().norm()) < 0.13
    assert (bias - b.float()).abs().max() < 0.02  # bfloat16
    stored = parts["bias"].float().reshape(64, splits)
    ones = stored - b.float().reshape(splits, 64).T
    assert ones.round().equal(torch.tensor([0.0, 1.0, 0.0] if splits == 3 else [0.0, 1, 0, 0, 1, 0]).expand(64, -1))


def test_nearest_e2m1():
    """Against a search over all values; ties to the smaller, and no negative zero."""
    values = torch.linspace(-7, 7, 2801)
    table = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])
    found = nearest_e2m1(values)
    nearest = (values.abs()[:, None] - table).abs().argmin(1)
    assert (found & 7).equal(nearest.to(torch.uint8))
    assert ((found >> 3).bool() == ((values < 0) & (nearest > 0))).all()


def test_smoothing_moves_outliers_into_the_weight():
    largest, w = torch.tensor([1.0, 16.0, 4.0]), [torch.tensor([[2.0, 1.0, 1.0]])]
    scale = smoothing(largest, w)
    expected = torch.tensor([0.5**0.5, 4.0, 2.0])
    assert (scale / scale[0] - expected / expected[0]).abs().max() < 1e-5


# Files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["svdquant-int4", "svdquant-nvfp4"])
def test_a_file_reads_back(tmp_path, blocks, name):
    out, ends = tmp_path / "a.safetensors", tmp_path / "ends.safetensors"
    arguments = [TOY / "flux-base", "--adapter", ADAPTER, "--format", name, "-o", out, "--split", ends]
    assert main([*map(str, arguments)]) == 0
    load_adapter(ends)
    back = open_nunchaku(out)
    assert set(back.entries) == set(blocks.entries)
    for key, entry in blocks.entries.items():
        wanted, found = blocks.get(key).float(), back.get(key).float()
        assert found.shape == entry.shape
        kept = key.startswith(("x_embedder", "proj_out", "time_text", "context", "norm_out")) or ".norm_" in key
        error = float((found - wanted).norm() / wanted.norm())
        if key.endswith("bias") and not kept:  # bfloat16, in some layers plus 1 or the shift
            assert (found - wanted).abs().max() < 0.02, key
        else:
            assert error == 0 if kept else error < 0.13, key
    with opened(out) as file:
        metadata = file.metadata()
    assert json.loads(metadata["config"])["_class_name"] == "FluxTransformer2DModel"
    layout = json.loads(metadata["quantization_config"])
    assert (layout["rank"], layout["weight"]["group_size"]) == (32, 16 if "nvfp4" in name else 64)
    config = json.loads(metadata["comfy_config"])["model_config"]
    assert (config["patch_size"], config["in_channels"], config["depth"]) == (2, 16, 2)


def test_activations_smooth(tmp_path, blocks):
    layers = packed_layers(blocks.backbone, blocks.signature)
    values = {part: torch.rand(packed.shapes[0][1]) + 0.1 for packed in layers for part in packed.parts}
    fmt = SvdQuant(True, 32)
    write_nunchaku(blocks, tmp_path / "a.safetensors", fmt, activations=values)
    with opened(tmp_path / "a.safetensors") as file:
        assert file.get_tensor("transformer_blocks.0.qkv_proj.smooth").float().std() > 0.1
    values.pop("transformer_blocks.1.ff.net.2")
    with pytest.raises(ValueError, match=r"activations: transformer_blocks\.1\.ff\.net\.2 has no values"):
        write_nunchaku(blocks, tmp_path / "b.safetensors", fmt, activations=values)
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize("case", ["deep", "family", "rank", "keep"])
def test_what_nunchaku_cannot_read_is_refused(tmp_path, capsys, case):
    family = "sana" if case == "family" else "flux"
    arguments = [TOY / f"{family}-base", "--format", "svdquant-int4", "-o", tmp_path / "a.safetensors"]
    arguments += {"deep": ["--adapter", ADAPTER], "rank": ["--rank", 40], "keep": ["--keep", "*"]}.get(case, [])
    assert main([*map(str, arguments)]) == 1
    said = capsys.readouterr().err
    assert {"deep": "--split", "family": "no SANA", "rank": "rank 40", "keep": "--keep"}[case] in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["config", "quantization_config", "rank", "tensor"])
def test_damaged_files_are_refused_by_name(tmp_path, blocks, capsys, damage):
    out = tmp_path / "a.safetensors"
    write_nunchaku(blocks, out, SvdQuant(True))
    with opened(out) as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if damage == "tensor":
        tensors.pop("transformer_blocks.1.mlp_fc1.lora_up")
    elif damage == "rank":
        metadata["quantization_config"] = metadata["quantization_config"].replace('"rank": 32', '"rank": "32"')
    else:
        metadata[damage] = "{}"
    save_file(tensors, out, metadata)
    assert main([str(out), "--dequantize", "-o", str(tmp_path / "b.safetensors")]) == 1
    said = capsys.readouterr().err
    assert "a.safetensors" in said
    assert "Traceback" not in said
    assert not (tmp_path / "b.safetensors").exists()


def test_values_that_are_not_finite_are_refused(tmp_path):
    base = open_model(TOY / "flux-base")
    tensors = {key: base.get(key) for key in base.entries}
    tensors["single_transformer_blocks.3.proj_out.weight"][5, 7] = float("nan")
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="proj_out"):
        write_nunchaku(open_model(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", SvdQuant(True))
    assert not (tmp_path / "b.safetensors").exists()
