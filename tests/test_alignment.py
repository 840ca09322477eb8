import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import realign_fast as rf
from realign_fast import _files
from realign_fast.alignment import apply_files, gather_moments

DIM = 67


def cloud(count: int, seed: int, dim: int = DIM) -> np.ndarray:
    """Unit rows around a direction of their own: two seeds make a modality gap."""
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=dim)
    values = centre / np.linalg.norm(centre) + 0.8 * rng.normal(size=(count, dim)) / np.sqrt(dim)
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def unit(values):
    values = np.asarray(values, np.float64)
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def text():
    return cloud(1200, 1)


@pytest.fixture(scope="module")
def image():
    return cloud(900, 2)


def by_the_book(text, image, method):
    """The paper's steps, one after the other, in float64."""
    u, x = unit(text), unit(image)
    mu_y, mu_x = u.mean(0), x.mean(0)
    scale = 1.0
    if method != "anchor":
        scale = np.sqrt(((x - mu_x) ** 2).sum(1).mean() / ((u - mu_y) ** 2).sum(1).mean())
    v = unit(mu_x + scale * (u - mu_y))
    if method == "realign":
        v = unit(v - v.mean(0) + mu_x)
    return v


@pytest.mark.parametrize("method", ["anchor", "anchor_trace", "realign"])
def test_fit_and_transform_follow_the_paper(text, image, method):
    alignment = rf.fit(text, image, method=method)
    out = alignment.transform(text)
    np.testing.assert_allclose(out, by_the_book(text, image, method), rtol=0, atol=3e-7)
    assert out.dtype == np.float32
    assert alignment.method == method
    assert (alignment.source.count, alignment.target.count) == (1200, 900)


def test_refine_removes_the_gap_that_is_left(text, image):
    target = unit(image).mean(0)

    def gap(**options):
        return np.linalg.norm(unit(rf.fit(text, image, **options).transform(text.astype(np.float64))).mean(0) - target)

    gaps = [gap(refine=k) for k in range(4)]
    assert gaps[0] > 1e-4
    assert gaps[3] < 1e-7
    assert gaps[1] < 0.01 * gaps[0]


@pytest.mark.parametrize("name", ["mindgap_clip_coco500", "mindgap_convirt500", "mindgap_videoclip", "mindgap_clasp"])
def test_refine_on_real_sets(shared_data, name):
    text, image = (np.load(shared_data / name / f"{side}.npy") for side in ("text", "image"))
    alignment = rf.fit(text, image, refine=3)
    out = alignment.transform(text.astype(np.float64))
    assert np.linalg.norm(out.mean(0) - unit(image).mean(0)) < 1e-7


def test_the_same_bits_however_the_rows_come(text, image):
    expected = rf.fit(text, image, refine=2, num_threads=1)
    shuffled = np.random.default_rng(0).permutation(len(text))
    for rows, threads in [
        (np.array_split(text, 7), 2),
        (np.array_split(text, 300)[::-1], 3),
        (text[shuffled], 7),
        (text.reshape(30, 40, DIM), 2),
    ]:
        found = rf.fit(rows, image, refine=2, num_threads=threads)
        assert found.fingerprint == expected.fingerprint
        assert found.report["in_sample"] == expected.report["in_sample"]
        assert found.report["held_out"] == expected.report["held_out"]


def test_the_report(text, image):
    report = rf.fit(text, image, refine=1).report
    assert json.loads(json.dumps(report)) == report
    assert report["text"]["rows"] == 1200
    assert report["image"]["rows"] == 900
    assert report["text"]["bad_rows"] == 0
    before = np.linalg.norm(unit(text).mean(0) - unit(image).mean(0))
    assert report["gap"]["before"] == pytest.approx(before, abs=1e-7)
    assert list(report["gap"]) == ["before", "trace", "centroid"]
    held_out = report["held_out"]
    assert held_out["rows"] == {"text": 120, "image": 90}
    assert report["in_sample"]["rows"] == {"text": 1080, "image": 810}
    assert list(held_out["gap"]) == ["before", "anchor", "trace", "centroid", "refine_1"]
    # On rows that the map has not seen the gap is sampling noise, whatever is done.
    assert 0.5 < held_out["gap"]["refine_1"] / held_out["noise_floor"] < 2
    assert report["in_sample"]["gap"]["refine_1"] < 1e-4


def test_small_sets_have_no_held_out_check():
    report = rf.fit(cloud(19, 1), cloud(50, 2)).report
    assert report["held_out"] is None
    assert report["in_sample"] is None


