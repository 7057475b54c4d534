"""What people see: photos read upright, pictures written whole or not at all, sheets and plots drawn.

labels: (H, W) integer train ids, 255 = ignore, drawn black. palette: (N, 3) uint8, centroids as colours, so
that a coloured mask is the flow's end state. entries: (name, colour, percent or None). Drawings are RGB.
"""

import math
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from glob import glob
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # no other decoder ever sees a user's bytes
SUFFIXES = {f".{name.lower()}": name for name in FORMATS} | {".jpg": "JPEG", ".tif": "TIFF"}
IGNORE = 255
MAX_PIXELS = 250_000_000  # more is taken for a decompression bomb
PAPER, INK, RULE = (250, 250, 248), (38, 42, 48), (140, 143, 148)


class PictureError(Exception):
    """A picture that cannot be read or written, in one line: given, expected, fix."""

    exit_code = 1


def read_photo(source: str | Path | bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The upright RGB photo in a file or in its bytes: transparency on white, 8 bits a channel, and the first
    of the frames that info["frames"] counts."""
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, max_pixels)  # Pillow's own, only raised
    path = "standard input" if isinstance(source, bytes) else source
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        image = Image.open(BytesIO(data), formats=FORMATS)
        if image.width * image.height > max_pixels:
            raise Image.DecompressionBombError(f"{image.width} x {image.height}")
        image.load()  # here, so that no decoding error is suppressed
        with suppress(Exception):  # damaged EXIF costs the turn, not the photo
            ImageOps.exif_transpose(image, in_place=True)
        photo = _rgb(image)
        with suppress(Exception):  # counted in another image, as counting leaves the first frame
            photo.info["frames"] = Image.open(BytesIO(data), formats=FORMATS).n_frames
        return photo
    except Image.DecompressionBombError as error:
        fix = "if you trust it, raise --max-pixels (max_pixels)"
        raise PictureError(f"{path} has over {max_pixels:,} pixels: {error}; {fix}") from error
    except Exception as error:  # decoders raise anything on damaged bytes
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, UnidentifiedImageError):
            reason = "not a picture" if data else "empty file"
        fix = f"give a whole {', '.join(FORMATS)} file"
        raise PictureError(f"{path}: cannot be read ({reason}); {fix}") from error


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB, transparency on white, more than 8 bits scaled to 8."""
    if image.mode[0] in "IF":  # Pillow would clip these at 255
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        peak = 65535 if image.mode.startswith("I;") else values.max()
        full = next((top for top in (1, 255, 65535) if peak <= top), peak)  # for I and F a guess
        image = Image.fromarray(np.rint((values / full).clip(0, 1) * 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def find_photos(paths: Sequence[str | Path], output: Path | None = None) -> list[tuple[Path | str, Path]]:
    """(photo, output stem) of files, folders, globs and "-", standard input; stems keep sub-folders, and no
    two are the same. What a folder holds below `output` was made from its photos before."""
    found = {}  # photo -> its path below the folder asked for
    for given in ["-" if path == "-" else Path(path) for path in paths]:
        if given == "-":
            found[given] = Path("stdin")
            continue
        root = next(folder for folder in (given, *given.parents) if folder.is_dir())  # a glob's fixed part
        files = root.rglob("*") if root == given else map(Path, glob(str(given), recursive=True))
        if root == given and output:
            files = (file for file in files if output.resolve() not in file.resolve().parents)
        files = [(file, file.relative_to(root)) for file in sorted(files) if file.suffix.lower() in SUFFIXES]
        files = [(f, rel) for f, rel in files if f.is_file() and not any(p[0] == "." for p in rel.parts)]
        if given.is_file():  # asked for by name: any suffix
            files = [(given, Path(given.name))]
        if not files:
            raise PictureError(
                f"no photo at {given}; expected file, folder (not -o) or glob of {' '.join(SUFFIXES)}"
            )
        found.update(files)
    stems = {}
    for photo, stem in found.items():
        stem = stem.with_suffix("")
        while stem in stems:  # a.jpg beside a.png: a and a_png
            stem = stem.with_name(f"{stem.name}_{photo.suffix[1:]}")
        stems[stem] = photo
    return [(photo, stem) for stem, photo in stems.items()]


def write_mask(path: str | Path, labels: np.ndarray, palette: np.ndarray) -> None:
    """Write train ids as PNG: mode P with the palette; uint16 ids (over 255 classes) as 16-bit grey."""
    assert labels.ndim == 2 and labels.dtype in (np.uint8, np.uint16), f"labels {labels.shape} {labels.dtype}"
    mask = Image.fromarray(labels)
    if labels.dtype == np.uint8:
        mask.putpalette(colorize(np.arange(256)[None], palette).tobytes())
    save(path, mask, [".png"])  # other formats may change values


def save(path: str | Path, image: Image.Image, suffixes: Iterable[str] = SUFFIXES, frames=()) -> None:
    """Write a picture in the format of its suffix, whole or not at all; in a GIF, frames follow it."""
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in suffixes:
        near = get_close_matches(suffix, suffixes, 1, cutoff=0)[0]
        raise PictureError(f"cannot write {path}: expected {', '.join(suffixes)}, got {suffix!r}; try {near}")
    part = path.with_name(f".{path.name[:200]}.{os.getpid()}.part")  # same folder: replace is atomic
    pace = [900, *[60] * (len(frames) - 1), 900]  # ms of each
    motion = {"save_all": True, "append_images": frames, "duration": pace, "loop": 0} if frames else {}
    try:
        with open(part, "wb") as file:
            image.save(file, SUFFIXES[suffix], quality=92, **motion)
        os.replace(part, path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PictureError(f"cannot write {path}: {reason}; choose a folder that can be written") from error
    finally:
        with suppress(OSError):
            part.unlink()


def palette(centroids: np.ndarray) -> np.ndarray:
    """(N, 3) uint8 colours 127.5 (mu + 1), mu the first three coordinates of centroids (N, dims)."""
    return np.asarray(state_image(np.asarray(centroids)[None, :, :3]))[0]


def state_image(x: np.ndarray) -> Image.Image:
    """The flow's state (H, W, 3), about [-1, 1], as the picture 127.5 (x + 1), rounded and clipped."""
    return Image.fromarray(np.rint(127.5 * (np.nan_to_num(x) + 1)).clip(0, 255).astype(np.uint8))


def colorize(labels: np.ndarray, palette: np.ndarray) -> Image.Image:
    """Labels in the palette's colours; 255, and any other without a colour, black."""
    return Image.fromarray(np.pad(palette, ((0, max(0, 256 - len(palette))), (0, 0)))[labels])


def overlay(photo: Image.Image, labels: np.ndarray, palette: np.ndarray, alpha: float = 0.5) -> Image.Image:
    """The photo under a translucent mask with thin light contours; ignored pixels show the photo itself."""
    assert photo.size == labels.shape[::-1], f"photo {photo.size}, labels {labels.shape[::-1]}"
    mask = colorize(labels, palette)
    picture = Image.blend(photo, mask, alpha)
    picture.paste(photo, mask=Image.fromarray(labels == IGNORE))
    width = max(1, round(math.sqrt(labels.size) / 900))
    edge = np.zeros(labels.shape, dtype=bool)
    edge[:, :-width] |= labels[:, :-width] != labels[:, width:]
    edge[:-width] |= labels[:-width] != labels[width:]
    picture.paste(Image.blend(mask, Image.new("RGB", mask.size, "white"), 0.6), mask=Image.fromarray(edge))
    return picture


def with_legend(image: Image.Image, entries: Sequence[tuple]) -> Image.Image:
    """The image above a legend in columns, the largest percent first."""
    size = int(np.clip(math.sqrt(image.width * image.height / max(30, len(entries))) / 9, 12, 80))
    font, line, gap = ImageFont.load_default(size), round(1.6 * size), 2 * size
    entries = sorted(entries, key=lambda entry: -(entry[2] or 0))
    names = [" ".join(name.split())[:28] for name, _, _ in entries]
    shares = ["" if percent is None else f"{percent:.1f} %" for _, _, percent in entries]
    name_w, share_w = (max(map(font.getlength, texts), default=0) for texts in (names, shares))
    step = math.ceil(1.6 * size + name_w + (share_w and size + share_w)) + gap
    columns = max(1, (image.width + gap) // step, math.ceil(len(entries) / 25))
    length = math.ceil(len(entries) / columns) or 1  # rows in a column
    width = max(image.width, math.ceil(len(entries) / length) * step - gap)
    sheet = Image.new("RGB", (width + 2 * size, image.height + length * line + 3 * size), PAPER)
    sheet.paste(image, (size, size))
    draw = ImageDraw.Draw(sheet)
    for i, (_, color, _) in enumerate(entries):
        x, y = size + i // length * step, image.height + 2 * size + i % length * line
        box = (x, y, x + size, y + size)
        draw.rectangle(box, tuple(map(int, color)), RULE, width=max(1, size // 16))
        draw.text((x + 1.6 * size, y + size / 2), names[i], INK, font, anchor="lm")
        draw.text((x + step - gap, y + size / 2), shares[i], INK, font, anchor="rm")
    return sheet


def preview(rows: Sequence[tuple], classes: Sequence[str], palette: np.ndarray) -> Image.Image:
    """A sheet of rows (photo, truth, prediction) under column titles, with a legend of the classes seen."""
    ids = sorted({int(k) for row in rows for labels in row[1:] for k in np.unique(labels)})
    entries = [("ignored", (0, 0, 0), None) if k == IGNORE else (classes[k], palette[k], None) for k in ids]
    tiles = []
    for photo, *masks in rows:
        tiles += [_fit(photo, 400, Image.Resampling.BICUBIC)]
        tiles += [_fit(colorize(mask, palette), 400) for mask in masks]
    return with_legend(grid(tiles, ["image", "truth", "prediction"], columns=3), entries)


def strip(frames: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """A contact sheet of the flow's states, photo first and mask last, each under its caption."""
    assert len(frames) == len(captions), f"{len(frames)} frames, {len(captions)} captions"
    tiles = [_fit(frame, 256) for frame in frames]
    return ImageOps.expand(grid(tiles, captions, columns=min(6, len(tiles))), 16, PAPER)


def save_animation(path: str | Path, states: Sequence[np.ndarray]) -> None:
    """The way through the flow's states (H, W, 3) as a GIF that rests at both ends; steps are straight."""
    n = math.ceil(24 / max(1, len(states) - 1))  # frames of a step
    way = [a + (b - a) * (k / n) for a, b in pairwise(states) for k in range(n)] + [states[-1]]
    first, *rest = [_fit(state_image(x), 256) for x in way]
    save(path, first, [".gif"], rest)


def grid(tiles: Sequence[Image.Image], captions: Sequence[str], columns: int) -> Image.Image:
    """Tiles in rows, each under its caption; as many captions as columns are column titles."""
    width, height = (max(tile.size[axis] for tile in tiles) for axis in (0, 1))
    gap = int(np.clip(width / 18, 12, 40))
    font, head = ImageFont.load_default(gap), round(1.6 * gap)
    dx = gap + max(width, *(math.ceil(font.getlength(text)) for text in captions))
    dy = gap + height + (head if len(captions) > columns else 0)
    sheet = Image.new("RGB", (columns * dx - gap, head + math.ceil(len(tiles) / columns) * dy - gap), PAPER)
    for k, tile in enumerate(tiles):
        x, y = k % columns * dx, k // columns * dy
        sheet.paste(tile, (x, y + head))
        ImageDraw.Draw(sheet).text((x, y), captions[k] if k < len(captions) else "", INK, font)
    return sheet


def _fit(image: Image.Image, side: int, enlarge: Image.Resampling = Image.Resampling.NEAREST) -> Image.Image:
    """The image about `side` pixels long: enlarged by a whole factor or reduced smoothly."""
    scale = side / max(image.size)
    scale = max(1, round(scale)) if scale > 0.7 else scale
    size = [max(1, round(n * scale)) for n in image.size]
    return image.resize(size, enlarge if scale >= 1 else Image.Resampling.BOX)
