"""Everything that needs a GPU, in one command of at most nine minutes, ending in one table: predicted against measured.

    python -m benchmarks.gpu [--minutes 9] [--only SECTION ...] [--out FOLDER]
    python -m benchmarks.gpu --device cpu      dry run on tiny networks; the numbers then mean nothing

Needs torch >= 2.11 with CUDA, and pydantic; triton and nvcc for what they compile, pytest for the tests. Predictions are
those of a roofline model of an H200, made before any measurement (docs/performance.md). Sections come in the order of
their weight. One that fails, or takes more than its share, says why and the rest goes on; at the end of the time the table
is printed with what there is, whatever still runs.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType

import torch
import torch.nn.functional as F

try:
    from benchmarks import attack_ladder, common, rungs
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"this Python has no module {missing.name!r}, without which nothing here runs. Where there is no network: "
        "pip install --target FOLDER pydantic on another machine with the same Python, then PYTHONPATH=FOLDER make gpu"
    ) from None
from distributed_at.attacks.losses import Goal
from distributed_at.engine.twin.compiled_attack import StaticIteration
from distributed_at.engine.twin.twin import Twin
from distributed_at.float32 import tf32

GPU_TEST_SECONDS = 120.0
END_SECONDS = 25.0  # kept for the table and for what cannot be interrupted at once


class TimeUpError(BaseException):
    """A section's time is over. Not an Exception, so that nothing between takes it for a failure of its own."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row of the last table; ``predicted`` is for an H200, None where nobody predicted it."""

    section: str
    what: str
    measured: float | None
    unit: str
    predicted: float | None = None
    note: str = ""


