"""The layer and its operators on the CPU, through the C++ kernels; on a GPU in test_gpu.py."""

import copy
import io

import numpy as np
import pytest
import torch

import realign_fast as rf
from realign_fast import _ops, _torch_rows, reference

DIM = 96
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
ROUNDING = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2e-7, torch.float64: 1e-12}


@pytest.fixture(scope="module")
def alignment():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(2, DIM))
    text, image = (centre + rng.normal(size=(400, DIM)) for centre in centres)
    return rf.fit(text, 0.5 * image + 0.5 * centres[1])


@pytest.fixture
def layer(alignment):
    return rf.nn.ReAlign(alignment)


def make(*shape, dtype=torch.float32, seed=1):
    return torch.from_numpy(np.random.default_rng(seed).normal(0.1, 1, shape)).to(dtype)


def wanted_gradient(alignment, x, grad_out):
    rows, grads = (each.detach().double().reshape(-1, DIM).numpy() for each in (x, grad_out))
    p = alignment.parameters
    return reference.row_transform_backward(rows, grads, p.scale, p.shift, p.correction).reshape(x.shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_maps_as_the_alignment_does(alignment, layer, dtype):
    x = make(2, 3, DIM, dtype=dtype)
    out = layer(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out, alignment.transform(x), rtol=0, atol=0)
    assert rf.nn.ReAlign(alignment, dtype=torch.float16)(x).dtype == torch.float16
    target = rf.nn.ReAlign(alignment, side="target")(x)
    torch.testing.assert_close(target, alignment.transform(x, side="target"), rtol=0, atol=0)
    assert layer(x[:0]).shape == (0, 3, DIM)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_the_oracle(alignment, layer, dtype):
    x = make(7, 5, DIM, dtype=dtype).requires_grad_()
    grad_out = make(7, 5, DIM, dtype=dtype, seed=2)
    layer(x).backward(grad_out)
    assert x.grad.dtype == dtype
    wanted = wanted_gradient(alignment, x, grad_out)
    largest = np.abs(wanted).max(axis=-1, keepdims=True)
    assert (np.abs(x.grad.double().numpy() - wanted) <= (2 * ROUNDING[dtype] + 2e-6) * largest).all()


def test_gradients_hold_against_finite_differences(layer):
    x = make(3, DIM, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))


def test_bad_rows_become_zeros_with_gradient_zero_and_are_counted(layer):
    x = make(6, DIM)
    x[1] = 0
    x[3, 5], x[4, 0] = float("nan"), float("inf")
    x.requires_grad_()
    out = layer(x)
    out.backward(torch.ones_like(out))
    bad = [1, 3, 4]
    assert not out[bad].any()
    assert not x.grad[bad].any()
    assert x.grad[[0, 2, 5]].isfinite().all()
    layer(x.detach())
    assert layer.bad_rows.tolist() == [2, 4]
    with pytest.raises(ValueError, match="4 with NaN or infinity, 2 of norm zero"):
        layer.raise_bad_rows()
    layer.raise_bad_rows()


def test_strided_rows_and_strided_gradients(alignment, layer):
    wide = make(8, 2 * DIM)
    x = wide[:, ::2].requires_grad_()
    out = layer(x)
    torch.testing.assert_close(out, alignment.transform(x.detach().contiguous()), rtol=0, atol=0)
    (grad,) = torch.autograd.grad(out.sum(), x)  # a gradient of stride 0
    np.testing.assert_allclose(grad, wanted_gradient(alignment, x, torch.ones_like(out)), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "cast", [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.double(), lambda m: m.to(torch.float16)]
)
def test_casts_leave_the_statistics_alone(alignment, cast):
    model = torch.nn.Sequential(torch.nn.Linear(DIM, DIM), rf.nn.ReAlign(alignment))
    cast(model)
    for name, buffer in model[1].named_buffers():
        expected = torch.int64 if name == "bad_rows" else torch.float32 if name.endswith("32") else torch.float64
        assert buffer.dtype == expected
    np.testing.assert_array_equal(model[1].shift[0], alignment.shift)
    x = make(4, DIM, dtype=model[0].weight.dtype)
    assert model(x).dtype == x.dtype


