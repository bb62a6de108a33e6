"""One code path for one process, one machine and many: a process group, a (replicate, shard) mesh, FSDP2."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Ranks:
    """This process among all: `rank` of `world`, and its device."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0


def start(device: str = "auto") -> Ranks:
    """Join the group that torchrun describes in RANK/WORLD_SIZE. One process needs no group, so it makes none."""
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(local)
    if world > 1 and not dist.is_initialized():
        if not use_cuda and not hasattr(torch.cpu.Stream, "record_event"):
            raise RuntimeError(
                f"{world} processes on the CPU need torch 2.8 or newer, this is {torch.__version__}: start one "
                "process, without torchrun, or install a newer torch"
            )
        on_cuda = "nccl" if dist.is_nccl_available() else "gloo"  # Windows has no NCCL
        dist.init_process_group(f"cpu:gloo,cuda:{on_cuda}" if use_cuda else "gloo", rank=rank, world_size=world)
    return Ranks(rank, world, local)


def stop() -> None:
    """Leave the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def shard_module(
    module: nn.Module, units: Iterable[nn.Module], ranks: Ranks, shard: int, methods: Sequence[str] = ()
) -> DeviceMesh | None:
    """Apply FSDP2 in place on a (world/shard, shard) mesh; shard=1 keeps whole copies, which is DDP's behaviour.

    Call it after LoRA injection. A single process needs no sharding and stays as it is. `methods` are calls other
    than forward that use the root's own weights.
    """
    if ranks.world == 1:
        return None
    size = shard or ranks.world
    if ranks.world % size:
        raise ValueError(f"shard={size} does not divide the {ranks.world} ranks; use a divisor, or 0 for all of them")
    # Some blocks end in an in-place-free reshape; that sharding changes nothing is tested against one process
    warnings.filterwarnings("ignore", message=".*returned a view tensor.*", category=UserWarning)
    mesh = init_device_mesh(ranks.device.type, (ranks.world // size, size), mesh_dim_names=("replicate", "shard"))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    for method in methods:
        register_fsdp_forward_method(module, method)
    return mesh


def sync_gradients(module: nn.Module, last: bool) -> None:
    """Reduce gradients over ranks only in the last micro-batch of a step."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor on the CPU, gathered from its shards (every rank must call it)."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().cpu()


def fill(target: Tensor, value: Tensor) -> None:
    """Copy a full CPU tensor into `target`, each rank taking its own shard."""
    if isinstance(target, DTensor):
        value = value.to(target.device)
        value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(value)


def mean(values: Sequence[float], ranks: Ranks) -> list[float]:
    """Average of each number over the ranks; numbers that are NaN on a rank are left out of its average."""
    if ranks.world == 1:
        return list(values)
    numbers = torch.tensor(values, dtype=torch.float64)
    counts = (~numbers.isnan()).double()
    packed = torch.stack([numbers.nan_to_num(0.0), counts])
    dist.all_reduce(packed)
    return (packed[0] / packed[1]).tolist()


def from_first(value: Any, ranks: Ranks) -> Any:
    """The value that the first rank has, on every rank."""
    if ranks.world == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def any_true(flag: bool, ranks: Ranks) -> bool:
    """True on every rank when it is true on one."""
    if ranks.world == 1:
        return flag
    packed = torch.tensor([int(flag)])
    dist.all_reduce(packed, op=dist.ReduceOp.MAX)
    return bool(packed.item())


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
