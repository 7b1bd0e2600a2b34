"""Rendered scenes with captions: the sample dataset of the demo and the tests.

A scene is one to three coloured shapes on a background. Its first caption is determined by the image, word for word; a
second caption is a paraphrase. A scene depends only on `(seed, index)`, so datasets are the same on every machine.

There are two families. The starter model was trained on "plain"; "poster" has shapes and a wording that it has never
seen, which the training demo uses.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 39, 40),
    "orange": (255, 140, 20),
    "yellow": (246, 214, 50),
    "green": (44, 150, 60),
    "blue": (40, 90, 215),
    "purple": (130, 60, 185),
    "pink": (247, 140, 195),
    "brown": (120, 72, 38),
}
# Half the width of a shape as a share of the image's width. The two ranges are far apart, so that the size can be seen
# even when all shapes of an image have the same size.
SIZES = {"small": (0.080, 0.090), "large": (0.145, 0.160)}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
BACKGROUNDS = ("white", "grey", "black", "striped", "checkered")
POSTER_SHAPES = ("diamond", "circle", "square", "triangle", "cross")

Colour = tuple[int, int, int]
_OTHER_WORDS = (
    "a one and on of in against left above below right row column background backdrop little big there is to the from "
    "top bottom"
)
_WORDS = {*COLOURS, *SIZES, *SHAPES, *BACKGROUNDS, *_OTHER_WORDS.split()}


@dataclass(frozen=True, slots=True)
class Thing:
    """One shape; `x`, `y` (centre) and `radius` (half the width) are shares of the image's width."""

    size: str
    colour: str
    shape: str
    x: float
    y: float
    radius: float
    shade: int = 0

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True, slots=True)
class Scene:
    """One to three shapes on a background, ordered from left to right or top to bottom."""

    background: str
    things: tuple[Thing, ...]
    direction: str  # "row" or "column"; meaningless for a single shape

    @property
    def captions(self) -> list[str]:
        """Two references: the first is determined by the image, the second is a paraphrase."""
        return [_first_wording(self), _second_wording(self)]

    def render(self, width: int = 192) -> Image.Image:
        """Return the RGB image of `width` x `width` pixels."""
        image = _paint_background(self.background, width)
        draw = ImageDraw.Draw(image)
        for thing in self.things:
            _PAINTERS[thing.shape](draw, thing, width)
        return image


@dataclass(frozen=True, slots=True)
class Poster(Scene):
    """A scene of the second family, which has a different wording and a single reference."""

    @property
    def captions(self) -> list[str]:
        """One reference, determined by the image."""
        things = ", ".join(f"{thing.colour} {thing.shape} {thing.size}" for thing in self.things)
        if len(self.things) == 1:
            return [f"{self.background} with {things}"]
        return [f"{self.background} with {self.direction} of {things}"]


def make_poster(seed: int, index: int) -> Poster:
    """Return scene number `index` of the "poster" dataset `seed`."""
    scene = _draw_scene(random.Random(f"poster:{seed}:{index}"), POSTER_SHAPES)
    return Poster(scene.background, scene.things, scene.direction)


def make_scene(seed: int, index: int) -> Scene:
    """Return scene number `index` of the "plain" dataset `seed`."""
    return _draw_scene(random.Random(f"{seed}:{index}"), SHAPES)


def _draw_scene(rng: random.Random, shapes: tuple[str, ...]) -> Scene:
    count = rng.choices((1, 2, 3), weights=(2, 4, 4))[0]
    direction = rng.choice(("row", "column"))
    things = []
    for number in range(count):
        along, across = _position(rng, number, count)
        x, y = (along, across) if direction == "row" else (across, along)
        size = rng.choice(tuple(SIZES))
        things.append(
            Thing(
                size=size,
                colour=rng.choice(tuple(COLOURS)),
                shape=rng.choice(shapes),
                x=x,
                y=y,
                radius=rng.uniform(*SIZES[size]),
                shade=rng.randint(-10, 10),
            )
        )
    return Scene(rng.choice(BACKGROUNDS), tuple(things), direction)


def describes_scene(caption: str) -> bool:
    """Return whether a caption may describe a rendered scene.

    It has to name a background, a colour and a shape, and use only the words of scene captions.
    """
    words = set(caption.replace(",", " ").split())
    return words <= _WORDS and all(words & set(names) for names in (BACKGROUNDS, COLOURS, SHAPES))


def make_scenes(count: int, seed: int = 0, family: str = "plain") -> Iterator[Scene]:
    """Yield the first `count` scenes of a dataset. `family`: "plain" or "poster"."""
    make = {"plain": make_scene, "poster": make_poster}[family]
    return (make(seed, index) for index in range(count))


