"""`compare` and `report`: the same figures as the metrics by themselves, held out, on any kind of set."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import realign_fast as rf
from realign_fast._errors import BadRowsError
from realign_fast.cli import main
from realign_fast.geometry import compare, protocol, report
from realign_fast.geometry.frame import decompose, frame_of
from realign_fast.geometry.metrics import centroid_gap, cosine_to_pair, knn_mixing, knn_overlap, recall_at
from realign_fast.reference import covariance

DIM = 16
SMALL = {"num_rows": 200, "num_centroids": 8, "k": 5}


def make(count, side, seed=0, dtype=np.float32):
    """Pairs of two clouds apart, whose spectra decay."""
    means = np.random.default_rng(99).normal(size=(2, DIM)) * 0.5
    scales = np.arange(1, DIM + 1) ** -0.7 * 0.4
    shared = np.random.default_rng(seed).normal(size=(count, DIM))
    own = np.random.default_rng([seed, side]).normal(size=(count, DIM))
    return ((shared + 0.7 * own) * scales + means[side]).astype(dtype)


@pytest.fixture(scope="module")
def sets():
    return make(300, 0), make(300, 1)


@pytest.fixture
def files(tmp_path, sets):
    for name, rows in zip(("text", "image"), sets, strict=True):
        (tmp_path / name).mkdir()
        for number, part in enumerate(np.split(rows, [100, 101])):
            np.save(tmp_path / name / f"part_{number}.npy", part)
    return tmp_path / "text", tmp_path / "image"


def test_compare_says_what_the_metrics_say(sets):
    text, image = sets
    alignment = rf.fit(text[:150], image[150:])
    found = compare(text, image, alignment, paired=True, **SMALL | {"num_rows": 300})
    out = alignment.transform(text)
    for entry, rows in ((found["before"], text), (found["after"], out)):
        assert entry["gap"]["value"] == pytest.approx(centroid_gap(rows, image), rel=1e-5)
        assert entry["mixing"]["value"] == pytest.approx(knn_mixing(rows, image, 5))
        assert entry["overlap"]["value"] == pytest.approx(knn_overlap(text, rows, 10))
        assert entry["recall"]["text_to_image"] == {str(k): recall_at(rows, image, k) for k in (1, 5, 10)}
        assert entry["recall"]["image_to_text"] == {str(k): recall_at(image, rows, k) for k in (1, 5, 10)}
        assert entry["cosine_to_pair"] == pytest.approx(cosine_to_pair(rows, image), rel=1e-5)
        values = np.linalg.eigvalsh(covariance(rows.astype(np.float64))[2])[::-1]
        np.testing.assert_allclose(entry["spectrum"]["values"], values, rtol=1e-4)
    assert found["measured_on"] == {"rows": 300, "used_in_fit": None, "sample": 300, "seed": 0}
    wanted = decompose(text, image, frame_of(text, image))
    assert found["frame"]["gamma_norm"] == pytest.approx(wanted.gamma_norm, rel=1e-3)
    json.dumps(found, allow_nan=False)


def test_the_interval_holds_the_gap_that_many_rows_have(sets):
    truth = centroid_gap(make(200_000, 0, 5), make(200_000, 1, 6))
    inside = 0
    for seed in range(20):
        found = compare(make(300, 0, 10 + seed), make(300, 1, 40 + seed), **SMALL)["before"]["gap"]
        inside += found["interval"][0] <= truth <= found["interval"][1]
    assert inside >= 17


@pytest.mark.parametrize("given", ["arrays", "files"])
def test_compare_knows_the_rows_of_the_fit(sets, files, given):
    text, image = sets if given == "arrays" else files
    alignment = rf.fit(text, image)
    found = compare(text, image, alignment, **SMALL)
    assert found["measured_on"]["used_in_fit"] is True
    # The noise of the fit is no noise on its own rows.
    assert found["after"]["gap"]["noise_floor"] == pytest.approx(found["noise_floor"], rel=0.1)
    other = compare(make(300, 0, 7), make(300, 1, 7), alignment, **SMALL)
    assert other["measured_on"]["used_in_fit"] is None
    assert other["after"]["gap"]["noise_floor"] == pytest.approx(other["noise_floor"] * 2**0.5, rel=0.2)


def test_files_and_arrays_give_the_same(sets, files):
    alignment = rf.fit(*sets)
    of_files, of_arrays = (compare(*each, alignment, **SMALL) for each in (files, sets))
    for name in ("before", "after"):
        for metric in ("mixing", "overlap", "occupancy", "cosines", "scatter"):
            assert of_files[name][metric] == of_arrays[name][metric]
        assert of_files[name]["gap"]["value"] == of_arrays[name]["gap"]["value"]
        assert of_files[name]["effective_rank"] == pytest.approx(of_arrays[name]["effective_rank"], rel=1e-5)


@pytest.mark.parametrize("method", ["center", "whiten", "c3", "coral", "ot"])
def test_all_kinds_of_maps_are_measured(sets, method):
    text, image = sets
    alignment = rf.fit(text, image, method=method)
    found = compare(text, image, alignment, **SMALL | {"num_rows": 300})["after"]
    out, target = (alignment.transform(rows, side=side, index=np.arange(300) if side == "source" else None)
                   for rows, side in ((text, "source"), (image, "target")))  # fmt: skip
    assert found["gap"]["value"] == pytest.approx(centroid_gap(out, target), abs=1e-6)
    assert found["mixing"]["value"] == pytest.approx(knn_mixing(out, target, 5), abs=2e-3)


def test_unpaired_sets_are_told_that_they_are_no_pairs(sets):
    found = compare(sets[0], sets[1][:-1], paired=True, **SMALL)
    assert "no pairs: 300 rows of text, 299 of images" in found["notes"][0]
    assert found["frame"] is found["before"]["recall"] is found["before"]["cosine_to_pair"] is None
    assert found["before"]["occupancy"]["agreement"] is None


def test_bad_rows(sets, files):
    text, image = (rows.copy() for rows in sets)
    text[[3, 70]], image[4] = np.nan, 0
    with pytest.raises(BadRowsError, match="text: row 3 is bad"):
        compare(text, image, **SMALL)
    found = compare(text, image, paired=True, on_bad_rows="skip", **SMALL | {"num_rows": 300})
    # Of a pair neither row is used if one is bad.
    assert found["measured_on"]["sample"] == 297
    good = np.setdiff1d(np.arange(300), [3, 4, 70])
    assert found["before"]["cosine_to_pair"] == pytest.approx(cosine_to_pair(text[good], image[good]), rel=1e-5)
    with pytest.raises(ValueError, match="'raise' or 'skip' here"):
        compare(text, image, on_bad_rows="zero", **SMALL)


def test_sets_that_cannot_be_measured(sets):
    text, image = sets
    with pytest.raises(ValueError, match="more than 11 rows a side to measure neighbours on, got 10"):
        compare(text[:10], image, **SMALL)
    with pytest.raises(ValueError, match="text has dimension 16, image has dimension 5"):
        compare(text, image[:, :5], **SMALL)
    with pytest.raises(ValueError, match="alignment has dimension 5, the rows have 16"):
        compare(text, image, rf.fit(text[:, :5], image[:, :5]), **SMALL)
    with pytest.raises(TypeError, match="text can be read only once"):
        compare(iter([text]), image, **SMALL)
    with pytest.raises(ValueError, match="image: all rows are equal"):
        compare(text, np.tile(image[:1], (300, 1)), **SMALL)
    few = compare(text, image, **SMALL | {"num_centroids": 301})
    assert few["before"]["occupancy"] is None
    assert "num_centroids must be between 1 and 200" in few["before"]["notes"][0]


def test_batches_of_unknown_number_and_another_scale(sets):
    text, image = sets
    wanted = compare(text, image, **SMALL)
    assert compare([text[:100], text[100:]], 1000 * image, **SMALL)["before"]["mixing"] == wanted["before"]["mixing"]


def test_a_set_a_thousand_times_larger_than_the_other(sets, tmp_path):
    found = report(make(90_000, 0), sets[1][:90], tmp_path / "out", **SMALL)
    assert found["measured_on"]["sample"] == 45
    assert found["verdict"][0]["title"] == "Aligned"


def test_names_are_escaped(sets, tmp_path):
    path = tmp_path / "<b onload=alert(1)>.npy"
    np.save(path, sets[0])
    report(path, sets[1], tmp_path / "out", **SMALL)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<b onload" not in page
    assert "&lt;b onload=alert(1)&gt;.npy" in page


def test_the_splits_of_the_protocol():
    rows = np.arange(90.0).reshape(90, 1)
    thirds = protocol.split(rows, rows, paired=True)
    np.testing.assert_array_equal(thirds.held_text, thirds.held_image)
    assert sorted(np.concatenate([thirds.text, thirds.image, thirds.held_text])[:, 0]) == list(range(90))
    halves = protocol.split(rows, rows[:40], seed=1)
    assert sorted(np.concatenate([halves.text, halves.held_text])[:, 0]) == list(range(90))
    assert len(halves.image) == len(halves.held_image) == 20
    with pytest.raises(ValueError, match="pairs need sets of equal length, got 90"):
        protocol.split(rows, rows[:40], paired=True)
    with pytest.raises(ValueError, match="text must have shape"):
        protocol.split(rows[:3], rows)


def test_the_gap_falls_with_the_rows_as_the_noise_does():
    rows = protocol.Split(*(make(4000, side, seed) for seed in (1, 2) for side in (0, 1)))
    points = protocol.sample_size_curve(rows, seed=3)
    assert [point["rows"] for point in points] == [100, 316, 1000]
    for point in points:
        assert point["mean"] == pytest.approx(point["floor"], rel=0.35)
        assert 0 < point["std"] < point["mean"]
    assert points == protocol.sample_size_curve(rows, seed=3)
    assert protocol.sizes_up_to(200_000) == [100, 316, 1000, 3162, 10_000, 31_623, 100_000]
    assert protocol.sizes_up_to(160) == [10, 20, 40, 80]


def test_transfer_and_mixtures():
    splits = {name: protocol.split(make(400, 0, seed), make(400, 1, seed), seed=seed) for seed, name in enumerate("ab")}
    # Of another domain the images lie elsewhere.
    moved = splits["b"]._replace(image=-splits["b"].image, held_image=-splits["b"].held_image)
    found = protocol.transfer(splits | {"c": moved}, k=5)
    gap = np.array(found["gap"])
    assert gap[:2, :2].max() < 0.2 < gap[:2, 2].min()
    assert gap[2, 2] < 0.2
    assert np.array(found["mixing"]).shape == (3, 3)
    with pytest.raises(ValueError, match="at least two domains, got 1"):
        protocol.transfer({"a": splits["a"]})
    many = protocol.split(make(8000, 0, 4), make(8000, 1, 4))
    mixtures = protocol.shifted_mixtures(many, num_centroids=8)["points"]
    assert [point["shift"] for point in mixtures] == [0, 0.25, 0.5, 0.75, 1]
    assert mixtures[0]["gap"] < mixtures[-1]["gap"]


def figures_of(folder):
    return json.loads((folder / "report.json").read_text())


def test_report_from_the_command_line(files, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = ["report", *map(str, files), "-o", str(output), "--paired", "--methods", "realign,c3,coral"]
    arguments += ["--rows", "90", "--k", "5", "--centroids", "8", "--domain", "twice", *map(str, files)]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    summary = json.loads(captured.out.splitlines()[-1])
    assert summary["output"] == str(output / "report.html")
    assert list(summary["methods"]) == ["none", "realign", "c3", "coral"]
    found = figures_of(output)
    formats = (Path(__file__).parents[1] / "realign_fast" / "FORMATS.md").read_text()
    page = formats.partition("## Reports\n")[2].partition("\n## ")[0]
    keys = [
        name for cell in re.findall(r"^\| (`.*?) \|", page, flags=re.MULTILINE) for name in re.findall(r"\w+", cell)
    ]
    assert sorted(keys) == sorted(found)
    assert (found["format"], found["version"]) == ("realign-report", 1)
    assert [entry["name"] for entry in found["methods"]] == ["none", "realign", "c3", "coral"]
    realign = found["methods"][1]
    assert [step for step, _ in realign["gap"]["steps"]] == ["none", "anchor", "trace", "realign"]
    assert realign["gap"]["in_sample"] < realign["gap"]["value"] < found["methods"][0]["gap"]["value"]
    assert realign["gap"]["value"] == realign["gap"]["steps"][-1][1]
    assert found["measured_on"] == {"rows": 100, "used_in_fit": False, "sample": 90, "seed": 0}
    assert found["sample_size"]["points"][-1]["rows"] == 100
    assert found["transfer"]["names"] == ["these sets", "twice"]
    assert len(found["verdict"]) == 4
    for part in found["verdict"]:
        assert f"{part['title']}: {part['text']}" in captured.err
    page = (output / "report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    assert sorted(path.suffix for path in output.iterdir() if path.suffix != ".png") == [".html", ".json"]
    assert main(arguments) == 1
    assert "is not empty: pass --overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
    again = figures_of(output)
    for each in (found, again):
        for entry in each["methods"]:
            del entry["seconds"]
    assert again == found


def test_report_of_an_alignment_says_what_it_was_fitted_on(sets, files, tmp_path):
    path = tmp_path / "a.safetensors"
    rf.fit(*files).save(path)
    found = report(*files, tmp_path / "own", alignment=path, methods=["ot"], **SMALL | {"num_rows": 100})
    assert [entry["name"] for entry in found["methods"]] == ["none", "realign (given)", "realign", "ot"]
    assert "fitted on all rows of these sets" in found["methods"][1]["notes"][-1]
    other = rf.fit(make(300, 0, 8), make(300, 1, 8))
    found = report(*sets, tmp_path / "other", alignment=other, methods=[], **SMALL | {"num_rows": 100})
    assert [entry["name"] for entry in found["methods"]] == ["none", "realign"]
    assert found["methods"][1]["notes"] == []


def test_a_report_is_refused_before_it_begins(sets, tmp_path):
    with pytest.raises(ValueError, match="at least 80 rows a side, got 79"):
        report(sets[0][:79], sets[1], tmp_path / "x")
    with pytest.raises(ValueError, match="method must be one of"):
        report(*sets, tmp_path / "x", methods=["magic"])
    with pytest.raises(ValueError, match="an alignment or at least one method"):
        report(*sets, tmp_path / "x", methods=[])
    assert not (tmp_path / "x").exists()


def test_what_a_verdict_says(sets, tmp_path):
    # Aligned with so few rows, and noise that buries the neighbourhoods.
    good = report(*sets, tmp_path / "good", **SMALL)["verdict"]
    assert good[0]["title"] == "Aligned"
    text, image = sets
    moved = rf.fit(text, -image)
    bad = report(text, image, tmp_path / "bad", alignment=moved, methods=[], **SMALL)["verdict"]
    assert bad[0]["level"] == bad[-1]["level"] == "bad"
    assert "Do not train" in bad[-1]["text"]
    same = report(text, make(300, 0, 3), tmp_path / "same", **SMALL)["verdict"]
    assert same[0]["title"] == "There was no gap"
