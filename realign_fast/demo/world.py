"""Scenes of one or two coloured shapes: their pictures, and captions from a grammar."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

IMAGE_SIZE = 32
SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "cyan")
SIZES = ("small", "large")
PLACES = tuple(f"{row} {column}".strip() for row in ("top", "middle", "bottom") for column in ("left", "", "right"))

_RGB = np.array(
    [
        (220, 40, 40),
        (40, 180, 60),
        (50, 80, 220),
        (235, 215, 40),
        (150, 50, 190),
        (240, 140, 30),
        (245, 245, 245),
        (50, 210, 220),
    ],
    np.float32,
)
_WORDS = {
    "circle": ("circle", "disc", "ball"),
    "square": ("square", "box", "block"),
    "triangle": ("triangle", "wedge"),
    "cross": ("cross", "plus"),
    "ring": ("ring", "hoop", "loop"),
    "small": ("small", "little", "tiny"),
    "large": ("large", "big", "huge"),
    "red": ("red", "crimson"),
    "green": ("green", "emerald"),
    "blue": ("blue", "navy"),
    "yellow": ("yellow", "golden"),
    "purple": ("purple", "violet"),
    "orange": ("orange",),
    "white": ("white", "pale"),
    "cyan": ("cyan", "turquoise"),
    "left of": ("left of", "beside and left of", "to the left of"),
    "above": ("above", "over", "higher than"),
}
_OPENINGS = ("", "a picture of", "there is", "an image with", "one sees", "this shows")
_BETWEEN_PLACES = ("in the", "at the", "near the")

PADDING = 0
_VOCABULARY = {
    word: index
    for index, word in enumerate(
        sorted(
            {
                word
                for phrase in (*_OPENINGS, *_BETWEEN_PLACES, *PLACES, *(w for ws in _WORDS.values() for w in ws), "a")
                for word in phrase.split()
            }
        ),
        start=PADDING + 1,
    )
}
VOCABULARY_SIZE = len(_VOCABULARY) + 1
MAX_WORDS = 20


class Scenes(NamedTuple):
    """`n` scenes. The first object of two is always the one further left, or above it in one column.

    Attributes
    ----------
    num_objects : ndarray
        `(n,)`, 1 or 2 objects.
    shape, colour, size, place : ndarray
        `(n, 2)` indices into `SHAPES`, `COLOURS`, `SIZES` and `PLACES`; the second column counts only where there is a
        second object.
    """

    num_objects: NDArray[np.int64]
    shape: NDArray[np.int64]
    colour: NDArray[np.int64]
    size: NDArray[np.int64]
    place: NDArray[np.int64]


def sample_scenes(num_scenes: int, seed: int) -> Scenes:
    """Return random scenes; equal seeds give equal scenes."""
    rng = np.random.default_rng(seed)
    pair = (num_scenes, 2)
    first = rng.integers(9, size=num_scenes)
    second = (first + rng.integers(1, 9, size=num_scenes)) % 9
    # By column, then by row.
    place = np.stack([first, second], axis=1)
    order = np.argsort((place % 3) * 3 + place // 3, axis=1)
    return Scenes(
        rng.integers(1, 3, size=num_scenes),
        rng.integers(len(SHAPES), size=pair),
        rng.integers(len(COLOURS), size=pair),
        rng.integers(len(SIZES), size=pair),
        np.take_along_axis(place, order, axis=1),
    )


def _masks() -> NDArray[np.bool_]:
    """Return `(shape, size, place, y, x)`: which pixels an object covers."""
    y, x = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE].astype(np.float32)
    masks = np.zeros((len(SHAPES), len(SIZES), len(PLACES), IMAGE_SIZE, IMAGE_SIZE), bool)
    for size, radius in enumerate((3.2, 5.2)):
        for place in range(len(PLACES)):
            dx, dy = x - (5.5 + 10.2 * (place % 3)), y - (5.5 + 10.2 * (place // 3))
            distance, box = np.hypot(dx, dy), np.maximum(abs(dx), abs(dy))
            masks[0, size, place] = distance <= radius
            masks[1, size, place] = box <= radius * 0.9
            masks[2, size, place] = (abs(dx) <= (dy + radius) * 0.55) & (dy <= radius * 0.9)
            masks[3, size, place] = (np.minimum(abs(dx), abs(dy)) <= radius * 0.3) & (box <= radius)
            masks[4, size, place] = (distance <= radius) & (distance >= radius * 0.55)
    return masks


_MASKS = _masks()


def render(scenes: Scenes, seed: int) -> NDArray[np.uint8]:
    """Return pictures, `(n, 3, 32, 32)`: dark grounds, colours that vary a little, and noise."""
    rng = np.random.default_rng(seed)
    num_scenes = len(scenes.num_objects)
    images = np.empty((num_scenes, 3, IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    for start in range(0, num_scenes, 1000):
        part = slice(start, min(start + 1000, num_scenes))
        size = part.stop - start
        picture = np.broadcast_to(
            rng.uniform(0, 60, (size, 3, 1, 1)).astype(np.float32), (size, 3, IMAGE_SIZE, IMAGE_SIZE)
        ).copy()
        for k in (0, 1):
            shown = scenes.num_objects[part] > k
            mask = _MASKS[scenes.shape[part, k], scenes.size[part, k], scenes.place[part, k]] & shown[:, None, None]
            colour = _RGB[scenes.colour[part, k]] + rng.normal(0, 12, (size, 3)).astype(np.float32)
            picture = np.where(mask[:, None], colour[:, :, None, None], picture)
        picture += rng.normal(0, 8, picture.shape).astype(np.float32)
        images[part] = np.clip(picture, 0, 255)
    return images


def captions(scenes: Scenes, seed: int, leave_out: float = 0.0) -> list[str]:
    """Return one caption a scene, in words that vary; each attribute is left out with probability `leave_out`."""
    chance = np.random.default_rng(seed).random((len(scenes.num_objects), 14)).tolist()
    texts = []
    for i, draws in enumerate(chance):
        objects = []
        for k in range(int(scenes.num_objects[i])):
            size, size_said, colour, colour_said, shape = draws[5 * k : 5 * k + 5]
            words = ["a"]
            if size_said >= leave_out:
                words.append(_pick(_WORDS[SIZES[scenes.size[i, k]]], size))
            if colour_said >= leave_out:
                words.append(_pick(_WORDS[COLOURS[scenes.colour[i, k]]], colour))
            objects.append(" ".join([*words, _pick(_WORDS[SHAPES[scenes.shape[i, k]]], shape)]))
        opening, relation, preposition, place_said = draws[10:]
        first, second = scenes.place[i]
        between = _pick(_WORDS["left of" if first % 3 < second % 3 else "above"], relation)
        text = f"{_pick(_OPENINGS, opening)} {f' {between} '.join(objects)}".strip()
        texts.append(
            text if place_said < leave_out else f"{text} {_pick(_BETWEEN_PLACES, preposition)} {PLACES[first]}"
        )
    return texts


def _pick(options: tuple[str, ...], draw: float) -> str:
    return options[int(draw * len(options))]


_FILLING = {word for phrase in (*_OPENINGS, *_BETWEEN_PLACES, "a") for word in phrase.split()}


def keywords(caption: str) -> str:
    """Return the words of a caption that carry meaning, in their order."""
    return " ".join(word for word in caption.split() if word not in _FILLING)


_MEANINGS = {word: meaning for meaning, words in _WORDS.items() for word in words}
# Longer phrases first: "left of" ends others.
_RELATION = "|".join(sorted((*_WORDS["left of"], *_WORDS["above"]), key=len, reverse=True))
_PLACE = re.compile(rf"\b(?:{'|'.join(_BETWEEN_PLACES)}) ({'|'.join(sorted(PLACES, key=len, reverse=True))})\b")


class Description(NamedTuple):
    """What a caption says, in the words of `SHAPES`, `COLOURS`, `SIZES` and `PLACES`.

    Attributes
    ----------
    shape, colour, size : list of (str or None)
        One for each object, in the order of the caption; None where it says nothing, or two things.
    place : str or None
        Of the first object.
    relation : str or None
        "left of" or "above": where the first object is to the second.
    """

    shape: list[str | None]
    colour: list[str | None]
    size: list[str | None]
    place: str | None
    relation: str | None


def parse(caption: str) -> Description:
    """Return what a caption says, whichever words it says it in; any text can be read."""
    places = set(_PLACE.findall(caption))
    parts = re.split(rf"\b({_RELATION})\b", _PLACE.sub("", caption))
    said = [[_MEANINGS[word] for word in part.split() if word in _MEANINGS] for part in parts[::2]]
    objects = [words for words in said if words]
    shape, colour, size = (
        [_only({word for word in words if word in kind}) for words in objects] for kind in (SHAPES, COLOURS, SIZES)
    )
    return Description(shape, colour, size, _only(places), _only({_MEANINGS[phrase] for phrase in parts[1::2]}))


def _only(values: set[str]) -> str | None:
    return values.pop() if len(values) == 1 else None


def tokenize(texts: list[str]) -> NDArray[np.int64]:
    """Return word numbers, `(n, MAX_WORDS)`, padded with `PADDING`.

    Raises
    ------
    ValueError
        If a text has a word that the grammar does not, or too many words.
    """
    tokens = np.full((len(texts), MAX_WORDS), PADDING, np.int64)
    for i, text in enumerate(texts):
        words = text.split()
        try:
            numbers = [_VOCABULARY[word] for word in words]
        except KeyError as error:
            raise ValueError(f"text {i} has the word {error}, which this world does not know") from None
        if len(words) > MAX_WORDS:
            raise ValueError(f"text {i} has {len(words)} words, expected at most {MAX_WORDS}")
        tokens[i, : len(words)] = numbers
    return tokens


def detokenize(tokens: NDArray[np.int64]) -> list[str]:
    """Return the texts of word numbers, `(n, words)`, without what stands for no word."""
    words = dict(enumerate(_VOCABULARY, start=PADDING + 1))
    return [" ".join(words[number] for number in row if number in words) for row in tokens.tolist()]