def test_from_moments(text, image):
    expected = rf.fit(text, image, refine=2)
    a, b = gather_moments(text[:500]), gather_moments(text[500:])
    found = rf.fit_from_moments(a + b, gather_moments(image), text=text, refine=2)
    assert found.fingerprint == expected.fingerprint
    anchor = rf.fit_from_moments(a + b, gather_moments(image), method="anchor_trace")
    assert anchor.fingerprint == rf.fit(text, image, method="anchor_trace").fingerprint
    with pytest.raises(ValueError, match="pass text="):
        rf.fit_from_moments(a, b)
    with pytest.raises(ValueError, match="same rows each time"):
        rf.fit_from_moments(a, b, text=text)


class Batches:
    """Gives its rows anew each time."""

    def __init__(self, values, wrap=lambda batch: batch):
        self.values, self.wrap = values, wrap

    def __iter__(self):
        return (self.wrap(batch) for batch in np.array_split(self.values, 5))


def test_batches(text, image):
    expected = rf.fit(text, image).fingerprint
    assert rf.fit(Batches(text), Batches(image)).fingerprint == expected
    assert rf.fit(Batches(text, torch.from_numpy), image).fingerprint == expected
    assert rf.fit(Batches(text, lambda batch: {"embedding": batch}), image, key="embedding").fingerprint == expected
    assert rf.fit(text, iter(Batches(image)), method="realign").fingerprint == expected
    with pytest.raises(TypeError, match=r"text can be read only once.*list of batches"):
        rf.fit(iter(Batches(text)), image)
    rf.fit(iter(Batches(text)), image, method="anchor")

    class Shrinking(Batches):
        def __iter__(self):
            batches = list(super().__iter__())
            self.values = self.values[:-1]
            return iter(batches)

    with pytest.raises(ValueError, match="1200 rows when first read and 1199 now"):
        rf.fit(Shrinking(text), image)


def test_sets_that_cannot_be_fitted_are_refused(text, image):
    with pytest.raises(ValueError, match="text has dimension 67, image has dimension 3"):
        rf.fit(text, cloud(10, 1, dim=3))
    with pytest.raises(ValueError, match="text has 1 usable rows"):
        rf.fit(text[:1], image)
    with pytest.raises(ValueError, match="image: all rows are equal"):
        rf.fit(text, np.repeat(image[:1], 10, axis=0))
    with pytest.raises(ValueError, match="method must be one of anchor, anchor_trace, realign"):
        rf.fit(text, image, method="magic")
    with pytest.raises(ValueError, match="takes no option 'refine'"):
        rf.fit(text, image, method="anchor", refine=1)
    with pytest.raises(ValueError, match="refine must be a whole number"):
        rf.fit(text, image, refine=-1)
    with pytest.raises(ValueError, match="backend must be one of"):
        rf.fit(text, image, backend="quantum")


def test_bad_rows(text, image):
    bad = text.copy()
    bad[100] = np.nan
    bad[900] = 0
    with pytest.raises(ValueError, match="text: row 100 is bad"):
        rf.fit(bad, image)
    skipped = rf.fit(bad, image, on_bad_rows="skip")
    assert skipped.fingerprint == rf.fit(np.delete(text, [100, 900], axis=0), image).fingerprint
    assert skipped.report["text"]["bad_rows"] == 2
    zeroed = rf.fit(bad, image, on_bad_rows="zero")
    assert zeroed.source.count == 1200
    out = skipped.transform(bad, on_bad_rows="zero")
    assert not out[[100, 900]].any()
    np.testing.assert_array_equal(out[:100], skipped.transform(text[:100]))
    with pytest.raises(ValueError, match="x: row 100 is bad"):
        skipped.transform(bad)
    with pytest.raises(ValueError, match="on_bad_rows must be one of raise, zero"):
        skipped.transform(bad, on_bad_rows="skip")
    kept = bad.copy()
    with pytest.raises(ValueError, match="row 100"):
        skipped.transform(bad, out=bad)
    np.testing.assert_array_equal(bad, kept)


def test_text_opposite_to_the_images():
    """The shift takes the text's mean through the origin: the guard of the fused form."""
    rng = np.random.default_rng(0)
    centre = unit(rng.normal(size=DIM))
    image = unit(centre + 0.02 * rng.normal(size=(500, DIM))).astype(np.float32)
    text = -image[::-1]
    out = rf.fit(text, image).transform(text)
    np.testing.assert_allclose(out, by_the_book(text, image, "realign"), rtol=0, atol=3e-7)


@pytest.fixture(scope="module")
def alignment(text, image):
    return rf.fit(text, image)


