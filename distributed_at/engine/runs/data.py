"""Which data a run is of: looked at before the first step, the same on all ranks, and the same when the run goes on."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from typing import Any

from distributed_at.config import RunConfig
from distributed_at.data.identity import DataIdentity
from distributed_at.data.source import ImageSource
from distributed_at.data.sources import open_split
from distributed_at.engine.processes.world import World, from_main, gather_all
from distributed_at.errors import ConfigError, UserError
from distributed_at.objectives import OBJECTIVES

Warn = Callable[[str, str], None]


class RunData:
    """The identities of a run's data, kept in every checkpoint.

    Args:
        splits: 'train', 'extra' where the recipe names extra images, and 'test' where it measures it.
        accept_changed: go on where a checkpoint was trained on other data.

    Attributes:
        changed: what was accepted, a sentence each.
    """

    def __init__(self, splits: Mapping[str, DataIdentity], *, accept_changed: bool = False) -> None:
        self.splits = dict(splits)
        self.changed: list[str] = []
        self._accept = accept_changed

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds."""
        return {part: identity.to_dict() for part, identity in self.splits.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Compare with what a checkpoint holds.

        Raises:
            ConfigError: it was trained on other data, and nobody accepted that.
        """
        self.changed = []
        for part, held in state.items():
            own = self.splits.get(part)
            difference = None if own is None else DataIdentity.from_dict(held).difference(own)
            if difference is None:
                continue
            told = f"data of split '{part}' are not those that this run began with: {difference}"
            if not self._accept:
                raise ConfigError(
                    f"{told}. Bring back the data, begin anew under another name, or accept the change, which is written "
                    "into the run's events: --accept-data"
                )
            self.changed.append(told)


def look_at_data(config: RunConfig, source: ImageSource, *, warn: Warn | None = None) -> dict[str, DataIdentity]:
    """Return the identities of what a run reads, the test images that it will measure at its end included.

    Raises:
        DataError: the test images cannot be opened.
        ConfigError: a class has no image to train on.
    """
    found = source.identities()
    empty = found["train"].without_images()
    if empty:
        raise ConfigError(
            f"data: no training image of {len(empty)} of {source.num_classes} classes, e.g. {', '.join(empty[:4])}: "
            "add images or remove the class's folder"
        )
    if config.evaluation.final:
        with open_split(config.data, "test", seed=config.seed) as test:
            found["test"] = test.identity()
        missing = found["test"].without_images()
        if missing and warn is not None:
            warn(
                "classes_without_test_images",
                f"no test image of {len(missing)} of {source.num_classes} classes, e.g. {', '.join(missing[:4])}",
            )
    return found


def require_labels(config: RunConfig, source: ImageSource) -> None:
    """Refuse extra images without labels where the objective or its attack looks at them.

    Raises:
        ConfigError: says what does, and how images get labels.
    """
    reason = OBJECTIVES[config.objective.name].needs_labels(config) if source.unlabelled else None
    if reason is not None:
        raise ConfigError(
            f"data.extra: its images have no labels, and {reason}; distributed-at data pseudolabel gives them some"
        )


def agree_on_data(
    config: RunConfig, world: World, source: ImageSource, *, warn: Warn | None = None, accept_changed: bool = False
) -> RunData:
    """Return the run's data, the same on all ranks; collective.

    Raises:
        ConfigError: a rank sees other data; all ranks raise the same words, which name it, its host and the difference.
        UserError: as ``look_at_data``, on all ranks.
    """
    own = source.identities()
    everyone = gather_all((socket.gethostname(), {part: held.to_dict() for part, held in own.items()}), world)
    first_host, first = everyone[0]
    for rank, (host, theirs) in enumerate(everyone):
        for part, held in theirs.items():
            difference = DataIdentity.from_dict(first[part]).difference(DataIdentity.from_dict(held))
            if difference is not None:
                where = f"data.path {config.data.path}" if part == "train" else "data.extra"
                raise ConfigError(
                    f"{where}: rank {rank} on {host} sees other training data than rank 0 on {first_host}: {difference}. "
                    "Give all nodes one copy, or equal ones"
                )
    refusal: UserError | None = None
    splits: dict[str, DataIdentity] = own
    if world.is_main:
        try:
            splits = look_at_data(config, source, warn=warn)
        except UserError as error:
            refusal = error
    refusal, splits = from_main((refusal, splits), world)
    if refusal is not None:
        raise refusal
    return RunData(splits, accept_changed=accept_changed)
