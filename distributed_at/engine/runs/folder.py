"""The run folder: where a run's files are, and the refusal to mix two recipes in one folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from distributed_at.config import RunConfig
from distributed_at.errors import ConfigError, UserError
from distributed_at.files import write_atomically
from distributed_at.plugins import FOLDER, kept_name
from distributed_at.recipes import diff, dump_yaml, load_recipe


@dataclass(frozen=True)
class RunFolder:
    """Paths inside `runs/<name>/`."""

    root: Path

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def events(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def has_checkpoints(self) -> bool:
        """Whether the run was saved before, so that the same command goes on instead of beginning."""
        return any(self.checkpoints.glob("step_*"))

    @property
    def evaluations(self) -> Path:
        return self.root / "evaluations"

    @property
    def logs(self) -> Path:
        return self.root / "log"

    def check(self, config: RunConfig) -> bool:
        """Return whether the folder already holds this very recipe; refuse another one, showing the difference."""
        if not self.recipe.exists():
            if self.root.exists() and not self.root.is_dir():
                raise ConfigError(f"run folder {self.root} is a file; choose another with --run-folder")
            return False
        held = self.load_config()
        if held == config:
            return True
        differences = "\n".join(f"  {line}" for line in diff(held, config))
        raise ConfigError(
            f"run folder {self.root} holds another recipe; it differs in\n{differences}\n"
            "Give this run another name (name=...) or folder (--run-folder), or remove the old one."
            + (f" To train its weights on: name=NEW train.init_from={self.root}" if self.has_checkpoints else "")
        )

    def load_config(self) -> RunConfig:
        """Return the recipe that this folder's run was started with."""
        if not self.recipe.exists():
            raise ConfigError(f"{self.root} is no run folder: it has no recipe.yaml")
        return load_recipe(str(self.recipe), []).config

    def prepare(self, config: RunConfig) -> None:
        """Create the folder and its fixed files; call on one rank, under the run's lock."""
        try:
            for folder in (self.root, self.checkpoints, self.evaluations, self.logs):
                folder.mkdir(parents=True, exist_ok=True)
            for plugin in config.plugins:
                self._keep(Path(plugin.path), plugin.sha256)
            if not self.recipe.exists():
                write_atomically(self.recipe, dump_yaml(config))
        except OSError as error:
            raise UserError(f"run folder {self.root} cannot be written: {error.strerror} ({error.filename})") from error

    def _keep(self, plugin: Path, digest: str) -> None:
        """Keep a plug-in as it is now: the run is evaluated, and goes on, with the code that it began with."""
        kept = self.root / FOLDER / kept_name(plugin, digest)
        if not kept.exists() and plugin.is_file():
            kept.parent.mkdir(exist_ok=True)
            write_atomically(kept, plugin.read_text(encoding="utf-8"))

    def next_free(self, name: str) -> Path:
        """Return ``<name>.old-1``, ``.old-2``, …: where a fresh start sets earlier files aside."""
        number = 1
        while (path := self.root / f"{name}.old-{number}").exists():
            number += 1
        return path

    def set_aside(self) -> None:
        """Rename the files of earlier training, so that a fresh start mixes with nothing and loses nothing."""
        for path in (self.events, self.checkpoints):
            if path.exists():
                path.rename(self.next_free(path.name))
        self.checkpoints.mkdir(parents=True, exist_ok=True)
