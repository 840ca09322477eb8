"""Fits and file jobs through the Triton kernels, by way of Triton's interpreter."""

import json
import os
import pickle

import numpy as np
import pytest
import torch

import realign_fast as rf
from realign_fast import _gpu, cli
from realign_fast._dtypes import to_float64
from realign_fast.alignment import apply_files, gather_moments
from realign_fast.io import sources

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1, and then no kernel can be compiled"
    ),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy speaks up where a GPU stays silent
]

DIM = 64  # the least that takes the fused form


def make(count, seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    centre = np.random.default_rng(seed % 2).normal(size=DIM)
    return (centre + rng.normal(size=(count, DIM))).astype(dtype)


@pytest.fixture
def shards(tmp_path, write_shard):
    """Two text and one image shard whose rows do not fill the batches evenly."""
    for number, count in enumerate((155, 57)):
        write_shard(tmp_path / "text" / f"part_{number}.npy", make(count, 2 * number))
    write_shard(tmp_path / "image" / "part_0.npy", make(105, 1))
    return tmp_path


@pytest.fixture(autouse=True)
def small_batches(monkeypatch, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "image").mkdir()
    defaults = {**sources.open_source.__kwdefaults__, "batch_bytes": 32 * DIM * 4}
    monkeypatch.setattr(sources.open_source, "__kwdefaults__", defaults)
    monkeypatch.setattr(_gpu, "_PIECE_BYTES", 25 * DIM * 4)


def assert_alike(found, wanted):
    for name in ("scale", "shift", "correction"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=0, atol=2e-6)
    for name in ("text", "image"):
        assert found.report[name]["rows"] == wanted.report[name]["rows"]
        assert found.report[name]["bad_rows"] == wanted.report[name]["bad_rows"]


def test_a_fit_by_the_gpu_is_written_but_not_resumed(shards, tmp_path):
    sets = shards / "text", shards / "image"
    found = rf.fit(*sets, backend="triton", output=tmp_path / "a.safetensors")
    assert rf.Alignment.load(tmp_path / "a.safetensors").fingerprint == found.fingerprint
    with pytest.raises(ValueError, match="resume: a GPU reads, and such a read is not kept"):
        rf.fit(*sets, backend="triton", output=tmp_path / "a.safetensors", resume=True)


@pytest.mark.parametrize("method", ["anchor", "realign"])
def test_a_fit_of_files_agrees_with_the_cpu(shards, method):
    options = {"refine": 2} if method == "realign" else {}
    found, wanted = (
        rf.fit(shards / "text", shards / "image", method=method, backend=backend, **options)
        for backend in ("triton", "cpu")
    )
    assert_alike(found, wanted)
    assert found.fingerprints == wanted.fingerprints
    # The sample is chosen by other keys, and here holds every row.
    assert found.report["in_sample"]["rows"] == wanted.report["in_sample"]["rows"]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_the_bits_do_not_depend_on_the_batches(dtype):
    text, image = make(150, 0, dtype), make(90, 1, dtype)
    whole = rf.fit(text, image, backend="triton")
    parts = rf.fit([text[:70], text[70:77], text[77:]], [image[:1], image[1:]], backend="triton")
    tensors = rf.fit(torch.from_numpy(text), torch.from_numpy(image), backend="triton")
    assert whole.fingerprint == parts.fingerprint == tensors.fingerprint


def test_bfloat16_strided_and_read_only_rows():
    text, image = torch.from_numpy(make(150, 0)).bfloat16(), torch.from_numpy(make(150, 1)).bfloat16()
    assert_alike(rf.fit(text, image, backend="triton"), rf.fit(text, image))
    wide = np.zeros((150, 2 * DIM), np.float32)
    wide[:, :DIM] = make(150, 0)
    wide.flags.writeable = False
    assert_alike(rf.fit(wide[:, :DIM], make(150, 1), backend="triton"), rf.fit(wide[:, :DIM], make(150, 1)))


def test_tensors_where_they_lie(monkeypatch):
    text, image = torch.from_numpy(make(150, 0)), torch.from_numpy(make(150, 1))
    wanted = rf.fit(text, image, backend="triton", refine=1)
    monkeypatch.setattr(sources, "_device_of", lambda x: torch.device("cpu"))
    monkeypatch.setattr(_gpu, "_PART_BYTES", 60 * DIM * 4)
    text = text.T.contiguous().T  # rows of no piece
    for sets in ((text, image), ([text[:11], text[11:]], [{"e": image}])):
        found = rf.fit(*sets, backend="triton", refine=1, key="e")
        assert found.fingerprint == wanted.fingerprint
        assert found.report == wanted.report
    limited = rf.fit(text, image, backend="triton", limit=80)
    assert limited.report["text"]["rows"] == 80
    assert limited.fingerprint == rf.fit(text[:80], image[:80], backend="triton").fingerprint


def test_a_limit(shards):
    found, wanted = (rf.fit(shards / "text", shards / "image", limit=180, backend=each) for each in ("triton", "cpu"))
    assert found.report["text"]["rows"] == 180
    assert_alike(found, wanted)


def test_bad_rows_are_named_by_file_and_row(shards):
    text = np.load(shards / "text" / "part_1.npy")
    text[53, 5] = np.nan
    text[55] = 0
    np.save(shards / "text" / "part_1.npy", text)
    with pytest.raises(ValueError, match=r"part_1\.npy: row 53 is bad .*1 with NaN or infinity, 1 of norm zero"):
        rf.fit(shards / "text", shards / "image", backend="triton")
    for policy in ("skip", "zero"):
        found, wanted = (
            rf.fit(shards / "text", shards / "image", backend=each, on_bad_rows=policy) for each in ("triton", "cpu")
        )
        assert_alike(found, wanted)


def test_statistics_and_what_they_make(shards):
    found, wanted = (gather_moments(shards / "text", backend=backend) for backend in ("triton", "cpu"))
    assert found.count == wanted.count == 212
    np.testing.assert_allclose(found.mean, wanted.mean, rtol=0, atol=2**-27)
    image = gather_moments(shards / "image", backend="triton")
    fits = [
        rf.fit_from_moments(found, image, text=shards / "text", backend=each, refine=1) for each in ("triton", "cpu")
    ]
    np.testing.assert_allclose(fits[0].correction, fits[1].correction, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("dtype", "out_dtype"), [(np.float32, None), (np.float16, "float32"), (np.float32, "bfloat16")]
)
def test_files_are_mapped_as_on_the_cpu(tmp_path, write_shard, dtype, out_dtype):
    alignment = rf.fit(make(150, 0), make(150, 1))
    for number in range(3):
        write_shard(tmp_path / "text" / f"part_{number}.safetensors", make(57 + number, 2 * number, dtype))
    summaries = [
        # Triton's interpreter knows one thread.
        apply_files(alignment, tmp_path / "text", tmp_path / backend, dtype=out_dtype, backend=backend, num_threads=1)
        for backend in ("triton", "cpu")
    ]
    assert summaries[0]["rows"] == summaries[1]["rows"] == 174
    slack = {None: 4e-7, "float32": 4e-7, "bfloat16": 2**-7}[out_dtype]
    for number in range(3):
        batches = [
            next(
                sources.open_source(
                    tmp_path / backend / f"part_{number}.safetensors", name="x", batch_bytes=1 << 20
                ).batches()
            )
            for backend in ("triton", "cpu")
        ]
        found, wanted = (to_float64(batch.rows) for batch in batches)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=slack)


