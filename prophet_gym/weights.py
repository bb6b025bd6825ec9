"""Where weights are: a folder, a name that comes with the package, or a repository on the hub."""

from __future__ import annotations

import re
from pathlib import Path

from .errors import nearest

__all__ = ["HUB_ID", "fetch_from_hub", "locate_parts", "locate_weights"]

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
"""What ``owner/name`` of a hub repository looks like."""


def locate_weights(name: str | Path, assets: Path, marker: str) -> Path:
    """Returns the folder behind a name.

    Args:
        name: a folder, the name of packaged weights, or ``owner/name`` of a hub repository, tried in this order.
        assets: folder with the packaged weights, one folder each.
        marker: file that every such folder has.

    Raises:
        ValueError: nothing there; the message says where was looked and suggests the nearest name.
    """
    if not isinstance(name, str | Path):
        raise ValueError(f"{name!r} ({type(name).__name__}): expected a folder, a packaged name or a hub id owner/name")
    folder = Path(name)
    if folder.is_dir():
        return folder
    packaged = sorted(path.parent.name for path in assets.glob(f"*/{marker}"))
    if str(name) in packaged:
        return assets / str(name)
    siblings = [str(path) for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
    reason = "it is neither a folder nor a packaged name"
    if HUB_ID.fullmatch(str(name)) and not siblings:
        try:
            return fetch_from_hub(str(name))
        except ValueError as error:
            reason += f", and {error}"
    whole = [sibling for sibling in siblings if (Path(sibling) / marker).is_file()]
    raise ValueError(f"{str(name)!r}: {reason}.{nearest(name, [*packaged, *whole])}")


def locate_parts(source: str | Path, revision: str | None, parts: tuple[str, ...]) -> Path:
    """Returns the folder behind a source in the layout of diffusers.

    Args:
        source: a folder, or ``owner/name`` of a hub repository.
        revision: branch, tag or commit on the hub; None for a folder.
        parts: subfolders that are needed; of a hub repository only their JSON and safetensors are fetched.

    Raises:
        ValueError: nothing there, or a revision of a folder.
    """
    if Path(source).is_dir():
        if revision is not None:
            raise ValueError(f"revision={revision!r} with the folder {source}: expected a hub id, folders have none")
        return Path(source)
    if not HUB_ID.fullmatch(str(source)):
        raise ValueError(f"{str(source)!r}: expected a folder, or a hub id owner/name")
    try:
        return fetch_from_hub(
            str(source), revision, [f"{part}/{kind}" for part in parts for kind in ("*.json", "*.safetensors")]
        )
    except ValueError as error:
        raise ValueError(
            f"{str(source)!r}: no such folder, and {error}. Repositories with a licence to accept need "
            "`hf auth login`; without network, give the folder of an earlier download"
        ) from error


def fetch_from_hub(repository: str, revision: str | None = None, patterns: list[str] | None = None) -> Path:
    """Returns the local folder of a hub repository, downloaded where it is not in the cache yet.

    Args:
        repository: ``owner/name``.
        revision: branch, tag or commit; default the main branch.
        patterns: which files, as in ``huggingface_hub.snapshot_download``; default all.

    Raises:
        ValueError: no network, no such repository or no access; the message starts with a small letter, for use
            inside another.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub raises many kinds
        first_line = (str(error).splitlines() or [""])[0]
        raise ValueError(f"the hub does not give it ({type(error).__name__}: {first_line})") from error
