"""Images a second of several workers that decode at once: each with the threads of the whole machine, or of its share.

    python -m benchmarks.shared_cores FOLDER [--workers 2] [--rounds 5]

FOLDER holds class folders of JPEGs in train/. Rounds alternate; the first setting is measured twice a round as a control.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from benchmarks import common
from distributed_at.cores import core_share

READ = """
import sys, time
import numpy as np
from distributed_at.config import AugmentConfig, DataConfig
from distributed_at.data import open_split
folder, threads, seconds, backend = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
config = DataConfig(dataset="folder", path=folder, image_size=224, backend=backend, num_threads=threads,
                    augment=AugmentConfig(crop="random_resized", flip=True))
with open_split(config, "train", seed=0) as source:
    ids = np.resize(source.sample_ids, 32)
    source.read(ids, epoch=0, train=True)
    print("ready", flush=True)
    sys.stdin.readline()
    begun, read, epoch = time.monotonic(), 0, 1
    while time.monotonic() - begun < seconds:
        source.read(ids, epoch=epoch, train=True)
        read, epoch = read + len(ids), epoch + 1
    print(read / (time.monotonic() - begun), flush=True)
"""


def together(folder: Path, workers: int, threads: int, seconds: float, backend: str) -> float:
    """Return the images a second of all workers together."""
    words = [sys.executable, "-c", READ, str(folder), str(threads), str(seconds), backend]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    readers = [
        subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(workers)
    ]
    for reader in readers:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "ready\n"
    for reader in readers:
        assert reader.stdin is not None
        reader.stdin.write("\n")
        reader.stdin.flush()
    rates = [float(reader.communicate()[0]) for reader in readers]
    return sum(rates)


def main() -> None:
    """Measure, print and write the JSON record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--backend", default="dali_cpu", choices=("dali_cpu", "pil"))
    arguments = parser.parse_args()
    before = common.environment()
    share = max(1, core_share() // arguments.workers)
    settings = {"whole machine each": core_share(), "whole machine each, again": core_share(), "a share each": share}
    rates: dict[str, list[float]] = {name: [] for name in settings}
    for _ in range(arguments.rounds):
        for name, threads in settings.items():
            rates[name].append(
                together(arguments.folder, arguments.workers, threads, arguments.seconds, arguments.backend)
            )
        time.sleep(0.2)
    first = rates["whole machine each"]
    result = {
        name: {
            "threads": settings[name],
            "images_per_second": [round(v, 1) for v in values],
            "median": round(median(values), 1),
            "over the first": round(median(v / f for v, f in zip(values, first, strict=True)), 3),
        }
        for name, values in rates.items()
    }
    for name, row in result.items():
        print(f"{name:28s} {row['threads']} threads  {row['median']:8.1f} images/s  x{row['over the first']}")
    setting = {k: v for k, v in vars(arguments).items() if k != "folder"}
    print(common.write_result("shared_cores", {"setting": setting, "results": result}, before=before))


if __name__ == "__main__":
    main()
