"""The formats of dcgen.quantize against comfy-kitchen bit for bit, and against float64."""

import pytest
import torch

from dcgen.quantize import kitchen
from dcgen.quantize.formats import FORMATS
from dcgen.quantize.integer import NORMAL_LEVELS, hadamard, rotated

pytest.importorskip("comfy_kitchen")
WIDTHS = (192, 256, 2240, 3072, 5600)
# Root-mean-square error of a normally distributed weight, relative to it: the bound is one part in ten above what the
# format's own step size gives (see `step`), or what the published tables say for codes of uneven steps.
ERRORS = {"int8": 0.0105, "w6a8": 0.021, "w4a8": 0.085, "fp8": 0.028, "mxfp8": 0.028, "nvfp4": 0.1}


def weights(inputs, seed=0):
    """name -> (N,K) weights as they occur: normal, with outlier inputs, heavy-tailed, with rows of zeros and tiny."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(96, inputs, generator=generator) * 0.03
    outliers = normal * torch.where(torch.rand(inputs, generator=generator) < 0.01, 40.0, 1.0)
    sparse = torch.where(torch.rand(96, inputs, generator=generator) < 0.01, normal * 100, normal * 1e-3)
    zeros = normal.clone()
    zeros[::3], zeros[1::7, : inputs // 2] = 0, 0
    rounded = normal.bfloat16().float()
    return {
        "normal": normal,
        "outliers": outliers,
        "sparse": sparse,
        "zeros": zeros,
        "tiny": normal * 1e-6,
        "rounded": rounded,
        "odd rows": normal[:77],
        "nothing": torch.zeros(32, inputs),
    }


@pytest.mark.parametrize("inputs", WIDTHS)
@pytest.mark.parametrize("name", FORMATS)
def test_equal_to_comfy_kitchen(name, inputs):
    fmt = FORMATS[name]
    assert kitchen.knows(fmt), "the development requirements name a version that has it"
    for case, weight in weights(inputs, seed=inputs).items():
        ours, theirs = fmt.quantize(weight), kitchen.quantize(fmt, weight)
        assert list(ours) == [entry.name for entry in fmt.entries(tuple(weight.shape))]
        assert ours.keys() == theirs.keys(), case
        for entry in fmt.entries(tuple(weight.shape)):
            part = ours[entry.name]
            assert (part.dtype, tuple(part.shape)) == (entry.dtype, entry.shape), (case, entry)
            assert bits(part).equal(bits(theirs[entry.name])), (case, entry.name)


def bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


@pytest.mark.parametrize("name", FORMATS)
def test_in_parts_as_at_once(name, monkeypatch):
    fmt, weight = FORMATS[name], weights(192)["sparse"]
    whole = fmt.quantize(weight)
    monkeypatch.setattr("dcgen.quantize.formats.ROW_VALUES", 192 * 7)
    parts = fmt.quantize(weight)
    assert all(bits(parts[key]).equal(bits(whole[key])) for key in whole)


@pytest.mark.parametrize("name", FORMATS)
def test_of_a_bfloat16_weight_the_same_as_of_its_values_in_float32(name):
    fmt, weight = FORMATS[name], weights(192)["outliers"].bfloat16()
    one, other = fmt.quantize(weight), fmt.quantize(weight.float())
    assert all(bits(one[key]).equal(bits(other[key])) for key in one)


@pytest.mark.parametrize("name", FORMATS)
def test_dequantized_as_comfy_kitchen_does(name):
    from comfy_kitchen.tensor import QuantizedTensor

    fmt = FORMATS[name]
    layout, options = kitchen.LAYOUTS[name]
    for case, weight in weights(256).items():
        if case == "nothing":
            assert not fmt.dequantize(fmt.quantize(weight), tuple(weight.shape)).any()
            continue
        sizes = {"convrot_groupsize": 256} if "convrot_groupsize" in fmt.fields(tuple(weight.shape)) else {}
        wanted = QuantizedTensor.from_float(weight, layout, **options, **sizes).dequantize()
        assert fmt.dequantize(fmt.quantize(weight), tuple(weight.shape)).equal(wanted), case


@pytest.mark.parametrize("name", FORMATS)
def test_error_is_the_formats_own(name):
    """Independent of comfy-kitchen: a normal weight comes back with the error that so many bits have."""
    fmt, weight = FORMATS[name], weights(3072)["normal"]
    back = fmt.dequantize(fmt.quantize(weight), tuple(weight.shape))
    error = float((back - weight).norm() / weight.norm())
    assert ERRORS[name] / 2 < error < ERRORS[name]


def test_the_rotation_is_orthogonal_symmetric_and_even():
    for size in (4, 16, 64, 256):
        matrix = hadamard(size, torch.device("cpu")).double()
        assert (matrix @ matrix - torch.eye(size, dtype=torch.float64)).abs().max() < 1e-6
        assert matrix.abs().max() == matrix.abs().min()
        # Regular: all rows have the same sum, so that a constant input is no outlier after the rotation.
        assert (matrix.sum(1) - 1).abs().max() < 1e-6
    weight = weights(192)["normal"]
    assert (rotated(rotated(weight)) - weight).abs().max() < 1e-6


def test_levels_for_normal_weights_are_a_fixed_point_of_lloyds_algorithm():
    """Each level is the mean of the values nearest to it, for groups of 16 scaled by their largest magnitude."""
    groups = torch.randn(1 << 18, 16, generator=torch.Generator().manual_seed(1))
    values = (groups / groups.abs().amax(1, keepdim=True)).flatten()
    levels = torch.tensor(NORMAL_LEVELS)
    nearest = torch.bucketize(values, (levels[1:] + levels[:-1]) / 2)
    means = torch.stack([values[nearest == i].mean() for i in range(16)])
    assert (means - levels).abs().max() < 0.02


def test_a_rotation_tames_outliers():
    """What it is for: the error of a weight with outlier inputs is that of a normal one."""
    error = {}
    for case in ("normal", "outliers"):
        weight = weights(3072)[case]
        fmt = FORMATS["int8"]
        back = fmt.dequantize(fmt.quantize(weight), tuple(weight.shape))
        error[case] = float((back - weight).norm() / weight.norm())
    assert error["outliers"] < 2 * error["normal"]


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("int8", (8, 6), "6 inputs are not a multiple of 4"),
        ("w4a8", (8, 36), "36 inputs are not a multiple of 16"),
        ("w6a8", (8, 48), "48 inputs are not a multiple of 32"),
        ("mxfp8", (8, 48), "48 inputs are not a multiple of 32"),
        ("nvfp4", (8, 24), "24 inputs are not a multiple of 16"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(name, shape, said):
    with pytest.raises(ValueError, match=said):
        FORMATS[name].check(shape)
