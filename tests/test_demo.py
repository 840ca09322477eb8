import json

import numpy as np
import pytest

from realign_fast.cli import main
from realign_fast.demo import encoder, run, world


def test_worlds_are_the_same_for_equal_seeds_and_differ_otherwise():
    for make in (world.render, world.captions):
        first, again, other = (make(world.sample_scenes(20, seed), seed) for seed in (1, 1, 2))
        assert np.array_equal(first, again)
        assert not np.array_equal(first, other)


def test_pictures_show_what_the_scene_says():
    scenes = world.sample_scenes(2000, 0)
    images = world.render(scenes, 0).astype(int)
    y, x = 5 + 10 * (scenes.place[:, 0] // 3), 5 + 10 * (scenes.place[:, 0] % 3)
    filled = world.SHAPES.index("ring") != scenes.shape[:, 0]
    centre = images[np.arange(2000), :, y, x]
    colour = np.abs(centre[:, None] - world._RGB[None].astype(int)).sum(axis=2).argmin(axis=1)
    assert (colour == scenes.colour[:, 0])[filled].mean() > 0.95


def test_the_first_of_two_is_further_left_or_above():
    place = world.sample_scenes(5000, 3).place
    left, above = place[:, 0] % 3 < place[:, 1] % 3, place[:, 0] // 3 < place[:, 1] // 3
    same_column = place[:, 0] % 3 == place[:, 1] % 3
    assert (left | (same_column & above)).all()


def test_captions_leave_out_attributes_but_never_shapes():
    scenes = world.sample_scenes(500, 4)
    full, bare = world.captions(scenes, 4), world.captions(scenes, 4, leave_out=1.0)
    colours = {word for colour in world.COLOURS for word in world._WORDS[colour]}
    assert all(colours & set(text.split()) for text in full)
    assert not any(colours & set(text.split()) for text in bare)
    assert all(len(some.split()) < len(every.split()) for some, every in zip(bare, full, strict=True))


def test_every_caption_can_be_tokenized():
    tokens = world.tokenize(world.captions(world.sample_scenes(5000, 5), 5))
    assert tokens.max() < world.VOCABULARY_SIZE
    assert (tokens[:, 0] != world.PADDING).all()
    with pytest.raises(ValueError, match="text 1 has the word 'dog'"):
        world.tokenize(["a circle", "a dog"])


def test_keywords_are_the_words_that_carry_meaning():
    caption = "one sees a big white wedge to the left of a huge pale ball near the bottom left"
    assert world.keywords(caption) == "big white wedge to left huge pale ball bottom left"


def test_captions_can_be_read_back():
    scenes = world.sample_scenes(3000, 7)
    captions = world.captions(scenes, 8)
    assert world.detokenize(world.tokenize(captions)) == captions
    for i, said in enumerate(map(world.parse, captions)):
        count, (first, second) = scenes.num_objects[i], scenes.place[i]
        assert said.shape == [world.SHAPES[value] for value in scenes.shape[i, :count]], captions[i]
        assert said.colour == [world.COLOURS[value] for value in scenes.colour[i, :count]], captions[i]
        assert said.size == [world.SIZES[value] for value in scenes.size[i, :count]], captions[i]
        assert said.place == world.PLACES[first], captions[i]
        relation = ("left of" if first % 3 < second % 3 else "above") if count == 2 else None
        assert said.relation == relation, captions[i]


@pytest.mark.parametrize(
    ("caption", "said"),
    [
        ("", ([], [], [], None, None)),
        ("a a left of the top", ([], [], [], None, "left of")),
        ("a red circle square left of", ([None], ["red"], [None], None, "left of")),
        (
            "one sees a disc to the left of a hoop over a ball",
            (["circle", "ring", "circle"], [None] * 3, [None] * 3, None, None),
        ),
        ("a big box in the top at the top left", (["square"], [None], ["large"], None, None)),
    ],
)
def test_captions_that_say_nothing_clear_are_read_as_that(caption, said):
    assert world.parse(caption) == said


def test_embeddings_do_not_depend_on_their_batch():
    model = encoder.train(steps=1, num_pairs=256)
    texts = world.captions(world.sample_scenes(30, 6), 6)
    np.testing.assert_allclose(encoder.embed_texts(model, texts), encoder.embed_texts(model, texts, batch=7), atol=1e-6)
    images = world.render(world.sample_scenes(30, 6), 6)
    rows = encoder.embed_images(model, images)
    np.testing.assert_allclose(rows, encoder.embed_images(model, images, batch=7), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    assert rows.shape == (30, encoder.DIM)


def test_the_demo_runs_and_runs_again(tmp_path, monkeypatch, capsys):
    whole = run.run
    monkeypatch.setattr(
        run, "run", lambda folder, overwrite: whole(folder, overwrite=overwrite, num_rows=1500, steps=8)
    )
    folder = tmp_path / "demo"
    for options in ([], ["--overwrite"]):
        assert main(["demo", "-o", str(folder), *options]) == 0
        captured = capsys.readouterr()
        summary = json.loads(captured.out.splitlines()[-1])
        assert summary["rows"] == 1500
        assert summary["after"]["gap"] < summary["before"]["gap"]
        for line in ("modality gap", "mixing", "cosine", "top 1", "top 5", "Retrieval falls by design"):
            assert line in captured.err
    assert main(["demo", "-o", str(folder)]) == 1
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.slow
def test_the_demo_closes_the_gap(tmp_path):
    summary = run.run(tmp_path / "demo")
    before, after = summary["before"], summary["after"]
    assert before["gap"] > 0.3
    assert after["gap"] < 0.05
    assert before["mixing"] < 0.02
    assert after["mixing"] > 0.1
    assert after["cosine"] > before["cosine"] + 0.05
    assert before["recall_at_1"] > 0.5
    assert not summary["drifted"]
