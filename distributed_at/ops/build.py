"""Compiles and loads the kernels in ``kernels/`` at first use, or says once that plain torch is used instead.

The sources have a plain C interface and include no torch header, so a build takes seconds, needs only g++ or nvcc and
does not depend on torch's C++ ABI. Tensor shapes, memory and dispatch are not handled here.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..errors import ConfigError, did_you_mean

_LOG = logging.getLogger(__name__)
_Function = TypeVar("_Function", bound=Callable[..., Any])
_CHOICES = ("auto", "on", "off")
_CPU_FILES = ("cpu.cpp",)
_CUDA_FILES = ("linf.cu", "l2.cu", "start.cu")
_HEADERS = ("numeric.h", "cpu.h", "launch.h")
# Contracting a multiplication and an addition into one rounding would change the bits of a step; fast math too.
_CPU_FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
              "-shared", "-fPIC")  # fmt: skip
_CUDA_FLAGS = ("-std=c++17", "-O3", "--fmad=false", "-shared", "-Xcompiler", "-fPIC", "-cudart", "static")
_TIMEOUT_SECONDS = 600
_LOCK = threading.Lock()


class KernelBuildError(ConfigError):
    """The kernels were asked for (``DISTRIBUTED_AT_KERNELS=on``) and cannot be compiled or loaded."""


def constant_to_compilers(function: _Function) -> _Function:
    """Mark a function whose result a compiled graph takes as a constant.

    ``torch.compiler.assume_constant_result`` does the same and imports the compiler for it, more than a second of every
    process that never compiles; a test compares the two.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def choice() -> str:
    """Return the environment's wish: ``auto`` (kernels where they compile), ``on`` (fail otherwise) or ``off``."""
    value = os.environ.get("DISTRIBUTED_AT_KERNELS", "auto").strip().lower() or "auto"
    if value not in _CHOICES:
        raise ConfigError(
            f"DISTRIBUTED_AT_KERNELS={value!r}: allowed are {', '.join(_CHOICES)}.{did_you_mean(value, _CHOICES)}"
        )
    return value


def source_folder() -> Path:
    """Return the folder of the sources: ``kernels/`` of a checkout, ``ops/sources`` of an installed wheel."""
    here = Path(__file__).resolve().parent
    for folder in (here / "sources", here.parents[1] / "kernels"):
        if (folder / "numeric.h").is_file():
            return folder
    raise FileNotFoundError(f"no kernel sources in {here / 'sources'} or {here.parents[1] / 'kernels'}")


def cache_folder() -> Path:
    """Return the per-user folder of compiled kernels (``DISTRIBUTED_AT_CACHE`` or ``~/.cache/distributed_at``)."""
    base = os.environ.get("DISTRIBUTED_AT_CACHE")
    root = Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distributed_at"
    folder = root / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass  # a read-only home, as on some compute nodes
    # Made anew and private: a guessable shared name in /tmp could be filled by somebody else.
    return Path(tempfile.mkdtemp(prefix="distributed_at_kernels_"))