@dataclass
class Session:
    """Device, sizes and what was found.

    Attributes:
        tiny: dry run: smallest networks and batches.
        lines: the table.
        details: raw results by section.
        ends: ``time.monotonic()`` at which no further section starts.
    """

    device: str
    tiny: bool
    ends: float
    rounds: int
    lines: list[Line] = field(default_factory=list)
    details: dict[str, object] = field(default_factory=dict)

    def add(self, section: str, what: str, measured: float | None, unit: str, **more: object) -> None:
        if self.tiny:  # neither the sizes nor the machine are those of the prediction
            section, more = f"dry: {section}", more | {"predicted": None}
        line = Line(section=section, what=what, measured=measured, unit=unit, **more)  # type: ignore[arg-type]
        self.lines.append(line)
        print(f"  {format_line(line)}", flush=True)

    def network(self, arch: str, norm: str = "bn"):
        if self.tiny:
            return rungs.network(
                "resnet18", norm=norm, size=32, device=self.device, width=32 if norm == "gn" else 8
            ), 32
        return rungs.network(arch, norm=norm, size=224, device=self.device), 224

    def setting(self, arch: str, count: int, dtype: str = "bf16", norm: str = "bn") -> rungs.Setting:
        model, size = self.network(arch, norm)
        x, y = rungs.batch(model, 4 if self.tiny else count, size, self.device)
        return rungs.Setting(model, x, y, dtype, self.device)

    def seconds(self, function: Callable[[], object], repeats: int = 10, warm_up: int = 2) -> float:
        """Return the median time of one call after unmeasured ones."""
        for _ in range(warm_up):
            function()
        cuda = self.device == "cuda"
        times = sorted(common._seconds(function, 1, cuda) for _ in range(3 if self.tiny else repeats))
        return times[len(times) // 2]


def ladder(session: Session, arch: str, predicted: dict[str, float], names: list[str], count: int) -> None:
    setting = session.setting(arch, count)
    result = attack_ladder.measure(
        setting, names, rounds=session.rounds, check_steps=3, target_seconds=0.0 if session.tiny else 0.2
    )
    session.details[f"ladder_{arch}_{count}"] = result
    section = f"attack {arch} b{count} bf16"
    comparison = result["comparison"]
    for name, timing in comparison.timings.items():
        per_image = 1e6 * timing.median / len(setting.x)
        ratio = comparison.ratios.get(name, [1.0])[0]
        session.add(
            section, name, per_image, "µs/img/it", predicted=predicted.get(name), note=f"x{ratio:.2f} over grad"
        )
        peak = result["memory"][name]["peak_bytes"]
        if peak:
            session.add(section, f"{name}, peak memory", peak / len(setting.x) / 1e6, "MB/img")
    for name, reason in result["skipped"].items():
        session.add(section, name, None, "", note=reason[:90])


def attack_resnet50(session: Session) -> None:
    # roofline model times 1 / 0.75 (docs/performance.md); the step of PGD-30 has 30 of them and a training step
    ladder(session, "resnet50", {"backward": 160, "grad": 125, "compiled": 81}, list(rungs.RUNGS[:-1]), 256)


def small_batches(session: Session) -> None:
    """Where the host is the slower side: plain against graphed at 8 and 32 images."""
    for count in (8, 32):
        setting = session.setting("resnet50", count)
        names = ["folded", "graphed"] if session.device == "cuda" else ["folded"]
        for name in names:
            iteration = setting.iteration(name) if name == "folded" else _graph_only(setting)
            goal, bounds, step = _inputs(setting)
            with torch.no_grad():
                seconds = session.seconds(lambda i=iteration, b=bounds, g=goal, s=step, x=setting.x: i(x, s, b, g))
            session.add(f"attack resnet50 b{count} bf16", name, 1e6 * seconds / len(setting.x), "µs/img/it")
    session.add("crossover", "graph pays below, predicted", None, "img", predicted=21.0, note="compare the rows above")


def _graph_only(setting: rungs.Setting):
    twin = Twin(setting.model, bn_mode="eval", dtype=setting.dtype)
    return StaticIteration(
        rungs.attack(1, dtype=setting.dtype), twin, batch_size=len(setting.x), use_compiler=False, use_graph=True
    )


def _inputs(setting: rungs.Setting):
    step = torch.full((), rungs.STEP, device=setting.x.device)
    return Goal(labels=setting.y), rungs.attack(1, dtype=setting.dtype).threat.bounds(setting.x), step


def training_step(setting: rungs.Setting) -> Callable[[torch.Tensor], None]:
    """Return one clean training step in 16 bits under autocast, channels-last, SGD."""
    model = setting.model.to(memory_format=torch.channels_last).train()
    sgd = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)  # the weights that are attacked stay

    def step(x: torch.Tensor) -> None:
        with torch.autocast(setting.device, dtype=torch.bfloat16):
            logits = model(x)
        F.cross_entropy(logits.float(), setting.y).backward()
        sgd.step()
        sgd.zero_grad()

    return step


def clean_training(session: Session) -> None:
    """One clean training step, the anchor that public figures give."""
    for arch, predicted in (("resnet50", 5800.0), ("resnet152", 2500.0))[: 1 if session.tiny else 2]:
        setting = session.setting(arch, 256)
        step = training_step(setting)
        seconds = session.seconds(lambda s=step, x=setting.x: s(x))
        session.add("clean training bf16", f"{arch}, eager", len(setting.x) / seconds, "img/s", predicted=predicted)


def compile_times(session: Session) -> None:
    """What a cold compilation costs, whole and by regions; the iteration's time of each after it."""
    whole = [("resnet50", False), ("resnet50", True)]
    for arch, regional in whole[: 1 if session.tiny else 2]:
        setting = session.setting(arch, 64)
        twin = Twin(setting.model, bn_mode="eval", dtype=setting.dtype)
        name = f"{arch}, {'by regions' if regional else 'whole'}"
        with _cold_cache():
            iteration = StaticIteration(
                rungs.attack(1, dtype=setting.dtype),
                twin,
                batch_size=len(setting.x),
                use_compiler=True,
                regional=regional,
            )
            started = time.monotonic()
            setting.perturb(iteration, 1)
            session.add("compilation, cold", name, time.monotonic() - started, "s", note=_form(iteration))
        goal, bounds, step = _inputs(setting)
        with torch.no_grad():
            seconds = session.seconds(lambda i=iteration, b=bounds, g=goal, s=step, x=setting.x: i(x, s, b, g))
        session.add("compilation, cold", f"{name}, an iteration then", 1e6 * seconds / len(setting.x), "µs/img/it")


