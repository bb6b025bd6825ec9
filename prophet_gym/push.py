"""A checkpoint folder to the hub (``prophet push``), where ``checkpoint="owner/name"`` finds it again."""

from __future__ import annotations

import os
from pathlib import Path

from .weights import HUB_ID

__all__ = ["push"]

_PICKLES = (".bin", ".ckpt", ".pkl", ".pickle", ".pt", ".pth")


def push(folder: str | Path, repo_id: str, *, private: bool = True) -> str:
    """Upload a whole checkpoint, and nothing beside it, to a model repository that is made where there is none.

    The account is the one of ``hf auth login``, or of the environment variable ``HF_TOKEN``. Files of an earlier push
    that the folder has no more are deleted, so that no old judge stands beside new weights: the repository then holds
    the folder and its own ``.gitattributes``. What was deleted stays in the repository's history.

    Args:
        folder: a checkpoint, as `prophet adapt` or `prophet train` leaves it.
        repo_id: ``owner/name``.
        private: make the repository private; False makes it public.

    Returns:
        Address of the commit.

    Raises:
        ValueError: not a whole checkpoint; links, hidden files or pickles in it; a repository that is there and public
            although ``private`` is asked for; no network, no account or no right to write.
    """
    from huggingface_hub import HfApi

    folder = Path(folder)
    if not HUB_ID.fullmatch(repo_id):
        raise ValueError(f"{repo_id!r}: expected owner/name of a repository on the hub")
    _require_whole(folder)
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        open_to_all = private and not api.repo_info(repo_id).private
        if not open_to_all:
            uploaded = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=f"prophet push {folder.resolve().name}",
                delete_patterns="*",  # matches across folders; the client keeps .gitattributes
            )
    except Exception as error:  # the hub's client raises many kinds
        first_line = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{repo_id}: the hub does not take it ({type(error).__name__}: {first_line}). Log in with `hf auth login`, "
            "with an account that may write there"
        ) from error
    if open_to_all:
        raise ValueError(f"{repo_id} is there already and public; nothing was uploaded. Give --public, or another name")
    return str(uploaded.commit_url)


def _require_whole(folder: Path) -> None:
    import torch

    from .world_model.prophet import ProphetWorldModel

    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected a checkpoint")
    for at, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(at, name)
            if path.is_symlink():
                raise ValueError(f"{path} is a link, whose target may be anything; replace it by what it points to")
            if name.startswith("."):
                raise ValueError(f"{path} is hidden, so probably not meant for others; move it out of the checkpoint")
            if path.suffix in _PICKLES:
                raise ValueError(f"{path} may run code when it is loaded; expected safetensors only: move it away")
    ProphetWorldModel.from_pretrained(folder, dtype=torch.bfloat16)
