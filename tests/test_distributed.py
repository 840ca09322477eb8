"""Moments of several processes, through gloo on this machine."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import distributed

import realign_fast as rf
from realign_fast.distributed import all_reduce

DIM = 50
COUNTS = (300, 0, 777)


def rows_of(rank):
    rng = np.random.default_rng(rank)
    return (0.3 * rank + rng.normal(size=(COUNTS[rank], DIM))).astype(np.float32)


def work(rank, folder):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=len(COUNTS))
    found = []
    for covariance in (False, True):
        moments = rf.Moments(DIM, covariance=covariance).update(rows_of(rank), num_threads=1)
        before = moments.copy()
        found.append(all_reduce(moments))
        assert moments == before
    empty = all_reduce(rf.Moments(DIM, covariance=True))
    assert empty.count == 0
    # The first rank has no rows.
    found.append(all_reduce(rf.Moments(DIM, covariance=True).update(rows_of((rank + 1) % 3), num_threads=1)))
    pair = distributed.new_group([0, 2])
    if rank != 1:
        found.append(all_reduce(rf.Moments(DIM, covariance=True).update(rows_of(rank), num_threads=1), pair))
    with pytest.raises(ValueError, match="must be alike"):
        all_reduce(rf.Moments(DIM, covariance=rank == 1))
    with open(f"{folder}/{rank}.pickle", "wb") as file:
        pickle.dump(found, file)
    distributed.destroy_process_group()


def test_every_process_has_the_moments_of_all(tmp_path):
    command = [sys.executable, __file__, str(tmp_path)]
    workers = [subprocess.Popen([*command, str(rank)]) for rank in range(len(COUNTS))]
    assert [worker.wait(120) for worker in workers] == [0] * len(COUNTS)
    rows = np.concatenate([rows_of(rank) for rank in range(len(COUNTS))])
    whole = rf.Moments(DIM, covariance=True).update(rows)
    found = [pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in range(len(COUNTS))]
    for plain, *others in found:
        assert plain == rf.Moments(DIM).update(rows)
        for each in others:
            assert each.count == whole.count
            np.testing.assert_array_equal(each.mean, whole.mean)
            difference = np.linalg.norm(each.covariance - whole.covariance)
            assert difference < 1e-7 * np.linalg.norm(whole.covariance)
    assert found[0][1] == found[1][1] == found[2][1]


def test_without_a_process_group_it_says_what_to_call():
    with pytest.raises(RuntimeError, match="init_process_group first"):
        all_reduce(rf.Moments(3).update(torch.eye(3)))


if __name__ == "__main__":
    work(int(sys.argv[2]), sys.argv[1])
