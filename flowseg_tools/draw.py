"""Pictures: labels and states as colours, overlays, legends, sheets, plots, and how they are written.

labels    (H, W) integer train ids; 255 = ignore and is drawn black
palette   (N, 3) uint8, the centroids as colours: a coloured mask is the end state of the flow
entries   rows of a legend: (name, colour, percent or None)

Every drawing is an RGB image.
"""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from data import IGNORE, SUFFIXES, PictureError

PAPER = (250, 250, 248)
INK = (38, 42, 48)
RULE = (140, 143, 148)
GRID = (226, 227, 229)
# Colours of lines in a plot, chosen to differ in print and for most colour-blind readers.
LINES = ((31, 105, 183), (219, 96, 32), (30, 140, 95), (158, 68, 148), (190, 140, 0), (95, 100, 108))

REST_MS = 900  # an animation rests this long at both of its ends
FRAME_MS = 60
FRAMES = 24  # frames of an animation between photo and mask


# ---------------------------------------------------------------- files


def save(
    path: str | Path, image: Image.Image, suffixes: Iterable[str] = SUFFIXES,
    frames: Sequence[Image.Image] = (), texts: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Write a picture in the format of its suffix, whole or not at all.

    frames: what follows in a GIF. texts: what a PNG says of itself, by keys. A suffix that is not in
    `suffixes`, or a place that cannot be written, is a PictureError.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in suffixes:
        near = get_close_matches(suffix, suffixes, 1, cutoff=0)[0]
        raise PictureError(f"cannot write {path}: expected {', '.join(suffixes)}, got {suffix!r}; try {near}")

    options: dict = {"quality": 92}
    if frames:
        durations = [REST_MS, *[FRAME_MS] * (len(frames) - 1), REST_MS]
        options |= {"save_all": True, "append_images": frames, "duration": durations, "loop": 0}

    if texts:
        options["pnginfo"] = PngInfo()
        for key, value in texts.items():
            options["pnginfo"].add_text(key, value)

    # The temporary file is in the same folder, because replacing is atomic only within a file system.
    part = path.with_name(f".{path.name[:200]}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            image.save(file, SUFFIXES[suffix], **options)
        os.replace(part, path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PictureError(f"cannot write {path}: {reason}; choose a folder that can be written") from error
    finally:
        with suppress(OSError):
            part.unlink()


def write_mask(
    path: str | Path, labels: np.ndarray, palette: np.ndarray, texts: Mapping[str, str] | None = None
) -> None:
    """Write ids (H, W) as a PNG: uint8 in mode P with the palette, uint16 as 16-bit grey."""
    assert labels.ndim == 2 and labels.dtype in (np.uint8, np.uint16), f"labels {labels.shape} {labels.dtype}"
    mask = Image.fromarray(labels)
    if labels.dtype == np.uint8:
        every_id = np.arange(256)[None]
        mask.putpalette(colorize(every_id, palette).tobytes())
    save(path, mask, [".png"], texts=texts)  # other formats may change the values


# ---------------------------------------------------------------- colours


def palette(centroids: np.ndarray) -> np.ndarray:
    """Colours 127.5 (mu + 1), (N, 3) uint8, of the first three coordinates of the centroids (N, dims)."""
    first = np.asarray(centroids)[None, :, :3]
    return np.asarray(state_image(first))[0]


def state_image(x: np.ndarray) -> Image.Image:
    """The state of the flow (H, W, 3), about [-1, 1], as the picture 127.5 (x + 1), rounded and clipped."""
    values = 127.5 * (np.nan_to_num(x) + 1)
    return Image.fromarray(np.rint(values).clip(0, 255).astype(np.uint8))


def colorize(labels: np.ndarray, palette: np.ndarray) -> Image.Image:
    """Labels in the colours of the palette; 255, and any other id without a colour, is black."""
    missing = max(0, 256 - len(palette))
    colors = np.pad(palette, ((0, missing), (0, 0)))
    return Image.fromarray(colors[labels])


def overlay(photo: Image.Image, labels: np.ndarray, palette: np.ndarray, alpha: float = 0.5) -> Image.Image:
    """The photo under a translucent mask with thin light contours; ignored pixels show the photo itself."""
    assert photo.size == labels.shape[::-1], f"photo {photo.size}, labels {labels.shape[::-1]}"
    mask = colorize(labels, palette)
    picture = Image.blend(photo, mask, alpha)
    picture.paste(photo, mask=Image.fromarray(labels == IGNORE))

    # A contour lies where the label changes within `width` pixels to the right or downwards.
    width = max(1, round(math.sqrt(labels.size) / 900))
    edge = np.zeros(labels.shape, dtype=bool)
    edge[:, :-width] |= labels[:, :-width] != labels[:, width:]
    edge[:-width] |= labels[:-width] != labels[width:]
    light = Image.blend(mask, Image.new("RGB", mask.size, "white"), 0.6)
    picture.paste(light, mask=Image.fromarray(edge))
    return picture


# ---------------------------------------------------------------- sheets


def with_legend(image: Image.Image, entries: Sequence[tuple]) -> Image.Image:
    """The image above a legend in columns, the entry with the largest percent first."""
    # The type grows with the image, and shrinks where there are many entries.
    room = image.width * image.height / max(30, len(entries))
    size = int(np.clip(math.sqrt(room) / 9, 12, 80))
    font = ImageFont.load_default(size)
    line = round(1.6 * size)
    gap = 2 * size

    # An entry is a swatch, a name and a share, as wide as the widest of each.
    entries = sorted(entries, key=_percent, reverse=True)
    names = [" ".join(name.split())[:28] for name, _, _ in entries]
    shares = ["" if percent is None else f"{percent:.1f} %" for _, _, percent in entries]
    cell = 1.6 * size + _text_width(font, names)
    if any(shares):
        cell += size + _text_width(font, shares)
    step = math.ceil(cell) + gap

    # A column holds at most 25 entries; a legend wider than the image widens the sheet.
    columns = max(1, (image.width + gap) // step, math.ceil(len(entries) / 25))
    length = max(1, math.ceil(len(entries) / columns))
    width = max(image.width, math.ceil(len(entries) / length) * step - gap)
    sheet = Image.new("RGB", (width + 2 * size, image.height + length * line + 3 * size), PAPER)
    sheet.paste(image, (size, size))

    draw = ImageDraw.Draw(sheet)
    for i, (_, color, _) in enumerate(entries):
        column, row = divmod(i, length)
        x = size + column * step
        y = image.height + 2 * size + row * line
        fill = tuple(int(value) for value in color)
        draw.rectangle((x, y, x + size, y + size), fill, RULE, width=max(1, size // 16))
        draw.text((x + 1.6 * size, y + size / 2), names[i], INK, font, anchor="lm")
        draw.text((x + step - gap, y + size / 2), shares[i], INK, font, anchor="rm")
    return sheet


def preview(rows: Sequence[tuple], classes: Sequence[str], palette: np.ndarray) -> Image.Image:
    """A sheet of rows (photo, truth, prediction) under column titles, with a legend of the classes seen."""
    tiles = []
    seen = set()
    for photo, truth, prediction in rows:
        tiles.append(_fit(photo, 400, Image.Resampling.BICUBIC))
        for labels in (truth, prediction):
            tiles.append(_fit(colorize(labels, palette), 400))
            seen.update(np.unique(labels).tolist())

    entries = []
    for k in sorted(seen):
        if k == IGNORE:
            entries.append(("ignored", (0, 0, 0), None))
        else:
            entries.append((classes[k], palette[k], None))
    return with_legend(grid(tiles, ["image", "truth", "prediction"], columns=3), entries)


def strip(frames: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """A contact sheet of the states of the flow, from the photo to the mask, each under its caption."""
    assert len(frames) == len(captions), f"{len(frames)} frames, {len(captions)} captions"
    tiles = [_fit(frame, 256) for frame in frames]
    return ImageOps.expand(grid(tiles, captions, columns=min(6, len(tiles))), 16, PAPER)


def save_animation(path: str | Path, states: Sequence[np.ndarray]) -> None:
    """Write the way through the states (H, W, 3) of the flow as a GIF; an Euler step is a straight line."""
    frames_per_step = math.ceil(FRAMES / max(1, len(states) - 1))
    frames = []
    for start, end in pairwise(states):
        for k in range(frames_per_step):
            between = start + (end - start) * (k / frames_per_step)
            frames.append(_fit(state_image(between), 256))
    frames.append(_fit(state_image(states[-1]), 256))
    save(path, frames[0], [".gif"], frames[1:])


def grid(tiles: Sequence[Image.Image], captions: Sequence[str], columns: int) -> Image.Image:
    """Tiles in rows, each under its caption; as many captions as columns are column titles."""
    width = max(tile.width for tile in tiles)
    height = max(tile.height for tile in tiles)
    gap = int(np.clip(width / 18, 12, 40))
    font = ImageFont.load_default(gap)
    head = round(1.6 * gap)

    # A cell is as wide as the widest tile or caption; with column titles only the first row needs a head.
    dx = gap + max(width, math.ceil(_text_width(font, captions)))
    dy = gap + height
    if len(captions) > columns:
        dy += head
    rows = math.ceil(len(tiles) / columns)
    sheet = Image.new("RGB", (columns * dx - gap, head + rows * dy - gap), PAPER)

    draw = ImageDraw.Draw(sheet)
    for k, tile in enumerate(tiles):
        row, column = divmod(k, columns)
        sheet.paste(tile, (column * dx, row * dy + head))
        if k < len(captions):
            draw.text((column * dx, row * dy), captions[k], INK, font)
    return sheet


def curves(series: Mapping[str, Sequence[tuple[float, float]]], xlabel: str, ylabel: str) -> Image.Image:
    """A plot of named lines of points (x, y), both axes from zero, 900 x 540 pixels."""
    # It is drawn three times as large and reduced, which makes the lines smooth.
    width, height, em = 2700, 1620, 66
    font = ImageFont.load_default(em)
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    points = np.concatenate([np.array(line) for line in series.values()])
    highest = 5 * np.ceil(points.max(0) / 5).clip(1)
    origin = np.array([3 * em, height - 4 * em])
    end = np.array([width - 3 * em, 4 * em])

    # The grid and its numbers, at fifths of both axes.
    for share in np.linspace(0, 1, 6):
        x, y = origin + share * (end - origin)
        draw.line((x, origin[1], x, end[1]), GRID, 3)
        draw.line((origin[0], y, end[0], y), GRID, 3)
        draw.text((x, origin[1] + em / 2), f"{share * highest[0]:.4g}", INK, font, anchor="mt")
        draw.text((origin[0] - em / 2, y), f"{share * highest[1]:.3g}", INK, font, anchor="rm")
    draw.text((origin[0], end[1] - em), ylabel, INK, font, anchor="lb")
    draw.text((end[0], height - em), xlabel, INK, font, anchor="rb")

    # The lines, with their names in their colours above the plot.
    room = (end - origin)[0] / len(series)
    for i, (name, line) in enumerate(series.items()):
        color = LINES[i % len(LINES)]
        path = origin + np.array(line) / highest * (end - origin)
        draw.line([tuple(point) for point in path], color, em // 6, joint="curve")
        draw.text((origin[0] + i * room, em), name, color, font, anchor="lt")
    return sheet.resize((width // 3, height // 3), Image.Resampling.LANCZOS)


def _fit(image: Image.Image, side: int, enlarge: Image.Resampling = Image.Resampling.NEAREST) -> Image.Image:
    """The image with a long side of about `side`: enlarged by a whole factor, or reduced smoothly."""
    scale = side / max(image.size)
    resample = Image.Resampling.BOX
    if scale > 0.7:
        scale = max(1, round(scale))
        resample = enlarge
    width = max(1, round(image.width * scale))
    height = max(1, round(image.height * scale))
    return image.resize((width, height), resample)


def _text_width(font: ImageFont.FreeTypeFont, texts: Sequence[str]) -> float:
    return max((font.getlength(text) for text in texts), default=0)


def _percent(entry: tuple) -> float:
    return entry[2] or 0
