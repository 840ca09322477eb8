"""Files of every version, kept under `files/`, against today's code, and by hand against the tables of FORMATS.md."""

import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
from bisect import bisect_left
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from pyarrow import parquet
from safetensors import safe_open

import realign_fast as rf
from realign_fast.io.writer import verify
from realign_fast.revision import ReVisionConfig, ReVisionForCausalLM

HERE = Path(__file__).parent
PAGE = (HERE.parent / "realign_fast" / "FORMATS.md").read_text()
VERSIONS = sorted(path.name for path in (HERE / "files").iterdir() if path.is_dir() and path.name[0].isdigit())
THIS = ".".join(rf.__version__.split(".")[:2])
DTYPES = {"F64": "<f8", "F32": "<f4", "I64": "<i8", "U64": "<u8", "U8": "u1"}
TYPES = {
    "integer": (int,), "string": (str,), "object": (dict,), "array": (list,), "boolean": (bool,),
    "number": (int, float), "null": (type(None),),
}  # fmt: skip
KINDS = {
    "alignment": "Alignment", "moments": "Moments", "window": "Window", "whitener": "Whitener", "ids": "Index of ids"
}  # fmt: skip
# The same in float64 but for the order of sums; sums of moments are rounded to 2**-27.
EXACT, SUMS, PRODUCTS = {"rtol": 0, "atol": 1e-9}, {"rtol": 0, "atol": 3e-8}, {"rtol": 0, "atol": 1e-6}


@pytest.fixture(params=VERSIONS)
def kept(request, tmp_path) -> Path:
    """Return a copy of the files of a version, with the times of change that its indexes know."""
    folder = shutil.copytree(HERE / "files" / request.param, tmp_path / "kept")
    for _, _, *files in (open_by_hand(path)[1]["made_from"] for path in folder.glob("*.index")):
        for name, _, time in (each for some in files for each in some):
            os.utime(folder / "aligned" / name, ns=(time, time))
    return folder


@pytest.fixture
def values(kept) -> dict[str, Any]:
    return json.loads((kept / "values.json").read_text())


@pytest.fixture
def text(kept):
    return np.load(kept / "text.npy")


@pytest.fixture
def image(kept):
    return np.load(kept / "image.npy")


# ---- The page -------------------------------------------------------------------------------------------------------


def tables_of(section: str) -> list[list[list[str]]]:
    """Return the rows of each table in a section, as cells."""
    _, _, rest = PAGE.partition(f"# {section}\n")
    body = re.split(r"^#", rest, flags=re.MULTILINE)[0]
    found = [block.splitlines()[2:] for block in re.findall(r"(?:^\|.*\n)+", body, flags=re.MULTILINE)]
    return [[[cell.strip() for cell in line.split("|")[1:-1]] for line in lines] for lines in found]


def names_in(cell: str) -> list[str]:
    return re.findall(r"`([\w.]+)`", cell)


def check_fields(fields: dict[str, Any], table: list[list[str]], *, all_of: bool = True) -> None:
    """Hold an object against a table of fields."""
    known = set()
    for cell, kinds, where, _ in table:
        names, types = names_in(cell), kinds.split(", ")
        known.update(names)
        for name, kind in zip(names, types * len(names) if len(types) == 1 else types, strict=True):
            assert name in fields or where != "all", name
            allowed = [each for word in kind.split(" or ") for each in TYPES[word]]
            assert name not in fields or type(fields[name]) in allowed, (name, fields[name])
    assert not all_of or set(fields) <= known


