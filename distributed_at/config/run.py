"""A whole run, and which combinations of its sections make no sense."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distributed_at.catalogue.attacks import ATTACK_LOSSES
from distributed_at.catalogue.norms import NORMS
from distributed_at.catalogue.objectives import OBJECTIVES
from distributed_at.config.attack import AttackConfig
from distributed_at.config.base import PaperConfig, Strict
from distributed_at.config.choice import Section
from distributed_at.config.data import DataConfig
from distributed_at.config.evaluation import EvaluationConfig
from distributed_at.config.model import ModelConfig
from distributed_at.config.objective import ObjectiveSection
from distributed_at.config.training import (
    CheckpointConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainConfig,
)


class LogConfig(Strict):
    """What is written while training."""

    every_steps: int = Field(default=10, gt=0)
    wandb: Literal["off", "offline", "online"] = "off"
    wandb_project: str = "distributed-at"
    wandb_entity: str | None = None
    tags: tuple[str, ...] = ()


class PluginFile(Strict):
    """A user's Python file that adds objectives and more; a recipe gives its path alone, relative to the recipe."""

    path: str
    sha256: str = Field(description="of its content; written when the recipe is read")


class RunConfig(Strict):
    """A whole run, as ``recipe.yaml`` holds it."""

    name: str = Field(min_length=1, max_length=120, pattern=r"^[A-Za-z0-9][A-Za-z0-9._+=-]*$")
    description: str = ""
    seed: int = Field(default=0, ge=0, lt=2**63)
    paper: PaperConfig | None = None
    plugins: tuple[PluginFile, ...] = Field(
        default=(), description="Python files with the user's own objectives and more"
    )
    data: DataConfig
    model: ModelConfig
    attack: AttackConfig | None = Field(
        default=None, description="the training attack; null where the objective sees none"
    )
    objective: Annotated[ObjectiveSection, Section(OBJECTIVES)]
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)  # it asks the kinds, which import this
    log: LogConfig = LogConfig()

    def _shorter_milestones(self) -> list[str]:
        """Return the milestones drawn in to ``train.epochs``, where the last stage was as long as the one before it."""
        before, last = ([0.0, *self.schedule.milestones])[-2:]
        return [f"{m * self.train.epochs / (2 * last - before):.3g}" for m in self.schedule.milestones]

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        self._check_objective()
        self._check_mixing()
        s = self.schedule
        late = [m for m, done in zip(s.milestones, s.drops, strict=True) if done >= self.train.epochs]
        if late:
            raise ValueError(
                f"schedule.milestones {late} lie at or past the last epoch (train.epochs: {self.train.epochs:g}); "
                f"write both, e.g. schedule.milestones=[{', '.join(self._shorter_milestones())}]"
            )
        if self.schedule.warmup_epochs >= self.train.epochs and self.schedule.warmup_epochs > 0:
            raise ValueError(
                f"schedule.warmup_epochs {self.schedule.warmup_epochs:g} is not shorter than train.epochs {self.train.epochs:g}"
            )
        if s.momentum_at_peak is not None and not (self.optimizer.reads("momentum") and self.optimizer.momentum):
            raise ValueError(
                "schedule.momentum_at_peak lets optimizer.momentum fall where the rate rises; optimizer.name "
                f"'{self.optimizer.name}' has none here"
            )
        if self.attack is not None and self.attack.branch == "clean" and not self.model.norm_facts.branches:
            raise ValueError(f"attack.branch 'clean' exists for model.norm {_named(_with_branches())} alone")
        if self.train.freeze_bn_from_epoch is not None and self.attack is not None and self.attack.bn_mode == "train":
            raise ValueError(
                "attack.bn_mode 'train' lets every attack move the running statistics, which train.freeze_bn_from_epoch "
                "freezes: use attack.bn_mode 'eval' or 'batch'"
            )
        finetunes = self.train.freeze_bn_from_epoch is not None or self.train.bn_only
        if finetunes and not self.model.norm_facts.running_statistics:
            raise ValueError(
                "train.freeze_bn_from_epoch and train.bn_only need running statistics; "
                f"{self.model.norm_facts.title.partition(' (')[0]} has none"
            )
        if self.train.select == "best_validation" and (
            self.data.validation_size == 0 or not self.evaluation.validation
        ):
            raise ValueError(
                "train.select 'best_validation' needs data.validation_size > 0 and evaluation.validation; the test set is for final evaluation alone"
            )
        if self.train.patience_epochs is not None and (
            self.data.validation_size == 0 or not self.evaluation.validation
        ):
            raise ValueError("train.patience_epochs needs data.validation_size > 0 and evaluation.validation")
        if self.train.stop_on_drop is not None and self.train.select != "best_validation":
            raise ValueError(
                "train.stop_on_drop keeps the weights from before the drop: it needs train.select: best_validation"
            )
        if self.evaluation.validation and self.data.validation_size == 0:
            raise ValueError("evaluation.validation needs data.validation_size > 0: a held-out part of train")
        return self

    def _check_mixing(self) -> None:
        """Check what labelled copies and phases of extra images ask of batches and epochs."""
        copies, batch = self.data.labelled_copies, self.train.batch_size
        if batch % copies:
            raise ValueError(f"train.batch_size {batch} is not a multiple of data.labelled_copies {copies}")
        late = [epoch for epoch, _ in self.data.ratios if epoch >= self.train.epochs]
        if late:
            raise ValueError(
                f"data.extra.labelled_ratio: epoch {late[0]:g} lies at or past the last (train.epochs: {self.train.epochs:g})"
            )

        smoothing = getattr(self.objective, "extra_label_smoothing", None)
        if smoothing is not None and self.data.extra is None:
            raise ValueError(
                f"objective.extra_label_smoothing {smoothing:g} is of extra images, and the recipe has no data.extra"
            )

    def _check_objective(self) -> None:
        """Ask the objective what it needs and what it trains."""
        section, name = self.objective, self.objective.name
        objective = OBJECTIVES[name]
        if objective.needs(section).attack == "none" and self.attack is not None:
            raise ValueError(
                f"objective '{name}' trains on {' and '.join(objective.branches)} images: remove attack, or set attack: null"
            )
        if objective.needs(section).attack != "none" and self.attack is None:
            raise ValueError(f"objective '{name}' needs attack: {{eps, num_steps, step_size}}")
        if objective.needs(section).gradients and self.parallel.zero_stage > 0:
            raise ValueError(
                f"objective '{name}' looks at the weights' gradients before the optimiser's step, and DeepSpeed keeps "
                f"them whole until then at parallel.zero_stage 0 alone, got {self.parallel.zero_stage}"
            )
        if self.optimizer.facts.whole_parameters and self.parallel.zero_stage > 0:
            raise ValueError(
                f"optimizer.name '{self.optimizer.name}' looks at each parameter as a whole, and ZeRO cuts them into slices: "
                f"it needs parallel.zero_stage 0, got {self.parallel.zero_stage}"
            )
        refusal = objective.refuse(self)
        if refusal is not None:
            raise ValueError(refusal)
        loss = self.attack.loss if self.attack is not None else "ce"
        if ATTACK_LOSSES[loss].from_clean and loss not in objective.attack_losses:
            fitting = [other for other in OBJECTIVES if loss in OBJECTIVES[other].attack_losses]
            raise ValueError(
                f"attack.loss '{loss}' is measured from the clean prediction and belongs to objectives that train on it "
                f"({', '.join(fitting)}); the objective is '{name}'"
            )
        trained, bn_only = objective.trains(section), self.train.bn_only
        if bn_only is not None and trained != (bn_only,):
            raise ValueError(
                f"train.bn_only '{bn_only}' finetunes on {bn_only} images alone; objective.name '{name}' trains on "
                f"{' and '.join(trained)} images: use {' or '.join(_training(bn_only))}"
            )
        if self.model.norm_facts.branches and len(trained) < 2 and bn_only is None:
            raise ValueError(
                f"model.norm '{self.model.norm}' needs an objective that trains both branches ({', '.join(_training('clean', 'adv'))}); "
                f"'{name}' trains {' and '.join(trained)} alone"
            )


def _training(*branches: str) -> list[str]:
    """Return the objectives that train exactly these branches, by name."""
    return [name for name in OBJECTIVES if set(OBJECTIVES[name].branches) == set(branches)]


def _with_branches() -> list[str]:
    """Return the norms with branches, by name."""
    return [name for name in NORMS if NORMS[name].branches]


def _named(names: list[str]) -> str:
    return " or ".join(f"'{name}'" for name in names)
