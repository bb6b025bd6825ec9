"""Files and folders that appear whole or not at all: written beside their place under a hidden name, then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_folder(target: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder to write into; it becomes `target` when the block ends, and vanishes if it raises.

    A reader never sees half a folder, and a killed writer leaves only a hidden ``.<name>.*`` folder behind. With
    `overwrite`, the old folder is moved aside first and removed after the new one is in place.

    Raises:
        ValueError: If `target` exists and `overwrite` is False.
    """
    target = Path(target)
    if target.exists() and not overwrite:
        raise ValueError(f"{target} exists already; give another folder, or overwrite=True to replace it")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        fresh = work / "new"  # made by mkdir, so that it has the user's usual permissions: mkdtemp's are private
        fresh.mkdir()
        yield fresh
        if target.exists():
            if not overwrite:  # another writer was faster
                raise ValueError(f"{target} exists already; give another folder, or overwrite=True to replace it")
            target.rename(work / "old")
        fresh.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def atomic_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file that appears complete or not at all, in the place of one that is there.

    Its folder is made where it is missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
