"""Settings that save time or memory: what they compute is what is computed without them."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file

from train.batches import BatchPlan
from train.config import Optimizer, RecipeError, load_recipe
from train.distributed import Ranks
from train.families import ARCHITECTURES
from train.frozen import FrozenLinear, freeze_linears
from train.optimizer import make_optimizer
from train.plan import load_of
from train.run import dry_run, make_stage, run_recipe

CPU = Ranks(0, 1, torch.device("cpu"))
SHORT = ["finetune.preview_every=0", "finetune.dtype=bfloat16"]


def step(run, name, *overrides, steps=2):
    """(losses, gradients by parameter) of the fine-tuning stage of a finished debug run, in a few steps."""
    recipe = load_recipe(name, [f"output={run}", *SHORT, *overrides])
    stage = make_stage(recipe, "finetune", CPU)
    module = stage.setup()
    generator = torch.Generator().manual_seed(0)
    for parameter_name, parameter in module.named_parameters():
        if ".lora_B." in parameter_name:  # which begin at zero, so that half of the gradients would be
            parameter.data.normal_(std=0.05, generator=generator)
    plan, losses = BatchPlan(stage.buckets(), 4, 0), []
    for number in range(steps):
        for batch in plan.micro_batches(number, rank=0, world=1, accumulate=1, device=CPU.device):
            loss, _ = stage.loss(batch)
            loss.backward()
            losses.append(loss.item())
    return losses, {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def distance(found, expected):
    """Largest relative distance of a gradient, and of the losses."""
    (losses, gradients), (plain_losses, plain) = found, expected
    assert gradients.keys() == plain.keys()
    apart = max(((gradients[name] - value).norm() / (value.norm() + 1e-9)).item() for name, value in plain.items())
    return max(apart, *(abs(a / b - 1) for a, b in zip(losses, plain_losses, strict=True)))


@pytest.fixture(params=[("debug_run", "debug"), ("debug_sana", "debug-sana"), ("debug_dit", "debug-dit")])
def debug(request):
    """Folder and name of a finished run of each family."""
    return request.getfixturevalue(request.param[0]), request.param[1]


def test_compiled_blocks_have_the_gradients_of_plain_ones(debug):
    """With recomputation, and for FLUX with another number of rows in each call."""
    torch._dynamo.reset()
    common = ["finetune.gradient_checkpointing=true", "finetune.objective.caption_dropout=0.5"]
    steps = 2 if debug[1] == "debug" else 1
    compiled = step(*debug, *common, "finetune.compile=true", "finetune.compile_backend=aot_eager", steps=steps)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] > 0
    assert distance(compiled, step(*debug, *common, steps=steps)) < 0.02  # bfloat16 sums in another order


def test_growing_alpha_is_not_compiled(debug_run):
    recipe = load_recipe("debug", [f"output={debug_run}", "finetune.compile=true", "finetune.alpha_warmup=3"])
    assert [p for p in make_stage(recipe, "finetune", CPU).check() if "set compile: false" in p]


def test_lora_without_casts_has_the_bits_of_lora_with_them(debug_run, monkeypatch):
    from train.stages import finetune

    found = step(debug_run, "debug")
    inject = finetune.inject_lora

    def with_casts(model, *arguments):
        inject(model, *arguments)
        for layer in model.modules():
            if hasattr(layer, "cast_input_dtype_enabled"):
                layer.cast_input_dtype_enabled = True

    monkeypatch.setattr(finetune, "inject_lora", with_casts)
    expected = step(debug_run, "debug")
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][name], value) for name, value in expected[1].items())


def test_offloaded_blocks_have_the_bits_of_resident_ones(debug):
    """Blocks on the CPU, and what recomputation starts from: on a CPU only the copies remain to be seen."""
    common = ["finetune.gradient_checkpointing=true"]
    expected = step(*debug, *common)
    found = step(*debug, *common, "finetune.offload_blocks=1", "finetune.offload_activations=true")
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][name], value) for name, value in expected[1].items())


def test_what_recomputation_starts_from_goes_to_the_cpu(debug_run, monkeypatch):
    packed = []
    real = torch.autograd.graph.save_on_cpu

    class Counted(real):
        def __init__(self, pin_memory):
            super().__init__(pin_memory)
            pack = self.pack_hook
            self.pack_hook = lambda tensor: (packed.append(tensor.shape), pack(tensor))[1]

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Counted)
    common = ["finetune.gradient_checkpointing=true", "finetune.objective.loss=flow"]
    step(debug_run, "debug", *common, "finetune.offload_activations=true", steps=1)
    image, text = (4, 16, 32), (4, 16, 32)  # 4x4 tokens and 16 of text, 32 wide, at the entry of both blocks
    assert packed.count(image) + packed.count(text) >= 4


def test_an_int8_layer_is_its_weight_to_half_a_step_and_has_its_gradient():
    g = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(40, 24).double()
    frozen = FrozenLinear(layer.float(), int8=True, offload=False)
    exact = layer.weight.detach().double()
    weight = frozen.codes.double() * frozen.scale.double()
    assert ((weight - exact).abs() <= frozen.scale.double() / 2 * 1.0001).all()
    assert frozen.codes.abs().amax(1).eq(127).all()
    x = torch.randn(3, 5, 40, generator=g, requires_grad=True)
    y = frozen(x)
    torch.testing.assert_close(y.double(), x.double() @ weight.T + layer.bias.double(), rtol=1e-5, atol=1e-6)
    y.sin().sum().backward()
    torch.testing.assert_close(x.grad.double(), y.double().cos() @ weight, rtol=1e-5, atol=1e-6)
    half = FrozenLinear(layer.bfloat16(), int8=True, offload=True)
    assert half(x).dtype == torch.bfloat16
    assert not list(half.parameters())
    assert half.to("meta").codes.device.type == "cpu"


def test_an_int8_base_trains_nearly_as_the_base_does(debug):
    """And no frozen layer of its blocks is left in bfloat16."""
    found, expected = step(*debug, "finetune.frozen_store=int8"), step(*debug)
    losses, plain = found[0], expected[0]
    assert losses != plain
    assert max(abs(a / b - 1) for a, b in zip(losses, plain, strict=True)) < 0.03
    cosine = [torch.cosine_similarity(found[1][n].flatten(), g.flatten(), 0) for n, g in expected[1].items()]
    assert torch.stack(cosine).median() > 0.98
    recipe = load_recipe(debug[1], [f"output={debug[0]}", *SHORT, "finetune.frozen_store=int8"])
    stage = make_stage(recipe, "finetune", CPU)
    stage.setup()
    layers = [
        m for block in stage.family.blocks(stage.model) for m in block.modules() if isinstance(m, torch.nn.Linear)
    ]
    frozen = [layer for layer in layers if isinstance(layer, FrozenLinear)]
    assert frozen
    assert all(layer.codes.dtype == torch.int8 for layer in frozen)
    assert all(layer.weight.requires_grad for layer in layers if not isinstance(layer, FrozenLinear))


def test_an_int8_base_is_compiled_whole(debug_run):
    torch._dynamo.reset()
    common = ["finetune.frozen_store=int8", "finetune.objective.loss=flow"]
    compiled = step(debug_run, "debug", *common, "finetune.compile=true", "finetune.compile_backend=aot_eager", steps=1)
    assert distance(compiled, step(debug_run, "debug", *common, steps=1)) < 0.02


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["finetune.offload_blocks=1", "finetune.compile=true"], "set compile: false"),
        (["finetune.offload_activations=true"], "set gradient_checkpointing: true"),
        (["finetune.train=full", "finetune.frozen_store=int8"], "leave out frozen_store"),
    ],
)
def test_settings_that_do_not_go_together_are_said(debug_run, overrides, words):
    stage = make_stage(load_recipe("debug", [f"output={debug_run}", *overrides]), "finetune", CPU)
    assert [problem for problem in stage.check() if words in problem]


EIGHT = ["finetune.optimizer.state=8bit", "finetune.preview_every=0", "finetune.rank=64", "finetune.dtype=bfloat16"]


def test_eight_bit_moments_need_torchao_and_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"finetune\.optimizer\.state: 8bit needs .*requirements-optional\.txt"):
        run_recipe(load_recipe("debug", [f"output={tmp_path}/run", *EIGHT]))
    with pytest.raises(ValueError, match="for one rank"):
        make_optimizer([], Optimizer(state="8bit"), world=2)


def test_settings_of_older_runs_have_no_new_fields():
    settings = load_recipe("debug").stages["finetune"].settings()
    assert "state" not in settings["optimizer"]
    assert not {"compile", "frozen_store", "offload_blocks", "validation_samples"} & set(settings)
    assert load_recipe("debug", EIGHT).stages["finetune"].settings()["optimizer"]["state"] == "8bit"


def test_eight_bit_moments_train_and_resume_to_the_same_bits(debug_run, tmp_path):
    pytest.importorskip("torchao")
    tiny = debug_run / "tiny"
    places = [f"finetune.cache={debug_run}/cache", f"finetune.start={debug_run}/head"]
    places += [f"finetune.base={tiny}/release", f"finetune.autoencoder={tiny}/dc-ae", "finetune.checkpoint_every=2"]
    adapters = {}
    for name, lengths in (("whole", (6,)), ("cut", (4, 6)), ("32bit", (6,))):
        for steps in lengths:
            overrides = [f"output={tmp_path / name}", *places, *EIGHT, f"finetune.steps={steps}"]
            if name == "32bit":
                overrides.append("finetune.optimizer.state=32bit")
            run_recipe(load_recipe("debug", overrides), only="finetune")
        adapters[name] = load_file(tmp_path / name / "finetune" / "adapter.safetensors")
    assert all(torch.equal(adapters["cut"][name], value) for name, value in adapters["whole"].items())
    stored = load_file(tmp_path / "whole" / "finetune" / "checkpoints" / "step-00000006" / "optimizer.safetensors")
    assert any(name.endswith("exp_avg.codes") and value.dtype == torch.uint8 for name, value in stored.items())
    for name, value in adapters["32bit"].items():
        assert (adapters["whole"][name] - value).norm() < 0.2 * value.norm() + 0.02, name


PLANNED = [  # recipe, GB of the card, overrides: one card, one sample at a time
    ("flux-512", 24, ["finetune.rank=64", "finetune.accumulate=256", "finetune.frozen_store=int8"]),
    ("flux-512", 24, ["finetune.rank=64", "finetune.accumulate=256", "finetune.offload_blocks=40"]),
    ("sana-1.6b", 12, ["finetune.accumulate=1024"]),
]


@pytest.mark.parametrize(("name", "memory", "overrides"), PLANNED)
def test_what_fits_a_small_card_by_plan(name, memory, overrides, capsys):
    one = ["ranks=1", f"memory_gb={memory}", "finetune.optimizer.state=8bit"]
    one += ["finetune.gradient_checkpointing=true", "finetune.offload_activations=true"]
    assert dry_run(load_recipe(name, [*one, *overrides]), only="finetune") == 0
    out = capsys.readouterr().out
    total = float(re.search(r"1 ranks: ([\d.]+) GB a rank", out)[1])
    assert 3 < total < memory
    assert "GB in RAM" in out


def test_the_plan_has_the_bytes_of_an_int8_flux_on_the_meta_device():
    """Frozen weights of the real network: int8 linear layers with their scales, everything else in bfloat16."""
    recipe = load_recipe("flux-512", ["ranks=1", "finetune.frozen_store=int8", "finetune.accumulate=256"])
    stage = make_stage(recipe, "finetune", CPU)
    planned = load_of(stage.context, stage.config, 256).gigabytes()["frozen weights"]
    flux, published = ARCHITECTURES["dc-gen-flux-f32"]
    with torch.device("meta"):
        model = flux.network_class().from_config(published.config).to(torch.bfloat16).requires_grad_(False)
    freeze_linears(flux.blocks(model), int8=True, offloaded=0)
    held = [*model.parameters(), *(b for m in model.modules() if isinstance(m, FrozenLinear) for b in m.buffers())]
    assert sum(tensor.nbytes for tensor in held) / 1e9 == pytest.approx(planned, rel=0.01)
    assert planned == pytest.approx(12.0, abs=0.2)


def test_what_is_in_ram_is_not_on_the_card():
    recipe = load_recipe("flux-512", ["ranks=1", "finetune.offload_blocks=57", "finetune.accumulate=256"])
    stage = make_stage(recipe, "finetune", CPU)
    load = load_of(stage.context, stage.config, 64)
    assert load.gigabytes()["frozen weights"] < 2  # two blocks on their way, embedders and modulation of the ends
    assert load.in_ram() == pytest.approx(23.8, abs=1.5)


@pytest.mark.parametrize(
    ("memory", "words"), [(27.5, "optimizer.state: 8bit"), (22, "frozen_store: int8"), (13, "offload_blocks: 57")]
)
def test_a_small_card_is_told_what_to_set(memory, words, capsys):
    one = ["ranks=1", f"memory_gb={memory}", "finetune.rank=64", "finetune.accumulate=256", "finetune.ema=null"]
    assert dry_run(load_recipe("flux-512", one), only="finetune") == 1
    assert words in capsys.readouterr().out
