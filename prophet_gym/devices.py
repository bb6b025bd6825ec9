"""Where networks run: one check of the ``device`` that callers give."""

from __future__ import annotations

import torch

__all__ = ["require_device"]


def require_device(device: str | torch.device) -> torch.device:
    """Returns ``device`` after requiring that tensors can be put there.

    Raises:
        ValueError: no name of torch, or nothing of that kind here.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):  # torch's message lists twenty backends
        raise ValueError(
            f"device={device!r}: expected a device of torch, such as 'cpu', 'cuda' (a GPU) or 'cuda:1'"
        ) from None
    try:
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without the backend
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"device={str(found)!r} cannot be used here ({reason}); expected 'cpu', or a machine and an installation "
            "of torch that have it"
        ) from error
    return found