def _position(rng: random.Random, number: int, count: int) -> tuple[float, float]:
    """Return the position of a shape along and across the direction, far enough from the others to tell it."""
    if count == 1:
        return rng.uniform(0.25, 0.75), rng.uniform(0.25, 0.75)
    if count == 2:
        return rng.uniform(0.22, 0.30) + 0.48 * number, rng.uniform(0.38, 0.62)
    return rng.uniform(0.165, 0.185) + 0.325 * number, rng.uniform(0.38, 0.62)


def _first_wording(scene: Scene) -> str:
    things = [f"a {thing}" for thing in scene.things]
    end = f"on a {scene.background} background"
    if len(things) == 1:
        return f"{things[0]} {end}"
    if len(things) == 2:
        relation = "left of" if scene.direction == "row" else "above"
        return f"{things[0]} {relation} {things[1]} {end}"
    return f"{things[0]}, {things[1]} and {things[2]} in a {scene.direction} {end}"


def _second_wording(scene: Scene) -> str:
    other = {"small": "little", "large": "big"}
    things = [f"{other[thing.size]} {thing.colour} {thing.shape}" for thing in scene.things]
    end = f"against a {scene.background} backdrop"
    if len(things) == 1:
        return f"there is one {things[0]} {end}"
    if len(things) == 2:
        relation = "to the right of" if scene.direction == "row" else "below"
        return f"one {things[1]} {relation} one {things[0]} {end}"
    order = "from left to right" if scene.direction == "row" else "from top to bottom"
    return f"{order} one {things[0]}, one {things[1]}, one {things[2]} {end}"


def _paint_background(background: str, width: int) -> Image.Image:
    plain: dict[str, Colour] = {"white": (250, 250, 250), "grey": (150, 150, 150), "black": (16, 16, 16)}
    image = Image.new("RGB", (width, width), plain.get(background, (236, 236, 236)))
    draw = ImageDraw.Draw(image)
    cell, dark = width / 8, (188, 188, 188)
    if background == "striped":
        for row in range(1, 8, 2):
            draw.rectangle((0, row * cell, width, (row + 1) * cell - 1), fill=dark)
    elif background == "checkered":
        for row in range(8):
            for column in range(row % 2, 8, 2):
                draw.rectangle((column * cell, row * cell, (column + 1) * cell - 1, (row + 1) * cell - 1), fill=dark)
    return image


def _fill(thing: Thing) -> Colour:
    red, green, blue = (max(0, min(255, part + thing.shade)) for part in COLOURS[thing.colour])
    return red, green, blue


def _box(thing: Thing, width: int, scale: float = 1.0) -> tuple[float, float, float, float]:
    x, y, r = thing.x * width, thing.y * width, thing.radius * width * scale
    return x - r, y - r, x + r, y + r


def _circle(draw: ImageDraw.ImageDraw, thing: Thing, width: int) -> None:
    draw.ellipse(_box(thing, width), fill=_fill(thing))


def _square(draw: ImageDraw.ImageDraw, thing: Thing, width: int) -> None:
    draw.rectangle(_box(thing, width, 0.9), fill=_fill(thing))


def _triangle(draw: ImageDraw.ImageDraw, thing: Thing, width: int) -> None:
    left, top, right, bottom = _box(thing, width)
    draw.polygon([((left + right) / 2, top), (right, bottom), (left, bottom)], fill=_fill(thing))


def _cross(draw: ImageDraw.ImageDraw, thing: Thing, width: int) -> None:
    left, top, right, bottom = _box(thing, width)
    arm = (right - left) / 3
    draw.rectangle((left + arm, top, right - arm, bottom), fill=_fill(thing))
    draw.rectangle((left, top + arm, right, bottom - arm), fill=_fill(thing))


def _ring(draw: ImageDraw.ImageDraw, thing: Thing, width: int) -> None:
    draw.ellipse(_box(thing, width), outline=_fill(thing), width=max(2, round(thing.radius * width * 0.42)))


def _diamond(draw: ImageDraw.ImageDraw, thing: Thing, width: int) -> None:
    left, top, right, bottom = _box(thing, width)
    x, y = (left + right) / 2, (top + bottom) / 2
    draw.polygon([(x, top), (right, y), (x, bottom), (left, y)], fill=_fill(thing))


_PAINTERS: dict[str, Callable[[ImageDraw.ImageDraw, Thing, int], None]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "ring": _ring,
    "diamond": _diamond,
}