def test_bad_rows_stop_a_file_job(tmp_path, write_shard):
    alignment = rf.fit(make(150, 0), make(150, 1))
    rows = make(90, 0)
    rows[[60, 61]] = 0
    rows[89, 3] = np.inf
    write_shard(tmp_path / "text" / "part_0.npy", rows)
    with pytest.raises(ValueError, match=r"part_0\.npy: row 60 is bad .*2 of norm zero"):
        apply_files(alignment, tmp_path / "text", tmp_path / "out", backend="triton")
    summary = apply_files(alignment, tmp_path / "text", tmp_path / "zeros", backend="triton", on_bad_rows="zero")
    assert summary["bad_rows"] == 3
    assert not np.load(tmp_path / "zeros" / "part_0.npy")[[60, 61, 89]].any()


def test_float64_is_refused(shards):
    with pytest.raises(ValueError, match="backend 'triton' takes float16, bfloat16 and float32, got float64"):
        rf.fit(make(30, 0, np.float64), make(30, 1, np.float64), backend="triton")
    with pytest.raises(ValueError, match="one of auto, cpu, triton for a fit, got 'torch'"):
        rf.fit(make(30, 0), make(30, 1), backend="torch")
    with pytest.raises(ValueError, match="one of auto, cpu, triton for files, got 'torch'"):
        apply_files(rf.fit(make(30, 0), make(30, 1)), shards / "text", shards / "out", backend="torch")


def test_covariances_of_files(shards):
    found, wanted = (gather_moments(shards / "text", backend=backend, covariance=True) for backend in ("triton", "cpu"))
    assert_covariances_close(found, wanted)


