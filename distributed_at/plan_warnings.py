"""What ``plan`` warns of: combinations that run but do not mean what a reader of the number would think."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distributed_at.bench.certificate import check_certificate
from distributed_at.catalogue.attacks import ATTACK_TARGETS
from distributed_at.catalogue.networks import is_foreign
from distributed_at.config import AttackConfig, RunConfig
from distributed_at.data.mixed_order import phases
from distributed_at.engine.batching import BatchPlan
from distributed_at.engine.processes.open_files import files_needed
from distributed_at.errors import ConfigError
from distributed_at.evaluation.kinds import KINDS
from distributed_at.models.statistics import trains_on_one_image
from distributed_at.objectives import OBJECTIVES

# Below this a ResNet's attack step is bound by kernel launches rather than by the GPU.
_SMALL_MICRO_BATCH = 24
_USUAL_FILES = 1024  # ulimit -n of most systems


@dataclass(frozen=True)
class PlanWarning:
    """A stable code for scripts and a sentence for people; a 'note' says that something was checked and is well, or what it comes to."""

    code: str
    message: str
    level: Literal["warning", "note"] = "warning"


def plan_warnings(config: RunConfig, batch: BatchPlan, *, num_train: int, has_batch_norm: bool) -> list[PlanWarning]:
    """Return everything about a valid recipe at this world size that its user should know before paying for it.

    ``has_batch_norm``: its network has layers with running statistics; a transformer has none whatever the norm.
    """
    found = [
        *_precision(config),
        *_batch(config, batch, num_train, has_batch_norm),
        *_weights(config),
        *_attack(config),
        *_selection(config),
    ]
    warnings = [PlanWarning(code, message) for code, message in [*found, *_evaluation(config)]]
    notes = OBJECTIVES[config.objective.name].notes(config.objective, batch.group_size)
    return [
        *warnings,
        *_certificates(config),
        *(PlanWarning("objective", text, "note") for text in notes),
        *(PlanWarning("mixed_batches", text, "note") for text in _mixing(config, num_train)),
    ]


def _mixing(config: RunConfig, num_train: int) -> list[str]:
    """Say what a batch holds, phase by phase, where it holds more than labelled images once each."""
    data, train = config.data, config.train
    if not data.mixes:
        return []
    found = phases(data.ratios, batch_size=train.batch_size, copies=data.labelled_copies, batches_per_epoch=1)
    copies = f", each {data.labelled_copies} times" if data.labelled_copies > 1 else ""
    return [
        f"from epoch {epoch:g} a batch holds {phase.labelled} labelled images ({phase.distinct} different ones{copies}) and "
        f"{phase.extra} extra ones; an epoch is as many batches as the {num_train:,} labelled images fill"
        for (epoch, _), phase in zip(data.ratios, found, strict=True)
    ]


def refuse_lone_image(config: RunConfig, batch: BatchPlan, *, num_train: int, num_classes: int) -> None:
    """Refuse a run whose last batch of an epoch would end it.

    Raises:
        ConfigError: a batch-norm group would hold one image, of which a layer has one value a channel.
    """
    last = _lone_image(config, batch, num_train)
    if last and not trains_on_one_image(config.model, num_classes=num_classes, image_size=config.data.image_size):
        raise ConfigError(
            f"the last batch of an epoch holds {last} of {num_train} images, so one batch-norm group of "
            f"{batch.group_size} has a single image, and model.arch {config.model.arch!r} has a batch norm that would "
            "see one value a channel of it, which cannot be normalised: set train.drop_last=true or another "
            "train.batch_size"
        )


def _lone_image(config: RunConfig, batch: BatchPlan, num_train: int) -> int:
    """Return the images of an incomplete last batch that leaves a batch-norm group a single one, else 0."""
    last = 0 if config.data.mixes else num_train % batch.batch_size  # batches that are mixed are all full
    return last if not config.train.drop_last and last % batch.group_size == 1 else 0


def _sixteen_bit_attacks(config: RunConfig) -> list[tuple[str, AttackConfig]]:
    attacks = [("attack", config.attack)]
    attacks += [(f"evaluation.final.{i}.attack", protocol.attack) for i, protocol in enumerate(config.evaluation.final)]
    return [(field, attack) for field, attack in attacks if attack is not None and attack.dtype != "fp32"]


def _precision(config: RunConfig) -> list[tuple[str, str]]:
    return [
        (
            "attack_without_certificate",
            f"{field}.dtype is {attack.dtype} and {field}.precision_certificate is not set: 16-bit attacks have been "
            "seen to be weaker, which flatters the model (about 3 % for Xie & Yuille's); use fp32, or certify",
        )
        for field, attack in _sixteen_bit_attacks(config)
        if attack.precision_certificate is None
    ]


def _certificates(config: RunConfig) -> list[PlanWarning]:
    found = []
    for field, attack in _sixteen_bit_attacks(config):
        if attack.precision_certificate is not None:
            code, message = check_certificate(Path(attack.precision_certificate), config, attack)
            level: Literal["warning", "note"] = "note" if code == "certificate_passed" else "warning"
            found.append(PlanWarning(code, f"{field}.precision_certificate: {message}", level))
    return found


def _weights(config: RunConfig) -> list[tuple[str, str]]:
    model = config.model
    if model.pretrained is None or not is_foreign(model.arch) or any(model.pixel_mean):
        return []
    return [
        (
            "pretrained_without_normalisation",
            f"model.pretrained is {model.pretrained} and model.pixel_mean is 0: published weights expect normalised "
            "pixels, most often pixel_mean: [0.485, 0.456, 0.406] and pixel_std: [0.229, 0.224, 0.225]",
        )
    ]


def _batch(config: RunConfig, batch: BatchPlan, num_train: int, has_batch_norm: bool) -> list[tuple[str, str]]:
    found = []
    if batch.group_free and has_batch_norm and not config.model.sync_bn:
        found.append(
            (
                "free_bn_group",
                f"train.bn_group_size is null, so batch norm sees {batch.group_size} images at this world size and "
                "another number at another: results at different world sizes are different protocols",
            )
        )
    if has_batch_norm and not batch.group_free and batch.ranks_per_group > 1:
        found.append(
            (
                "bn_group_spans_ranks",
                f"each batch-norm group of {batch.group_size} spans {batch.ranks_per_group} ranks, whose statistics "
                "are synchronised in every training forward; a smaller world size needs no such traffic",
            )
        )
    if config.data.facts.image_size is None and batch.micro_batch < _SMALL_MICRO_BATCH and batch.world_size > 1:
        found.append(
            (
                "small_micro_batch",
                f"{batch.micro_batch} images a forward do not fill a modern GPU; "
                "kernel launches, not arithmetic, will set the pace",
            )
        )
    needed = files_needed(batch.world_size, "cuda")
    if needed > _USUAL_FILES:
        found.append(
            (
                "open_files",
                f"rank 0 of {batch.world_size} needs up to {needed} open files; the usual limit is {_USUAL_FILES} and is "
                "raised as far as ulimit -Hn goes, which must reach that on its node",
            )
        )
    last = _lone_image(config, batch, num_train)
    if last and has_batch_norm:
        found.append(
            (
                "single_image_group",
                f"the last batch of an epoch holds {last} images, so one batch-norm group has a single image; "
                "set train.drop_last: true or another batch_size",
            )
        )
    return found


def _range(sizes: list[float]) -> str:
    ends = f"{max(sizes):g}", f"{min(sizes):g}"
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def _attack(config: RunConfig) -> list[tuple[str, str]]:
    attack = config.attack
    if attack is None:
        return []
    found = []
    reach = sum(attack.step_sizes())
    if _is_adversarial(config) and (attack.eps == 0 or attack.num_steps == 0):
        what = "eps" if attack.eps == 0 else "num_steps"
        found.append(
            (
                "attack_does_nothing",
                f"attack.{what} is 0 under objective '{config.objective.name}': its 'adversarial' images are "
                f"{'the clean ones' if attack.eps == 0 else 'random starts without a step'}",
            )
        )
    if attack.num_steps and reach < attack.eps:
        found.append(
            (
                "attack_cannot_reach_eps",
                f"attack: {attack.num_steps} steps of {_range(attack.step_sizes())}/255 move at most {reach:g}/255, "
                f"less than eps {attack.eps:g}/255",
            )
        )
    if attack.num_steps == 1 and not ATTACK_TARGETS[attack.target].targeted:
        found.append(
            (
                "catastrophic_overfitting",
                "one-step untargeted training is known to collapse to zero robust accuracy late in training; "
                "keep evaluation.validation with a multi-step attack",
            )
        )
    trained = OBJECTIVES[config.objective.name].trains(config.objective)
    if attack.branch == "clean" and len(trained) > 1:
        found.append(
            (
                "attack_on_another_branch",
                f"attack.branch is clean, but objective '{config.objective.name}' trains on adversarial images through "
                "the branch adv: they are made against a branch that they do not train",
            )
        )
    if attack.bn_mode == "train":
        found.append(
            (
                "attack_moves_statistics",
                "attack.bn_mode is train: every attack forward moves the running statistics, so they describe images "
                "between clean and adversarial (the papers' 'train mode')",
            )
        )
    return found


def _selection(config: RunConfig) -> list[tuple[str, str]]:
    robust = [protocol for protocol in config.evaluation.validation if KINDS[protocol.kind].attacked]
    if config.train.select == "best_validation" and _is_adversarial(config) and not robust:
        return [
            (
                "selection_without_attack",
                "train.select is best_validation, but evaluation.validation measures clean accuracy alone; "
                "add a pgd protocol, or the least robust checkpoint may be chosen",
            )
        ]
    if config.train.select == "last" and config.data.facts.robust_overfitting and config.train.epochs >= 100:
        return [
            (
                "robust_overfitting",
                f"train.select is last: on {config.data.facts.title}, robust accuracy falls in the epochs after the rate drops",
            )
        ]
    return []


def _evaluation(config: RunConfig) -> list[tuple[str, str]]:
    final = config.evaluation.final
    if all(KINDS[protocol.kind].attacked for protocol in final):
        found = [("no_clean_accuracy", "evaluation.final does not measure clean accuracy")]
    else:
        found = []
    if not _is_adversarial(config):
        return found
    robust = [protocol for protocol in final if KINDS[protocol.kind].attacked]
    if not robust:
        return [
            *found,
            ("no_robust_accuracy", "evaluation.final measures no robust accuracy of a robustly trained model"),
        ]
    if all(KINDS[protocol.kind].is_targeted(protocol) for protocol in robust):
        found.append(
            (
                "targeted_evaluation",
                "every attack in evaluation.final is targeted: such numbers are higher than untargeted ones and compare "
                "only with the same protocol",
            )
        )
    smaller = [p for p in robust if p.attack is not None and _is_smaller(p.attack, config.attack)]
    if smaller:
        names = ", ".join(p.name or p.kind for p in smaller)
        found.append(("evaluation_radius", f"evaluation.final ({names}) uses a smaller eps than the training attack"))
    return found


def _is_adversarial(config: RunConfig) -> bool:
    return OBJECTIVES[config.objective.name].needs(config.objective).attack != "none"


def _is_smaller(evaluation: AttackConfig, training: AttackConfig | None) -> bool:
    return training is not None and evaluation.norm == training.norm and evaluation.eps < training.eps
