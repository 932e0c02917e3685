"""Whole trainings in this process for integration tests: a recipe in, checkpoints and events out."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

from distributed_at.engine.builder import build_parts
from distributed_at.engine.checkpoint.tools import read_checkpoint
from distributed_at.engine.run import run_training
from distributed_at.engine.runs.folder import RunFolder
from distributed_at.recipes import load_recipe
from tests.training_kit import _one_world

# A network that trains in seconds: 8x8 digits, 64 images, 8 steps an epoch, ResNet of two stages.
TINY = (
    "data.limit_train=64",
    "data.limit_test=16",
    "data.validation_size=0",
    "model={arch: resnet, blocks: [1, 1], block: basic, base_width: 8, stem: cifar}",
    "attack={eps: 16, num_steps: 2, step_size: 8, target: random_other}",
    "objective={name: pgd_at}",
    "optimizer={lr: 0.05}",
    "schedule={name: constant, warmup_epochs: 0}",
    "train={epochs: 2, batch_size: 8, bn_group_size: null, micro_batch_size: null, select: last}",
    "evaluation={every_epochs: null, validation: [], final: [{kind: clean}]}",
    "checkpoint={every_epochs: 0.5, keep_every_epochs: 0.5, asynchronous: false}",
    "log.every_steps=4",
)


def tiny(*overrides, recipe="digits/adversarial.yaml"):
    """Return the tiny recipe with overrides."""
    return load_recipe(recipe, [*TINY, *overrides]).config


@contextmanager
def _in_one_world():
    """One process group for all runs of this process, shared with the other tests: DeepSpeed keeps its first groups."""
    with (
        mock.patch.dict(os.environ, LOCAL_RANK=os.environ.get("LOCAL_RANK", "0")),  # DeepSpeed asks for it
        mock.patch("distributed_at.engine.run.initialise_world", _one_world),
        mock.patch("distributed_at.engine.run.shutdown_world"),
    ):
        yield


def train(config, folder, **options):
    """Train (or go on) in ``folder``; return its path."""
    with _in_one_world():
        run_training(config, RunFolder(Path(folder)), quiet=True, **options)
    return Path(folder)


def tensors(folder, step):
    """Return the checkpoint at a step: name -> tensor."""
    return read_checkpoint(Path(folder) / "checkpoints" / f"step_{step:08d}")[0]


def cut_back(source, target, step):
    """Copy a run as it stood when it was killed after ``step``: no later checkpoint exists."""
    shutil.copytree(source, target)
    for path in (Path(target) / "checkpoints").glob("step_*"):
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    return Path(target)


def same_bits(a, b):
    """Whether two tensors agree in every bit."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.reshape(-1), b.reshape(-1))


def built(config, folder=None):
    """Return a run's parts."""
    with _in_one_world():
        return build_parts(config, _one_world(config.parallel.timeout_seconds), folder)
