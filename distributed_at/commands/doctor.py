"""Say what is installed, what a run will use here, and the command that fixes what is missing."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

from distributed_at.commands.common import add_json, print_json, print_table
from distributed_at.engine.processes.launch import check_workers, detect_rank, run_workers, usable_workers
from distributed_at.errors import ConfigError
from distributed_at.findings import ABSENT, BROKEN, OK, SLOW, Finding

PREFLIGHT_SECONDS = 120.0  # a rank that has not come by then is missing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", help="with --distributed: the recipe that all ranks must agree on")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of that recipe")
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="check all ranks of a job together: devices, network, clocks, files, versions, recipe",
    )
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="with --distributed: where runs live (runs)")
    parser.add_argument("--workers", default="auto", help="with --distributed: workers on this machine")
    add_json(parser)


def _version(*names: str) -> str:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def _python() -> Finding:
    version = platform.python_version()
    supported = (3, 10) <= sys.version_info[:2] <= (3, 13)
    return Finding("python", OK if supported else BROKEN, version, "" if supported else "use Python 3.10 to 3.13")


def _torch() -> Finding:
    try:
        import torch
    except ImportError as error:
        return Finding("torch", BROKEN, str(error), "pip install torch torchvision")
    version = tuple(int(x) for x in torch.__version__.split("+")[0].split(".")[:2])
    fix = "" if version >= (2, 11) else "pip install -U torch torchvision"
    return Finding("torch", OK if not fix else BROKEN, f"{torch.__version__}, CUDA build {torch.version.cuda}", fix)


def _torchvision() -> Finding:
    try:
        import torchvision
    except (ImportError, RuntimeError) as error:
        # a CPU-only torch beside the index's torchvision fails here: the two come from different builds
        return Finding("torchvision", BROKEN, str(error), "pip install --force-reinstall torch torchvision")
    return Finding("torchvision", OK, torchvision.__version__)


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("gpu", ABSENT, "none: training runs on the CPU with gloo", "")
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    detail = ", ".join(f"{p.name} {p.total_memory / 2**30:.0f} GiB sm_{p.major}{p.minor}" for p in names)
    return Finding("gpu", OK, detail)


def _deepspeed() -> Finding:
    version = _version("deepspeed")
    if version:
        return Finding("deepspeed", OK, version)
    return Finding(
        "deepspeed", ABSENT, "runs of one worker use plain torch; more need it", "pip install deepspeed==0.19.8"
    )


def _dali() -> Finding:
    if importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali"):
        version = _version("nvidia-dali-cuda130", "nvidia-dali-cuda120")
        import torch

        return Finding("dali", OK, f"{version}, backend {'gpu' if torch.cuda.is_available() else 'cpu'}")
    return Finding(
        "dali", ABSENT, "ImageNet folders are read with PIL", "pip install nvidia-dali-cuda130 (or -cuda120)"
    )


def _apex() -> Finding:
    if importlib.util.find_spec("apex") is None:
        return Finding(
            "apex",
            ABSENT,
            "optional; torch's own SGD is used",
            "build NVIDIA apex from source for optimizer.backend=apex",
        )
    try:
        importlib.import_module("apex.optimizers")
    except ImportError:
        return Finding("apex", BROKEN, "the package named apex here is not NVIDIA's", "pip uninstall apex")
    return Finding("apex", OK, "NVIDIA apex")


def _compiler() -> Finding:
    found = [name for name in ("g++", "clang++", "nvcc", "ninja") if shutil.which(name)]
    if "g++" in found or "clang++" in found:
        return Finding("compiler", OK, ", ".join(found))
    return Finding(
        "compiler",
        ABSENT,
        "no C++ compiler: no torch.compile, no built kernels; plain torch is used",
        "apt-get install g++",
    )


def _kernels() -> Finding:
    if importlib.util.find_spec("distributed_at.ops") is None:
        return Finding("kernels", ABSENT, "plain torch is used")
    ops = importlib.import_module("distributed_at.ops")
    return Finding("kernels", OK, ", ".join(f"{name}: {value}" for name, value in ops.describe().items()))


def _wandb() -> Finding:
    version = _version("wandb")
    if not version:
        return Finding("wandb", ABSENT, "events.jsonl and the report need none", "pip install wandb")
    key = bool(os.environ.get("WANDB_API_KEY")) or os.path.exists(os.path.expanduser("~/.netrc"))
    mode = os.environ.get("WANDB_MODE") or ("online" if key else "offline (no key)")
    return Finding("wandb", OK, f"{version}, mode {mode}", "" if key else "wandb login, for log.wandb=online")


def _autoattack() -> Finding:
    version = _version("pyautoattack")
    if version:
        return Finding("autoattack", OK, f"pyautoattack {version}")
    return Finding("autoattack", ABSENT, "evaluation by AutoAttack is not possible", "pip install pyautoattack==0.2.0")


def _cluster() -> Finding:
    if (shutil.which("sbatch") or "SLURM_JOB_ID" in os.environ) and not shutil.which("scontrol"):
        return Finding("slurm", SLOW, "no scontrol here: jobs cannot requeue themselves", "use slurm/chain.sh")
    if shutil.which("sbatch"):
        return Finding("slurm", OK, os.environ.get("SLURM_JOB_ID", "sbatch found, no job"))
    return Finding("slurm", ABSENT, "no sbatch here", "")


CHECKS = (
    _python, _torch, _torchvision, _gpu, _deepspeed, _dali, _kernels, _compiler, _apex, _autoattack, _wandb, _cluster,
)  # fmt: skip


def examine() -> list[Finding]:
    """Return a finding for each part; a check that fails is a finding too."""
    findings = []
    for check in CHECKS:
        try:
            findings.append(check())
        except Exception as error:  # a broken installation must not break the doctor
            findings.append(Finding(check.__name__.strip("_"), BROKEN, f"{type(error).__name__}: {error}"))
    return findings


def run(args: argparse.Namespace) -> int:
    if args.distributed:
        return _run_distributed(args)
    if args.recipe is not None:
        raise ConfigError(f"doctor takes a recipe with --distributed alone, got {args.recipe}")
    findings = examine()
    _show([asdict(f) for f in findings], as_json=args.json)
    return 1 if any(f.state == BROKEN for f in findings) else 0


def _run_distributed(args: argparse.Namespace) -> int:
    """The same check under srun, torchrun or by hand; every rank ends with the same exit code."""
    if detect_rank() is None:
        return run_workers(args.words, check_workers(args.workers) or usable_workers(), None)
    from distributed_at.engine.processes.preflight import examine_ranks
    from distributed_at.engine.processes.world import initialise_world, shutdown_world
    from distributed_at.recipes import dump_yaml, load_recipe

    recipe = dump_yaml(load_recipe(args.recipe, args.overrides).config) if args.recipe is not None else None
    world = initialise_world(PREFLIGHT_SECONDS)
    findings = examine_ranks(world, args.folder, recipe=recipe)
    if world.is_main:
        _show([asdict(f) for f in findings], as_json=args.json)
    shutdown_world()
    return 1 if any(f.state == BROKEN for f in findings) else 0


def _show(rows: list[dict[str, str]], *, as_json: bool) -> None:
    if as_json:
        print_json(rows)
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold")
    for column in ("part", "state", "what", "how to fix it"):
        table.add_column(column, overflow="fold")
    colours = {OK: "green", ABSENT: "yellow", SLOW: "yellow", BROKEN: "red"}
    for row in rows:
        table.add_row(
            row["part"], Text(row["state"], style=colours[row["state"]]), Text(row["detail"]), Text(row["fix"])
        )
    print_table(table)