@pytest.mark.parametrize("shape", [(DIM,), (0, DIM), (40, DIM), (4, 2, 5, DIM)])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_arrays_keep_shape_and_dtype(alignment, text, shape, dtype):
    x = text[: int(np.prod(shape[:-1]))].reshape(shape).astype(dtype)
    out = alignment.transform(x)
    assert (out.shape, out.dtype) == (shape, np.dtype(dtype))
    expected = alignment.transform(x.astype(np.float64))
    np.testing.assert_allclose(out, expected, rtol=0, atol=3e-4 if dtype == "float16" else 2e-7)
    assert alignment.transform(x, dtype="float16").dtype == np.float16
    for other in (np.asfortranarray(x), x[..., ::-1][..., ::-1], x.astype(x.dtype.newbyteorder(">"))):
        np.testing.assert_array_equal(alignment.transform(other), out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_tensors_keep_shape_and_dtype(alignment, text, dtype, backend):
    x = torch.from_numpy(text[:60]).to(dtype).reshape(3, 20, DIM)
    out = alignment.transform(x, backend=backend)
    assert out.dtype == dtype
    assert out.shape == x.shape
    expected = torch.from_numpy(alignment.transform(x.double().numpy()))
    tolerance = {torch.float16: 3e-4, torch.bfloat16: 3e-3}.get(dtype, 3e-7)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)
    transposed = x.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(alignment.transform(transposed, backend=backend), out, rtol=0, atol=0)
    assert alignment.transform(x, dtype=torch.float32, backend=backend).dtype == torch.float32
    in_place = x.clone()
    assert alignment.transform(in_place, out=in_place, backend=backend) is in_place
    torch.testing.assert_close(in_place, out, rtol=0, atol=0)
    strided = torch.zeros(3, 20, 2 * DIM, dtype=dtype)[..., ::2]
    alignment.transform(x, out=strided, backend=backend)
    torch.testing.assert_close(strided, out, rtol=0, atol=0)
    bad = x.clone()
    bad[1, 2] = float("nan")
    with pytest.raises(ValueError, match="row 22"):
        alignment.transform(bad, backend=backend)
    assert not alignment.transform(bad, on_bad_rows="zero", backend=backend)[1, 2].any()


def test_out_in_every_layout(alignment, text):
    expected = alignment.transform(text)
    out = np.full_like(text, np.nan)
    assert alignment.transform(text, out) is out
    np.testing.assert_array_equal(out, expected)
    for make in (lambda a: a, np.asfortranarray, lambda a: a[:, ::-1].copy()[:, ::-1], lambda a: a.astype(">f4")):
        x = make(text.copy())
        assert alignment.transform(x, out=x) is x
        np.testing.assert_array_equal(x, expected)
    half = np.empty(text.shape, np.float16)
    alignment.transform(text, out=half)
    np.testing.assert_allclose(half, expected, atol=3e-4)


def test_triton_takes_rows_on_a_gpu(alignment, text):
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="backend 'triton' takes rows on a GPU, got rows in host memory"):
        alignment.transform(torch.from_numpy(text), backend="triton")
    with pytest.raises(ValueError, match="backend 'triton' takes rows on a CUDA or ROCm device, got rows on meta"):
        alignment.transform(torch.from_numpy(text).to("meta"), backend="triton")


def test_arguments_that_do_not_fit_are_refused(alignment, text):
    for arguments, error, message in [
        (([1.0, 2.0],), TypeError, "x must be a NumPy array or a torch tensor, got list"),
        ((text[:, :5],), ValueError, "rows of dimension 67"),
        ((np.ones(()),), ValueError, "shape"),
        ((np.ones((2, DIM), np.int8),), TypeError, "int8: dequantise it first"),
        ((np.ones((2, DIM), np.int64),), TypeError, "x.dtype must be one of float16"),
        ((np.ones((2, DIM), np.complex64),), TypeError, "x.dtype must be one of float16"),
        ((np.ones((2, DIM), object),), TypeError, "x.dtype must be one of float16"),
        ((text, text[:5]), ValueError, "out must have the shape of x"),
        ((text, torch.from_numpy(text)), TypeError, "out must be of the kind of x"),
        ((text, None, "int8"), TypeError, "int8"),
        ((text, None, "bfloat16"), TypeError, "NumPy has no bfloat16"),
        ((text, np.empty_like(text), "float16"), ValueError, "give one of them"),
    ]:
        with pytest.raises(error, match=message):
            alignment.transform(*arguments)
    with pytest.raises(ValueError, match="side must be"):
        alignment.transform(text, side="both")
    with pytest.raises(ValueError, match="backend 'cpu' takes rows in host memory, got rows on meta"):
        alignment.transform(torch.from_numpy(text).to("meta"), backend="cpu")
    with pytest.raises(ValueError, match="backend must be one of"):
        alignment.transform(text, backend="quantum")
    with pytest.raises(TypeError, match="takes torch tensors"):
        alignment.transform(text, backend="torch")
    with pytest.raises(ValueError, match="num_threads must be at least 1"):
        alignment.transform(text, num_threads=0)
    with pytest.raises(ValueError, match="records gradients"):
        alignment.transform(torch.ones(2, DIM, requires_grad=True))
    with torch.no_grad():
        alignment.transform(torch.ones(2, DIM, requires_grad=True))


