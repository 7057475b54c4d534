"""The scenes of the built-in data set `shapes`: textured ground, shaded things, specks, noise."""

import numpy as np
from PIL import Image

# Array arithmetic is + - * / sqrt, floor and comparisons only: IEEE 754 makes these equal on every machine.

SIDE = 96
Y, X = np.mgrid[:SIDE, :SIDE].astype(np.float32)


def _wave(x: np.ndarray) -> np.ndarray:
    """Triangle wave of period 1 in [0, 1], 1 at the integers."""
    return 2 * abs(x - np.floor(x) - 0.5)


def _norm(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sqrt(x * x + y * y)


def _mortar(u: np.ndarray, v: np.ndarray, p: float) -> np.ndarray:
    """Lines between bricks that are one period wide and half a period high."""
    x, y = u + 0.5 * (np.floor(2 * v) % 2), 2 * v
    return 1.6 - np.minimum(1 - _wave(x), (1 - _wave(y)) / 2) * p / 2


def _sides(u: np.ndarray, v: np.ndarray, n: int) -> np.ndarray:
    """Distances to the n sides of a regular polygon about 0, ascending: (n, H, W)."""
    angles = 2 * np.pi * np.arange(n) / n
    normals = np.float32(np.stack([np.sin(angles), np.cos(angles)], axis=1).round(6))
    return np.sort([x * u + y * v for x, y in normals], axis=0)


# Ground: share of the second colour (clipped to [0, 1]) at (u, v), in periods of p pixels.
GROUND = {
    "plain": lambda u, v, p, rng: 0 * u,
    "grain": lambda u, v, p, rng: rng.random((SIDE // 2, SIDE // 2), np.float32).repeat(2, 0).repeat(2, 1),
    "stripes": lambda u, v, p, rng: (_wave(u) - 0.5) * p / 2 + 0.5,
    "zigzag": lambda u, v, p, rng: (_wave(u + 0.7 * _wave(v / 2)) - 0.5) * p / 2.5 + 0.5,
    "checker": lambda u, v, p, rng: (_wave(0.7 * u) - 0.5) * (_wave(0.7 * v) - 0.5) * 2 * p + 0.5,
    "dots": lambda u, v, p, rng: (0.31 - _norm(u - np.floor(u) - 0.5, v - np.floor(v) - 0.5)) * p + 0.5,
    "bricks": lambda u, v, p, rng: _mortar(0.7 * u, 0.7 * v, p / 0.7),
}
# Things: signed distance in radii, negative inside, v pointing down.
THINGS = {
    "disc": lambda u, v: _norm(u, v) - 0.85,
    "triangle": lambda u, v: _sides(u, v, 3)[-1] - 0.6,
    "star": lambda u, v: _sides(u, -v, 5)[-2] - 0.4,  # a point of a star is outside of one side at most
    "ring": lambda u, v: abs(_norm(u, v) - 0.75) - 0.25,
    "cross": lambda u, v: np.maximum(np.minimum(abs(u), abs(v)) - 0.3, np.maximum(abs(u), abs(v)) - 1),
    "heart": lambda u, v: np.minimum(
        (abs(u) + abs(v - 0.05)) * 0.7071 - 0.6364, _norm(abs(u) - 0.45, v + 0.4) - 0.6364
    ),
    "crescent": lambda u, v: np.maximum(_norm(u, v) - 1.05, 0.85 - _norm(u - 0.6, v)),
}
HUES = ("red", "amber", "lime", "green", "cyan", "blue", "violet", "pink")


def _rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    """HSV in [0, 1] -> (3, 1, 1) RGB in [0, 1]."""
    pure = np.clip(abs((6 * hue + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return (value * (1 - saturation * (1 - pure))).astype(np.float32)[:, None, None]


def _turned(rng: np.random.Generator, limit: float) -> tuple[np.ndarray, np.ndarray]:
    """Pixel coordinates about a random point, turned by at most 2 atan(limit)."""
    t, (cx, cy) = rng.uniform(-limit, limit), np.float32(rng.uniform(10, SIDE - 10, 2))
    cos, sin = np.float32((1 - t * t) / (1 + t * t)), np.float32(2 * t / (1 + t * t))
    return cos * (X - cx) + sin * (Y - cy), cos * (Y - cy) - sin * (X - cx)


def _voronoi(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Weighted squared distance to, and number of, the nearest of `count` random points."""
    x, y = np.float32(rng.uniform(0, SIDE, (2, count, 1, 1)))
    distance = ((X - x) ** 2 + (Y - y) ** 2) * np.float32(rng.uniform(0.7, 1.4, (count, 1, 1)))
    return distance.min(0), distance.argmin(0)


def _ground(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two or three textured regions: canvas (3, H, W) in [0, 1] and fine labels (H, W)."""
    canvas, labels = np.zeros((3, SIDE, SIDE), np.float32), np.zeros((SIDE, SIDE), np.uint8)
    kinds = rng.permutation(len(GROUND))[: rng.integers(2, 4)]
    region = _voronoi(rng, len(kinds))[1]
    for number, kind in enumerate(kinds):
        hue, values = rng.random(), rng.permuted([rng.uniform(0.25, 0.5), rng.uniform(0.65, 0.95)])
        first = _rgb(hue, rng.uniform(0.3, 0.7), values[0])
        second = _rgb(hue + rng.uniform(-0.06, 0.06), rng.uniform(0.2, 0.6), values[1])
        period, (u, v) = np.float32(rng.uniform(7, 11)), _turned(rng, 1)
        share = np.clip([*GROUND.values()][kind](u / period, v / period, period, rng), 0, 1)
        canvas = np.where(region == number, first + (second - first) * share, canvas)
        labels[region == number] = kind * len(HUES) + int(hue * len(HUES) + 0.5) % len(HUES)
    return canvas, labels


def _litter(canvas: np.ndarray, rng: np.random.Generator) -> None:
    """Scatter coloured specks that keep the label of their ground."""
    count = rng.integers(6, 14)
    distance, number = _voronoi(rng, count)
    hsv = rng.uniform((0, 0.3, 0.3), (1, 0.9, 1), (count, 3))
    colours = np.stack([_rgb(*row)[:, 0, 0] for row in hsv], axis=1)
    radii = np.float32(rng.uniform(1, 2.8, count))
    canvas += np.clip(radii[number] + 0.5 - np.sqrt(distance), 0, 1) * (colours[:, number] - canvas)


def _thing(canvas: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> None:
    """Paint one object with a shadow and a bevelled edge over what is there."""
    kind, radius = rng.integers(len(THINGS)), np.float32(rng.uniform(13, 25))
    hue = (kind + rng.uniform(-2, 2)) / len(THINGS) % 1  # a weak hint, as in nature
    u, v = (c / radius for c in _turned(rng, 0.15))
    distance = [*THINGS.values()][kind](u, v) * radius  # in pixels, so clip(0.5 - distance) is antialiased
    canvas[:, 3:, 2:] *= 1 - 0.5 * np.clip(0.5 - distance[:-3, :-2] / 5, 0, 1)
    shade = np.clip(0.7 - distance / 12, 0.7, 1) - 0.15 * (u + v)
    colour = _rgb(hue, rng.uniform(0.5, 0.95), rng.uniform(0.7, 1)) * shade
    canvas += np.clip(0.5 - distance, 0, 1) * (colour - canvas)
    labels[distance < 0] = (len(GROUND) + kind) * len(HUES) + int(hue * len(HUES) + 0.5) % len(HUES)


def scene(rng: np.random.Generator) -> tuple[Image.Image, np.ndarray]:
    """Draw ground, specks and three or four things -> RGB 96 x 96 and fine labels: class * 8 + hue."""
    canvas, labels = _ground(rng)
    _litter(canvas, rng)
    for _ in range(rng.integers(3, 5)):
        _thing(canvas, labels, rng)

    # The camera: light from one side, and sensor noise.
    slope = np.float32(rng.uniform(-0.25, 0.25, 2)) / (SIDE / 2)
    noise = rng.random((2, *canvas.shape), np.float32)
    canvas *= 1 + (slope[0] * (X - SIDE / 2) + slope[1] * (Y - SIDE / 2))
    canvas += (noise[0] - noise[1]) * np.float32(rng.uniform(0.04, 0.12))
    pixels = (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(np.moveaxis(pixels, 0, 2))), labels
