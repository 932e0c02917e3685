"""The recipes that are trained both ways: one tiny recipe, and what each case changes in it.

Not every combination, but every value: what a recipe can name stands in at least one case (``coverage.py`` says which
fields those are), and a new objective, norm, optimiser, schedule or knob joins by one entry here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distributed_at.config import RunConfig
from distributed_at.recipes import load_recipe

RECIPE = Path(__file__).parents[2] / "digits" / "adversarial.yaml"
BATCH = 24
# Three steps an epoch and two epochs, unless a case says otherwise.
BASE = (
    "data.limit_train=72",
    "data.validation_size=0",
    "data.prefetch=1",
    "model={arch: preact_resnet, blocks: [1, 1], block: basic, base_width: 4, stem: cifar, groups: 2}",
    "attack={eps: 51, num_steps: 2, step_size: 20}",
    f"train={{epochs: 2, batch_size: {BATCH}, bn_group_size: 6, select: last}}",
    "optimizer={name: sgd, lr: 0.1, momentum: 0.9, weight_decay: 0.02}",
    "schedule={name: constant, warmup_epochs: 0}",
    "checkpoint={every_epochs: null, asynchronous: false}",
    "evaluation={every_epochs: null, validation: []}",
    "log.every_steps=1",
)
ALL_WORLDS = ((1, 1), (1, 2), (2, 1), (2, 2))  # ranks, forwards a rank and step


@dataclass(frozen=True)
class Case:
    """One recipe, and where it is trained.

    Attributes:
        words: overrides of the base recipe.
        worlds: (ranks, forwards of a rank in a step).
        double: in float64; else as users train, in float32 and with the compiled kernels.
        deepspeed: False trains with the plain engine that stands in where DeepSpeed is absent.
    """

    words: tuple[str, ...]
    worlds: tuple[tuple[int, int], ...] = ALL_WORLDS
    double: bool = True
    deepspeed: bool = True

    def config(self, world: tuple[int, int], initial: Path) -> RunConfig:
        """Return the recipe as it is trained with so many ranks and forwards."""
        ranks, forwards = world
        cut = f"train.micro_batch_size={BATCH // ranks // forwards}"
        return load_recipe(str(RECIPE), [*BASE, cut, f"train.init_from={initial}", *self.words]).config

    def forwards(self, world: tuple[int, int]) -> int:
        """Return how many forwards make a step, as far as batch norm is concerned."""
        return world[1] if "model.sync_bn=true" in self.words else world[0] * world[1]


CASES: dict[str, Case] = {
    "pgd_at": Case(
        (
            "schedule={name: cosine, final_lr: 0.01, warmup_epochs: 0.6, warmup_start: 0.02}",
            "optimizer.lr_per=48",
            "objective.label_smoothing=0.1",
            "attack.eps_warmup_epochs=1.4",
            "train.ema={decay: 0.8, dynamic: true, buffers: average}",
        )
    ),
    "bag of tricks": Case(
        (
            "schedule={name: piecewise, milestones: [1, 1.6], boundary: last_iteration, warmup_epochs: 0.7, warmup_form: overshoot}",
            "objective={name: pgd_at, label_smoothing: 0.2, label_smoothing_form: other_classes, bn_clean_updates_per_step: 2}",
            "attack={bn_mode: train, final_forward: true, eps_warmup_epochs: 1, eps_warmup_form: overshoot}",
            "optimizer.weight_decay_rule=all",
            "seed=3",
        )
    ),
    "robust overfitting": Case(
        (
            "objective={name: pgd_at, bn_clean_updates_per_step: 1}",
            "attack={norm: l2, eps: 128, step_size: 60, restarts: 2}",
            "schedule={name: cyclic, final_lr: 0.005}",
            "optimizer.weight_decay_rule=no_norm_bias",
            "log.every_steps=4",
        )
    ),
    "intriguing properties": Case(
        (
            "model={arch: resnet, pixel_mean: [0.4, 0.5, 0.6], pixel_std: [0.2, 0.3, 0.25], bn_momentum: 0.2, bn_eps: 1e-3}",
            "attack={target: random_other, step_size: 1, step_rule: at_least_eps_over_steps, clip_start: false}",
            "attack={start_clean_probability: 0.4, start_clean_scope: group}",
            "optimizer={nesterov: true, weight_decay_rule: kernels, lr_per: 12, lr: 0.02}",
            "schedule={name: piecewise, milestones: [0.6, 1.4], factor: 0.2, warmup_epochs: 0.5, warmup_start: 0.01}",
            "train.freeze_bn_from_epoch=1.3",
            "objective.label_smoothing=0.1",
            "log.every_steps=2",
        )
    ),
    "trades": Case(
        (
            "objective={name: trades, beta: 4}",
            "attack={loss: kl, start: gaussian, start_std: 0.01, clip_start: false}",
            "optimizer={name: adam, lr: 0.01, eps: 1e-3}",
            "schedule={name: exponential, decay_every: 0.7, factor: 0.5}",
            "train.ema={decay: 0.9}",
        )
    ),
    "trades on two branches": Case(
        (
            "model.norm=mbn",
            "objective={name: trades, clean_forwards: twice, label_smoothing: 0.1, label_smoothing_form: other_classes}",
            "attack={loss: kl, bn_mode: batch}",
            "optimizer={name: rmsprop, lr: 0.002, rmsprop_decay: 0.8, eps: 0.01}",
            "schedule={name: cyclic, peak_epoch: 0.7, warmup_epochs: 0.4}",
        )
    ),
    "trades as its code": Case(
        (
            "objective={name: trades, beta: 6}",
            "attack={loss: kl, start: gaussian, clip_start: false, bn_mode: train, reference_forward: each_step}",
        )
    ),
    "mart": Case(
        (
            "objective={name: mart, beta: 3}",
            "attack={start: gaussian, start_std: 0.01, clip_start: false}",
            "schedule={name: piecewise, milestones: [1, 2], boundary: counted_from_one}",
        )
    ),
    "mart with a divergence inside": Case(
        (
            "model.norm=mbn",
            "objective={name: mart, clean_bn: batch, label_smoothing: 0.1, label_smoothing_form: other_classes}",
            "attack={loss: kl, bn_mode: batch}",
        ),
        worlds=((1, 1), (2, 2)),
    ),
    "adversarial training on a divergence": Case(("attack={loss: kl, start: uniform}",), worlds=((1, 1), (2, 1))),
    "centralised gradients": Case(
        ("optimizer={name: sgd_gc, lr: 0.1, momentum: 0.9, weight_decay: 0.02}", "parallel.zero_stage=0"),
        worlds=((1, 1), (2, 1)),
    ),
    "centralised gradients of convolutions": Case(
        ("optimizer={name: sgd_gcc, lr: 0.1, momentum: 0.5, weight_decay: 0.02}", "parallel.zero_stage=0"),
        worlds=((1, 1), (1, 2)),
    ),
    "logit pairing's optimiser": Case(
        (
            "optimizer={name: rmsprop_tf, lr: 0.01, rmsprop_decay: 0.8, momentum: 0.9, eps: 0.5}",
            "schedule={name: exponential, decay_every: 0.7, factor: 0.5}",
        ),
        worlds=((1, 1), (2, 2)),
    ),
    "other betas": Case(
        (
            "optimizer={name: adam, lr: 0.01, eps: 1e-3, betas: [0.5, 0.95]}",
            "schedule={name: exponential, factor: 0.4, decay_every: 0.9, staircase: false}",
        ),
        worlds=((1, 1),),
    ),
    "friendly as its code": Case(
        (
            "attack={num_steps: 4, step_noise: 0.02, early_stop: 1, early_stop_epochs: [0.6, 1.4]}",
            "attack.early_stop_boundary=after",
            "schedule={name: piecewise, milestones: [0.4, 1.1], factors: [0.5, 0.2], boundary: after_warmup, warmup_epochs: 0.5}",
        ),
        worlds=((1, 1), (2, 2)),
    ),
    "fast": Case(
        (
            "attack={num_steps: 1, step_size: 63.75, bn_mode: train}",
            "schedule={name: cyclic, momentum_at_peak: 0.8}",
        ),
        worlds=((1, 1), (2, 1)),
    ),
    "one cycle": Case(
        (
            "schedule={name: onecycle, peak_epoch: 2, start_divisor: 10, final_lr: 1e-3, momentum_at_peak: 0.8, changes: epoch}",
            "optimizer.momentum=0.95",
            "train.epochs=4",
        ),
        worlds=((1, 1),),
    ),
    "lines down": Case(
        ("schedule={name: points, points: [[0, 1], [0.9, 1], [0.9, 0.1], [1.8, 0]], boundary: last_iteration}",),
        worlds=((1, 1),),
    ),
    "clipped": Case(("optimizer.clip_norm=0.5",), worlds=((1, 1), (2, 2))),
    "clipped at ZeRO 0": Case(("optimizer.clip_norm=0.5", "parallel.zero_stage=0"), worlds=((1, 2), (2, 1))),
    "clipped without DeepSpeed": Case(("optimizer.clip_norm=0.5",), worlds=((1, 2),), deepspeed=False),
    "free": Case(
        (
            "objective={name: free_at, replays: 2, label_smoothing: 0.1, label_smoothing_form: other_classes}",
            "attack={num_steps: 1, step_size: 51, start: zero, bn_mode: train, eps_warmup_epochs: 0.6}",
            "schedule={name: cyclic, momentum_at_peak: 0.8}",
            "data.limit_train=65",  # a last batch of two whole groups and a half, of which a rank has none
            "train.drop_last=false",
            "optimizer.lr=0.05",
        )
    ),
    "free as its code": Case(
        (
            "objective={name: free_at, replays: 3, box: images, gradient: own_pass}",
            "attack={num_steps: 1, step_size: 30, start: zero}",
            "optimizer.lr=0.05",
        ),
        worlds=((1, 1), (2, 2)),
    ),
    "friendly": Case(
        ("attack={num_steps: 5, early_stop: 1, early_stop_epochs: [0.6, 1.4]}", "objective.bn_clean_updates_per_step=2")
    ),
    "uncovering the limits": Case(
        (
            "objective={name: trades, clean_bn: batch}",
            "attack={loss: margin, bn_mode: batch, num_steps: 4, update: adam, step_schedule: [[2, 0.1]]}",
            "optimizer={name: adamw, lr: 0.01}",
            "train.ema={decay: 0.7, buffers: average}",
            "train.freeze_bn_from_epoch=1",
        )
    ),
    "standard": Case(
        (
            "objective={name: standard, label_smoothing: 0.1, label_smoothing_form: other_classes}",
            "attack=null",
            "optimizer.momentum=0",
            "data.limit_train=69",
            "train.drop_last=false",
            "log.every_steps=4",
        )
    ),
    "mixture in one batch norm": Case(
        (
            "objective={name: mixture, clean_ratio: 0.5, alpha: 0.3}",
            "attack.target=random_any",
            "data.limit_train=69",  # a last batch of three whole groups and a half
            "train.drop_last=false",
            "train.ema={decay: 0.8, buffers: average}",
        )
    ),
    "mixture as a mean over samples": Case(
        (
            "objective={name: mixture, clean_ratio: 0.4, weighting: samples, label_smoothing: 0.1}",
            "model.norm=mbn",
            "attack={target: most_confusing, bn_mode: batch, branch: clean}",
            "model.activation_checkpointing=true",
            "data.limit_train=67",  # of the last group's one image no clean one is kept
            "train.drop_last=false",
        )
    ),
    "mixture batch norm with logit pairing": Case(
        (
            "objective={name: mixture, logit_pairing: 0.5, alpha: 0.4}",
            "model.norm=mbn",
            "attack={target: least_likely, start_clean_probability: 0.3, bn_mode: train}",
            "optimizer={name: rmsprop, lr: 0.01, eps: 1.0, momentum: 0}",
            "schedule={name: exponential, factor: 0.94, decay_every: 0.34, warmup_epochs: 0.4}",
        )
    ),
    "mixture with group norm": Case(
        (
            "objective={name: mixture, logit_pairing: 0.3, logit_pairing_form: l2_sum}",
            "objective={label_smoothing: 0.1, label_smoothing_form: other_classes}",
            "model.norm=gn",
            "attack={loss: dlr, start: zero}",
            "optimizer={name: adamw, lr: 0.01, weight_decay_rule: no_norm_bias}",
        )
    ),
    "group norm": Case(("model={norm: gn, arch: resnet}", "attack={loss: dlr, target: random_other}")),
    "finetuned on clean images": Case(
        ("model.norm=mbn", "objective.name=standard", "attack=null", "train.bn_only=clean", "train.ema={decay: 0.8}")
    ),
    "finetuned on adversarial images": Case(
        ("model={norm: mbn, arch: resnet}", "train.bn_only=adv", "attack={loss: margin, target: random_other}")
    ),
    "a rank without images": Case(("data.limit_train=53", "train.drop_last=false", "attack.bn_mode=batch")),
    "a group that spans ranks": Case(("train.bn_group_size=24", "attack.bn_mode=batch"), worlds=((1, 1), (2, 1))),
    "synchronised batch norm": Case(
        ("model.sync_bn=true", "train.bn_group_size=null", "attack.bn_mode=train"), worlds=((1, 1), (2, 1))
    ),
    "groups as the devices hold them": Case(
        ("train.bn_group_size=null", "attack.bn_mode=train", "parallel.reduce_bucket_size=300")
    ),
    "recomputed activations": Case(("model.activation_checkpointing=true", "attack.bn_mode=train")),
    "ZeRO 0": Case(("parallel.zero_stage=0", "optimizer.nesterov=true"), worlds=((1, 2), (2, 2))),
    "without DeepSpeed": Case(("optimizer.nesterov=true",), worlds=((1, 1), (1, 2)), deepspeed=False),
    "linf in float32": Case(("train.epochs=1.34",), double=False),
    "l2 in float32": Case(
        (
            "attack={norm: l2, eps: 128, step_size: 60}",
            "parallel.zero_stage=2",
            "objective={name: trades}",
            "train.epochs=1.6",
        ),
        double=False,
    ),
}


def initial_state(config: RunConfig) -> dict[str, Tensor]:
    """Return weights and running statistics that no code would start with: nothing is 0 or 1, where a fault might hide."""
    generator = torch.Generator().manual_seed(7)
    model = config.model
    width, norm, post = model.base_width, model.norm, model.arch == "resnet"

    def normal(*shape: int, std: float, mean: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=generator) * std + mean

    state: dict[str, Tensor] = {}

    def conv(name: str, into: int, out: int, size: int) -> None:
        state[f"{name}.weight"] = normal(out, into, size, size, std=(2 / (size * size * into)) ** 0.5)

    def layer(name: str, channels: int) -> None:
        for place in (f"{name}.clean", f"{name}.adv") if norm == "mbn" else (name,):
            state[f"{place}.weight"] = normal(channels, mean=1.0, std=0.2)
            state[f"{place}.bias"] = normal(channels, std=0.2)
            if norm != "gn":
                state[f"{place}.running_mean"] = normal(channels, std=0.2)
                state[f"{place}.running_var"] = normal(channels, std=0.3).exp()
                state[f"{place}.num_batches_tracked"] = torch.tensor(5)

    conv("conv1", 3, width, 3)
    if post:
        layer("bn1", width)
    for name, into, out in (("layer1.0", width, width), ("layer2.0", width, 2 * width)):
        conv(f"{name}.conv1", into, out, 3)
        conv(f"{name}.conv2", out, out, 3)
        layer(f"{name}.bn1", out if post else into)
        layer(f"{name}.bn2", out)
        if into != out:
            conv(f"{name}.downsample.0" if post else f"{name}.shortcut.0", into, out, 1)
            if post:
                layer(f"{name}.downsample.1", out)
    if not post:
        layer("bn", 2 * width)
    head = "fc" if post else "linear"
    state[f"{head}.weight"], state[f"{head}.bias"] = normal(10, 2 * width, std=0.3), normal(10, std=0.1)
    return state
