"""One training run: parallelism, the loop, its state on disk, and a clean way in and out."""
