"""Plans: the arithmetic of the papers, costs against published anchors, warnings."""

import json

import pytest

from distributed_at.accelerators import GPUS, attack_arithmetic
from distributed_at.catalogue.datasets import DATASETS
from distributed_at.data import digits
from distributed_at.engine.batching import largest_world_size
from distributed_at.errors import ConfigError
from distributed_at.models.statistics import ModelStatistics
from distributed_at.plan_table import plan_table
from distributed_at.planning import make_plan
from distributed_at.recipes import list_recipes, load_recipe

XIE = "imagenet/xie_yuille/base"
# ResNet-152 at 224 pixels, so that most tests need no network.
R152 = ModelStatistics(
    parameters=60_192_808,
    buffers=151_424,
    macs=11_513_624_576,
    activations=22_600_000,
    train_bytes=180_000_000,
    input_grad_bytes=180_000_000,
    image_size=224,
)


def plan(ref, *overrides, statistics=R152, **arguments):
    return make_plan(load_recipe(ref, overrides).config, statistics=statistics, **arguments)


def codes(found):
    return {warning.code for warning in found.warnings}


def test_full_scale_imagenet_arithmetic():
    found = plan(XIE, world_size=128)
    assert (found.batch.micro_batch, found.batch.accumulation, found.batch.groups_per_step) == (32, 1, 128)
    assert (found.steps_per_epoch, found.num_steps, found.images) == (313, 34_430, 110 * 1_281_167)
    at = {point.step: point.learning_rate for point in found.rates}
    assert at[0] == pytest.approx(0.1)
    assert at[1565] == at[35 * 313 - 1] == pytest.approx(1.6)
    assert at[35 * 313] == pytest.approx(0.16)


def test_measured_statistics_match_the_known_size_of_resnet_152():
    found = make_plan(load_recipe(XIE).config, world_size=128)
    assert found.statistics.parameters == R152.parameters
    assert found.statistics.macs == pytest.approx(11.5e9, rel=0.01)


def test_v100_hours_reproduce_the_reported_run():
    hours = plan(XIE, world_size=128, gpu="v100").hours
    assert hours.wall_hours == pytest.approx(52, rel=0.02)
    assert hours.images_per_second / 128 == pytest.approx(5.9, rel=0.02)
    assert hours.rate.published


def test_pgd_30_costs_63_forwards_and_1_45_teraflop():
    found = plan(XIE, world_size=128)
    assert found.attack_units + found.train_units == 63
    assert found.flops_per_image == pytest.approx(1.45e12, rel=0.01)
    assert found.flops == pytest.approx(2.04e20, rel=0.01)


def test_world_size_changes_memory_and_time_but_not_the_work():
    small, large = (plan(XIE, world_size=w, gpu="h200") for w in (8, 128))
    assert (small.num_steps, small.flops, small.rates) == (large.num_steps, large.flops, large.rates)
    assert small.hours.wall_hours == pytest.approx(16 * large.hours.wall_hours)
    assert small.memory.activations == 256 * 180_000_000
    assert large.memory.activations == 32 * 180_000_000
    assert large.memory.states < small.memory.states


def test_checkpoint_holds_weights_momentum_and_running_statistics():
    assert plan(XIE, world_size=128).checkpoint_bytes == 4 * (2 * R152.parameters + R152.buffers)
    adam = plan(XIE, "optimizer.name=adam", "optimizer.nesterov=false", world_size=128)
    assert adam.checkpoint_bytes == 4 * (3 * R152.parameters + R152.buffers)


def test_world_size_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match=r"nearest that can: 64 and 128"):
        plan(XIE, world_size=100)


def test_unknown_gpu_names_the_nearest():
    with pytest.raises(
        ConfigError, match=r"no rates for gpu 'H20'.*Did you mean 'h200'.*Allowed: h200, h100, a100, v100"
    ):
        plan(XIE, world_size=128, gpu="H20")


def test_every_rate_names_its_source():
    for gpu in GPUS.values():
        for arithmetic in ("fp32", "tf32", "bf16", "fp16"):
            assert gpu.rate(arithmetic).tflops > 0
            assert len(gpu.rate(arithmetic).source) > 20
        assert gpu.fp32.tflops <= gpu.tf32.tflops <= gpu.half.tflops
    assert GPUS["h200"].rate("tf32") is GPUS["h200"].tf32
    assert GPUS["h200"].rate("bf16") is GPUS["h200"].rate("fp16") is GPUS["h200"].half


