"""Several processes that train one network: replicas (DDP), or shards of its parameters (FSDP2).

Both average gradients over the processes, so with equal shares of a batch they follow the run of one process on all
of it. Processes are accelerate's, wrappers and sharded tensors torch's own: accelerate's FSDP2 falls back to plain
replicas on a CPU without a word.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from .objective import ChunkDenoiser

Parallel = Literal["ddp", "fsdp2"]
_PATIENCE = timedelta(hours=24)  # processes wait for each other while data are decoded and encoded


def start_processes(mixed_precision: str, run: Path) -> Accelerator:
    """Join the processes that ``torchrun`` or ``accelerate launch`` started; one alone needs neither.

    Args:
        mixed_precision: as of accelerate.
        run: folder of the TensorBoard log.

    Raises:
        ValueError: accelerate was used before, in a way that left this process alone.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        cpu=launched > 1 and not torch.accelerator.is_available(),  # else it takes processes on CPUs for lone ones
        log_with="tensorboard",
        project_dir=run,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)] if launched > 1 else None,
    )
    if accelerator.num_processes != launched:
        raise ValueError(
            f"WORLD_SIZE is {launched}, but accelerate knows {accelerator.num_processes} processes; expected equal: "
            "start the run before anything else that uses accelerate"
        )
    return accelerator


def distribute(denoiser: ChunkDenoiser, accelerator: Accelerator, parallel: Parallel, *, varies: bool) -> nn.Module:
    """Put a network on the devices of all processes; alone, on the device of this one.

    Args:
        denoiser: the network, the same in every process; FSDP2 turns its parameters into shards, in place.
        accelerator: of :func:`start_processes`.
        parallel: "ddp" keeps all of it in every process, "fsdp2" a share of every parameter; blocks are gathered when
            they are used.
        varies: some learned parameters have no gradient in some batches.
    """
    if accelerator.num_processes == 1:
        return accelerator.prepare_model(denoiser)
    device = accelerator.device
    if parallel == "ddp":
        return DistributedDataParallel(
            denoiser.to(device),
            device_ids=None if device.type == "cpu" else [device],
            find_unused_parameters=varies,
            gradient_as_bucket_view=True,
        )
    mesh = init_device_mesh(device.type, (accelerator.num_processes,))
    narrow = torch.bfloat16 if accelerator.mixed_precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in denoiser.transformer.transformer_blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(denoiser, mesh=mesh, mp_policy=policy)  # both move what they shard to the mesh's device


def keep_gradients(wrapped: nn.Module) -> AbstractContextManager[Any]:
    """Within it, replicas add up their own gradients; shards are reduced at once, as whole gradients take memory."""
    return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else nullcontext()


def gathered(value: Any) -> Any:
    """Nested dictionaries and lists with whole tensors on the CPU in place of shards; every process must call it."""
    if isinstance(value, dict):
        return {key: gathered(item) for key, item in value.items()}
    if isinstance(value, list):
        return [gathered(item) for item in value]
    return value.detach().full_tensor().cpu() if isinstance(value, DTensor) else value


def shard_as(value: Any, parameter: Tensor) -> Any:
    """A whole tensor, cut as the parameter is; what has another shape (a step counter) stays as it is."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    local = value.to(parameter.device, parameter.dtype)
    return distribute_tensor(local, parameter.device_mesh, parameter.placements, src_data_rank=None)


def shard_optimizer_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimiser, as a checkpoint holds it, with its tensors cut as the optimiser's parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    slots = {
        index: {name: shard_as(value, parameters[index]) for name, value in slot.items()}
        for index, slot in state["state"].items()
    }
    return {**state, "state": slots}
