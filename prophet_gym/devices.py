"""Where networks run, and how precisely: one check of the ``device`` that callers give, one choice of precision."""

from __future__ import annotations

import torch

__all__ = ["fast_dtype", "require_device"]


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


def fast_dtype(device: str | torch.device) -> str:
    """Returns "bfloat16" where ``device`` multiplies it in hardware, else "float32".

    A processor without such instructions still computes bfloat16, several times slower than float32. Torch before
    2.10 does not tell what a processor can; then it is float32.
    """
    if torch.device(device).type == "cuda":
        with torch.cuda.device(device):
            return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if torch.device(device).type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return "float32"
    able = torch.cpu.get_capabilities()
    return "bfloat16" if any(bool(has) for name, has in able.items() if "bf16" in name) else "float32"
