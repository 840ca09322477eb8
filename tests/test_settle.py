"""The settling experiment in a reduced form, and what its plan makes of made-up results."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from realign_fast.demo import world

pytestmark = pytest.mark.slow
BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch):
    """Return a function that imports a script of the experiment."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


def run(folder):
    command = [
        sys.executable,
        BENCH / "settle.py",
        "--quick",
        "--work",
        "work",
        "--json",
        "found.json",
        "--workers",
        "1",
    ]
    command += ["--seeds", "0", "--arms", "none", "ot auto + noise 0.05", "paired"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "found.json").read_text())


def test_a_run_goes_on_and_finds_the_same(tmp_path):
    found = run(tmp_path)
    assert [line[0] for line in found["table"]] == ["none", "ot auto + noise 0.05", "paired"]
    assert all(len(line) == len(found["columns"]) for line in found["table"])
    assert "by its plan the experiment CANNOT tell" in found["words"]
    assert (tmp_path / "found.png").stat().st_size > 10_000

    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").iterdir()}
    lost = tmp_path / "work" / "0 ot auto + noise 0.05.json"
    before = json.loads(lost.read_text())
    lost.unlink()
    again = run(tmp_path)
    assert {path.name for path, time in finished.items() if path.stat().st_mtime_ns != time} == {lost.name}
    after = json.loads(lost.read_text())
    assert {**before, "seconds": 0} == {**after, "seconds": 0}
    assert (again["table"], again["words"]) == (found["table"], found["words"])


def test_results_of_another_plan_are_not_taken(tmp_path, bench):
    settle = bench("settle")
    (tmp_path / "plan.json").write_text("another")
    with pytest.raises(ValueError, match="another plan"):
        settle.run(settle.ARMS, (0,), settle.QUICK, tmp_path, 1)


def test_no_arm_sees_what_is_held_out(bench):
    sample = bench("_settle_seed")._sample
    held_out = np.arange(len(world.SHAPES))
    for unseen in (False, True):
        scenes = sample(300, 1, held_out, unseen)
        assert len(scenes.num_objects) == 300
        for i, caption in enumerate(world.captions(scenes, 2)):
            said = world.parse(caption)
            pairs = [
                (world.SHAPES.index(shape), world.COLOURS.index(colour))
                for shape, colour in zip(said.shape, said.colour, strict=True)
            ]
            assert any(held_out[shape] == colour for shape, colour in pairs) == unseen, (i, caption)


def test_captions_are_marked(bench):
    score = bench("_settle_seed").score
    scenes = world.sample_scenes(400, 3)
    captions = world.captions(scenes, 4)
    assert set(score(captions, scenes).values()) == {1.0}
    mute = score([""] * 400, scenes)
    assert set(mute.values()) == {0.0}
    other = score(world.captions(scenes._replace(colour=(scenes.colour + 1) % len(world.COLOURS)), 4), scenes)
    assert (other["colour"], other["shape"], other["all"]) == (0.0, 1.0, 0.0)
    assert other["mean"] == pytest.approx(5 / 6)


def test_verdicts_follow_the_plan(bench):
    settle, findings = bench("settle"), bench("_settle_report").Findings
    marks = {"paired": 0.9, "none": 0.4, "realign": 0.89, "coral": 0.8, "ot auto": 0.85, "anchor": 0.895}
    scatter = {"ot auto": 0.05, "none": 0.02}

    def result(arm, seed):
        mean = marks[arm] + scatter.get(arm, 0.002) * (seed - 1)
        parts = {part: {"mean": mean, "all": mean} for part in ("seen", "unseen")}
        known = {"arm": arm, "seed": seed, "cosine": 0, "figures": {"modality gap": 1}}
        return {**known, "zero-shot": parts, "stage 2": parts}

    found = findings.of([result(arm, seed) for arm in marks for seed in range(3)], settle.MARGIN, settle.CLAIMS)
    assert found.informative()
    assert found.deviations() == pytest.approx(25)
    verdicts = {arm: found.verdict(arm) for arm in found.unpaired}
    assert verdicts == {
        "none": "falls short",
        "realign": "substitutes",
        "coral": "falls short",
        "ot auto": "open",
        "anchor": "substitutes",
    }
    orders = found.orders(next(iter(settle.CLAIMS)))
    assert [each.split(" (")[0] for each in orders["confirmed"]] == ["realign over none", "realign over coral"]
    assert [each.split(" (")[0] for each in orders["contradicted"]] == ["realign over anchor"]
