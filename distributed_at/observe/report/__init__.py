"""One self-contained HTML page about a run: ``build_report``. It reads the run folder and measures nothing itself."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from distributed_at.errors import ConfigError
from distributed_at.files import write_atomically
from distributed_at.observe.record import load_run
from distributed_at.observe.report.page import page_values
from distributed_at.observe.secrets import redact_text, secret_values

REPORT_FILE = "report.html"


def build_report(
    run_folder: Path | str, *, compare: Sequence[Path | str] = (), output: Path | str | None = None
) -> Path:
    """Write the report of a run, finished or not, and return its path.

    Args:
        run_folder: the run's folder; its ``examples.npz`` and ``evaluations/`` are used where present.
        compare: folders of other runs, e.g. of natural training, that stand beside it in the accuracy table.
        output: where to write; None = ``report.html`` in the run folder. The file is replaced in one move.

    Raises:
        DataError: a folder is no run folder.
        ConfigError: ``output`` is a folder, or lies where none can be made.
    """
    path = Path(run_folder) / REPORT_FILE if output is None else Path(output)
    if path.is_dir():
        raise ConfigError(f"--output {path}: is a folder; name a file, e.g. {path / REPORT_FILE}")
    record = load_run(run_folder)
    others = [load_run(folder) for folder in compare]
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    style = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
    values = page_values(record, others)
    html = templates.get_template("report.html.j2").render(
        style=style, written=time.strftime("%Y-%m-%d %H:%M"), **values
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {path}: its folder cannot be made: {error.strerror}") from None
    write_atomically(path, _without_secrets(html))
    return path


def _without_secrets(html: str) -> str:
    """Remove secrets line by line; lines of pictures are left alone, where a match could only be chance."""
    secrets = secret_values()
    return "\n".join(line if "data:image/" in line else redact_text(line, secrets) for line in html.split("\n"))
