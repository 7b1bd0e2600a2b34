"""Rendered scenes with known captions: the sample archive of the demo and the tests.

A scene is one to three coloured shapes on a background. The image alone determines the first caption, word for
word; a second caption says the same in other words. Scenes are drawn from `(seed, index)` and nothing else, so the
same archive comes out on every machine.

There are two families. "plain" is the one the starter model was trained on; "poster" has shapes and a wording that it
has never seen, for showing what training does.
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
# Half the width of a shape as a share of the image's width. The two ranges are far apart: a size word must be
# readable from the image even when every shape in it has the same size.
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
    """One shape. `x`, `y` (centre) and `radius` (half the width) are shares of the image's width."""

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
    """One to three things on a background, in reading order: left to right, or top to bottom."""

    background: str
    things: tuple[Thing, ...]
    direction: str  # "row" or "column"; without meaning for a single thing

    @property
    def captions(self) -> list[str]:
        """Two references. The first is a function of the image alone; the second words it another way."""
        return [_first_wording(self), _second_wording(self)]

    def render(self, width: int = 192) -> Image.Image:
        """The image, RGB, `width` x `width` pixels."""
        image = _paint_background(self.background, width)
        draw = ImageDraw.Draw(image)
        for thing in self.things:
            _PAINTERS[thing.shape](draw, thing, width)
        return image


@dataclass(frozen=True, slots=True)
class Poster(Scene):
    """A scene of the second family: the same things said in other words, and in one way only."""

    @property
    def captions(self) -> list[str]:
        """One reference, a function of the image alone."""
        things = ", ".join(f"{thing.colour} {thing.shape} {thing.size}" for thing in self.things)
        if len(self.things) == 1:
            return [f"{self.background} with {things}"]
        return [f"{self.background} with {self.direction} of {things}"]


def make_poster(seed: int, index: int) -> Poster:
    """The scene number `index` of the archive `seed` of the second family."""
    scene = _draw_scene(random.Random(f"poster:{seed}:{index}"), POSTER_SHAPES)
    return Poster(scene.background, scene.things, scene.direction)


def make_scene(seed: int, index: int) -> Scene:
    """The scene number `index` of the archive `seed`."""
    return _draw_scene(random.Random(f"{seed}:{index}"), SHAPES)


def _draw_scene(rng: random.Random, shapes: tuple[str, ...]) -> Scene:
    count = rng.choices((1, 2, 3), weights=(2, 4, 4))[0]
    direction = rng.choice(("row", "column"))
    things = []
    for place in range(count):
        along, across = _place(rng, place, count)
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
    """Whether a caption could be of a rendered scene: it names a background, a colour and a shape, and its every word
    is one that scenes are described with."""
    words = set(caption.replace(",", " ").split())
    return words <= _WORDS and all(words & set(some) for some in (BACKGROUNDS, COLOURS, SHAPES))


def make_scenes(count: int, seed: int = 0, family: str = "plain") -> Iterator[Scene]:
    """`family`: "plain" or "poster"."""
    make = {"plain": make_scene, "poster": make_poster}[family]
    return (make(seed, index) for index in range(count))


def _place(rng: random.Random, place: int, count: int) -> tuple[float, float]:
    """Where a thing stands (along the direction, across it). Apart enough that the direction is never in doubt."""
    if count == 1:
        return rng.uniform(0.25, 0.75), rng.uniform(0.25, 0.75)
    if count == 2:
        return rng.uniform(0.22, 0.30) + 0.48 * place, rng.uniform(0.38, 0.62)
    return rng.uniform(0.165, 0.185) + 0.325 * place, rng.uniform(0.38, 0.62)


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
