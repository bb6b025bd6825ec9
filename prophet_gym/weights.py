"""Where weights are: a folder, a name that comes with the package, or a repository on the hub."""

from __future__ import annotations

import re
from pathlib import Path

from .errors import nearest

__all__ = ["locate_weights"]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def locate_weights(name: str | Path, assets: Path, marker: str) -> Path:
    """Returns the folder behind a name.

    Args:
        name: a folder, the name of packaged weights, or ``owner/name`` of a hub repository, tried in this order.
        assets: folder with the packaged weights, one folder each.
        marker: file that every such folder has.

    Raises:
        ValueError: nothing there; the message says where was looked and suggests the nearest name.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    packaged = sorted(path.parent.name for path in assets.glob(f"*/{marker}"))
    if str(name) in packaged:
        return assets / str(name)
    siblings = [str(path) for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
    reason = "it is neither a folder nor a packaged name"
    if _HUB_ID.fullmatch(str(name)) and not siblings:
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(str(name)))
        except Exception as error:  # no network, no such repository, no access: the hub raises many kinds
            reason += f", and the hub does not give it ({type(error).__name__}: {str(error).splitlines()[0]})"
    raise ValueError(f"{str(name)!r}: {reason}.{nearest(name, [*packaged, *siblings])}")