@contextlib.contextmanager
def _cold_cache() -> Iterator[None]:
    """Let the compiler find nothing of earlier calls."""
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    torch._dynamo.reset()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        try:
            yield
        finally:
            os.environ.pop("TORCHINDUCTOR_CACHE_DIR")
            if before is not None:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


def gpu_tests(session: Session) -> None:
    """The tests that need a GPU, in a process of their own."""
    if importlib.util.find_spec("pytest") is None:
        session.add("tests/gpu", "skipped", None, "", note="this Python has no pytest")
        return
    root = Path(__file__).resolve().parent.parent
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-m",
        "gpu and not slow",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:logging",
        "--tb",
        "short",
        "tests/gpu",
    ]
    limit = max(10.0, min(GPU_TEST_SECONDS, session.ends - time.monotonic()) - 5.0)
    with tempfile.TemporaryFile("w+") as told:
        process = subprocess.Popen(words, cwd=root, stdout=told, stderr=subprocess.STDOUT)
        try:
            ended = f"exit code {process.wait(timeout=limit)}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {limit:.0f} s"
        finally:
            process.kill()
            process.wait()
        told.seek(0)
        text = told.read()
    session.details["tests"] = text[-12000:]
    verdicts = re.findall(r"^tests/gpu/\S+ .*?(PASSED|FAILED|ERROR|SKIPPED)", text, flags=re.MULTILINE)
    for what in ("PASSED", "FAILED", "ERROR", "SKIPPED"):
        expected = 0.0 if what in ("FAILED", "ERROR") else None
        if what in verdicts or expected is not None:
            session.add("tests/gpu", what.lower(), verdicts.count(what), "tests", predicted=expected, note=ended)
    for name in re.findall(r"^FAILED tests/gpu/(\S+)", text, flags=re.MULTILINE):
        session.add("tests/gpu", "failed", None, "", note=name[:120])


def pgd30(session: Session) -> None:
    """The whole PGD-30 training step of ResNet-152: attack, training step, images a second.

    The good eager loop comes first: the others must reach its loss.
    """
    setting = session.setting("resnet152", 256)
    steps = 2 if session.tiny else 30
    section = f"PGD-{steps} resnet152 b256 bf16"
    step = training_step(setting)
    training = session.seconds(lambda: step(setting.x), repeats=4)
    setting.model.eval()  # its running statistics have moved: the reference comes after
    expected = setting.loss(setting.perturb(setting.iteration("grad"), 3))
    seconds: dict[str, float] = {}
    for name, predicted in (("grad", 112.0), ("compiled", 170.0), ("backward", 87.0), ("folded", None)):
        iteration = setting.iteration(name)
        started = time.monotonic()
        setting.perturb(iteration, 1)
        if name == "compiled":
            session.add(section, "compiled, first call", time.monotonic() - started, "s", note=_form(iteration))
        wrong = rungs.check(setting, setting.perturb(iteration, 3), expected)
        if wrong:
            session.add(section, name, None, "img/s", note=f"not measured: {wrong}")
            continue
        seconds[name] = session.seconds(lambda i=iteration: setting.perturb(i, steps), repeats=2, warm_up=0)
        share = 100 * seconds[name] / (seconds[name] + training)
        rate = len(setting.x) / (seconds[name] + training)
        session.add(section, name, rate, "img/s", predicted=predicted, note=f"attack {share:.0f} % of the step")
        for other, goal in (("grad", 1.5), ("backward", 2.0)):
            last = "compiled" if other == "grad" else "backward"  # the later one of the two
            if name == last and {other, "compiled"} <= seconds.keys():
                ratio = (seconds[other] + training) / (seconds["compiled"] + training)
                session.add(section, f"compiled over {other}, whole step", ratio, "x", predicted=goal)


