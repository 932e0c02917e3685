"""What an evaluation counts and how AutoAttack is set up, on cases small enough to work out by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted

from distributed_at.config import AttackConfig, evaluation_entry
from distributed_at.evaluation import build_protocol
from distributed_at.evaluation.attacked import AttackedSamples, ThreatViolationError, inside_ball, perturbation_size
from distributed_at.evaluation.kinds import autoattack
from distributed_at.evaluation.kinds.pgd import build_attack, run_pgd
from distributed_at.evaluation.protocol import effective_dtype

CPU = torch.device("cpu")


def linear(x):
    return x.flatten(1)[:, :10]


def protocol(version="standard", num_classes=10, **attack):
    values = {"eps": 8, "num_steps": 1, "step_size": 2, **attack}
    config = evaluation_entry(kind="autoattack", version=version, attack=AttackConfig(**values))
    return build_protocol(config, weights="w", ids=np.arange(4), num_classes=num_classes, seed=5)


@pytest.mark.parametrize(
    ("version", "restarts", "turns", "targets"), [("standard", 1, 1, 9), ("plus", 5, 1, 9), ("rand", 1, 20, 0)]
)
def test_autoattack_gets_the_published_budgets(version, restarts, turns, targets):
    """Croce & Hein 2020: 100 steps, 9 targets of one restart each, 5000 queries; 5 restarts in plus, 20 draws in rand."""
    made = protocol(version)
    tools = autoattack._toolbox(linear, made, CPU, seed=3)
    assert (made.num_steps, made.num_queries, made.num_targets) == (100, 0 if version == "rand" else 5000, targets)
    assert (tools.apgd.n_restarts, tools.apgd.eot_iter) == (restarts, turns)
    assert (tools.apgd_targeted.n_restarts, tools.apgd_targeted.n_target_classes) == (1, targets)
    assert (tools.fab.n_iter, tools.fab.n_target_classes, tools.square.n_queries) == (100, targets, made.num_queries)
    for part in (tools.apgd, tools.apgd_targeted, tools.fab, tools.square):
        assert (part.eps, part.norm, part.seed) == (8 / 255, "Linf", 3)


@pytest.mark.parametrize("steps", [1, 4, 5, 10, 17, 25, 34, 50, 100])
def test_the_checkpoints_of_apgd_are_those_that_it_sets_itself(steps):
    tools = autoattack._toolbox(linear, dataclasses.replace(protocol(), num_steps=steps), CPU, seed=0)
    for part, own in ((tools.apgd, APGDAttack), (tools.apgd_targeted, APGDAttack_targeted)):
        reference = own(linear, n_iter=steps, eps=8 / 255, device="cpu")
        reference.init_hyperparam(torch.zeros(1, 3, 4, 4))
        for name in ("n_iter", "n_iter_2", "n_iter_min", "size_decr"):
            assert getattr(part, name, None) == getattr(reference, name), name


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_autoattack_knows_its_norm(norm):
    tools = autoattack._toolbox(linear, protocol(norm=norm, eps=100), CPU, seed=0)
    assert tools.apgd.norm == {"linf": "Linf", "l2": "L2"}[norm]


def test_each_attack_of_the_ensemble_is_run_as_its_name_says():
    class Part:
        loss = targeted = n_restarts = None

        def __init__(self, name):
            self.name = name

        def perturb(self, x, y):
            return self.name, self.loss, self.targeted, self.n_restarts

    class Tools:
        apgd, apgd_targeted, fab, square = (Part(name) for name in ("apgd", "apgd_targeted", "fab", "square"))

    ran = {
        name: autoattack._run_one(Tools, name, None, None, 5)
        for name in ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
    }
    assert ran == {
        "apgd-ce": ("apgd", "ce", None, None),
        "apgd-dlr": ("apgd", "dlr", None, None),
        "apgd-t": ("apgd_targeted", None, None, None),
        "fab": ("fab", None, False, 5),
        "fab-t": ("fab", None, True, 1),
        "square": ("square", None, None, None),
    }


def test_pixels_from_0_to_1_are_taken_and_a_little_outside_refused(monkeypatch):
    monkeypatch.setattr(autoattack, "_run_one", lambda tools, name, x, y, restarts: x)
    x, y, made = torch.zeros(2, 1, 4, 4), torch.tensor([0, 1]), protocol("fast")
    run = lambda x: autoattack.run_autoattack(linear, x, y, chunk_ids=np.arange(2), protocol=made)  # noqa: E731
    for fine in (x, x + 1, x + 0.5):
        assert len(run(fine).broken) == 2
    for bad in (x - 1e-3, x + 1.001):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            run(bad)


def test_the_chunks_seed_never_changes():
    assert autoattack.chunk_seed(0, np.array([1, 2, 3])) == 7572095205480427600


def test_a_perturbation_is_measured_in_its_norm():
    x = torch.zeros(2, 3, 2, 2)
    adv = x.clone()
    adv[0, 0, 0, 0], adv[0, 2, 1, 1], adv[1, 1, 0, 1] = 0.3, -0.4, -0.25
    assert perturbation_size(adv, x, norm="linf").tolist() == pytest.approx([0.4, 0.25])
    assert perturbation_size(adv, x, norm="l2").tolist() == pytest.approx([0.5, 0.25])
    assert perturbation_size(adv, x, norm="l2").dtype == torch.float64


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_rounding_alone_is_forgiven_and_grows_with_the_pixels_for_l2(norm):
    pixels, eps = 3 * 8 * 8, 0.25
    x = torch.full((2, 3, 8, 8), 0.5, dtype=torch.float64)
    one = 6e-8 if norm == "linf" else 6e-8 * pixels**0.5
    for excess, fine in ((0.9 * (eps * 1e-6 + one), True), (1.1 * (eps * 1e-6 + one), False)):
        adv = x.clone()
        adv[1, 2, 3, 4] += eps + excess
        if fine:
            inside = inside_ball(adv, x, eps=eps, norm=norm)
            assert (perturbation_size(inside, x, norm=norm) <= eps).all()
            assert torch.equal(inside[0], x[0])
        else:
            with pytest.raises(ThreatViolationError, match="moved an image"):
                inside_ball(adv, x, eps=eps, norm=norm)


def test_the_box_may_be_left_by_rounding_alone():
    x = torch.tensor([0.0, 1.0]).reshape(1, 1, 1, 2)
    inside = inside_ball(x + torch.tensor([-9e-7, 9e-7]), x, eps=0.1, norm="linf")
    assert torch.equal(inside, x)
    for step in ([-1.2e-6, 0.0], [0.0, 1.3e-6]):
        with pytest.raises(ThreatViolationError, match="box"):
            inside_ball(x + torch.tensor(step), x, eps=0.1, norm="linf")


def logits_for(*classes):
    return torch.nn.functional.one_hot(torch.tensor(classes), 4).float()


def test_an_outcome_keeps_what_broke_a_sample_first_and_the_highest_loss_where_nothing_did():
    y = torch.tensor([0, 1, 2, 3])
    outcome = AttackedSamples.unbroken(y)
    assert outcome.loss.tolist() == [-float("inf")] * 4
    everyone = torch.arange(4)
    outcome.record(everyone, logits_for(0, 3, 2, 3), torch.tensor([0.5, 2.0, 0.4, 0.3]), y, 0)
    assert outcome.prediction.tolist() == [0, 3, 2, 3]
    assert outcome.broken.tolist() == [False, True, False, False]
    assert outcome.attack.tolist() == [-1, 0, -1, -1]
    # the second attack: sample 0 holds at a lower loss, 1 is broken already, 2 falls, 3 holds at a higher loss
    outcome.record(everyone, logits_for(0, 2, 0, 3), torch.tensor([0.2, 9.0, 0.1, 0.6]), y, 1)
    assert outcome.loss.tolist() == pytest.approx([0.5, 2.0, 0.1, 0.6])
    assert outcome.prediction.tolist() == [0, 3, 0, 3]
    assert outcome.broken.tolist() == [False, True, True, False]
    assert outcome.attack.tolist() == [-1, 0, 1, -1]
    assert not outcome.target_hit.any()


def test_an_outcome_of_some_samples_touches_those_alone_and_a_hit_stays_a_hit():
    y = torch.tensor([0, 1, 2])
    outcome = AttackedSamples.unbroken(y)
    some = torch.tensor([2, 0])
    outcome.record(some, logits_for(1, 0), torch.tensor([3.0, 1.0]), y[some], 4, targets=torch.tensor([1, 3]))
    assert outcome.broken.tolist() == [False, False, True]
    assert outcome.attack.tolist() == [-1, -1, 4]
    assert outcome.loss.tolist() == [1.0, -float("inf"), 3.0]
    assert outcome.target_hit.tolist() == [False, False, True]
    outcome.record(some, logits_for(2, 0), torch.tensor([0.0, 0.0]), y[some], 5, targets=torch.tensor([1, 3]))
    assert outcome.target_hit.tolist() == [False, False, True]


@pytest.mark.parametrize(
    "start",
    [{"start": "gaussian", "start_std": 0.02}, {"start": "uniform", "start_clean_probability": 0.25}],
    ids=["gaussian", "uniform"],
)
def test_a_pgd_protocol_is_the_attack_that_runs(start):
    attack = AttackConfig(
        norm="l2", eps=128, num_steps=7, step_size=15, restarts=3, loss="margin", target="most_confusing",
        clip_start=False, **start,
    )  # fmt: skip
    config = evaluation_entry(kind="pgd", attack=attack)
    found = build_attack(build_protocol(config, weights="w", ids=np.arange(4), num_classes=10))
    assert (found.threat.norm, found.threat.eps, found.step_size) == ("l2", 128 / 255, 15 / 255)
    assert (found.num_steps, found.restarts, found.start) == (7, 3, start["start"])
    assert (found.loss, found.target, found.clip_start) == ("margin", "most_confusing", False)
    assert found.start_std == start.get("start_std", 0.001)
    assert found.start_clean_probability == start.get("start_clean_probability", 0.0)
    assert (found.num_classes, found.check_input, found.fused) == (10, False, True)


def test_a_protocol_of_clean_accuracy_names_no_attack():
    made = build_protocol(evaluation_entry(kind="clean"), weights="w", ids=np.array([3, 3, 1]), num_classes=10)
    assert (made.num_samples, made.ball, made.attacks, made.attacked) == (2, None, (), False)


def test_tf32_is_how_a_device_computes_and_not_another_attack():
    """A protocol names it, since the number depends on it; the attack's own arithmetic is float32 then."""
    attack = AttackConfig(eps=8, num_steps=2, step_size=2)
    made = build_protocol(evaluation_entry(kind="pgd", attack=attack), weights="w", ids=np.arange(4), num_classes=10)
    assert made.dtype == "fp32"
    assert build_attack(dataclasses.replace(made, dtype="tf32")) == build_attack(made)
    assert build_attack(dataclasses.replace(made, dtype="fp16")).loss_scale == 128.0