def assert_covariances_close(found, wanted):
    assert found.count == wanted.count
    difference = found.covariance - wanted.covariance
    assert np.linalg.norm(difference) < 3e-7 * np.linalg.norm(wanted.covariance)


def test_commands(shards, capsys):
    folder = str(shards)
    for arguments in (
        ["fit", f"{folder}/text", f"{folder}/image", "-o", f"{folder}/a.safetensors", "--refine", "1"],
        ["stats", f"{folder}/text", "-o", f"{folder}/m.safetensors"],
        ["stats", f"{folder}/text", "-o", f"{folder}/m.safetensors", "--covariance", "--precision", "exact"],
        ["apply", f"{folder}/a.safetensors", f"{folder}/text", "-o", f"{folder}/out"],
    ):
        assert cli.main([*arguments, "--device", "cuda", "--threads", "1"]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["command"] == arguments[0]


def test_moments_that_lie_on_a_device_are_settled_when_they_are_read():
    x = torch.from_numpy(make(90, 0))
    x[7] = 0
    wanted = rf.Moments(DIM).update(x, on_bad_rows="skip")
    for read in (lambda m: m, rf.Moments.copy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m + rf.Moments(DIM)):
        moments = rf.Moments(DIM)
        for part in x.split(40):
            moments.update(part, on_bad_rows="skip", backend="triton")
        assert moments._pending
        found = read(moments)
        assert (found.count, found.num_skipped, found.num_zero) == (89, 1, 0)
        np.testing.assert_allclose(found.mean, wanted.mean, rtol=0, atol=2**-27)
        assert not found._pending
    mixed = (
        rf.Moments(DIM).update(x, on_bad_rows="zero", backend="triton").update(x, on_bad_rows="skip", backend="triton")
    )
    assert (mixed.count, mixed.num_zero, mixed.num_skipped) == (179, 1, 1)


@pytest.mark.parametrize("policy", ["zero", "skip"])
def test_covariances_of_tensors_on_a_device(policy):
    x = torch.from_numpy(make(90, 0))
    x[[7, 60]] = 0
    wanted = rf.Moments(DIM, covariance=True).update(x, on_bad_rows=policy)
    found = rf.Moments(DIM, covariance=True)
    for part in x.split(40):
        found.update(part, on_bad_rows=policy, backend="triton")
    assert found._pending
    assert_covariances_close(found, wanted)
    assert_covariances_close(found + found, wanted + wanted)
    before = found.copy()
    with pytest.raises(ValueError, match="row 7 "):
        found.update(x, backend="triton")
    assert found == before
    assert_covariances_close(found.update(x[:7], backend="triton"), wanted.update(x[:7]))


@pytest.mark.parametrize("method", ["ot", "coral", "whiten", "center", "c3"])
def test_maps_of_several_steps(shards, method):
    options = {"strength": 0.7} if method == "ot" else {}
    found, wanted = (
        rf.fit(shards / "text", shards / "image", method=method, backend=backend, **options)
        for backend in ("triton", "cpu")
    )
    x = torch.from_numpy(make(70, 0))
    x[3] = 0
    for side in ("source", "target"):
        out = wanted.transform(x, side=side, on_bad_rows="zero", seed=5, index=17)
        for dtype, atol in ((torch.float32, 3e-5), (torch.float16, 1e-3)):
            mapped = wanted.transform(x, dtype=dtype, backend="triton", side=side, on_bad_rows="zero", seed=5, index=17)
            torch.testing.assert_close(mapped.float(), out, atol=atol, rtol=0)
        again = found.transform(x, side=side, on_bad_rows="zero", seed=5, index=17)
        torch.testing.assert_close(again, out, atol=2e-4, rtol=0)
    with pytest.raises(ValueError, match="row 3 "):
        wanted.transform(x, backend="triton")
    for backend in ("triton", "cpu"):
        apply_files(wanted, shards / "text", shards / backend, backend=backend, num_threads=1, seed=2)
    for number in (0, 1):
        mapped, other = (np.load(shards / backend / f"part_{number}.npy") for backend in ("triton", "cpu"))
        np.testing.assert_allclose(mapped, other, rtol=0, atol=3e-5)


def test_whitening_there():
    x = torch.from_numpy(make(300, 0))
    whitener = rf.Whitener.fit(x, "pca", n_components=9, backend="triton")
    out = whitener.transform(x, backend="triton")
    torch.testing.assert_close(out, whitener.transform(x), atol=1e-3, rtol=0)