def _form(iteration: object) -> str:
    """Say how a compiled iteration came to run."""
    if isinstance(iteration, StaticIteration):
        return f"fell back: {iteration.failed}"[:90] if iteration.failed else "compiled and run once"
    return ""


def group_norm(session: Session) -> None:
    """What group norm costs beside batch norm: stock, and with the fused operation."""
    seconds = {}
    for name, norm, fuse in (("bn, folded", "bn", False), ("gn, stock", "gn", False), ("gn, fused", "gn", True)):
        setting = session.setting("resnet50", 64, norm=norm)
        iteration = rungs.attack(1, dtype="bf16").iteration(
            Twin(setting.model, bn_mode="eval", dtype="bf16", fuse_group_norm=fuse)
        )
        goal, bounds, step = _inputs(setting)
        with torch.no_grad():
            seconds[name] = session.seconds(lambda i=iteration, b=bounds, g=goal, s=step, x=setting.x: i(x, s, b, g))
        per_image = 1e6 * seconds[name] / len(setting.x)
        session.add("group norm resnet50 b64 bf16", name, per_image, "µs/img/it")
        if session.device == "cuda" and name != "gn, stock":  # what 'auto' runs where the host is the slower side
            graphed = _graph_only(setting)
            with torch.no_grad():
                at = session.seconds(lambda i=graphed, b=bounds, g=goal, s=step, x=setting.x: i(x, s, b, g))
            seconds[f"{name}, graphed"] = at
            session.add("group norm resnet50 b64 bf16", f"{name}, graphed", 1e6 * at / len(setting.x), "µs/img/it")
    for name, base, predicted in (
        ("gn, stock", "bn, folded", 2.0),
        ("gn, fused", "bn, folded", None),
        ("gn, fused, graphed", "bn, folded, graphed", 1.3),
    ):
        if name in seconds:
            ratio = seconds[name] / seconds[base]
            session.add("group norm resnet50 b64 bf16", f"{name} over bn", ratio, "x", predicted=predicted)


def train_mode(session: Session) -> None:
    """An attack whose forwards move running statistics, as the CIFAR recipes', launched one by one and as a graph."""
    count, width = (4, 8) if session.tiny else (128, 64)
    model = rungs.network("preact_resnet18", size=32, device=session.device, width=width)
    x, y = rungs.batch(model, count, 32, session.device)
    for dtype in ("fp32", "bf16"):
        with tf32(dtype == "fp32"):
            setting = rungs.Setting(model, x, y, dtype, session.device)
            goal, bounds, step = _inputs(setting)
            section = f"train mode, rn18 b{count} {'tf32' if dtype == 'fp32' else dtype}"
            for name in ("plain", "graphed") if session.device == "cuda" else ("plain",):
                twin = Twin(model, bn_mode="train", dtype=dtype)
                iteration = rungs.attack(1, dtype=dtype).iteration(twin)
                if name == "graphed":
                    iteration = StaticIteration(
                        rungs.attack(1, dtype=dtype), twin, batch_size=count, use_compiler=False, use_graph=True
                    )
                with torch.no_grad():
                    seconds = session.seconds(lambda i=iteration, b=bounds, g=goal, s=step: i(x, s, b, g), repeats=30)
                note = f"fell back: {iteration.failed}"[:90] if getattr(iteration, "failed", "") else ""
                session.add(section, name, 1e3 * seconds, "ms/it", note=note)


def float32(session: Session) -> None:
    """What the batch that an image comes in changes in its adversarial image, in float32 and with TF32."""
    for norm in ("bn", "gn"):
        model = rungs.network("resnet18", norm=norm, size=32, device=session.device, width=32)
        x, y = rungs.batch(model, 16, 32, session.device)
        setting = rungs.Setting(model, x, y, "fp32", session.device)
        for name, enabled in (("TF32", True), ("float32", False)):
            with tf32(enabled):
                whole = setting.perturb(setting.iteration("folded"), 4)[:8]
                half = rungs.attack(4).perturb(model, x[:8], y[:8], iteration=setting.iteration("folded"))
            share = 100 * ((whole - half).abs() > 1e-6).float().mean().item()
            session.add(
                f"resnet18 {norm}, PGD-4, {name}", "pixels that batch 8 or 16 changes", share, "%",
                predicted=None if enabled else 0.0,
            )  # fmt: skip


