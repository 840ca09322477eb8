"""On a CUDA or ROCm device: the same values as on the CPU, no wait for the device, graphs, streams, devices."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import realign_fast as rf
from realign_fast.data import EmbeddingDataset, EmbeddingStream

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")

DIM = 300
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
ROUNDING = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 4e-7}


def make(*shape, dtype=torch.float32, seed=1, device="cuda"):
    return torch.from_numpy(np.random.default_rng(seed).normal(0.1, 1, shape)).to(device, dtype)


@pytest.fixture(scope="module")
def alignment():
    return rf.fit(make(500, DIM, device="cpu"), make(500, DIM, seed=2, device="cpu") + 0.3)


@pytest.fixture
def layer(alignment):
    return rf.nn.ReAlign(alignment).cuda()


@contextmanager
def no_waiting():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 65, 10_007])
def test_transform_and_gradients_agree_with_the_cpu(alignment, layer, dtype, count):
    x = make(count, DIM, dtype=dtype).requires_grad_()
    out = layer(x)
    torch.testing.assert_close(alignment.transform(x.detach()), out.detach(), rtol=0, atol=0)
    on_cpu = x.detach().cpu().requires_grad_()
    wanted = rf.nn.ReAlign(alignment)(on_cpu)
    torch.testing.assert_close(out.cpu(), wanted, rtol=0, atol=2 * ROUNDING[dtype])
    grad_out = make(count, DIM, dtype=dtype, seed=3)
    out.backward(grad_out)
    wanted.backward(grad_out.cpu())
    torch.testing.assert_close(x.grad.cpu(), on_cpu.grad, rtol=4 * ROUNDING[dtype], atol=4 * ROUNDING[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_moments_and_fit_agree_with_the_cpu(dtype):
    text, image = make(20_011, DIM, dtype=dtype), make(9_001, DIM, dtype=dtype, seed=2) + 0.3
    text[5] = 0
    found, wanted = (rf.Moments(DIM).update(each, on_bad_rows="skip") for each in (text, text.cpu()))
    assert (found.count, found.num_skipped) == (wanted.count, wanted.num_skipped) == (20_010, 1)
    np.testing.assert_allclose(found.mean, wanted.mean, rtol=0, atol=2**-27)
    on_gpu, on_cpu = (
        rf.fit(*sets, refine=1, on_bad_rows="skip") for sets in ((text, image), (text.cpu(), image.cpu()))
    )
    for name in ("scale", "shift", "correction"):
        np.testing.assert_allclose(getattr(on_gpu, name), getattr(on_cpu, name), rtol=0, atol=1e-6)
    streamed = rf.fit(text.cpu(), image.cpu(), refine=1, on_bad_rows="skip", backend="triton")
    np.testing.assert_array_equal(streamed.shift, on_gpu.shift)


def test_nothing_waits_for_the_device(alignment, layer):
    x = make(70, DIM).requires_grad_()
    out, moments = torch.empty_like(x, requires_grad=False), rf.Moments(DIM)
    alignment.transform(x.detach())  # brings the map to the device
    with no_waiting():
        layer(x).sum().backward()
        alignment.transform(x.detach(), out=out, on_bad_rows="zero")
        for _ in range(3):
            moments.update(x.detach(), on_bad_rows="zero")
    assert moments.count == 210


def test_cuda_graphs(layer):
    x = make(256, DIM)
    layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x)
    x.copy_(make(256, DIM, seed=9))
    x[3] = 0
    layer.bad_rows.zero_()
    graph.replay()
    assert layer.bad_rows.tolist() == [1, 0]
    torch.testing.assert_close(out, layer(x), rtol=0, atol=0)


def test_streams(layer):
    x, stream = make(100_000, DIM), torch.cuda.Stream()
    wanted = layer(x)
    with torch.cuda.stream(stream):
        stream.wait_stream(torch.cuda.default_stream())
        torch.cuda._sleep(10_000_000)
        x = x.flip(0)
        out = layer(x)
    torch.cuda.default_stream().wait_stream(stream)
    torch.testing.assert_close(out.flip(0), wanted, rtol=0, atol=0)


def test_compilers_keep_one_graph(alignment):
    model = torch.nn.Sequential(torch.nn.Linear(DIM, DIM), rf.nn.ReAlign(alignment)).cuda()
    x = make(64, DIM)
    for mode in ("default", "reduce-overhead"):
        torch.testing.assert_close(torch.compile(model, fullgraph=True, mode=mode)(x), model(x))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_several_devices(alignment, layer):
    x = make(40, DIM, device="cuda:1")
    torch.testing.assert_close(alignment.transform(x).cpu(), layer(x.to("cuda:0")).cpu(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="x is on cuda:1, the layer on cuda:0"):
        layer(x)


def test_domains(alignment):
    bank = rf.AlignmentBank({"a": alignment, "b": rf.fit(make(90, DIM, seed=5), make(90, DIM, seed=6) + 0.5)})
    x, domain = make(1000, DIM), torch.arange(1000, device="cuda") % 2
    np.testing.assert_allclose(
        bank.transform(x, domain).cpu(), bank.transform(x.cpu(), domain.cpu()), rtol=0, atol=4e-7
    )
    with pytest.raises(ValueError, match=r"domain must lie in \[0, 2\), got 2 for row 0"):
        bank.transform(x, domain + 2)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", [EmbeddingDataset, EmbeddingStream])
def test_loaders_pin_their_memory(tmp_path, alignment, kind, num_workers):
    rows = make(5000, DIM, device="cpu").numpy()
    np.save(tmp_path / "rows.npy", rows)
    data = kind(tmp_path, alignment) if kind is EmbeddingDataset else kind(tmp_path, alignment, 512)
    size = 512 if kind is EmbeddingDataset else None
    found = []
    for batch in DataLoader(data, batch_size=size, num_workers=num_workers, pin_memory=True):
        assert batch["embedding"].is_pinned()
        found.append(batch["embedding"].to("cuda", non_blocking=True))
    np.testing.assert_array_equal(torch.cat(found).cpu(), alignment.transform(rows))