def test_a_device_without_float64_keeps_it_on_the_cpu(layer):
    seen = []

    def move(buffer):
        seen.append(buffer.dtype)
        if buffer.dtype == torch.float64:
            raise TypeError("no float64 here")
        return buffer.to("meta")

    layer._apply(move)
    assert torch.float64 in seen
    assert {name: buffer.device.type for name, buffer in layer.named_buffers() if not name.startswith("_")} == {
        "scale": "cpu",
        "shift": "cpu",
        "correction": "cpu",
        "bad_rows": "meta",
    }
    assert layer._shift32.device.type == "meta"


def test_a_buffer_that_was_cast_all_the_same_is_refused(layer):
    layer.shift = layer.shift.half()
    with pytest.raises(TypeError, match=r"shift must stay float64, got torch.float16"):
        layer(make(2, DIM))


def test_state_copies_and_pickles(alignment, layer):
    assert sorted(layer.state_dict()) == ["correction", "scale", "shift"]
    rng = np.random.default_rng(5)
    other = rf.nn.ReAlign(rf.fit(rng.normal(1, 1, (50, DIM)), rng.normal(0.5, 1, (50, DIM))))
    x = make(9, DIM)
    for assign in (False, True):
        fresh = copy.deepcopy(other)
        assert not torch.equal(fresh(x), layer(x))
        fresh.load_state_dict(layer.state_dict(), assign=assign)
        assert torch.equal(fresh(x), layer(x))
        assert torch.equal(fresh._shift32, layer._shift32)
    empty = copy.deepcopy(other).to("meta").to_empty(device="cpu")
    empty.load_state_dict(layer.state_dict())
    empty.bad_rows.zero_()
    assert torch.equal(empty(x), layer(x))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), layer(x))
    assert repr(layer) == f"ReAlign(dim={DIM})"


