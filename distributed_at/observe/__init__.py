"""Watching a run: events first, then console, wandb, tables and the report as views of them. Nothing here trains."""

from distributed_at.observe.console import ConsoleView
from distributed_at.observe.environment import collect_environment, read_environment, write_environment
from distributed_at.observe.events import EventLog, next_restart, read_events
from distributed_at.observe.wandb import WandbView

__all__ = [
    "ConsoleView", "EventLog", "WandbView", "collect_environment", "next_restart", "read_environment", "read_events",
    "write_environment",
]  # fmt: skip