def kernels(session: Session) -> None:
    """The attack's pixel operations against a copy in the same process."""
    from benchmarks import kernels as pixel

    batch, size = (4, 32) if session.tiny else (256, 224)
    content = pixel.measure(session.device, batch, size, 5)
    session.details["kernels"] = content
    step = content["operations"]["linf_step"]
    rate = step["gigabytes_per_second_at_median"]
    predicted = {"copy": 4300.0, "fused": 0.85 * 4300.0}
    for name in ("copy", "eager chain", "fused", "fused, uint8 clean, bf16 gradient"):
        timing = step["run"].timings[name]
        note = f"{1e6 * timing.median / batch:.2f} µs/img, {100 * rate[name] / rate['copy']:.0f} % of the copy"
        session.add("linf step 224²", name, rate[name], "GB/s", predicted=predicted.get(name), note=note)


def stem_gradient(session: Session) -> None:
    """The first convolution's gradient with respect to the image, which only an attack needs."""
    count, size = (4, 32) if session.tiny else (256, 224)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for channels in (3, 4, 8):
            x = torch.zeros(count, channels, size, size, device=session.device, dtype=dtype)
            x = x.contiguous(memory_format=torch.channels_last)
            weight = torch.randn(64, channels, 7, 7, device=session.device, dtype=dtype)
            weight = weight.contiguous(memory_format=torch.channels_last)
            dy = torch.randn_like(F.conv2d(x, weight, stride=2, padding=3))

            def backward(x=x, weight=weight, dy=dy) -> object:
                return torch.ops.aten.convolution_backward(
                    dy, x, weight, None, [2, 2], [3, 3], [1, 1], False, [0, 0], 1, [True, False, False]
                )

            per_image = 1e6 * session.seconds(backward) / count
            name = f"{str(dtype).removeprefix('torch.')}, {channels} channels"
            predicted = 8.0 if (dtype, channels) == (torch.bfloat16, 3) else None
            session.add("stem input gradient", name, per_image, "µs/img", predicted=predicted)


