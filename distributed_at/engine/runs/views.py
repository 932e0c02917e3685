"""Views of a run's events beyond its own folder, as its recipe asks for them."""

from __future__ import annotations

from distributed_at.config import RunConfig
from distributed_at.engine.runs.folder import RunFolder
from distributed_at.observe.events import View
from distributed_at.observe.wandb import WandbView


def remote_views(config: RunConfig, folder: RunFolder) -> list[View]:
    """Return the views that ``log`` names; the same run there whoever writes, training or evaluation."""
    if config.log.wandb == "off":
        return []
    return [
        WandbView(
            folder.root,
            mode=config.log.wandb,
            name=config.name,
            project=config.log.wandb_project,
            entity=config.log.wandb_entity,
            tags=config.log.tags,
            config=config.model_dump(mode="json"),
        )
    ]