def test_the_target_side_is_brought_to_unit_length(alignment, image):
    np.testing.assert_allclose(alignment.transform(3 * image, side="target"), unit(image), rtol=0, atol=2e-7)


def test_check_tells_noise_from_drift(alignment, text):
    same = alignment.check(cloud(1200, 1)[:400])
    assert not same.drifted
    assert same.num_rows == 400
    assert 0 < same.distance < 2 * same.noise_floor
    assert alignment.check(cloud(400, 2)).drifted
    assert not alignment.check(cloud(400, 2), side="target").drifted
    assert alignment.check(gather_moments(text[:400])) == alignment.check(text[:400])
    with pytest.raises(ValueError, match="usable rows"):
        alignment.check(np.zeros((3, DIM)))
    with pytest.raises(ValueError, match="side must be"):
        alignment.check(text, side="both")


def test_save_and_load(tmp_path, text, image):
    alignment = rf.fit(text, image, encoder="toy")
    path = tmp_path / "a.safetensors"
    alignment.save(path)
    found = rf.Alignment.load(path)
    assert found.fingerprint == alignment.fingerprint
    assert (found.method, found.encoder, found.report) == ("realign", "toy", alignment.report)
    assert found.source.trace == alignment.source.trace
    np.testing.assert_array_equal(found.target.mean, alignment.target.mean)
    np.testing.assert_array_equal(found.transform(text), alignment.transform(text))
    first = path.read_bytes()
    found.save(path)
    assert path.read_bytes() == first
    with pytest.raises(ValueError, match="read-only"):
        found.shift[0] = 1
    with pytest.raises(AttributeError):
        found.method = "anchor"


def test_damaged_files_are_refused(tmp_path, alignment):
    path = tmp_path / "a.safetensors"
    alignment.save(path)
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    for cut in [0, 1, 8, 9, 100, len(good) - 1]:
        path.write_bytes(good[:cut])
        with pytest.raises(ValueError, match=r"a\.safetensors"):
            rf.Alignment.load(path)
    for _ in range(1000):
        damaged = bytearray(good)
        for place in rng.integers(0, min(len(good), 4096), rng.integers(1, 4)):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            rf.Alignment.load(path)
        except ValueError as error:
            assert "a.safetensors" in str(error)  # noqa: PT017 (a mutation may do no harm)


def test_files_of_a_newer_format_are_refused(tmp_path, alignment, monkeypatch):
    path = tmp_path / "a.safetensors"
    alignment.save(path)
    monkeypatch.setattr(_files, "FORMAT_VERSION", 0)
    with pytest.raises(ValueError, match="upgrade realign-fast"):
        rf.Alignment.load(path)
    monkeypatch.undo()
    rf.Moments(3).save(path)
    with pytest.raises(ValueError, match="holds 'moments', expected 'alignment'"):
        rf.Alignment.load(path)
    replace(alignment, method="later").save(path)
    with pytest.raises(ValueError, match="method 'later', which this package does not know: upgrade it"):
        rf.Alignment.load(path)


def test_files_in_files_out(tmp_path, text, image):
    for name, values in (("text", text), ("image", image)):
        (tmp_path / name).mkdir()
        for index, part in enumerate(np.array_split(values, 3)):
            np.save(tmp_path / name / f"part_{index}.npy", part)
    alignment = rf.fit(tmp_path / "text", str(tmp_path / "image" / "*.npy"), refine=1)
    assert alignment.fingerprint == rf.fit(text, image, refine=1).fingerprint
    assert set(alignment.fingerprints) == {"text", "image"}
    summary = apply_files(alignment, tmp_path / "text", tmp_path / "out", dtype="float16")
    assert summary["rows"] == 1200
    out = np.concatenate([np.load(tmp_path / "out" / f"part_{index}.npy") for index in range(3)])
    np.testing.assert_array_equal(out, alignment.transform(text, dtype="float16"))
    bad = text.copy()
    bad[500] = np.inf
    np.save(tmp_path / "text" / "part_1.npy", bad[400:800])
    with pytest.raises(ValueError, match=r"part_1\.npy: row 100 is bad"):
        rf.fit(tmp_path / "text", tmp_path / "image")
    with pytest.raises(ValueError, match=r"part_1\.npy: row 100 is bad"):
        apply_files(alignment, tmp_path / "text", tmp_path / "out2")
