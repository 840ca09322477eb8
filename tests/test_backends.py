"""Which kernels run where: one choice, and a clear error for what cannot run."""

import numpy as np
import pytest
import torch

import realign_fast as rf
from realign_fast import backends, cli
from realign_fast._reader import reader_for


@pytest.fixture
def gpu(monkeypatch):
    """Let torch say that it has a GPU of some capability."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def set_capability(capability, hip=None):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.version, "hip", hip)

    set_capability((9, 0))
    return set_capability


def test_what_is_left_open_may_fall_back(gpu, monkeypatch):
    assert backends.choose("auto", "cpu", ("float64",)) == "cpu"
    assert backends.choose("auto", "cuda:0", ("float16", "float32")) == "triton"
    assert backends.choose("auto", "cuda:0", ("float64",)) == "torch"
    assert backends.choose("auto", "mps") == "torch"
    gpu((7, 5))
    assert backends.choose("auto", "cuda:0") == "torch"
    gpu((9, 0))
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    assert backends.choose("auto", "cuda:0") == "torch"


def test_what_is_asked_for_by_name_runs_or_says_why_not(gpu, monkeypatch):
    assert backends.choose("torch", "cpu") == "torch"
    assert backends.choose("triton", "cuda:1", ("bfloat16",)) == "triton"
    for arguments, message in [
        (("gpu", "cpu"), "backend must be one of auto, cpu, triton, torch, got 'gpu'"),
        (("cpu", "cuda:0"), "backend 'cpu' takes rows in host memory, got rows on cuda:0"),
        (("triton", "cpu"), "takes rows on a GPU, got rows in host memory"),
        (("triton", "mps"), "takes rows on a CUDA or ROCm device, got rows on mps"),
        (("triton", "cuda:0", ("float64",)), "takes float16, bfloat16 and float32, got float64"),
    ]:
        with pytest.raises(ValueError, match=message):
            backends.choose(*arguments)
    gpu((7, 5))
    with pytest.raises(ValueError, match=r"needs a GPU of compute capability 8.0 or newer, cuda:0 has 7.5"):
        backends.choose("triton", "cuda:0")
    gpu((7, 5), hip="6.2")  # ROCm counts otherwise
    assert backends.choose("triton", "cuda:0") == "triton"
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs triton: pip install 'realign-fast\[gpu\]'"):
        backends.choose("triton", "cuda:0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    rows = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32)
    for side in ("text", "image"):
        np.save(tmp_path / f"{side}.npy", rows)
    with pytest.raises(ValueError, match="needs a CUDA or ROCm device, and torch finds none"):
        rf.fit(rows, rows + 1, backend="triton")
    sides = [str(tmp_path / f"{side}.npy") for side in ("text", "image")]
    assert cli.main(["fit", *sides, "-o", str(tmp_path / "a.safetensors"), "--device", "cuda"]) == 1
    error = capsys.readouterr().err
    assert error == "realign fit: backend 'triton' needs a CUDA or ROCm device, and torch finds none\n"
    assert not (tmp_path / "a.safetensors").exists()


class FakeSource:
    dtype = "float32"

    def __init__(self, device):
        self.device = device


def test_a_backend_is_checked_also_where_no_row_is_read():
    rows = np.random.default_rng(0).normal(size=(30, 8))
    moments = [rf.Moments(8).update(each) for each in (rows, rows + 1)]
    with pytest.raises(ValueError, match="backend must be one of auto, cpu, triton for a fit, got 'gpu'"):
        rf.fit_from_moments(*moments, method="anchor", backend="gpu")


def test_sets_on_two_devices_are_refused():
    with pytest.raises(ValueError, match="text and image must be on one device, got cuda:0 and cuda:1"):
        reader_for("auto", (FakeSource("cuda:0"), FakeSource("cuda:1")), "raise")
    with pytest.raises(ValueError, match="backend 'cpu' takes rows in host memory, got rows on cuda:0"):
        reader_for("cpu", (FakeSource("cuda:0"), FakeSource(None)), "raise")
