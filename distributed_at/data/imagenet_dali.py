"""Decodes images with NVIDIA DALI, on the CPU or on the GPU.

DALI decides nothing here: encoded bytes, windows, sizes and flips are fed to it, so batches are the same on every world
size and after every resume. On the GPU it resizes too; on the CPU ``resample.py`` does, which is faster. One pipeline
lives as long as its decoder; it is built anew only after a damaged image.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from distributed_at.config.data import ResizeFilter
from distributed_at.data.augment import Views
from distributed_at.data.inspection import damage
from distributed_at.data.resample import resample
from distributed_at.errors import DataError

_MAX_BATCH = 256


def _build(*, size: int, batch_size: int, num_threads: int, device_id: int | None) -> Any:
    import nvidia.dali as dali

    fn: Any = dali.fn  # made at import, unknown to type checkers
    types: Any = dali.types
    pipeline_def: Any = dali.pipeline_def

    # no queue of its own: requests come one at a time, from the prefetcher's thread
    @pipeline_def(
        batch_size=batch_size,
        num_threads=num_threads,
        device_id=device_id,
        prefetch_queue_depth=1,
        exec_async=False,
        exec_pipelined=False,
    )
    def pipeline() -> Any:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        windows = fn.external_source(name="windows", dtype=types.INT32, ndim=1)  # top, left, height, width
        images = fn.decoders.image_slice(
            encoded,
            windows[0:2],
            windows[2:4],
            axis_names="HW",
            normalized_anchor=False,
            normalized_shape=False,
            device="cpu" if device_id is None else "mixed",
            output_type=types.RGB,
            adjust_orientation=False,  # dimensions and windows are those of the stored image
            jpeg_fancy_upsampling=True,  # as libjpeg-turbo does on the CPU
            hw_decoder_load=0.99,
        )
        if device_id is None:
            return images
        resized = fn.external_source(name="resized", dtype=types.FLOAT, ndim=1)  # height, width
        corners = fn.external_source(name="corners", dtype=types.INT32, ndim=1)  # top, left
        flips = fn.external_source(name="flips", dtype=types.INT32, ndim=0)
        images = fn.resize(images, size=resized, interp_type=types.INTERP_CUBIC, antialias=True)
        images = fn.slice(images, start=corners, shape=[size, size], axes=[0, 1])
        return fn.flip(images, horizontal=flips)

    built = pipeline()
    built.build()
    return built


class DaliDecoder:
    """Turns encoded images into uint8 squares with a DALI pipeline."""

    def __init__(
        self,
        *,
        size: int,
        num_threads: int,
        device_id: int | None = None,
        resize: ResizeFilter = "antialiased",
    ) -> None:
        """Prepare a decoder; the pipeline is built at the first batch.

        Args:
            size: height and width of the result, pixels.
            num_threads: DALI's worker threads.
            device_id: CUDA device of the 'dali_gpu' backend; null = CPU.
            resize: the kernel on the CPU; on the GPU it is DALI's own, antialiased.

        Raises:
            DataError: DALI is not installed.
        """
        try:
            import nvidia.dali
        except ImportError as error:
            raise DataError(
                f"data.backend needs NVIDIA DALI ({error}). Install the extra dali-cuda12 or dali-cuda13, "
                f"or set data.backend: pil."
            ) from error
        self.name = "dali_cpu" if device_id is None else "dali_gpu"
        self._version = nvidia.dali.__version__
        self._size = size
        self._num_threads = num_threads
        self._device_id = device_id
        self._resize = resize
        self._pipeline: Any = None
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="resample")

    def decode(self, encoded: Sequence[np.ndarray], views: Views) -> tuple[torch.Tensor, dict[int, str]]:
        """Decode N images.

        A batch with a damaged image fails as a whole in DALI, without saying which one it is: then each image is tried
        alone, and the good ones are decoded together again.

        Returns:
            (N, size, size, 3) uint8 on the backend's device, and position -> reason for those that cannot be decoded
            (their pixels are 0).
        """
        parts, failures = [], {}
        for start in range(0, len(encoded), _MAX_BATCH):
            part = encoded[start : start + _MAX_BATCH]
            places = np.arange(start, start + len(part))
            images, reasons = self._decode_part(list(part), views.take(places))
            parts.append(images)
            failures.update({start + place: reason for place, reason in reasons.items()})
        if not parts:
            return torch.zeros((0, self._size, self._size, 3), dtype=torch.uint8), {}
        return (parts[0] if len(parts) == 1 else torch.cat(parts)), failures

    def _decode_part(self, encoded: list[np.ndarray], views: Views) -> tuple[torch.Tensor, dict[int, str]]:
        try:
            return self._run(encoded, views), {}
        except (RuntimeError, ValueError):
            self._pipeline = None  # DALI declares a failed pipeline invalid
        failures = self._find_damaged(encoded, views)
        good = np.array([i for i in range(len(encoded)) if i not in failures], dtype=np.int64)
        device = "cpu" if self._device_id is None else f"cuda:{self._device_id}"
        out = torch.zeros((len(encoded), self._size, self._size, 3), dtype=torch.uint8, device=device)
        if len(good):
            out[torch.from_numpy(good).to(device)] = self._run([encoded[i] for i in good], views.take(good))
        return out, failures

    def _find_damaged(self, encoded: list[np.ndarray], views: Views) -> dict[int, str]:
        failures = {}
        for place in range(len(encoded)):
            if len(encoded[place]) == 0:
                failures[place] = damage(b"")
                continue
            try:
                self._run([encoded[place]], views.take(np.array([place])))
            except (RuntimeError, ValueError) as error:
                self._pipeline = None
                failures[place] = damage(encoded[place].tobytes()) or _reason(error)
        return failures

    def _run(self, encoded: list[np.ndarray], views: Views) -> torch.Tensor:
        if self._pipeline is None:
            self._pipeline = _build(
                size=self._size, batch_size=_MAX_BATCH, num_threads=self._num_threads, device_id=self._device_id
            )
        self._pipeline.feed_input("encoded", encoded)
        self._pipeline.feed_input("windows", views.windows.astype(np.int32))
        if self._device_id is None:
            (windows,) = self._pipeline.run()
            out = np.empty((len(encoded), self._size, self._size, 3), dtype=np.uint8)

            def one(i: int) -> None:
                resample(np.asarray(windows[i]), views, i, out[i], resize=self._resize)

            list(self._pool.map(one, range(len(encoded))))
            return torch.from_numpy(out)
        self._pipeline.feed_input("resized", views.resized.astype(np.float32))
        self._pipeline.feed_input("corners", views.corners.astype(np.int32))
        self._pipeline.feed_input("flips", views.flips.astype(np.int32))
        (images,) = self._pipeline.run()
        return torch.from_dlpack(images.as_tensor()).clone()  # a copy: DALI reuses its memory

    def describe(self) -> str:
        """Return the backend and the versions of what makes its pixels."""
        return f"{self.name} {self._version}" + (f", torch {torch.__version__}" if self._device_id is None else "")

    def close(self) -> None:
        """Free the pipeline and stop the threads."""
        self._pipeline = None
        self._pool.shutdown()


def _reason(error: Exception) -> str:
    """Return the line of DALI's report that names the fault, without its stack: where Pillow finds none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "nvImageCodec" in line or "Failed to decode" in line]
    return f"cannot be decoded: {(told or lines or ['unknown error'])[0][:200]}"
