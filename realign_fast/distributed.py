"""Statistics of many processes in one, through torch.distributed."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

try:
    import torch
    from torch import distributed
except ModuleNotFoundError as missing:
    raise ImportError("realign_fast.distributed needs torch: pip install 'realign-fast[torch]'") from missing

from .moments import Moments

__all__ = ["all_reduce"]


def all_reduce(moments: Moments, group: Any = None) -> Moments:
    """Return, in every process of the group, the moments of all their rows; those given stay as they are.

    Count, mean and trace have the same bits whatever the number of processes and what each has read; covariances agree
    to 1e-7. What is sent is `dim` integers and, with a covariance, `dim**2` float64.

    Parameters
    ----------
    moments
        Those of this process; they may be empty.
    group
        A process group of torch.distributed, by default that of all processes.

    Raises
    ------
    RuntimeError
        If torch.distributed is not initialised.
    ValueError
        If the dimensions differ, or only some have collected a covariance.
    """
    if not distributed.is_initialized():
        raise RuntimeError("torch.distributed is not initialised: call torch.distributed.init_process_group first")
    pilot = moments.pilot
    own = (moments.dim, moments.has_covariance), pilot is not None
    found: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(found, own, group=group)
    kinds = [kind for kind, _ in found]
    if len(set(kinds)) > 1:
        raise ValueError(f"moments of all processes must be alike, got (dim, covariance) of {kinds}")
    # NCCL takes tensors of a GPU alone.
    device = torch.device("cuda") if distributed.get_backend(group) == "nccl" else torch.device("cpu")

    def summed(values: NDArray[Any]) -> NDArray[Any]:
        tensor = torch.tensor(values).to(device)
        distributed.all_reduce(tensor, group=group)
        total: NDArray[Any] = tensor.cpu().numpy()
        return total

    # The first process that has a pilot gives it to all, so that their products can be added.
    chosen = [rank for rank, (_, has_pilot) in enumerate(found) if has_pilot]
    if chosen:
        tensor = torch.zeros(moments.dim, dtype=torch.float64) if pilot is None else torch.tensor(pilot)
        tensor = tensor.to(device)
        first = chosen[0] if group is None else distributed.get_global_rank(group, chosen[0])
        distributed.broadcast(tensor, first, group=group)
        pilot = tensor.cpu().numpy()
    return moments.combined(summed, pilot)
