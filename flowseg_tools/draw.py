"""Pictures: labels and states as colours, overlays, legends, sheets, plots, and how they are written.

labels    (H, W) integer train ids; 255 = ignore and is drawn black
palette   (N, 3) uint8, a colour of each class: with the centroids a coloured mask is the end of the flow
entries   rows of a legend: (name, colour, percent or None)

Every drawing is an RGB image. Text is in Pillow's own font, which has Latin letters, or in that of
`use_font`.
"""

import math
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from data import IGNORE, SUFFIXES, PictureError

PAPER = (250, 250, 248)
TILE = (232, 233, 234)  # behind a picture that is smaller than its tile
INK = (38, 42, 48)
RULE = (140, 143, 148)
GRID = (226, 227, 229)
# Colours of lines in a plot, chosen to differ in print and for most colour-blind readers.
LINES = ((31, 105, 183), (219, 96, 32), (30, 140, 95), (158, 68, 148), (190, 140, 0), (95, 100, 108))
# Colours of a scale from 0 to 1, of steadily growing lightness.
SCALE = ((26, 22, 66), (62, 57, 130), (52, 104, 148), (42, 148, 134), (118, 190, 92), (250, 232, 96))

REST_MS = 900  # an animation rests this long at both of its ends
FRAME_MS = 60
FRAMES = 24  # frames of an animation between photo and mask
SMALL_SIDE = 640  # pixels: smaller pictures are enlarged for names and scales
MOST_PIXELS = 24_000_000  # larger photos are drawn reduced

_font_file: Path | None = None


# ---------------------------------------------------------------- text


def use_font(path: Path) -> None:
    """Write all text in the font of a .ttf or .otf file. ValueError: it is none."""
    global _font_file
    if not path.is_file():  # a pipe is not opened
        raise ValueError(f"{path}: no regular file; expected a .ttf, .otf or .ttc file")
    try:
        ImageFont.truetype(path, 12)
    except OSError as error:
        raise ValueError(f"{path}: {error}; expected a .ttf, .otf or .ttc file") from error
    _font_file = path


def font(size: float) -> ImageFont.FreeTypeFont:
    """The font of all text, `size` pixels high."""
    return ImageFont.truetype(_font_file, size) if _font_file else ImageFont.load_default(size)


def missing_letters(names: Iterable[str]) -> str:
    """The letters of the names that the font lacks, and would draw as boxes."""
    face = font(20)
    box = bytes(face.getmask("\U0010fffe"))
    letters = sorted(set("".join(names)))
    return "".join(letter for letter in letters if bytes(face.getmask(letter)) == box)


def say_missing_letters(names: Iterable[str], console) -> None:
    """Say on a terminal which letters of the names pictures cannot show, and what to do."""
    if missing := missing_letters(names):
        console.print(f"note: the font of the pictures lacks {missing}: pass --font FILE", style="yellow")


def shorten(text: str, face: ImageFont.FreeTypeFont, width: float) -> str:
    """One line of text that is at most `width` pixels long."""
    text = " ".join(text.split())
    shown = text
    while text and face.getlength(shown) > width:
        text = text[:-1]
        shown = text + "…"
    return shown


# ---------------------------------------------------------------- files


