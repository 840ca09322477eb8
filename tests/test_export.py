"""Maps in FAISS and ONNX against the map itself."""

import numpy as np
import pytest

import realign_fast as rf
from realign_fast import cli, export

DIM = 70
METHODS = ["anchor", "realign", "coral", "center", "whiten"]


def make(count, seed):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=DIM) + rng.normal(size=(count, DIM))).astype(np.float32)


@pytest.fixture(scope="module", params=METHODS)
def alignment(request):
    return rf.fit(make(400, 1), make(300, 2), method=request.param)


def mapped_by(faiss, index, rows):
    for number in range(index.chain.size()):
        rows = faiss.downcast_VectorTransform(index.chain.at(number)).apply(rows)
    return rows


@pytest.mark.parametrize("side", ["source", "target"])
def test_faiss_maps_what_is_added_and_searched(alignment, side, tmp_path):
    faiss = pytest.importorskip("faiss")
    x = make(50, 3)
    wanted = alignment.transform(x, side=side)
    index = export.to_faiss(alignment, side=side)
    np.testing.assert_allclose(mapped_by(faiss, index, x), wanted, rtol=0, atol=3e-6)
    index.add(x)
    scores, found = index.search(x, 1)
    np.testing.assert_array_equal(found[:, 0], np.arange(50))
    np.testing.assert_allclose(scores, 1, atol=1e-5)
    np.testing.assert_allclose(faiss.downcast_index(index.index).reconstruct_n(0, 50), wanted, rtol=0, atol=3e-6)
    export.save(alignment, tmp_path / "a.index", "faiss", side=side)
    again = faiss.read_index(str(tmp_path / "a.index"))
    np.testing.assert_allclose(mapped_by(faiss, again, x), wanted, rtol=0, atol=3e-6)


def test_an_index_of_ones_own(alignment):
    faiss = pytest.importorskip("faiss")
    own = faiss.IndexFlatL2(DIM)
    images = alignment.transform(make(60, 4), side="target")
    own.add(images)
    index = export.to_faiss(alignment, own)
    queries = make(20, 5)
    _, found = index.search(queries, 3)
    _, wanted = own.search(alignment.transform(queries), 3)
    np.testing.assert_array_equal(found, wanted)
    with pytest.raises(ValueError, match="index must have dimension 70, got 5"):
        export.to_faiss(alignment, faiss.IndexFlatL2(5))


@pytest.mark.parametrize("side", ["source", "target"])
def test_onnx_maps_as_the_alignment(alignment, side, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    export.save(alignment, tmp_path / "a.onnx", "onnx", side=side)
    session = runtime.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    x = make(40, 6)
    x[7] = 0
    x[8] *= np.float32(1e30)
    x[9] *= np.float32(1e-30)
    (found,) = session.run(None, {"x": x})
    np.testing.assert_allclose(found, alignment.transform(x, side=side, on_bad_rows="zero"), rtol=0, atol=3e-6)
    assert session.run(None, {"x": x[:1]})[0].shape == (1, DIM)


def test_the_command(tmp_path, capsys):
    pytest.importorskip("faiss")
    pytest.importorskip("onnx")
    rf.fit(make(100, 1), make(100, 2)).save(tmp_path / "a.safetensors")
    for to in ("faiss", "onnx"):
        arguments = ["export", str(tmp_path / "a.safetensors"), "--to", to, "-o", str(tmp_path / f"a.{to}")]
        assert cli.main(arguments) == 0
        assert f'"to": "{to}"' in capsys.readouterr().out
        assert (tmp_path / f"a.{to}").stat().st_size > 4 * DIM * DIM


def test_what_is_missing_is_named(monkeypatch):
    alignment = rf.fit(make(100, 1), make(100, 2))
    for name in ("faiss", "onnx"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
        with pytest.raises(ImportError, match=rf"needs {name}: pip install 'realign-fast\[{name}\]'"):
            getattr(export, f"to_{name}")(alignment)
    with pytest.raises(ValueError, match="to must be 'faiss' or 'onnx'"):
        export.save(alignment, "x", "tflite")