def test_autocast(alignment):
    model = torch.nn.Sequential(torch.nn.Linear(DIM, DIM), rf.nn.ReAlign(alignment), torch.nn.Linear(DIM, 2))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(make(4, DIM))
        loss = out.float().square().sum()
    assert out.dtype == torch.bfloat16
    loss.backward()
    assert model[0].weight.grad.isfinite().all()
    assert model[0].weight.grad.any()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compilers_keep_one_graph(alignment, dynamic):
    model = torch.nn.Sequential(torch.nn.Linear(DIM, DIM), rf.nn.ReAlign(alignment), torch.nn.Linear(DIM, 2))
    copied = copy.deepcopy(model)
    compiled = torch.compile(copied, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for count in (3, 8):
        x = make(count, DIM)
        x[1] = 0
        found, wanted = (each(x) for each in (compiled, model))
        torch.testing.assert_close(found, wanted)
        for out in (found, wanted):
            out.square().sum().backward()
        torch.testing.assert_close(copied[0].weight.grad, model[0].weight.grad)
    assert copied[1].bad_rows.tolist() == model[1].bad_rows.tolist()


def test_export(alignment, layer):
    model = torch.nn.Sequential(torch.nn.Linear(DIM, DIM), layer).eval()
    rows = torch.export.Dim("rows", min=2)
    with torch.no_grad():
        exported = torch.export.export(model, (make(4, DIM),), dynamic_shapes=({0: rows},), strict=False)
        x = make(11, DIM)
        torch.testing.assert_close(exported.module()(x), model(x))
    names = [str(node.target) for node in exported.graph.nodes if "realign_fast" in str(node.target)]
    assert names == ["realign_fast.row_transform.default"]
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.export.load(buffer).module()(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_operators_pass_the_checks_of_torch(layer, dtype):
    maps = layer._scale32, layer._shift32, layer._correction32, layer.scale, layer.shift, layer.correction
    x = make(4, 2, DIM, dtype=dtype).requires_grad_()
    torch.library.opcheck(_ops.row_transform, (x, *maps, dtype))
    torch.library.opcheck(_ops.row_transform_backward, (make(4, 2, DIM, dtype=dtype), x.detach(), *maps))


def test_wrong_rows_are_refused(layer):
    with pytest.raises(ValueError, match=r"x must have rows of dimension 96, got shape \(2, 95\)"):
        layer(make(2, DIM - 1))
    with pytest.raises(TypeError, match=r"x.dtype must be one of"):
        layer(torch.ones(2, DIM, dtype=torch.int32))
    with pytest.raises(ValueError, match="x is on meta, the layer on cpu"):
        layer(torch.ones(2, DIM, device="meta"))
    with pytest.raises(ValueError, match=r"records gradients, which end here: use realign_fast.nn.ReAlign"):
        rf.fit(make(30, DIM), make(30, DIM, seed=3) + 1).transform(make(2, DIM).requires_grad_())


@pytest.mark.parametrize("dim", [1, 3, 63, 255, 700])
def test_gradients_in_plain_torch(monkeypatch, dim):
    monkeypatch.setattr(_torch_rows, "_CHUNK_ELEMENTS", 4 * dim)
    rng = np.random.default_rng(1)
    scale, shift, correction = np.array([1.2]), rng.normal(0.1, 0.3, (1, dim)), rng.normal(0, 0.1, (1, dim))
    x, grad_out = make(11, dim), make(11, dim, seed=2)
    x[3], x[4, 0], x[5] = 0, float("nan"), 1e30 * x[5]
    grad_x = torch.full_like(x, float("nan"))
    maps = _torch_rows.tensors_of((scale, shift, correction), torch.device("cpu"))
    _torch_rows.row_transform_backward(x, grad_out, grad_x, maps)
    arguments = (each.double().numpy() for each in (x, grad_out))
    wanted = reference.row_transform_backward(*arguments, 1.2, shift[0], correction[0])
    largest = np.abs(wanted).max(axis=1, keepdims=True)
    assert (np.abs(grad_x.numpy() - wanted) <= 1e-5 * largest + (1e-6 if dim == 1 else 0)).all()


# ---- Maps of several steps ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["ot", "whiten", "center"])
def other(request):
    rng = np.random.default_rng(3)
    centres = rng.normal(size=(2, DIM))
    text, image = (centre + rng.normal(size=(400, DIM)) for centre in centres)
    options = {"strength": 0.6} if request.param == "ot" else {}
    return rf.fit(text, image, method=request.param, **options)


@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_maps_as_the_alignment_does(other, side, dtype):
    x = make(2, 3, DIM, dtype=dtype)
    x[1, 2] = 0
    layer = rf.nn.ReAlign(other, side=side)
    wanted = other.transform(x, side=side, on_bad_rows="zero")
    torch.testing.assert_close(layer(x), wanted, rtol=0, atol=2 * ROUNDING[dtype] + 3e-6)
    assert layer.bad_rows.tolist() == [1, 0]
    again = rf.nn.ReAlign(other, side="target" if side == "source" else "source")
    if again.has_matrix == layer.has_matrix:
        again.load_state_dict(layer.state_dict())
        torch.testing.assert_close(again(x), layer(x), rtol=0, atol=0)
    half = copy.deepcopy(layer).half()
    torch.testing.assert_close(half(x), layer(x), rtol=0, atol=0)


def test_gradients_through_a_matrix(other):
    layer = rf.nn.ReAlign(other)
    x = make(3, DIM, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,), fast_mode=True)


def test_noise_is_added_while_training(other):
    layer = rf.nn.ReAlign(other, noise_std=0.05)
    x = make(50, DIM)
    x[7] = 0
    torch.manual_seed(0)
    noisy = layer(x)
    torch.manual_seed(0)
    torch.testing.assert_close(layer(x), noisy, rtol=0, atol=0)
    plain = layer.eval()(x)
    torch.testing.assert_close(plain, other.transform(x, on_bad_rows="zero"), rtol=0, atol=3e-6)
    good = torch.arange(50) != 7
    torch.testing.assert_close(noisy[good].norm(dim=1), torch.ones(49))
    assert not noisy[7].any()
    assert 0.2 < (noisy - plain)[good].norm(dim=1).mean() < 0.8
