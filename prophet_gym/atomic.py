"""Files and folders that appear whole or not at all: written beside their place under a hidden name, then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path


@contextmanager
def atomic_folder(
    target: str | os.PathLike[str], *, overwrite: bool = False, contents: Sequence[str] = ()
) -> Iterator[Path]:
    """Yield an empty folder to write into; it becomes `target` when the block ends, and vanishes if it raises.

    A reader never sees half a folder, and a killed writer leaves only a hidden ``.<name>.*`` folder behind. With
    `overwrite`, the old folder is moved aside first and removed after the new one is in place.

    Args:
        target: The folder.
        overwrite: Replace a folder that is there.
        contents: Glob patterns of all that a folder to replace may hold; unless it is empty it has to hold the first
            one, which is a name. By default it may hold anything.

    Raises:
        ValueError: If `target` is a file, or exists and `overwrite` is False, or holds other things than `contents`.
    """
    target = Path(target)
    require_replaceable(target, overwrite, contents)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        fresh = work / "new"  # made by mkdir, so that it has the user's usual permissions: mkdtemp's are private
        fresh.mkdir()
        yield fresh
        require_replaceable(target, overwrite, contents)  # another writer may have been faster
        if target.exists():
            target.rename(work / "old")
        fresh.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def require_replaceable(target: Path, overwrite: bool, contents: Sequence[str]) -> None:
    """Require that :func:`atomic_folder` may write here; long work asks before it begins.

    Raises:
        ValueError: As of :func:`atomic_folder`.
    """
    if not target.exists():
        return
    if not overwrite:
        raise ValueError(f"{target} exists already; give another folder, or overwrite=True to replace it")
    if not target.is_dir():
        raise ValueError(f"{target} is a file; expected a folder to replace, or a new one")
    names = sorted(path.name for path in target.iterdir())
    if names and contents and contents[0] not in names:
        raise ValueError(
            f"{target} holds no {contents[0]}: it is something else, and is not replaced; give another folder"
        )
    foreign = [name for name in names if contents and not any(fnmatch(name, pattern) for pattern in contents)]
    if foreign:
        more = f" and {len(foreign) - 1} more" if foreign[1:] else ""
        raise ValueError(
            f"{target} also holds {foreign[0]}{more}, which replacing it would delete; move that away, or give another "
            "folder"
        )


def atomic_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file that appears complete or not at all, in the place of one that is there.

    Its folder is made where it is missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
