"""Mirrors events to Weights & Biases without ever blocking or stopping training; the events file stays the record.

Rank 0 only. All calls happen on one worker thread and are guarded: the first failure is told once, then the mirror goes
offline, and if that fails too it falls silent.
"""

from __future__ import annotations

import contextlib
import logging
import netrc
import os
import queue
import re
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from distributed_at.observe.encoding import to_json
from distributed_at.observe.secrets import redact

Mode = Literal["off", "offline", "online"]
RUN_ID_FILE = Path("log") / "wandb_run_id"
LONGEST_QUEUE = 10_000
DEFAULT_HOST = "https://api.wandb.ai"

logger = logging.getLogger("distributed_at.observe")


def flatten(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return an event as flat metrics, e.g. ``train/loss``, ``train/seconds/attack``, ``test/pgd-20/adv/accuracy``."""
    event = str(row["event"])
    place = event
    if event == "evaluation":
        protocol = row.get("protocol")
        name = protocol.get("name", "evaluation") if isinstance(protocol, Mapping) else (protocol or "evaluation")
        place = "/".join(str(part) for part in (row.get("split"), name, row.get("branch")) if part)
    found: dict[str, Any] = {"train/step": row.get("step"), "epoch": row.get("epoch"), "restart": row.get("restart")}

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                add(f"{prefix}/{key}", item)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[prefix] = value

    for key, value in row.items():
        if key not in ("event", "step", "epoch", "restart", "protocol"):
            add(f"{place}/{key}", value)
    return found


def stored_run_id(run_folder: Path | str, name: str) -> str:
    """Return the run's id at wandb, made once and kept in the run folder, so that a resumed run is the same run."""
    path = Path(run_folder) / RUN_ID_FILE
    try:
        held = path.read_text(encoding="utf-8").strip()
        if held:
            return held
    except OSError:
        pass
    made = f"{re.sub(r'[^A-Za-z0-9_-]', '-', name)[:48] or 'run'}-{uuid.uuid4().hex[:8]}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(made + "\n", encoding="utf-8")
    except OSError as error:
        logger.warning("the wandb run id cannot be kept in %s (%s): a resumed run will be a new one there", path, error)
    return made


def has_key(environ: Mapping[str, str] | None = None) -> bool:
    """Say whether wandb finds credentials without asking: a key or token in the environment, or an entry in netrc."""
    environ = os.environ if environ is None else environ
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(environ.get("WANDB_BASE_URL") or DEFAULT_HOST).hostname or ""
    path = environ.get("NETRC") or str(Path(environ.get("HOME", "~")).expanduser() / ".netrc")
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class WandbView:
    """A view of events (``EventLog(views=[...])``) that mirrors them to wandb.

    Args:
        run_folder: holds the run id (``log/wandb_run_id``) and wandb's own files (``log/wandb``).
        mode: 'off', 'offline' (files that ``wandb sync`` sends later) or 'online'.
        name: the run's name there. project, entity, tags: as wandb has them.
        config: the resolved recipe; secrets are removed.
        rank: only 0 does anything.
        init_timeout, finish_timeout: seconds after which starting and ending are given up.
        module: stands in for the wandb package (tests).
    """

    def __init__(
        self, run_folder: Path | str, *, mode: Mode = "off", name: str = "run", project: str = "distributed-at",
        entity: str | None = None, tags: Iterable[str] = (), config: Mapping[str, Any] | None = None, rank: int = 0,
        init_timeout: float = 20.0, finish_timeout: float = 60.0, module: Any = None,
    ) -> None:  # fmt: skip
        self._folder = Path(run_folder)
        self._mode: Mode = mode if rank == 0 else "off"
        self._name = name
        self._options: dict[str, Any] = {"name": name, "project": project, "entity": entity, "tags": list(tags)}
        self._config = redact(to_json(config or {}))
        self._init_timeout, self._finish_timeout = init_timeout, finish_timeout
        self._module = module
        self._run: Any = None
        self._queue: queue.Queue[Mapping[str, Any] | None] = queue.Queue(maxsize=LONGEST_QUEUE)
        self._told = False
        self._tried = False
        self._dropped = 0
        self._worker: threading.Thread | None = None
        if self._mode != "off":
            self._worker = threading.Thread(target=self._work, name="wandb-mirror", daemon=True)
            self._worker.start()

    @property
    def mode(self) -> Mode:
        """What the mirror does now: a failed 'online' has become 'offline', a failed 'offline' 'off'."""
        return self._mode

    def on_event(self, row: Mapping[str, Any]) -> None:
        """Take an event; returns at once. A full queue (wandb hangs) drops it: the events file has it."""
        if self._worker is None or self._mode == "off":
            return
        try:
            self._queue.put_nowait(row)
        except queue.Full:
            self._dropped += 1
            if self._dropped == 1:
                self._tell("it does not keep up; rows are dropped there and stay in events.jsonl")

    def close(self) -> None:
        """Send what waits and finish, for ``finish_timeout`` seconds at most."""
        worker, self._worker = self._worker, None
        if worker is None:
            return
        try:
            self._queue.put(None, timeout=1.0)
        except queue.Full:
            self._mode = "off"
        worker.join(self._finish_timeout + self._init_timeout)
        if worker.is_alive():
            self._tell(f"it did not finish in {self._finish_timeout:g} s and is left behind")

    def replay(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Send a whole run again from its events, waiting for the queue; then ``close`` it."""
        for row in events:
            while self._worker is not None and self._mode != "off":
                try:
                    self._queue.put(row, timeout=1.0)
                    break
                except queue.Full:
                    continue

    def _work(self) -> None:
        self._start()
        while (row := self._queue.get()) is not None:
            if self._run is not None:
                self._guard(partial(self._send, row), "log")
        if self._run is not None:
            self._guard(self._run.finish, "finish", retry=False)

    def _start(self) -> None:
        if self._mode == "online" and not has_key():
            self._mode = "offline"
            self._tell("no API key was found (WANDB_API_KEY or ~/.netrc)")
        while self._mode != "off" and self._run is None:
            try:
                if self._tried:
                    self._release_id()
                self._tried = True
                self._run = self._init()
            except BaseException as error:  # wandb ends some failures with SystemExit
                self._fall_back(f"init failed: {type(error).__name__}: {error}")

    def _release_id(self) -> None:
        """End wandb's service: it holds the id of the run that failed and would refuse it ("run ID is in use")."""
        with contextlib.suppress(Exception):
            self._module.teardown(exit_code=0)

    def _init(self) -> Any:
        if self._module is None:
            os.environ.setdefault("WANDB_SILENT", "true")
            import wandb

            self._module = wandb
        (self._folder / "log").mkdir(parents=True, exist_ok=True)
        run = self._module.init(
            **self._options, id=stored_run_id(self._folder, self._name), resume="allow", mode=self._mode,
            dir=str(self._folder / "log"), config=self._config, settings=self._settings(),
        )  # fmt: skip
        # wandb's own step restarts at 0 whenever a run resumes offline; ours is a column like any other.
        run.define_metric("train/step", hidden=True)
        run.define_metric("*", step_metric="train/step")
        return run

    def _settings(self) -> Any:
        wanted: dict[str, Any] = {
            "init_timeout": self._init_timeout, "finish_timeout": self._finish_timeout, "console": "off", "silent": True,
            "disable_git": True, "save_code": False,
        }  # fmt: skip
        known = getattr(self._module.Settings, "model_fields", wanted)
        return self._module.Settings(**{key: value for key, value in wanted.items() if key in known})

    def _send(self, row: Mapping[str, Any]) -> None:
        if row["event"] == "warning":
            self._run.alert(title=str(row.get("code", "warning")), text=str(row.get("message", "")))
            return
        self._run.log(flatten(row))
        if row["event"] == "run_end":
            self._run.summary["reason"] = str(row.get("reason", ""))

    def _guard(self, call: Callable[[], Any], what: str, *, retry: bool = True) -> None:
        try:
            call()
        except BaseException as error:
            self._fall_back(f"{what} failed: {type(error).__name__}: {error}")
            if retry and self._mode != "off":
                self._start()
                if self._run is not None:
                    try:
                        call()
                    except BaseException:
                        self._mode, self._run = "off", None

    def _fall_back(self, reason: str) -> None:
        self._run = None
        self._mode = "offline" if self._mode == "online" else "off"
        self._tell(reason)

    def _tell(self, reason: str) -> None:
        if not self._told:
            self._told = True
            logger.warning("wandb: %s; now %s. Training goes on and events.jsonl is complete.", reason, self._mode)
