"""How rows are laid over programs and warps: one plan for every kernel that reads rows, and what it will move."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import torch
import triton

# Rows of up to so many elements stay in the registers of one program; longer ones are read in chunks, twice or more.
MAX_BLOCK_D = 8192
_WIDE_BLOCK_D, _WIDE_WARPS = 2048, 4
_CHUNK_D = 128
# Elements of a tile: enough loads in flight to cover the memory's latency, few enough for the registers.
_TILE_ELEMENTS = 4096
# Programs on one multiprocessor that work at once; each goes on to the next tile until none is left.
_PROGRAMS_PER_PROCESSOR = 8
_REGISTERS = 1 << 16  # of a multiprocessor
_SHARED_BYTES = 163 << 10  # of an A100, where there is no GPU to ask
ON_HIP = torch.version.hip is not None


class Plan(NamedTuple):
    """A launch.

    Attributes
    ----------
    block_n, block_d : int
        Shape of a tile, powers of two; `block_d` covers a row of at most `MAX_BLOCK_D`, and a part of a longer one.
    chunk_d : int
        Columns at a time of the rare rows that are computed in float64.
    num_warps : int
    num_programs : int
        The grid; a program does every `num_programs`-th tile.
    num_reads : int
        How often it reads each element of a plain row; what it writes it writes once.
    """

    block_n: int
    block_d: int
    chunk_d: int
    num_warps: int
    num_programs: int
    num_reads: int = 1

    def count_bytes(self, read: Iterable[torch.Tensor], written: Iterable[torch.Tensor] = ()) -> int:
        """Return the bytes of plain rows that the launch moves, given the tensors it reads and those it writes."""
        return self.num_reads * sum(x.nbytes for x in read) + sum(x.nbytes for x in written)


def plan_rows(
    num_rows: int, dim: int, device: torch.device, max_block_n: int = 16, elements_per_warp: int = 1024
) -> Plan:
    """Return the launch for `num_rows` rows of `dim` elements, at most `max_block_n` of them in a tile."""
    block_d = max(16, triton.next_power_of_2(dim)) if dim <= MAX_BLOCK_D else _WIDE_BLOCK_D
    block_n = max(1, min(max_block_n, _TILE_ELEMENTS // block_d)) if dim <= MAX_BLOCK_D else 1
    num_warps = _WIDE_WARPS
    if dim <= MAX_BLOCK_D:
        tile_elements = block_n * block_d
        if tile_elements > _TILE_ELEMENTS:  # one long row: its shift and correction take registers too
            elements_per_warp //= 2
        num_warps = max(1, min(16, tile_elements // elements_per_warp))
    num_tiles = triton.cdiv(num_rows, block_n)
    return Plan(
        block_n,
        block_d,
        min(block_d, _CHUNK_D),
        num_warps,
        min(num_tiles, _PROGRAMS_PER_PROCESSOR * count_processors(device)),
        1 if dim <= MAX_BLOCK_D else 2,
    )


def compile_options(num_warps: int, num_stages: int | None = None, *, hip: bool = ON_HIP) -> dict[str, int | bool]:
    """Return the options of a launch on this torch's GPUs: a matter of the compiler, not of the values."""
    options: dict[str, int | bool] = {"num_warps": num_warps, "enable_fp_fusion": True}
    if num_stages is not None:
        options["num_stages"] = num_stages
    if not hip:
        # As many registers as there are: left alone, the assembler aims at occupancy and spills what rare rows need.
        options["maxnreg"] = min(255, _REGISTERS // (32 * num_warps))
    return options


def warps_of_chunk(chunk_d: int, *, hip: bool = ON_HIP) -> int:
    """Return how many warps read so many columns at a time: of half-precision rows, each thread 16 bytes."""
    return max(1, chunk_d // (8 * (64 if hip else 32)))


def count_processors(device: torch.device) -> int:
    """Return the multiprocessors of a GPU, and 1 for the interpreter's CPU tensors."""
    return 1 if device.type == "cpu" else _count_processors(device.index or 0)


@cache
def _count_processors(index: int) -> int:
    count: int = torch.cuda.get_device_properties(index).multi_processor_count
    return count


def shared_bytes(device: torch.device) -> int:
    """Return the shared memory that one program can have."""
    return _SHARED_BYTES if device.type == "cpu" else _count_shared_bytes(device.index or 0)


@cache
def _count_shared_bytes(index: int) -> int:
    count: int = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
    return count
