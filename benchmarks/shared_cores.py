"""Images a second of several workers that decode at once: each with the threads of all cores, or of its share.

    python -m benchmarks.shared_cores FOLDER [--workers 2] [--rounds 25] [--backend dali_cpu]

FOLDER holds train/ and val/ of class folders with JPEGs. The workers of both kinds stay alive and wait; in every round, in
random order, those of one kind read the same views at once, and the round's time is that of the slowest. Workers with a
share have the environment that the launcher gives its own, and find their number of threads themselves. Processor time an
image is the least of some passes. Writes results/shared_cores.json.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from benchmarks import common
from benchmarks.loader import processor_time
from distributed_at.cores import allowed_cores
from distributed_at.engine.processes.launch import worker_environment

READ = """
import sys
import numpy as np
from distributed_at.config import AugmentConfig, DataConfig
from distributed_at.data import open_split
from distributed_at.data.machine import decoder_threads
folder, threads, batches, backend = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
config = DataConfig(dataset="folder", path=folder, image_size=224, backend=backend, num_threads=threads,
                    augment=AugmentConfig(crop="random_resized", flip=True))
with open_split(config, "train", seed=0) as source:
    ids = np.resize(source.sample_ids, 32 * batches).reshape(batches, 32)
    print(decoder_threads(threads), flush=True)
    for _ in sys.stdin:
        for part in ids:
            source.read(part, epoch=1, train=True)
        print("read", flush=True)
"""


class Workers:
    """Processes that each read the same images when told to."""

    def __init__(self, folder: Path, workers: int, threads: int, batches: int, backend: str) -> None:
        words = [sys.executable, "-c", READ, str(folder), str(threads), str(batches), backend]
        self._readers = [
            subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env=worker_environment(rank, workers, 0, {**os.environ, "OMP_NUM_THREADS": "1"}),
            )
            for rank in range(workers)
        ]  # fmt: skip
        self.threads = [int(self._answer(reader)) for reader in self._readers]
        self.processes = [reader.pid for reader in self._readers]

    def read(self) -> None:
        for reader in self._readers:
            assert reader.stdin is not None
            reader.stdin.write("\n")
            reader.stdin.flush()
        for reader in self._readers:
            self._answer(reader)

    def close(self) -> None:
        for reader in self._readers:
            reader.communicate()

    def _answer(self, reader: subprocess.Popen[str]) -> str:
        assert reader.stdout is not None
        return reader.stdout.readline()


def main() -> None:
    """Measure, print and write the JSON record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--batches", type=int, default=8, help="of 32 images, read by each worker in a round")
    parser.add_argument("--backend", default="dali_cpu", choices=("dali_cpu", "pil"))
    arguments = parser.parse_args()
    before = common.environment()
    images = arguments.workers * arguments.batches * 32
    threads = {"all cores each": allowed_cores(), "a share each": 0}
    kinds = {
        name: Workers(arguments.folder, arguments.workers, number, arguments.batches, arguments.backend)
        for name, number in threads.items()
    }
    comparison = common.compare(
        {name: workers.read for name, workers in kinds.items()},
        baseline="all cores each", rounds=arguments.rounds, warm_up=1,
    )  # fmt: skip
    result = {
        name: {
            "threads": workers.threads,
            "images_per_second": round(images / comparison.timings[name].median, 1),
            "processor_milliseconds_per_image": processor_time(workers.read, workers.processes, images),
        }
        for name, workers in kinds.items()
    }
    for workers in kinds.values():
        workers.close()
    for name, row in result.items():
        print(
            f"{name:16s} threads {row['threads']}  {row['images_per_second']} images/s  "
            f"{row['processor_milliseconds_per_image']} ms of processor an image"
        )
    print(f"a share over all cores {comparison.ratios['a share each']}, A/A control {comparison.control}", end="")
    print("" if comparison.trusted else "  NOT TRUSTED: the machine was too busy")
    setting = {k: v for k, v in vars(arguments).items() if k != "folder"}
    content = {"setting": setting, "results": result, "comparison": comparison}
    print(common.write_result("shared_cores", content, before=before))


if __name__ == "__main__":
    main()