def check_tensors(tensors: dict[str, Any], table: list[list[str]], version: int) -> None:
    """Hold tensors against a table: their names, dtypes, and shapes that fit together."""
    known = {names_in(row[0])[0]: row for row in table}
    assert set(tensors) <= set(known)
    sizes: dict[str, int] = {}
    for name, (_, dtype, shape, where, _) in known.items():
        if name not in tensors:
            assert where != "all", name
            continue
        assert where == "all" or version == int(where)
        assert tensors[name].dtype == np.dtype(DTYPES[dtype])
        axes = shape.strip("()").split(", ")
        assert len(axes) == tensors[name].ndim
        for axis, size in zip(axes, tensors[name].shape, strict=True):
            symbol, _, more = axis.partition(" + ")
            expected = int(symbol) if symbol.isdigit() else sizes.setdefault(symbol, size - int(more or 0))
            assert size == expected + int(more or 0), name


def open_by_hand(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return tensors and fields of a file, read as the page says."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert length % 8 == 0
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    assert set(metadata) == {"realign_fast"}
    tensors, end = {}, 0
    order = sorted(header, key=lambda name: (["U64", "I64", "F64", "U8"].index(header[name]["dtype"]), name))
    assert list(header) == order
    for name, entry in header.items():
        begin, stop = entry["data_offsets"]
        assert begin == end
        end = stop
        found = np.frombuffer(data[8 + length + begin : 8 + length + stop], DTYPES[entry["dtype"]])
        tensors[name] = found.reshape(entry["shape"])
    assert 8 + length + end == len(data)
    return tensors, json.loads(metadata["realign_fast"])


def pi(z: np.ndarray) -> np.ndarray:
    return z / np.linalg.norm(z, axis=-1, keepdims=True)


def ours(folder: Path) -> list[Path]:
    return [*folder.glob("*.safetensors"), *folder.glob("alignments/*.safetensors"), *folder.glob("*.index")]


def test_files_of_this_version_are_kept():
    assert THIS in VERSIONS


@pytest.mark.slow
def test_the_script_makes_the_files_of_this_version(tmp_path):
    script = shutil.copy(HERE / "files" / "make.py", tmp_path)
    subprocess.run([sys.executable, script], check=True, capture_output=True)
    made, kept = (sorted(str(path.relative_to(top / THIS)) for path in (top / THIS).rglob("*"))
                  for top in (tmp_path, HERE / "files"))  # fmt: skip
    assert made == kept
    again = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert (again.returncode, "files of a version are made once" in again.stderr) == (1, True)


def test_every_file_has_the_layout_of_the_page(kept):
    kinds = set()
    for path in ours(kept):
        tensors, fields = open_by_hand(path)
        kinds.add(fields["kind"])
        of_tensors, of_fields, *_ = tables_of(KINDS[fields["kind"]])
        check_tensors(tensors, of_tensors, fields["format"])
        common = tables_of("Alignments, moments, windows, whiteners, indexes")[1]
        check_fields(fields, common + of_fields)
        for part in fields.get("parts", []):
            check_fields({name: value for name, value in part.items() if name != "name"}, tables_of("Moments")[1])
            assert type(part["name"]) in (str, type(None))
        with safe_open(path, framework="numpy") as file:
            assert all(np.array_equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())
    assert kinds == set(KINDS)


# ---- Alignments, moments, windows, whiteners ------------------------------------------------------------------------


def test_alignments_map_as_they_did(kept, values, text, image):
    assert len(values["alignments"]) > 4
    for name, sides in values["alignments"].items():
        alignment = rf.Alignment.load(kept / "alignments" / f"{name}.safetensors")
        assert (alignment.method, alignment.encoder) == (name, "clip@0123")
        assert set(alignment.fingerprints) == {"text", "image"}
        assert (alignment.source.count, alignment.source.num_skipped, alignment.target.count) == (95, 1, 96)
        for side, rows in (("source", text), ("target", image)):
            options: Any = {"side": side, "noise_std": 0}
            np.testing.assert_allclose(alignment.transform(rows[:4].astype(float), **options), sides[side], **EXACT)
        alignment.save(kept / "again")
        np.testing.assert_equal(
            open_by_hand(kept / "again")[0], open_by_hand(kept / f"alignments/{name}.safetensors")[0]
        )


def test_alignments_map_as_the_page_says(kept, values, text, image):
    for name, sides in values["alignments"].items():
        t, fields = open_by_hand(kept / "alignments" / f"{name}.safetensors")
        u, v = pi(text[:4].astype(float)), pi(image[:4].astype(float))
        if "matrix" in t:
            moved = (u - t["centre"]) @ t["matrix"].T + (t["shift"] + t["matrix"] @ t["centre"])
        else:
            moved = t["scale"] * u + t["shift"]
        np.testing.assert_allclose(pi(pi(moved) + t["correction"]), sides["source"], **EXACT)
        if "target_shift" in t:
            v = pi((v @ t["target_matrix"].T if "target_matrix" in t else v) + t["target_shift"])
        np.testing.assert_allclose(v, sides["target"], **EXACT)
        assert (fields.get("noise_std", 0) > 0) == (name == "c3")
        for of_side, mean in (("source", "source_mean"), ("target", "target_mean")):
            assert fields[of_side]["trace"] == pytest.approx(1 - t[mean] @ t[mean], abs=1e-9)


def test_moments_say_what_they_did(kept, values):
    for name, expected in values["moments"].items():
        path = kept / f"moments_{name}.safetensors"
        moments = rf.Moments.load(path)
        counts = expected["count"], expected["num_zero"], expected["num_skipped"]
        assert (moments.count, moments.num_zero, moments.num_skipped) == counts
        np.testing.assert_allclose(moments.mean, expected["mean"], **SUMS)
        assert moments.trace == pytest.approx(np.trace(expected["covariance"]), abs=1e-7)
        t, fields = open_by_hand(path)
        mean = t["sums"] / 2 ** fields["fixed_point_bits"] / fields["count"]
        np.testing.assert_allclose(mean, moments.mean, rtol=1e-14)
        assert moments.has_covariance == ("products" in t) == (fields["format"] == 2)
        if moments.has_covariance:
            np.testing.assert_allclose(moments.covariance, expected["covariance"], **PRODUCTS)
            products = np.tril(t["products"]) + np.tril(t["products"], -1).T
            assert not np.triu(t["products"], 1).any()
            by_hand = products / fields["count"] - np.outer(mean - t["pilot"], mean - t["pilot"])
            np.testing.assert_allclose(by_hand, moments.covariance, **EXACT)


def test_a_window_goes_on(kept, values):
    window = rf.MomentsWindow.load(kept / "window.safetensors")
    assert (window.size, window.names) == (4, ("2026-02-01", "2026-02-02", None))
    expected = values["moments"]["skip"]
    assert window.total.count == expected["count"]
    np.testing.assert_allclose(window.total.mean, expected["mean"], **SUMS)
    np.testing.assert_allclose(window.total.covariance, expected["covariance"], **PRODUCTS)
    window.push(rf.Moments.load(kept / "moments_skip.safetensors"), "2026-02-03")
    assert window.total.count == 2 * expected["count"]


def test_a_whitener_whitens_as_it_did(kept, values, image):
    whitener = rf.Whitener.load(kept / "whitener.safetensors")
    np.testing.assert_allclose(whitener.transform(image[:4].astype(float)), values["whitener"], **EXACT)
    t, fields = open_by_hand(kept / "whitener.safetensors")
    assert (fields["whitening"], fields["shrinkage"], fields["count"]) == ("pca", 0.1, len(image))
    np.testing.assert_allclose((pi(image[:4].astype(float)) - t["mean"]) @ t["matrix"].T, values["whitener"], **EXACT)
    np.testing.assert_allclose(t["matrix"] @ t["inverse_matrix"], np.eye(5), atol=1e-8)


def rewrite(path: Path, more: dict[str, Any]) -> None:
    """Change fields in the header of a file."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    fields = json.loads(header["__metadata__"]["realign_fast"])
    header["__metadata__"]["realign_fast"] = json.dumps(fields | more)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def test_later_formats_are_refused_and_unknown_fields_overlooked(kept):
    def index(path):
        return rf.data.EmbeddingDataset(kept / "aligned", index=path)

    for name, load in (
        ("alignments/realign.safetensors", rf.Alignment.load),
        ("moments_skip.safetensors", rf.Moments.load),
        ("window.safetensors", rf.MomentsWindow.load),
        ("whitener.safetensors", rf.Whitener.load),
        ("id.index", index),
    ):
        rewrite(kept / name, {"later": [1, {"a": None}]})
        load(kept / name)
        rewrite(kept / name, {"format": 3})
        with pytest.raises(ValueError, match=rf"{name} .*format version 3, newer than the 2 .*upgrade realign-fast"):
            load(kept / name)
        for wrong in (0, "1", None, True):
            rewrite(kept / name, {"format": wrong})
            with pytest.raises(ValueError, match=rf"{name}.* does not state its format"):
                load(kept / name)


# ---- Indexes and folders --------------------------------------------------------------------------------------------


def test_an_index_finds_the_rows_it_did(kept, values):
    before = (kept / "id.index").read_bytes()
    data = rf.data.EmbeddingDataset(kept / "aligned", index=kept / "id.index")
    assert data.numbers_of(list(values["ids"])).tolist() == list(values["ids"].values())
    assert [data[row]["id"] for row in values["ids"].values()] == list(values["ids"])
    assert (kept / "id.index").read_bytes() == before
    numbered = rf.data.EmbeddingDataset(kept / "aligned", index=kept / "row.index", id_column="row")
    assert numbered.numbers_of([95, 0]).tolist() == [95, 0]
    assert numbered[7]["id"] == 7


def test_an_index_can_be_searched_by_hand(kept, values):
    for name, wanted in (("id", values["ids"]), ("row", {str(row): row for row in range(96)})):
        data = (kept / f"{name}.index").read_bytes()
        tensors, fields = open_by_hand(kept / f"{name}.index")
        assert fields["integers"] == (name == "row")
        n, t = len(tensors["rows"]), len(tensors["text"])
        (h,) = struct.unpack("<Q", data[:8])
        begin = h + 8
        hashes = struct.unpack(f"<{n}Q", data[begin : begin + 8 * n])
        offsets = struct.unpack(f"<{n + 1}q", data[begin + 8 * n : begin + 16 * n + 8])
        rows = struct.unpack(f"<{n}q", data[begin + 16 * n + 8 : begin + 24 * n + 8])
        text = data[begin + 24 * n + 8 : begin + 24 * n + 8 + t]
        assert (len(data), offsets[-1]) == (begin + 24 * n + 8 + t, t)
        assert list(hashes) == sorted(hashes)
        for each, row in wanted.items():
            place = bisect_left(hashes, xxhash.xxh64(each.encode()).intdigest())
            assert rows[place] == row
            assert text[offsets[row] : offsets[row + 1]] == each.encode()


def test_folders_are_what_their_manifests_say(kept, values, text):
    for folder, num_rows, bad_rows in (("aligned", 96, 1), ("embedded", 4, 1)):
        found = verify(kept / folder)
        assert (found["problems"], found["rows"]) == ([], num_rows)
        manifest = json.loads((kept / folder / "realign-manifest.json").read_text())
        of_manifest, of_files = tables_of("Manifest")
        check_fields(manifest, of_manifest)
        assert [each["name"] for each in manifest["inputs"]] == [entry["input"] for entry in manifest["files"]]
        assert sum(entry["bad_rows"] for entry in manifest["files"]) == bad_rows
        for entry in manifest["files"]:
            check_fields(entry, of_files)
            for output in (entry, entry["sidecar"]):
                data = (kept / folder / output["name"]).read_bytes()
                assert (len(data), xxhash.xxh64(data).hexdigest()) == (output["size"], output["xxh64"])
            assert entry["sidecar"]["name"] == Path(entry["name"]).stem + ".columns.parquet"
            rows = np.load(kept / folder / entry["name"])
            assert (rows.shape, rows.dtype) == ((entry["rows"], entry["dim"]), entry["dtype"])
            ids = parquet.read_table(kept / folder / entry["sidecar"]["name"])[entry["ids"]["column"]].to_pylist()
            encoded = [each.encode() for each in ids]
            lengths = struct.pack(f"<{len(ids)}q", *map(len, encoded))
            streams = [xxhash.xxh64(stream).hexdigest() for stream in (lengths, b"".join(encoded))]
            assert entry["ids"]["xxh64"] == [xxhash.xxh64("".join(streams).encode()).hexdigest()]
    aligned = np.concatenate([np.load(kept / "aligned" / f"part_{number}.npy") for number in range(2)])
    expected = rf.Alignment.load(kept / "alignments" / "realign.safetensors").transform(text[:-1])
    np.testing.assert_allclose(aligned[:-1], expected, atol=1e-6)
    assert not aligned[-1].any()
    assert parquet.read_table(kept / "aligned" / "part_1.columns.parquet")["row"].to_pylist() == list(range(48, 96))


def test_shards_of_embed_keep_ids_and_encoder(kept, values):
    tables = [parquet.read_table(kept / "embedded" / f"embed_0000{number}.columns.parquet") for number in range(2)]
    assert [table.column_names for table in tables] == [["id"], ["id"]]
    assert [table["id"].to_pylist() for table in tables] == values["embedded"]
    fitted = rf.fit(kept / "embedded", kept / "embedded", method="anchor")
    assert re.fullmatch(r"clip@[0-9a-f]{16}", fitted.encoder or "")


def test_manifests_of_later_formats_are_refused(kept):
    path = kept / "aligned" / "realign-manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"later": 1}))
    assert verify(kept / "aligned")["ok"]
    path.write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(ValueError, match=r"realign-manifest\.json has format version 2, .* reads up to 1: upgrade"):
        verify(kept / "aligned")


# ---- ReVision -------------------------------------------------------------------------------------------------------


def test_a_projector_makes_the_tokens_it_did(kept, values, image):
    config = ReVisionConfig.from_pretrained(kept / "model")
    model = ReVisionForCausalLM(config)
    model.load_projector(kept / "model" / "projector.safetensors")
    with torch.no_grad():
        tokens = model.projector(torch.from_numpy(image[:2]))
    np.testing.assert_allclose(tokens, values["projector"], atol=1e-5)


def test_a_projector_is_what_the_page_says(kept, values, image):
    fields, tensors = (tables_of("ReVision")[number] for number in range(2))
    config = json.loads((kept / "model" / "config.json").read_text())
    check_fields(config, fields, all_of=False)
    with safe_open(kept / "model" / "projector.safetensors", framework="numpy") as file:
        t = {name: file.get_tensor(name).astype(float) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    assert set(t) == {names_in(row[0])[0] for row in tensors}
    width, dim = t["projector.0.weight"].shape
    assert (width, dim) == (config["projector_dim"], config["embedding_dim"])
    hidden = image[:2] @ t["projector.0.weight"].T + t["projector.0.bias"]
    hidden *= (1 + np.vectorize(math.erf)(hidden / math.sqrt(2))) / 2
    out = hidden @ t["projector.2.weight"].T + t["projector.2.bias"]
    repeats = config["num_visual_tokens"] // config["num_projected_tokens"]
    tokens = np.tile(out.reshape(2, config["num_projected_tokens"], -1), (1, repeats, 1))
    np.testing.assert_allclose(tokens.reshape(-1, out.shape[1] // 2), values["projector"], atol=1e-5)


def test_other_users_can_read_a_projector(kept, tmp_path):
    model = ReVisionForCausalLM(ReVisionConfig.from_pretrained(kept / "model"))
    model.save_projector(tmp_path / "p.safetensors")
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "p.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
