"""Loads a user's Python file and tells its mistakes by their file and line, without our stack."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from distributed_at.errors import ConfigError, UserError

_LOADED: dict[tuple[Path, str], ModuleType] = {}  # by path and content


def load_python_file(path: str | Path) -> ModuleType:
    """Return a Python file as a module, run once a process and content; files beside it can be imported from it.

    Raises:
        ConfigError: there is no such file, or it fails; names the line.
    """
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise ConfigError(f"there is no file {path}")
    key = (file, hashlib.sha256(file.read_bytes()).hexdigest())
    if key in _LOADED:
        return _LOADED[key]
    name = f"_user_{file.stem}_{hashlib.sha256(''.join(map(str, key)).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    sys.modules[name] = module
    try:
        with told_by_line(file):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    _LOADED[key] = module
    return module


@contextmanager
def told_by_line(path: str | Path) -> Iterator[None]:
    """Turn an error inside a user's code into one message with the file and line where it arose.

    Raises:
        ConfigError: whatever went wrong in the block, but for our own errors, which say enough.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise ConfigError(f"{_place(error, Path(path))}: {type(error).__name__}: {error}") from None


def _place(error: Exception, path: Path) -> str:
    """Return ``file:line`` of the deepest frame in the user's own folder, or of a syntax error."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    own = path.expanduser().resolve().parent
    frames = traceback.extract_tb(error.__traceback__)
    mine = [frame for frame in frames if Path(frame.filename).resolve().parent.is_relative_to(own)]
    inside = [frame for frame in mine if "site-packages" not in frame.filename] or mine
    return f"{inside[-1].filename}:{inside[-1].lineno}" if inside else str(path)