@pytest.mark.parametrize(
    ("precision", "attack", "expected"),
    [
        ("fp32", "fp32", "fp32"),
        ("tf32", "fp32", "tf32"),
        ("tf32", "bf16", "bf16"),
        ("bf16", "fp32", "fp32"),
        ("fp32", "fp16", "fp16"),
        ("tf32", None, "tf32"),
        ("bf16", None, "bf16"),
    ],
)
def test_attack_shares_trainings_tf32_and_nothing_else(precision: str, attack: str | None, expected: str) -> None:
    assert attack_arithmetic(precision, attack) == expected


def test_digits_size_is_what_the_loader_gives():
    images, _, _ = digits.read_digits()
    sizes = tuple(len(digits.digits_ids(split, len(images))) for split in ("train", "test"))
    assert sizes == (DATASETS["digits"].train, DATASETS["digits"].test)


@pytest.mark.parametrize(
    ("ref", "overrides", "world_size", "code"),
    [
        (XIE, ["attack.dtype=bf16"], 128, "attack_without_certificate"),
        (XIE, ["train.bn_group_size=null"], 128, "free_bn_group"),
        (XIE, [], 512, "small_micro_batch"),
        (XIE, [], 128, "targeted_evaluation"),
        (XIE, ["attack.num_steps=5"], 128, "attack_cannot_reach_eps"),
        (XIE, ["attack.num_steps=0"], 128, "attack_does_nothing"),
        (XIE, ["attack.eps=0"], 128, "attack_does_nothing"),
        (XIE, ["evaluation.final=[{kind: clean}]"], 128, "no_robust_accuracy"),
        ("cifar/bag_of_tricks/base", [], 2, "bn_group_spans_ranks"),
        ("cifar/bag_of_tricks/base", [], 1, "attack_moves_statistics"),
        ("cifar/bag_of_tricks/base", ["evaluation.validation=[{kind: clean}]"], 1, "selection_without_attack"),
        ("cifar/bag_of_tricks/base", ["train.select=last"], 1, "robust_overfitting"),
        ("cifar/bag_of_tricks/base", ["attack.num_steps=1", "attack.step_size=10"], 1, "catastrophic_overfitting"),
        ("cifar/bag_of_tricks/base", ["evaluation.final.1.attack.eps=4"], 1, "evaluation_radius"),
        (
            XIE,
            ["model.norm=mbn", "objective.name=trades", "attack.target=none", "attack.branch=clean"],
            128,
            "attack_on_another_branch",
        ),
    ],
)
def test_doubtful_settings_are_warned_of(ref, overrides, world_size, code):
    assert code in codes(plan(ref, *overrides, world_size=world_size))


def test_certificate_and_fixed_groups_silence_their_warnings():
    assert "attack_without_certificate" not in codes(
        plan(XIE, "attack.dtype=bf16", "attack.precision_certificate=c.json", world_size=128)
    )
    assert "free_bn_group" not in codes(plan(XIE, world_size=128))


def test_too_little_memory_is_warned_of():
    assert "out_of_memory" in codes(plan(XIE, world_size=8, gpu="v100"))
    assert "out_of_memory" not in codes(plan(XIE, world_size=128, gpu="v100"))


def test_plan_is_json_and_a_table():
    from rich.console import Console

    found = plan(XIE, world_size=128, gpu="h200")
    data = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert (data["num_steps"], data["units_per_image"], data["batch"]["groups_per_step"]) == (34_430, 63, 128)
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(plan_table(found))
    text = console.export_text()
    assert "4096 = 128 workers x 32 images x 1 accumulated" in text
    assert "34,430 in 110 epochs" in text


@pytest.mark.parametrize("ref", [entry.ref for entry in list_recipes()])
def test_every_recipe_passes_plan_at_its_full_world_size(ref):
    config = load_recipe(ref).config
    cut = {"batch_size": config.train.batch_size, "bn_group_size": config.train.bn_group_size}
    workers = largest_world_size(max(1, config.train.batch_size // 32), **cut)
    found = make_plan(config, world_size=workers, gpu="h200", statistics=R152)
    assert found.num_steps > 0
    assert found.flops > 0


@pytest.mark.parametrize(
    ("ratio", "told"), [(0.2, "6 clean ones are kept: a share of 18.75%"), (0.5, None), (1.0, None)]
)
def test_plan_says_what_a_share_comes_to_in_whole_images(ratio: float, told: str | None) -> None:
    words = [
        "objective.name=mixture",
        f"objective.clean_ratio={ratio}",
        "train.bn_group_size=32",
        "train.batch_size=32",
    ]
    found = make_plan(load_recipe("digits/adversarial", words).config)
    notes = [w.message for w in found.warnings if w.code == "objective"]
    assert (told is None) == (not notes)
    assert told is None or f"of each group of 32 images {told} for objective.clean_ratio 0.2" in notes[0]
    assert all(w.level == "note" for w in found.warnings if w.code == "objective")
