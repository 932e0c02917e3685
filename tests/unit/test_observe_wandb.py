"""The wandb mirror never raises, never blocks and never holds the only copy; no test here reaches a network."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from distributed_at.observe.events import EventLog, read_events
from distributed_at.observe.wandb import WandbView, flatten, stored_run_id
from tests.patience import LONGEST


class FakeRun:
    def __init__(self, package: FakeWandb) -> None:
        self.package = package
        self.summary: dict = {}

    def define_metric(self, *args: object, **kwargs: object) -> None:
        self.package.metrics.append((args, kwargs))

    def log(self, row: dict) -> None:
        if self.package.log_error is not None and self.package.modes[-1] == "online":
            raise self.package.log_error
        self.package.gate.wait(LONGEST)
        self.package.rows.append(row)

    def alert(self, **_: object) -> None:
        pass

    def finish(self) -> None:
        self.package.held = None
        self.package.finished += 1


class FakeWandb:
    """Stands in for the package: refuses some modes, fails when told to."""

    Settings = SimpleNamespace

    def __init__(self, refuse: tuple[str, ...] = (), log_error: Exception | None = None) -> None:
        self.refuse, self.log_error = refuse, log_error
        self.modes: list[str] = []
        self.ids: list[str] = []
        self.rows: list[dict] = []
        self.metrics: list = []
        self.options: list[dict] = []
        self.finished = 0
        self.held: object = None
        self.gate = threading.Event()
        self.gate.set()

    def teardown(self, exit_code: int) -> None:
        self.held = None

    def init(self, **options: object) -> FakeRun:
        if self.held == options["id"]:
            raise RuntimeError(f"run ID {self.held} is in use")
        self.held = options["id"]
        if options["mode"] in self.refuse:
            raise ConnectionError("refused")
        self.modes.append(str(options["mode"]))
        self.ids.append(str(options["id"]))
        self.options.append(options)
        return FakeRun(self)


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def run_five_steps(folder: Path, view: WandbView, restart: int = 0) -> None:
    with EventLog(folder, views=[view], restart=restart) as log:
        for step in range(5):
            log.write("train", step=step, epoch=0, loss=step * 0.5, seconds={"attack": 1.0}, terms={"adv": 2.0})


def test_rows_carry_our_own_step(tmp_path: Path) -> None:
    package = FakeWandb()
    run_five_steps(tmp_path, WandbView(tmp_path, mode="offline", module=package))
    assert [row["train/step"] for row in package.rows] == list(range(5))
    assert package.rows[2]["train/loss"] == 1.0
    assert package.rows[2]["train/seconds/attack"] == 1.0
    assert (("*",), {"step_metric": "train/step"}) in package.metrics
    assert package.finished == 1


def test_resumed_run_has_the_same_id(tmp_path: Path) -> None:
    package = FakeWandb()
    for restart in range(2):
        run_five_steps(tmp_path, WandbView(tmp_path, mode="offline", module=package, name="my run"), restart)
    assert package.ids[0] == package.ids[1] == stored_run_id(tmp_path, "my run")
    assert all(options["resume"] == "allow" for options in package.options)


def test_online_without_a_key_becomes_offline_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    package = FakeWandb()
    run_five_steps(tmp_path, WandbView(tmp_path, mode="online", module=package))
    assert package.modes == ["offline"]
    assert len(package.rows) == 5
    assert sum("no API key" in message for message in caplog.messages) == 1


def test_refused_network_becomes_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    package = FakeWandb(refuse=("online",))
    run_five_steps(tmp_path, WandbView(tmp_path, mode="online", module=package))
    assert package.modes == ["offline"]
    assert len(package.rows) == 5


def test_service_dying_in_the_middle_of_a_run_becomes_offline_and_loses_no_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    package = FakeWandb(log_error=ConnectionResetError("service gone"))
    run_five_steps(tmp_path, WandbView(tmp_path, mode="online", module=package))
    assert package.modes == ["online", "offline"]
    assert len(package.rows) == 5
    assert len(read_events(tmp_path)) == 5
    assert sum(message.startswith("wandb:") for message in caplog.messages) == 1


def test_wandb_that_cannot_start_at_all_leaves_the_events_complete(tmp_path: Path) -> None:
    view = WandbView(tmp_path, mode="offline", module=FakeWandb(refuse=("online", "offline")))
    run_five_steps(tmp_path, view)
    assert view.mode == "off"
    assert len(read_events(tmp_path)) == 5


def test_hanging_service_blocks_neither_logging_nor_the_end(tmp_path: Path) -> None:
    package = FakeWandb()
    package.gate.clear()
    view = WandbView(tmp_path, mode="offline", module=package, init_timeout=0.1, finish_timeout=0.2)
    run_five_steps(tmp_path, view)
    assert package.rows == []  # or it would have waited for them
    package.gate.set()


def test_other_ranks_never_start_it(tmp_path: Path) -> None:
    package = FakeWandb()
    run_five_steps(tmp_path, WandbView(tmp_path, mode="online", module=package, rank=1))
    assert package.modes == []


def test_config_carries_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "abcdefgh12345678")
    package = FakeWandb()
    config = {"data": {"path": "/x?token=abcdefgh12345678"}, "api_key": "value"}
    run_five_steps(tmp_path, WandbView(tmp_path, mode="offline", module=package, config=config))
    assert "abcdefgh12345678" not in str(package.options[0]["config"])
    assert package.options[0]["config"]["api_key"] != "value"


def test_evaluations_are_named_by_split_protocol_and_branch() -> None:
    row = {"event": "evaluation", "step": 7, "epoch": 1, "split": "test", "branch": "adv", "accuracy": 0.5}
    assert flatten({**row, "protocol": {"name": "pgd-20"}})["test/pgd-20/adv/accuracy"] == 0.5


@pytest.mark.slow
def test_real_wandb_with_refused_network_never_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    view = WandbView(tmp_path, mode="online", init_timeout=5, finish_timeout=5)
    run_five_steps(tmp_path, view)
    assert view.mode == "offline"
    assert len(read_events(tmp_path)) == 5
    assert list((tmp_path / "log" / "wandb").glob("offline-run-*/*.wandb"))
