"""The typed schema of a run: what a recipe may say, in which units, and which combinations make no sense.

Only the schema lives here; reading files, ``extends:``, rows and overrides is ``recipes.py``, and turning pydantic's
errors into one clear message is ``recipe_errors.py``. Every class refuses unknown keys. Pixel quantities (``eps``,
``step_size``) are in /255 everywhere in a recipe; code converts them to [0, 1] once, where the attack is built.
"""

from distributed_at.config.attack import AttackConfig
from distributed_at.config.base import (
    Activation,
    AttackDtype,
    BnMode,
    Branch,
    PaperConfig,
    Pixels,
    Strict,
)
from distributed_at.config.data import AugmentConfig, DataConfig, ExtraConfig
from distributed_at.config.evaluation import EvaluationConfig, EvaluationEntry, evaluation_entry
from distributed_at.config.model import ModelConfig
from distributed_at.config.objective import ObjectiveSection
from distributed_at.config.run import LogConfig, PluginFile, RunConfig
from distributed_at.config.training import (
    CheckpointConfig,
    EmaConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainConfig,
)

__all__ = [
    "Activation",
    "AttackConfig",
    "AttackDtype",
    "AugmentConfig",
    "BnMode",
    "Branch",
    "CheckpointConfig",
    "DataConfig",
    "EmaConfig",
    "EvaluationConfig",
    "EvaluationEntry",
    "ExtraConfig",
    "LogConfig",
    "ModelConfig",
    "ObjectiveSection",
    "OptimizerConfig",
    "PaperConfig",
    "ParallelConfig",
    "Pixels",
    "PluginFile",
    "RunConfig",
    "ScheduleConfig",
    "Strict",
    "TrainConfig",
    "evaluation_entry",
]