def host_waits(session: Session) -> None:
    """One attack under torch's check that nothing waits for the device."""
    if session.device != "cuda":
        session.add("host synchronisation", "attack under set_sync_debug_mode", None, "", note="skipped: needs CUDA")
        return
    setting = session.setting("resnet50", 8)
    iteration = setting.iteration("folded")
    setting.perturb(iteration, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        setting.perturb(iteration, 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    session.add("host synchronisation", "waits in an attack", 0.0, "", predicted=0.0)


# (name, its share of the time in seconds, function), the most telling first
SECTIONS: list[tuple[str, float, Callable[[Session], None]]] = [
    ("kernels", 60, kernels),
    ("pgd30", 240, pgd30),
    ("train_mode", 30, train_mode),
    ("group_norm", 80, group_norm),
    ("gpu_tests", GPU_TEST_SECONDS, gpu_tests),
    ("attack_resnet50", 120, attack_resnet50),
    ("compile_times", 120, compile_times),
    ("small_batches", 40, small_batches),
    ("float32", 20, float32),
    ("host_waits", 15, host_waits),
    ("clean_training", 30, clean_training),
    ("stem_gradient", 20, stem_gradient),
]


def format_line(line: Line) -> str:
    """Return a row: what, measured, predicted, their ratio."""
    measured = f"{line.measured:10.2f}" if line.measured is not None else f"{'–':>10}"
    predicted = f"{line.predicted:9.2f}" if line.predicted is not None else f"{'':>9}"
    ratio = ""
    if line.measured and line.predicted:
        ratio = f"{line.measured / line.predicted:5.2f}"
    return f"{line.section:30.30s} {line.what:34.34s} {predicted} {measured} {ratio:>5} {line.unit:9s} {line.note}"


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeUpError in this thread after ``seconds``, at the next Python instruction."""

    def over(number: int, frame: FrameType | None) -> None:
        raise TimeUpError

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(0.01, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def run_section(session: Session, name: str, share: float, function: Callable[[Session], None]) -> None:
    """Run a section for at most its share of the time, or put into the table why not."""
    left = session.ends - time.monotonic()
    limit = left if session.tiny else min(share, left)  # a dry run is to come to its end
    if limit < 0.25 * share:
        session.add(
            name, "skipped", None, "", note=f"{max(left, 0):.0f} s are left, of the {share:.0f} s that it may need"
        )
        return
    print(f"{name} ({left:.0f} s left)", flush=True)
    started = time.monotonic()
    try:
        with time_limit(limit):
            function(session)
    except TimeUpError:
        session.add(name, "stopped", None, "", note=f"took more than its {limit:.0f} s; the rows above are whole")
    except Exception as error:  # whatever a new machine brings, the other sections still count
        traceback.print_exc(file=sys.stderr)
        first = str(error).splitlines()[0] if str(error) else ""
        session.add(name, "failed", None, "", note=f"{type(error).__name__}: {first}"[:120])
    session.details[f"seconds_{name}"] = round(time.monotonic() - started, 1)
    if session.device == "cuda":
        torch._dynamo.reset()
        torch.cuda.empty_cache()


def finish(session: Session, before: dict[str, object], out: Path) -> None:
    """Write the record and print the table, of whatever there is."""
    out.mkdir(parents=True, exist_ok=True)
    record = {"environment": before, "lines": [asdict(line) for line in session.lines], "details": session.details}
    path = out / f"gpu_{'dry_run' if session.tiny else 'measured'}.json"
    path.write_text(json.dumps(record, indent=1, default=lambda v: getattr(v, "__dict__", str(v))) + "\n")
    name = before["gpu"] if session.device == "cuda" else "CPU, a dry run: the numbers mean nothing"
    print(f"\n== {name}, torch {torch.__version__}; predictions are for an H200; record: {path}")
    print(f"{'section':30s} {'what':34s} {'predicted':>9} {'measured':>10} ratio unit")
    for line in session.lines:
        print(format_line(line))
    sys.stdout.flush()


def main() -> None:
    """Run the sections, write the JSON record, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--minutes", type=float, default=9.0, help="of this call, the table included")
    parser.add_argument("--only", nargs="+", choices=[name for name, _, _ in SECTIONS])
    parser.add_argument("--out", type=Path, help="folder of the record (default $OUT, else benchmarks/results)")
    arguments = parser.parse_args()
    started = time.monotonic()
    device = arguments.device
    if device == "auto":
        if not torch.cuda.is_available():
            raise SystemExit("no CUDA device here. A dry run on tiny networks: python -m benchmarks.gpu --device cpu")
        device = "cuda"
    torch.backends.cudnn.benchmark = True
    before = common.environment()
    out = arguments.out or (Path(os.environ["OUT"]) if os.environ.get("OUT") else common.RESULTS)
    tiny = device == "cpu"
    session = Session(device, tiny, started + 60.0 * arguments.minutes - END_SECONDS, rounds=2 if tiny else 5)

    def give_up() -> None:
        session.add("the end", "stopped", None, "", note="a section could not be interrupted")
        finish(session, before, out)
        os._exit(1)

    last_resort = threading.Timer(session.ends + 0.6 * END_SECONDS - time.monotonic(), give_up)
    last_resort.daemon = True
    last_resort.start()
    for name, share, function in SECTIONS:
        if arguments.only is None or name in arguments.only:
            run_section(session, name, share, function)
    last_resort.cancel()
    finish(session, before, out)


if __name__ == "__main__":
    main()