@pytest.mark.parametrize("target", ["most_confusing", "least_likely", "random_other", "none"])
def test_a_targeted_attack_counts_its_hits_in_every_restart_and_an_untargeted_one_none(target):
    """Logits are the first ten pixels, so that 100/255 up on the target and down elsewhere always wins."""
    attack = AttackConfig(eps=100, num_steps=4, step_size=50, restarts=2, target=target)
    made = build_protocol(evaluation_entry(kind="pgd", attack=attack), weights="w", ids=np.arange(6), num_classes=10)
    x = torch.full((6, 1, 4, 4), 0.5) + 0.01 * torch.rand((6, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    y, asked = linear(x).argmax(1), []
    outcome = run_pgd(lambda z: asked.append(len(z)) or linear(z), x, y, ids=torch.arange(6), protocol=made)
    assert outcome.broken.all()
    assert outcome.target_hit.all() == (target != "none")
    assert outcome.target_hit.any() == (target != "none")
    assert (set(asked[len(asked) // 2 :]) == {6}) or target == "none"
    first_restart_alone = len(asked) == 5  # four steps and the verdict; nothing is left for the second
    assert first_restart_alone == (target == "none")


def test_the_published_autoattack_is_the_default():
    made = protocol()
    assert (made.chunk_size, made.num_steps, made.num_queries, made.eot_steps) == (128, 100, 5000, 1)
    assert made.scope == "clean_correct"


def test_what_a_number_is_called_follows_its_kind():
    metrics = {kind: dataclasses.replace(protocol(), kind=kind).metric for kind in ("autoattack", "clean", "pgd")}
    assert metrics == {"autoattack": "robust_accuracy", "clean": "clean_accuracy", "pgd": "robust_accuracy"}


@pytest.fixture
def float32_backends():
    """Convolutions and products, set to plain float32; they come back as they were."""
    backends = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [each.fp32_precision for each in backends]
    for each in backends:
        each.fp32_precision = "ieee"
    yield backends
    for each, precision in zip(backends, before, strict=True):
        each.fp32_precision = precision


@pytest.mark.parametrize("which", [0, 1], ids=["convolutions", "products"])
def test_float32_is_named_tf32_where_a_gpu_computes_so(which, float32_backends, monkeypatch):
    gpu = torch.device("cuda")
    capability = [8, 0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: tuple(capability))
    assert effective_dtype("fp32", gpu) == "fp32"
    float32_backends[which].fp32_precision = "tf32"
    assert effective_dtype("fp32", gpu) == "tf32"
    assert [effective_dtype(d, gpu) for d in ("bf16", "fp16")] == ["bf16", "fp16"]
    assert effective_dtype("fp32", CPU) == "fp32"
    capability[0] = 7
    assert effective_dtype("fp32", gpu) == "fp32"


def test_a_sample_that_pgd_breaks_is_broken_by_its_only_attack():
    attack = AttackConfig(eps=64, num_steps=1, step_size=64, start="zero")
    what = build_protocol(
        evaluation_entry(kind="pgd", attack=attack), weights="w", ids=np.arange(2), num_classes=2, seed=0
    )
    x, y = torch.tensor([[0.9, 0.1], [0.55, 0.45]]).view(2, 1, 1, 2), torch.tensor([0, 0])
    found = run_pgd(lambda images: images.flatten(1), x, y, ids=torch.arange(2), protocol=what)
    assert (found.broken.tolist(), found.attack.tolist()) == ([False, True], [-1, 0])


@pytest.mark.parametrize("change", [{"num_steps": 99}, {"num_steps": 1}, {"num_queries": 4999}])
def test_a_smaller_budget_than_the_published_one_is_named(change):
    assert dataclasses.replace(protocol(), **change).name == f"{protocol().name} (reduced budget)"