def _processor() -> str:
    """Name what ``-march=native`` depends on, because a home folder is shared by nodes with different processors."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and (Path(home) / "bin" / "nvcc").is_file():
        return str(Path(home) / "bin" / "nvcc")
    default = Path("/usr/local/cuda/bin/nvcc")
    return shutil.which("nvcc") or (str(default) if default.is_file() else None)


def command(device_type: str, target: Path) -> tuple[list[str], str]:
    """Return the compiler command for ``device_type`` (``cpu`` or ``cuda``) and a text that the result depends on.

    Raises:
        FileNotFoundError: no compiler, or no sources.
    """
    folder = source_folder()
    if device_type == "cpu":
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
        if not compiler:
            raise FileNotFoundError("no C++ compiler (g++, clang++ or $CXX)")
        return [compiler, *_CPU_FLAGS, *(str(folder / name) for name in _CPU_FILES), "-o", str(target)], _processor()
    compiler = _nvcc()
    if not compiler:
        raise FileNotFoundError("no CUDA compiler (nvcc, $CUDA_HOME)")
    major, minor = torch.cuda.get_device_capability()
    architecture = f"-gencode=arch=compute_{major}{minor},code=[sm_{major}{minor},compute_{major}{minor}]"
    files = [str(folder / name) for name in _CUDA_FILES]
    return [compiler, *_CUDA_FLAGS, architecture, *files, "-o", str(target)], architecture


def _key(device_type: str, compile_command: list[str], depends_on: str) -> str:
    folder = source_folder()
    digest = hashlib.sha256()
    for name in (*_HEADERS, *(_CPU_FILES if device_type == "cpu" else _CUDA_FILES)):
        digest.update((folder / name).read_bytes())
    digest.update("\0".join([*compile_command[:-1], depends_on, torch.__version__, platform.machine()]).encode())
    return digest.hexdigest()[:20]


@contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``path``, so that the ranks of a node compile once; file systems without locks go on."""
    import fcntl

    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            _LOG.debug("no file locks in %s; each process compiles its own copy", path.parent)
        yield


def compile_library(device_type: str) -> Path:
    """Compile the kernels for ``device_type`` unless the cache holds them, and return the shared library's path.

    The result is written beside and renamed, so that a reader never sees half a file even where locks do not work.

    Raises:
        FileNotFoundError: no compiler, or no sources.
        subprocess.CalledProcessError: the compiler failed; its output is in ``stderr``.
    """
    compile_command, depends_on = command(device_type, Path("library.so"))
    folder = cache_folder()
    target = folder / f"{device_type}_{_key(device_type, compile_command, depends_on)}.so"
    with _file_lock(target.with_suffix(".lock")):
        if not target.is_file():
            handle, name = tempfile.mkstemp(suffix=".so", dir=folder)
            os.close(handle)
            try:
                subprocess.run(
                    [*compile_command[:-1], name], check=True, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS
                )
                os.replace(name, target)
            finally:
                Path(name).unlink(missing_ok=True)
    return target


def _share_threads_of_torch(library: ctypes.CDLL) -> None:
    torch_library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        parallel_for = ctypes.CDLL(str(torch_library)).torch_parallel_for
    except (OSError, AttributeError):
        _LOG.info("torch gives no torch_parallel_for: the CPU kernels run on one thread")
        return
    library.dat_cpu_use_threads_of_torch(ctypes.cast(parallel_for, ctypes.c_void_p))


@functools.cache
def _load(device_type: str, wish: str) -> ctypes.CDLL | None:
    if wish == "off":
        return None
    try:
        library = ctypes.CDLL(str(compile_library(device_type)))
        if device_type == "cpu":
            _share_threads_of_torch(library)
        return library
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        if isinstance(detail, bytes):
            detail = detail.decode(errors="replace")
        message = f"the {device_type} kernels cannot be built or loaded: {detail.strip()[-2000:]}"
        if wish == "on":
            raise KernelBuildError(f"DISTRIBUTED_AT_KERNELS=on, but {message}") from error
        _LOG.warning("%s\nPlain torch is used instead: the same results, slower.", message)
        return None


def library(device_type: str) -> ctypes.CDLL | None:
    """Return the loaded kernels for ``device_type``, compiling them at first use, or None where plain torch serves.

    Raises:
        KernelBuildError: ``DISTRIBUTED_AT_KERNELS=on`` and they cannot be built.
    """
    if device_type not in ("cpu", "cuda"):
        return None
    with _LOCK:
        return _load(device_type, choice())


@constant_to_compilers
def available(device_type: str) -> bool:
    """Return whether compiled kernels serve ``device_type``; a constant to torch.compile."""
    return library(device_type) is not None


def describe() -> dict[str, str]:
    """Return for each device type what serves it: ``compiled``, ``plain torch`` or ``no device``."""
    found = {"cpu": "compiled" if available("cpu") else "plain torch"}
    if torch.cuda.is_available():
        found["cuda"] = "compiled" if available("cuda") else "plain torch"
    else:
        found["cuda"] = "no device"
    return found
