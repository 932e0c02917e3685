"""Objectives: building from recipes, state, group sizes, corner cases. Their mathematics is in tests/conformance."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distributed_at.errors import ConfigError
from distributed_at.objectives import OBJECTIVES, Needs, ObjectiveContext, check_declared, perturbed
from distributed_at.objectives.labels import smooth_labels, smoothed_cross_entropy
from distributed_at.objectives.mixture import Mixture, kept_count
from distributed_at.objectives.page import objectives_page
from distributed_at.objectives.pgd_at import PgdAt
from distributed_at.planning import make_plan
from distributed_at.recipes import load_recipe
from tests.conformance.kit import Recorder, batch_of
from tests.conformance.kit import build as build_in
from tests.conformance.networks import CLASSES, labels
from tests.conformance.objectives import words_of
from tests.conformance.product import REAL

CONFIGS = {name: OBJECTIVES[name].Config() for name in OBJECTIVES.builtin}


def build(config, **options):
    return build_in(REAL, config, **options)


def test_section_of_a_recipe_is_of_the_class_that_its_name_chooses() -> None:
    for name in OBJECTIVES:
        needs = OBJECTIVES[name].needs(CONFIGS[name])
        words = [f"objective.name={name}", *words_of(name), *(["attack=null"] if needs.attack == "none" else [])]
        section = load_recipe("digits/adversarial", words).config.objective
        assert type(section) is OBJECTIVES[name].Config
        assert section == CONFIGS[name]


def test_reading_a_recipe_and_asking_an_objective_for_its_facts_loads_no_torch() -> None:
    program = (
        "import sys\n"
        "from distributed_at.objectives import OBJECTIVES\n"
        "from distributed_at.recipes import load_recipe\n"
        "for name in OBJECTIVES: OBJECTIVES[name].passes(OBJECTIVES[name].Config())\n"
        "load_recipe('digits/adversarial')\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("name", OBJECTIVES.builtin)
def test_objective_is_of_its_class_finite_and_stateless(name: str) -> None:
    objective, (batch, adv) = build(CONFIGS[name]), batch_of()
    assert isinstance(objective, OBJECTIVES[name])
    needs = objective.needs(objective.config)
    terms = objective.loss(Recorder(), batch, None if needs.attack == "none" else adv)
    assert terms.loss.shape == ()
    assert torch.isfinite(terms.loss)
    assert all(not t.requires_grad and t.shape == () for t in terms.terms.values())
    assert all(not z.requires_grad for z in terms.logits.values())
    assert set(terms.logits) <= {"clean", "adv"}
    assert objective.state_dict() == {}
    objective.load_state_dict({})
    with pytest.raises(ValueError, match="keeps no state"):
        objective.load_state_dict({"counter": 1})


@pytest.mark.parametrize("name", ["pgd_at", "trades", "mixture"])
def test_forgotten_attack_is_refused(name: str) -> None:
    batch, adv = batch_of()
    for wrong in (None, adv[:5]):
        with pytest.raises(ValueError, match="adversarial images"):
            build(CONFIGS[name]).loss(Recorder(), batch, wrong)


@pytest.mark.parametrize(("ratio", "kept"), [(0.0, 0), (0.2, 6), (0.4, 13), (0.6, 19), (0.8, 26), (1.0, 32)])
def test_share_of_clean_images_is_exact_in_every_group(ratio: float, kept: int) -> None:
    batch, adv = batch_of(64, group=32)
    objective = build(Mixture.Config(clean_ratio=ratio))
    rows = objective.clean_rows(batch)
    assert torch.bincount(batch.group_ids[rows], minlength=2).tolist() == [kept, kept]
    assert kept == kept_count(32, ratio)
    recorder = Recorder()
    terms = objective.loss(recorder, batch, adv)
    assert len(recorder.calls[0]["x"]) == 64 + 2 * kept == 2 * objective.bn_group_sizes(32)["adv"]
    labels = terms.labels_of("clean", batch.labels)
    assert ("clean" in terms.logits) == (kept > 0)
    if kept:
        assert len(labels) == len(terms.logits["clean"])


def test_no_clean_image_means_plain_adversarial_training() -> None:
    batch, adv = batch_of()
    mixed = build(Mixture.Config(clean_ratio=0.0)).loss(Recorder(), batch, adv).loss
    assert torch.allclose(mixed, build(CONFIGS["pgd_at"]).loss(Recorder(), batch, adv).loss)


@pytest.mark.parametrize("norm", ["mbn", "gn"])
def test_branches_have_their_own_group_sizes(norm: str) -> None:
    assert build(Mixture.Config(clean_ratio=0.5), norm=norm).bn_group_sizes(32) == {"clean": 16, "adv": 32}
    assert build(CONFIGS["trades"]).bn_group_sizes(32) == {"clean": 32, "adv": 32}


def test_clean_labels_follow_the_kept_rows() -> None:
    batch, adv = batch_of(20, group=10)
    objective = build(Mixture.Config(clean_ratio=0.3), norm="mbn")
    recorder = Recorder()
    terms = objective.loss(recorder, batch, adv)
    assert torch.equal(terms.labels_of("clean", batch.labels), batch.labels[objective.clean_rows(batch)])
    assert torch.equal(terms.labels_of("adv", batch.labels), batch.labels)
    expected = recorder.model(batch.images[objective.clean_rows(batch)])
    assert torch.allclose(terms.logits["clean"], expected)


def test_attack_branch_is_handed_on() -> None:
    objective = build(CONFIGS["pgd_at"], attack_branch="clean")
    batch, adv = batch_of()
    recorder = Recorder()
    objective.loss(recorder, batch, adv)
    assert objective.context.attack_branch == recorder.calls[0]["branch"] == "clean"


@pytest.mark.parametrize("form", ["uniform", "other_classes"])
def test_smoothed_labels_are_distributions(form: str) -> None:
    soft = smooth_labels(labels(), CLASSES, 0.1, form=form)
    assert torch.allclose(soft.sum(1), torch.ones(12))
    assert torch.equal(soft.argmax(1), labels())
    wrong = 0.1 / CLASSES if form == "uniform" else 0.1 / (CLASSES - 1)
    assert soft.min().item() == pytest.approx(wrong)


def test_smoothing_names_the_nearest_form() -> None:
    with pytest.raises(ConfigError, match="other_classes"):
        smooth_labels(labels(), CLASSES, 0.1, form="other_class")
    for outside in (1.0, 1.5, -0.1):
        with pytest.raises(ConfigError, match="label_smoothing"):
            smooth_labels(labels(), CLASSES, outside)


def test_page_of_the_objectives_is_current() -> None:
    path = Path(__file__).parents[2] / "docs" / "objectives.md"
    assert objectives_page() == path.read_text(encoding="utf-8"), "run python -m distributed_at.objectives.page"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["objective.name=standard"],
            "objective 'standard' trains on clean images: remove attack, or set attack: null",
        ),
        (["attack=null"], "objective 'pgd_at' needs attack"),
        (
            ["objective.name=mixture", "attack.loss=kl"],
            "train on it (pgd_at, trades, mart); the objective is 'mixture'",
        ),
        (["objective.name=trades", "attack.target=random_other"], "is untargeted; attack.target is 'random_other'"),
        (["model.norm=mbn"], "trains both branches (trades, mart, mixture); 'pgd_at' trains adv alone"),
        (["model.norm=mbn", "objective={name: mixture, clean_ratio: 0}"], "'mixture' trains adv alone"),
        (["train.bn_only=clean"], "'pgd_at' trains on adv images: use standard"),
        (["train.bn_only=adv", "objective.name=trades"], "'trades' trains on clean and adv images: use pgd_at"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_an_objective_cannot_be_combined_with_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("digits/adversarial", words)
    assert said in str(caught.value)


def test_a_kept_share_of_clean_images_wants_whole_groups_and_plan_says_so() -> None:
    words = ["train={batch_size: 32, bn_group_size: 16}", "objective={name: mixture, clean_ratio: 0.5}"]
    config = load_recipe("digits/adversarial", words).config
    make_plan(config, world_size=2)
    with pytest.raises(
        ConfigError, match=r"clean_ratio 0.5 chooses its clean images inside a BN group.*at most 2 workers"
    ):
        make_plan(config, world_size=4)
    whole = load_recipe("digits/adversarial", [*words, "objective.clean_ratio=1"]).config
    make_plan(whole, world_size=4)


def test_activations_of_all_trained_images_of_a_pair_count_in_the_plan() -> None:
    def activations(*words: str) -> int:
        return make_plan(load_recipe("digits/adversarial", words).config).memory.activations

    assert activations("objective.name=trades") == 2 * activations()
    assert activations("objective={name: trades, clean_forwards: twice}") == 3 * activations()
    assert activations("objective={name: mixture, clean_ratio: 0.5}") == 1.5 * activations()


@pytest.mark.parametrize("form", ["uniform", "other_classes"])
def test_smoothed_cross_entropy_weighs_every_class(form: str) -> None:
    """Worked out by hand for two images of four classes."""
    logits = torch.tensor([[3.0, 1.0, 2.0, -1.0], [0.0, 4.0, 1.0, 2.0]], dtype=torch.float64)
    surprise = logits.exp().sum(1).log()[:, None] - logits
    wrong, right = (0.05, 0.85) if form == "uniform" else (0.2 / 3, 0.8)
    by_hand = [
        sum((right if k == label else wrong) * surprise[row, k].item() for k in range(4))
        for row, label in enumerate((0, 2))
    ]
    found = smoothed_cross_entropy(logits, torch.tensor([0, 2]), 0.2, form=form)
    assert found.tolist() == pytest.approx(by_hand, rel=1e-12)  # in the arithmetic of the logits
    plain = smoothed_cross_entropy(logits, torch.tensor([0, 2]), 0.0, form=form)
    assert plain.tolist() == pytest.approx([surprise[0, 0].item(), surprise[1, 2].item()])


def test_perturbed_weights_act_on_loss_and_gradient_and_are_bitwise_restored() -> None:
    torch.manual_seed(0)
    network, x = torch.nn.Linear(64, 32), torch.randn(5, 64)
    before = {name: weight.detach().clone() for name, weight in network.named_parameters()}
    changes = {"weight": torch.full((32, 64), 1e-3) * network.weight.detach().exp()}
    other = torch.nn.Linear(64, 32)
    other.load_state_dict({"weight": before["weight"] + changes["weight"], "bias": before["bias"]})
    with perturbed(network, changes):
        loss = network(x).tanh().square().sum()
        loss.backward()
    other(x).tanh().square().sum().backward()
    assert torch.equal(network.weight.grad, other.weight.grad)
    assert all(torch.equal(weight, before[name]) for name, weight in network.named_parameters())
    with pytest.raises(RuntimeError, match="stop"), perturbed(network, changes):
        raise RuntimeError("stop")
    assert torch.equal(network.weight, before["weight"])
    with pytest.raises(ValueError, match="no parameters"), perturbed(network, {"wieght": x}):
        pass


def test_backward_outside_of_perturbed_weights_is_an_error_not_a_wrong_gradient() -> None:
    network, x = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2)), torch.randn(5, 3)
    with perturbed(network, {"1.weight": torch.ones(2, 3)}):
        loss = network(x).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_objective_keeps_what_it_declares() -> None:
    class Undeclared(PgdAt):
        def place_tensors(self) -> dict[str, torch.Tensor]:
            return {"sums": torch.zeros(2)}

    class Lost(PgdAt):
        @classmethod
        def needs(cls, config: PgdAt.Config) -> Needs:
            return Needs(networks=("teacher",), state=True)

    for wrong, said in ((Undeclared, "keeps a state: declare it"), (Lost, r"declares the networks \('teacher',\)")):
        with pytest.raises(TypeError, match=said):
            check_declared(wrong(PgdAt.Config(), ObjectiveContext(num_classes=2, seed=0)))


@pytest.mark.parametrize("name", CONFIGS)
def test_facts_are_the_classes_own(name: str) -> None:
    """They are asked for where a recipe is planned and drawn, where no objective is built."""
    share = OBJECTIVES[name].clean_share(CONFIGS[name])
    assert share is None or 0.0 <= share <= 1.0


def test_the_clean_forward_after_a_step_keeps_nothing_for_a_gradient() -> None:
    objective = build(PgdAt.Config(bn_clean_updates_per_step=1))
    recorder, (batch, _) = Recorder(), batch_of()
    objective.after_step(recorder, batch)
    assert [(call["branch"], call["bn"], call["grad"]) for call in recorder.calls] == [("adv", "train", False)]
