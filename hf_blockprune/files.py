"""Files and folders written whole or not at all, and the question whether they can be, asked before long work."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def partial_file(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place when the block ends well, and vanishes when it does not.

    An older file's permissions stay. Raises OSError where the folder takes no file, and what the block raises.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        if path.exists():
            shutil.copymode(path, partial)
        partial.replace(path)
    finally:
        remove(partial)


@contextmanager
def partial_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` that takes its place when the block ends well, and vanishes when it does not.

    An older folder stays until then. Raises OSError where none can be made there, and what the block raises.
    """
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        partial.chmod(0o777 & ~_umask())  # those of temporary folders are for nobody else
        yield partial
        _move_into_place(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _move_into_place(partial: Path, path: Path) -> None:
    """Rename a folder; an older one of that name is put aside first, and back where that fails."""
    backup = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    try:
        if path.exists():
            os.rename(path, backup / path.name)
        try:
            os.rename(partial, path)
        except BaseException:
            if (backup / path.name).exists():
                os.rename(backup / path.name, path)
            raise
    finally:
        shutil.rmtree(backup, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a file if it is there and can be: where it could not be made, its path may lead nowhere either."""
    with contextlib.suppress(OSError):
        path.unlink()


def write_all(texts: Mapping[Path, str]) -> None:
    """Write several files of one folder; all of them, or none.

    Raises:
        OSError: they cannot be written; those that were there are as before.
    """
    before = {path: path.read_bytes() if path.is_file() else None for path in texts}
    try:
        with contextlib.ExitStack() as stack:
            for path, text in texts.items():
                stack.enter_context(partial_file(path)).write_text(text, encoding="utf-8")
    except BaseException:
        for path, content in before.items():
            with contextlib.suppress(OSError):
                _restore(path, content)
        raise


def _restore(path: Path, content: bytes | None) -> None:
    if content is None:
        remove(path)
    elif path.read_bytes() != content:
        with partial_file(path) as partial:
            partial.write_bytes(content)


def check_writable(path: Path) -> None:
    """Refuse a path that cannot be written, by a file without a name in the nearest folder that exists.

    Permission bits do not tell: they say nothing of file systems, and do not bind everyone.

    Raises:
        OSError: saying why.
    """
    folder = next(parent for parent in path.absolute().parents if parent.exists() or parent.is_symlink())
    with tempfile.TemporaryFile(dir=folder):
        pass