def save(
    path: str | Path, image: Image.Image, suffixes: Iterable[str] = SUFFIXES,
    frames: Sequence[Image.Image] = (), texts: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Write a picture in the format of its suffix, whole or not at all.

    frames: what follows in a GIF. texts: what a PNG says of itself. A suffix that is not in `suffixes`, or a
    place that cannot be written, is a PictureError.
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


def palette(centroids: np.ndarray, colors: Sequence[str] = ()) -> np.ndarray:
    """The colour of each class, (N, 3) uint8: the "#rrggbb" that a data set gives, or 127.5 (mu + 1).

    centroids: (N, dims), of which the first three coordinates count.
    """
    if colors:
        return np.array([list(bytes.fromhex(color[1:])) for color in colors], np.uint8)
    first = np.asarray(centroids)[None, :, :3]
    return np.asarray(state_image(first))[0]


def clear_ids(classes: Sequence[str], clear: Collection[str] = ()) -> set[int]:
    """Train ids of what overlays leave as it is: classes in `clear`, or called background."""
    bare = {*clear, "background", "_background_"}
    return {k for k, name in enumerate(classes) if name in bare or name.lower() in bare}


def state_image(x: np.ndarray) -> Image.Image:
    """The state of the flow (H, W, 3), about [-1, 1], as the picture 127.5 (x + 1), rounded and clipped."""
    values = 127.5 * (np.nan_to_num(x) + 1)
    return Image.fromarray(np.rint(values).clip(0, 255).astype(np.uint8))


def colorize(labels: np.ndarray, palette: np.ndarray) -> Image.Image:
    """Labels in the colours of the palette; 255, and any other id without a colour, is black."""
    missing = max(0, 256 - len(palette))
    colors = np.pad(palette, ((0, missing), (0, 0)))
    return Image.fromarray(colors[labels])


def overlay(
    photo: Image.Image, labels: np.ndarray, palette: np.ndarray, clear: Collection[int] = (),
    alpha: float = 0.5,
) -> Image.Image:  # fmt: skip
    """The photo under a translucent mask with thin light contours.

    Ignored pixels, and those of classes that are `clear`, show the photo itself.
    """
    assert photo.size == labels.shape[::-1], f"photo {photo.size}, labels {labels.shape[::-1]}"
    mask = colorize(labels, palette)
    picture = Image.blend(photo, mask, alpha)
    bare = np.isin(labels, [IGNORE, *clear])
    picture.paste(photo, mask=Image.fromarray(bare))

    # A contour lies where the label changes within `width` pixels to the right or downwards.
    width = max(1, round(math.sqrt(labels.size) / 900))
    edge = np.zeros(labels.shape, dtype=bool)
    edge[:, :-width] |= labels[:, :-width] != labels[:, width:]
    edge[:-width] |= labels[:-width] != labels[width:]
    light = Image.blend(mask, Image.new("RGB", mask.size, "white"), 0.6)
    picture.paste(light, mask=Image.fromarray(edge))
    return picture


def name_regions(
    picture: Image.Image, labels: np.ndarray, names: Mapping[int, str], clear: Collection[int] = ()
) -> None:
    """Write the name of every class into its largest region, where it fits: into the picture itself."""
    # Places are sought on labels reduced by `step`. `free` is where no name has been written yet.
    step = max(1, math.ceil(max(labels.shape) / 240))
    small = labels[::step, ::step]
    free = np.ones(small.shape, bool)
    draw = ImageDraw.Draw(picture)
    largest = float(np.clip(math.sqrt(labels.size) / 26, 13, 90))
    ids, counts = np.unique(small, return_counts=True)
    for k in ids[np.argsort(-counts, kind="stable")].tolist():
        if k not in names or k in clear:
            continue
        for size in (largest, 0.75 * largest, 0.55 * largest):
            face = font(max(12, size))
            text = shorten(names[k], face, labels.shape[1] / 2)
            width = math.ceil(1.15 * face.getlength(text) / step)
            height = math.ceil(1.3 * size / step)
            if place := _place(free & (small == k), height, width):
                y, x = place
                top = max(0, y - height // 2)
                left = max(0, x - width // 2)
                free[top : top + height, left : left + width] = False
                stroke = max(1, round(size / 9))
                at = (x * step, y * step)
                draw.text(at, text, "white", face, anchor="mm", stroke_width=stroke, stroke_fill=INK)
                break


def _place(room: np.ndarray, height: int, width: int) -> tuple[int, int] | None:
    """The middle of a box with much of the True pixels of `room` (H, W) around it, or None if none fits."""
    total = np.pad(room.cumsum(0).cumsum(1), ((1, 0), (1, 0)))  # of all pixels above and to the left
    for growth in (4, 2.8, 2, 1.4, 1):  # the largest region is where the largest box fits
        h = math.ceil(growth * height)
        w = math.ceil(growth * width)
        below = total[h:] - total[:-h]
        inside = below[:, w:] - below[:, :-w]
        places = np.argwhere(inside >= 0.97 * h * w)
        if len(places):
            distance = np.square(places - places.mean(0)).sum(1)
            y, x = places[distance.argmin()]
            return int(y) + h // 2, int(x) + w // 2
    return None


def overlay_sheet(
    photo: Image.Image, labels: np.ndarray, palette: np.ndarray, names: Mapping[int, str],
    entries: Sequence[tuple], clear: Collection[int] = (),
) -> Image.Image:  # fmt: skip
    """The overlay at a size to look at, with names in the regions of classes and a legend below."""
    photo = for_viewing(photo, Image.Resampling.BICUBIC)
    labels = np.asarray(Image.fromarray(labels).resize(photo.size, Image.Resampling.NEAREST))
    picture = overlay(photo, labels, palette, clear)
    name_regions(picture, labels, names, clear)
    return with_legend(picture, entries, most=24)


def heat(grey: Image.Image, title: str) -> Image.Image:
    """Values in [0, 1], as 8-bit grey, in the colours of a scale, which is the legend."""
    stops = np.linspace(0, 255, len(SCALE))
    ramp = np.stack([np.interp(range(256), stops, channel) for channel in np.transpose(SCALE)], axis=1)
    ramp = np.rint(ramp).astype(np.uint8)  # (256, 3)
    picture = Image.fromarray(ramp[np.asarray(for_viewing(grey))])
    scale = [(f"{share:g}", ramp[round(255 * share)], None) for share in (0, 0.2, 0.4, 0.6, 0.8, 1)]
    return with_legend(grid([picture], [title], 1), scale, size=max(20, picture.width // 60))


def for_viewing(image: Image.Image, resample: Image.Resampling = Image.Resampling.NEAREST) -> Image.Image:
    """The image at a size to look at: small ones enlarged by a whole factor, huge ones reduced."""
    scale = max(1, round(SMALL_SIDE / max(image.size)))
    if image.width * image.height > MOST_PIXELS:
        scale = math.sqrt(MOST_PIXELS / (image.width * image.height))
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), resample)


# ---------------------------------------------------------------- sheets


def with_legend(
    image: Image.Image, entries: Sequence[tuple], most: int | None = None, size: int | None = None
) -> Image.Image:
    """The image above a legend in columns, the entry with the largest percent first.

    Of more than `most` entries the last say only how many they are, and how much together. size: pixels
    of type; by default it goes with the image.
    """
    entries = sorted(entries, key=_percent, reverse=True)
    if most and len(entries) > most:
        rest = entries[most - 1 :]
        percent = None if rest[0][2] is None else sum(map(_percent, rest))
        entries = [*entries[: most - 1], (f"+ {len(rest)} more", None, percent)]

    # An entry is a swatch, a name and a share, as wide as the widest of each.
    if size is None:
        room = image.width * image.height / max(30, len(entries))
        size = int(np.clip(math.sqrt(room) / 9, 12, 80))
    face = font(size)
    line = round(1.6 * size)
    gap = 2 * size
    names = [shorten(name, face, 14 * size) for name, _, _ in entries]
    shares = ["" if percent is None else f"{percent:.1f} %" for _, _, percent in entries]
    shares = ["< 0.1 %" if share == "0.0 %" else share for share in shares]
    cell = 1.6 * size + _text_width(face, names)
    if any(shares):
        cell += size + _text_width(face, shares)
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
        if color is not None:
            fill = tuple(int(value) for value in color)
            draw.rectangle((x, y, x + size, y + size), fill, RULE, width=max(1, size // 16))
        draw.text((x + 1.6 * size, y + size / 2), names[i], INK, face, anchor="lm")
        draw.text((x + step - gap, y + size / 2), shares[i], INK, face, anchor="rm")
    return sheet


def preview(
    rows: Sequence[tuple], classes: Sequence[str], palette: np.ndarray, title: str = "",
    notes: Sequence[str] = (),
) -> Image.Image:  # fmt: skip
    """A sheet of rows (photo, truth, prediction) in equal tiles, with a legend of the classes seen most.

    notes: what stands above the predictions, say a score.
    """
    tiles = []
    captions = []
    for i, (photo, truth, prediction) in enumerate(rows):
        tiles.append(fit(photo, 400, Image.Resampling.BICUBIC))
        tiles += [fit(colorize(labels, palette), 400) for labels in (truth, prediction)]
        captions += ["", "", notes[i] if notes else ""]
    captions[:3] = ["image", "truth", f"prediction   {captions[2]}"]
    masks = [labels.ravel() for row in rows for labels in row[1:]]
    entries = legend_entries(np.concatenate(masks), classes, palette)
    return with_legend(grid(tiles, captions, 3, title), entries, most=12, size=24)


def legend_entries(labels: np.ndarray, classes: Sequence[str], palette: np.ndarray) -> list[tuple]:
    """Legend rows of the classes that occur, the most frequent first."""
    known = {k: (name, palette[k], None) for k, name in enumerate(classes)}
    known[IGNORE] = ("ignored", (0, 0, 0), None)
    ids, counts = np.unique(labels, return_counts=True)
    return [known[k] for k in ids[np.argsort(-counts, kind="stable")].tolist() if k in known]


def strip(frames: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """A contact sheet of the states of the flow, from the photo to the mask, each under its caption."""
    assert len(frames) == len(captions), f"{len(frames)} frames, {len(captions)} captions"
    tiles = [fit(frame, 256) for frame in frames]
    return ImageOps.expand(grid(tiles, captions, columns=min(6, len(tiles))), 16, PAPER)


def save_animation(path: str | Path, states: Sequence[np.ndarray]) -> None:
    """Write the way through the states (H, W, 3) of the flow as a GIF; an Euler step is a straight line."""
    frames_per_step = math.ceil(FRAMES / max(1, len(states) - 1))
    frames = []
    for start, end in pairwise(states):
        for k in range(frames_per_step):
            between = start + (end - start) * (k / frames_per_step)
            frames.append(fit(state_image(between), 256))
    frames.append(fit(state_image(states[-1]), 256))
    save(path, frames[0], [".gif"], frames[1:])


def grid(tiles: Sequence[Image.Image], captions: Sequence[str], columns: int, title: str = "") -> Image.Image:
    """Pictures in the middle of equal tiles, each under its caption, if it has one."""
    width = max(tile.width for tile in tiles)
    height = max(tile.height for tile in tiles)
    gap = int(np.clip(width / 18, 12, max(24, width / 60)))
    line = round(1.6 * gap)
    face = font(gap)
    captions = [*captions, *[""] * (len(tiles) - len(captions))]
    step = gap + max(width, math.ceil(_text_width(face, captions)))

    # A row without a caption has no line for it.
    tops = [round(1.4 * line) if title else 0]
    for first in range(0, len(tiles), columns):
        head = line if any(captions[first : first + columns]) else 0
        tops.append(tops[-1] + head + height + gap)
    sheet = Image.new("RGB", (columns * step - gap, tops[-1] - gap), PAPER)

    draw = ImageDraw.Draw(sheet)
    draw.text((0, 0), shorten(title, font(1.2 * gap), sheet.width), INK, font(1.2 * gap))
    for k, tile in enumerate(tiles):
        x = k % columns * step
        draw.text((x, tops[k // columns]), captions[k], INK, face)
        y = tops[k // columns + 1] - gap - height
        if tile.size != (width, height):
            draw.rectangle((x, y, x + width - 1, y + height - 1), TILE)
        sheet.paste(tile, (x + (width - tile.width) // 2, y + (height - tile.height) // 2))
    return sheet


def fit(image: Image.Image, side: int, enlarge: Image.Resampling = Image.Resampling.NEAREST) -> Image.Image:
    """The image with a long side of about `side`: enlarged by a whole factor, or reduced smoothly."""
    scale = side / max(image.size)
    resample = Image.Resampling.BOX
    if scale > 0.7:
        scale = max(1, round(scale))
        resample = enlarge
    width = max(1, round(image.width * scale))
    height = max(1, round(image.height * scale))
    return image.resize((width, height), resample)


def _text_width(face: ImageFont.FreeTypeFont, texts: Sequence[str]) -> float:
    return max((face.getlength(text) for text in texts), default=0)


def _percent(entry: tuple) -> float:
    return entry[2] or 0


# ---------------------------------------------------------------- plots


def training_curves(log: Sequence[Mapping]) -> Image.Image:
    """Loss, validation mIoU and learning rate over the steps, from the lines of metrics.jsonl."""
    panels = {}
    for name, title, unit in (
        ("loss", "loss", 1),
        ("mIoU", "validation mIoU, %", 0.01),
        ("lr", "learning rate", 1),
    ):
        points = [(entry["step"], entry[name] / unit) for entry in log if entry.get(name) is not None]
        if points:
            panels[title] = {name: points}
    return plots(panels or {"nothing was logged": {"": [(0, 0)]}}, "step", height=300)


def plots(panels: Mapping[str, Mapping], xlabel: str, height: int) -> Image.Image:
    """Plots below each other, 900 pixels wide, with one axis of x; panels: {title: {name: points (x, y)}}."""
    # They are drawn three times as large and reduced, which makes the lines smooth.
    em = 60
    sheet = Image.new("RGB", (2700, len(panels) * 3 * height), PAPER)
    draw = ImageDraw.Draw(sheet)
    every_line = [line for series in panels.values() for line in series.values()]
    ticks = round_ticks(max(x for line in every_line for x, _ in line))
    for i, (title, series) in enumerate(panels.items()):
        box = (4 * em, 3 * height * i + 2 * em, 2700 - 5 * em, 3 * height * (i + 1) - 3 * em)
        _panel(draw, box, title, series, ticks, em)
    draw.text((2700 - 5 * em, sheet.height - em / 3), xlabel, INK, font(em), anchor="rb")
    return sheet.resize((900, sheet.height // 3), Image.Resampling.LANCZOS)


def _panel(
    draw: ImageDraw.ImageDraw, box: tuple, title: str, series: Mapping, ticks_x: np.ndarray, em: int
) -> None:
    """One plot with its grid inside of the box (left, top, right, bottom)."""
    left, top, right, bottom = box
    face = font(em)
    ticks_y = round_ticks(max(y for line in series.values() for _, y in line))
    origin = np.array([left, bottom])
    scale = np.array([(right - left) / ticks_x[-1], (top - bottom) / ticks_y[-1]])
    for tick in ticks_x:
        x = left + tick * scale[0]
        draw.line((x, bottom, x, top), GRID, 3)
        draw.text((x, bottom + em / 3), f"{tick:g}", INK, face, anchor="mt")
    for tick in ticks_y:
        y = bottom + tick * scale[1]
        draw.line((left, y, right, y), GRID, 3)
        draw.text((left - em / 2, y), f"{tick:g}", INK, face, anchor="rm")

    # The lines, where each of them ends, and the names of several in their colours behind the title.
    draw.text((left, top - 0.8 * em), title, INK, face, anchor="ls")
    name_x = left + face.getlength(title) + 2 * em
    for i, (name, line) in enumerate(series.items()):
        color = LINES[i % len(LINES)]
        path = [tuple(origin + np.array(point) * scale) for point in line]
        draw.line(path, color, em // 6, joint="curve")
        x, y = path[-1]
        draw.ellipse((x - em / 5, y - em / 5, x + em / 5, y + em / 5), color)
        if len(series) > 1:
            draw.text((name_x, top - 0.8 * em), name, color, face, anchor="ls")
            name_x += face.getlength(name) + 1.5 * em
        else:
            draw.text((x + em / 3, y), f"{line[-1][1]:.3g}", color, face, anchor="lm")


def round_ticks(highest: float) -> np.ndarray:
    """Three to six round numbers from 0 to at least `highest`."""
    highest = highest if highest > 0 else 1
    power = 10.0 ** math.floor(math.log10(highest))
    step = next(power * m for m in (0.2, 0.25, 0.5, 1, 2) if highest <= 5 * power * m)
    return step * np.arange(math.ceil(highest / step - 1e-9) + 1)
