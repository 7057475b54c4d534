"""Data: label tables, photos, masks, folder data sets, the built-in scenes, augmentation, sample order.

    image   PIL RGB, upright, or (3, size, size) uint8      raw   (H, W) integers, the values stored in a mask
    labels  (H, W) uint8 train ids in [0, N), 255 = ignore

Every random draw is keyed: a scene by (seed, split, index), the order of an epoch by (seed, epoch), an
augmentation by (seed, epoch, index). Workers, ranks and resuming can therefore not change a sample.
"""

import difflib
import os
import re
import shlex
import tomllib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

IGNORE = 255  # the train id of pixels that count neither in the loss nor in the score
SPLITS = ("training", "validation", "test")
TABLES_DIR = Path(__file__).parent / "flowseg_tools/tables/labels"
TABLES = {path.stem: path for path in sorted(TABLES_DIR.glob("*.toml"))}
LAYOUT = "images/<split>/, annotations/<split>/ and dataset.toml with the line: classes = ['sky', 'road']"
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # no other decoder ever sees a user's bytes
SUFFIXES = {f".{name.lower()}": name for name in FORMATS} | {".jpg": "JPEG", ".tif": "TIFF"}
MAX_PIXELS = 250_000_000  # a larger picture is taken for a decompression bomb


class DataError(Exception):
    """A problem with the user's data in one line: given, expected, fix. One cause has one `kind`."""

    exit_code = 3

    def __init__(self, message: str, kind: str = ""):
        super().__init__(message)
        self.kind = kind

    def __str__(self) -> str:
        # A DataLoader worker's error arrives with its traceback in front; the message is the last line.
        return super().__str__().strip().rpartition("\n")[2].removeprefix(f"{__name__}.DataError: ")


class PictureError(Exception):
    """A picture that cannot be read or written, in one line: given, expected, fix."""

    exit_code = 1


def data_root(root: str | Path | None = None) -> Path:
    """Return the folder of named data sets and weights: `root`, else $FLOWSEG_DATA, else the cache."""
    return Path(root or os.environ.get("FLOWSEG_DATA") or "~/.cache/flowseg").expanduser()


def nearest(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'shapes'?" for the closest known word, or nothing."""
    match = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


def evenly_spaced(total: int, limit: int | None = None) -> list[int]:
    """Return up to `limit` evenly spaced indices below total, or all."""
    return np.unique(np.linspace(0, total - 1, min(total, limit or total)).astype(int)).tolist()


# ---- label tables ----
@dataclass(frozen=True)
class LabelTable:
    """Raw mask value -> train id -> class name. A raw value outside of it is an error, never a guess."""

    classes: tuple[str, ...]  # names in train-id order
    ids: tuple[int, ...]  # raw value of each class, 0..65535
    ignore: tuple[int, ...]  # raw values that become 255

    def to_train(self, raw: np.ndarray, where: str) -> np.ndarray:
        """Map (H, W) raw integers to (H, W) uint8 train ids; DataError names `where` and an unknown value."""
        lookup = np.zeros(65536, np.uint16)  # train id + 1; 0 stands for a value that the table lacks
        lookup[list(self.ids)] = np.arange(len(self.ids)) + 1
        lookup[list(self.ignore)] = IGNORE + 1
        if raw.min() >= 0 and raw.max() < len(lookup) and (labels := lookup[raw]).all():
            return (labels - 1).astype(np.uint8)
        value = np.setdiff1d(raw, self.ids + self.ignore)[0]
        fix = f"expected ids in {min(self.ids)}..{max(self.ids)}; add it to one list in dataset.toml"
        raise DataError(f"{where}: raw value {value} is in neither ids nor ignore; {fix}", "unknown value")


def _different(given: dict, key: str, kind: type, default: list) -> tuple:
    """Return the list under `key`, whose values must be different and of one kind; ValueError otherwise."""
    found = given.get(key, default)
    right = isinstance(found, list) and all(type(value) is kind for value in found)
    if not right or len(set(found)) < len(found):
        raise ValueError(f"{key} is {found!r}; expected a list of different {kind.__name__} values")
    return tuple(found)


def _parse_toml(path: Path) -> tuple[str, LabelTable, dict[str, str]]:
    """Return name, label table and the folder of each split; ValueError says what is wrong."""
    given = tomllib.loads(path.read_text(encoding="utf-8"))
    known = ("name", "classes", "ids", "ignore", "splits")
    for key in given:
        if key not in known:
            raise ValueError(f"unknown key {key!r}; expected {', '.join(known)}{nearest(key, known)}")
    name = given.get("name", "")
    if not isinstance(name, str):
        raise ValueError(f"name is {name!r}; expected a string")
    folders = _different(given, "splits", str, [*SPLITS])
    if len(folders) not in (2, 3):
        raise ValueError(f"splits is {list(folders)}; expected the 2 or 3 folders of {', '.join(SPLITS)}")
    classes = _different(given, "classes", str, [])
    ids = _different(given, "ids", int, [*range(len(classes))])
    ignore = _different(given, "ignore", int, [])
    if not 1 <= len(classes) <= IGNORE:
        raise ValueError(f"classes has {len(classes)} names; expected 1 to 255, since train id 255 is void")
    if len(ids) != len(classes) or any(not 0 <= value <= 65535 for value in ids + ignore):
        raise ValueError(
            f"ids has {len(ids)} values for {len(classes)} classes; expected one each in 0..65535"
        )
    if both := set(ids) & set(ignore):
        raise ValueError(f"raw values {sorted(both)} are in both ids and ignore; keep one")
    return name, LabelTable(classes, ids, ignore), dict(zip(SPLITS, folders, strict=False))


# ---- pictures ----
def read_photo(source: str | Path | bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return the photo in a file, or in its bytes, as upright 8-bit RGB; PictureError names the file.
    Transparency becomes white. Only the first frame is read; info["frames"] is the number of frames."""
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, max_pixels)  # Pillow's own limit is only raised
    where = "standard input" if isinstance(source, bytes) else source
    try:
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
        image = Image.open(BytesIO(content), formats=FORMATS)
        if image.width * image.height > max_pixels:
            raise Image.DecompressionBombError(f"{image.width} x {image.height}")
        image.load()  # here, outside of the suppression below, so that damaged pixels are an error
        with suppress(Exception):  # damaged EXIF costs the turn, not the photo
            ImageOps.exif_transpose(image, in_place=True)
        photo = _to_rgb(image)
        with suppress(Exception):  # frames are counted in another object, because counting leaves the first
            photo.info["frames"] = Image.open(BytesIO(content), formats=FORMATS).n_frames
        return photo
    except Image.DecompressionBombError as error:
        fix = f"over {max_pixels:,} pixels; if you trust it, raise --max-pixels (max_pixels)"
        raise PictureError(f"{where}: {error}, which is {fix}") from error
    except Exception as error:  # decoders raise anything on damaged bytes
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, UnidentifiedImageError):
            reason = "not a picture" if content else "empty file"
        raise PictureError(f"{where}: cannot be read ({reason}); give a {', '.join(FORMATS)} file") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB: transparency becomes white, more than 8 bits are scaled to 8."""
    if image.mode[0] in "IF":  # integers and floats, which Pillow would clip at 255
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        peak = 65535 if image.mode.startswith("I;") else values.max()
        full = next((top for top in (1, 255, 65535) if peak <= top), peak)  # a guess, but for I;16
        image = Image.fromarray(np.rint((values / full).clip(0, 1) * 255).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def read_mask(path: Path) -> np.ndarray:
    """Return the raw values (H, W) of a mask, of a palette image its indices; DataError names the file."""
    if path.suffix.lower() in (".jpg", ".jpeg"):
        raise DataError(f"{path}: a mask saved as JPEG, which changes its values; save masks as PNG", "JPEG")
    try:
        with Image.open(path) as image:
            mask = ImageOps.exif_transpose(image)
    except Exception as error:  # decoders raise anything on damaged bytes
        raise DataError(f"{path}: cannot be read ({error}); replace or remove it", "damaged mask") from None
    if mask.mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
        fix = "expected one value per pixel; save it as 8-bit grey or palette PNG"
        raise DataError(f"{path}: a mask saved as {mask.mode}; {fix}", f"mode {mask.mode}")
    return np.array(mask, np.int32 if mask.mode.startswith("I") else np.uint8)


# ---- folder data sets ----
def _by_stem(folder: Path) -> dict[str, Path]:
    """Return the pictures below a folder by relative path without suffix, in natural order, none hidden."""
    found: dict[str, Path] = {}
    order = {path: re.sub(r"\d+", lambda n: n[0].zfill(20), str(path)) for path in folder.rglob("*")}
    for path in sorted(order, key=lambda path: (order[path], path)):  # a2 before a10
        name = path.relative_to(folder)
        if path.suffix.lower() not in SUFFIXES or any(part.startswith(".") for part in name.parts):
            continue
        if (other := found.setdefault(name.with_suffix("").as_posix(), path)) != path:
            raise DataError(f"{path}: has the same stem as {other.name}; keep one of them")
    return found


class FolderDataset:
    """The pairs of images/<split>/ and annotations/<split>/ with equal stems, and dataset.toml, or `toml`.
    What is missing raises DataError; if not `strict`, `unpaired` has a line for each kind of it."""

    augment = True

    def __init__(self, root: Path, split: str, strict: bool = True, toml: Path | None = None):
        root = Path(root)
        toml = toml or root / "dataset.toml"
        if not toml.is_file():
            raise DataError(f"{root}: has no dataset.toml; expected a folder with {LAYOUT}")
        try:
            name, self.labels, folders = _parse_toml(toml)
        except ValueError as error:
            raise DataError(f"{toml}: {error}") from None
        self.name = name or root.resolve().name
        self.split = split
        self.splits = tuple(folders)
        if split not in folders:
            raise DataError(f"{self.name} has no {split} split; expected {' or '.join(folders)}")

        dirs = [root / kind / folders[split] for kind in ("images", "annotations")]
        images, masks = (_by_stem(folder) for folder in dirs)
        self.pairs = [(images[stem], masks[stem]) for stem in images if stem in masks]

        # What is missing: a folder, all images, or the partners of some files.
        self.unpaired = []
        absent = [folder for folder in dirs if not folder.is_dir()]
        if absent:
            fix = f"make it, or name the folders by splits in {toml}"
            if toml in TABLES.values():
                place = "" if root.parent == data_root() else f" --root {shlex.quote(str(root.parent))}"
                fix = f"run flowseg download {toml.stem}{place}"
            self.unpaired = [f"{absent[0]}: no such folder; {fix}"]
        elif not images:
            self.unpaired = [f"{dirs[0]}: holds no image; expected a.jpg, say, with {dirs[1]}/a.png"]
        else:
            for files, partners, place in ((images, masks, dirs[1]), (masks, images, dirs[0])):
                alone = [path for stem, path in files.items() if stem not in partners]
                count = f"{len(alone)} of {len(files)} files have none"
                self.unpaired += [f"{path}: no file of its stem in {place}; {count}" for path in alone[:1]]
        if strict and (not self.pairs or len(self.pairs) < len(images)):
            raise DataError(self.unpaired[0])

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """Return image and labels (H, W) of one pair; DataError names the file."""
        image, raw, where = self.read(index)
        return image, self.labels.to_train(raw, where)

    def read(self, index: int) -> tuple[Image.Image, np.ndarray, str]:
        """Return the image, its raw mask (H, W), which must have its size, and the mask's path."""
        image_path, mask_path = self.pairs[index]
        try:
            image = read_photo(image_path)
        except PictureError as error:
            raise DataError(str(error), "unreadable image") from None
        raw = read_mask(mask_path)
        if image.size != raw.shape[::-1]:
            sizes = "the image is {} x {} pixels, its mask {} x {}".format(*image.size, *raw.shape[::-1])
            raise DataError(f"{image_path}: {sizes}; export the mask again, in equal size", "different sizes")
        return image, raw, str(mask_path)


# ---- the built-in scenes ----
# Array arithmetic is + - * / sqrt, floor and comparisons only: IEEE 754 makes these equal on every machine.
SIDE = 96  # pixels
Y, X = np.mgrid[:SIDE, :SIDE].astype(np.float32)


def _wave(x: np.ndarray) -> np.ndarray:
    """Return a triangle wave of period 1 in [0, 1], which is 1 at the integers."""
    return 2 * abs(x - np.floor(x) - 0.5)


def _r(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the distance from 0."""
    return np.sqrt(x * x + y * y)


def _mortar(u: np.ndarray, v: np.ndarray, period: float) -> np.ndarray:
    """Return lines between bricks that are one period wide and half a period high."""
    across = _wave(u + 0.5 * (np.floor(2 * v) % 2))
    return 1.6 - np.minimum(1 - across, (1 - _wave(2 * v)) / 2) * period / 2


def _sides(u: np.ndarray, v: np.ndarray, n: int) -> np.ndarray:
    """Return the distances to the n sides of a regular polygon about 0, ascending: (n, H, W)."""
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
    "dots": lambda u, v, p, rng: (0.31 - _r(u - np.floor(u) - 0.5, v - np.floor(v) - 0.5)) * p + 0.5,
    "bricks": lambda u, v, p, rng: _mortar(0.7 * u, 0.7 * v, p / 0.7),
}
# Things: signed distance in radii, negative inside, v pointing down.
THINGS = {
    "disc": lambda u, v: _r(u, v) - 0.85,
    "triangle": lambda u, v: _sides(u, v, 3)[-1] - 0.6,
    "star": lambda u, v: _sides(u, -v, 5)[-2] - 0.4,  # a point of a star is outside of one side at most
    "ring": lambda u, v: abs(_r(u, v) - 0.75) - 0.25,
    "cross": lambda u, v: np.maximum(np.minimum(abs(u), abs(v)) - 0.3, np.maximum(abs(u), abs(v)) - 1),
    "heart": lambda u, v: np.minimum((abs(u) + abs(v - 0.05)) * 0.7071, _r(abs(u) - 0.45, v + 0.4)) - 0.6364,
    "crescent": lambda u, v: np.maximum(_r(u, v) - 1.05, 0.85 - _r(u - 0.6, v)),
}
HUES = ("red", "amber", "lime", "green", "cyan", "blue", "violet", "pink")


def _rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    """Convert HSV in [0, 1] to (3, 1, 1) RGB in [0, 1]."""
    pure = np.clip(abs((6 * hue + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return (value * (1 - saturation * (1 - pure))).astype(np.float32)[:, None, None]


def _turned(rng: np.random.Generator, limit: float) -> tuple[np.ndarray, np.ndarray]:
    """Return pixel coordinates about a random point, turned by at most 2 atan(limit)."""
    t = rng.uniform(-limit, limit)
    cx, cy = np.float32(rng.uniform(10, SIDE - 10, 2))
    cos = np.float32((1 - t * t) / (1 + t * t))
    sin = np.float32(2 * t / (1 + t * t))
    return cos * (X - cx) + sin * (Y - cy), cos * (Y - cy) - sin * (X - cx)


def _voronoi(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return weighted squared distance to, and number of, the nearest of `count` random points."""
    x, y = np.float32(rng.uniform(0, SIDE, (2, count, 1, 1)))
    distance = ((X - x) ** 2 + (Y - y) ** 2) * np.float32(rng.uniform(0.7, 1.4, (count, 1, 1)))
    return distance.min(0), distance.argmin(0)


def _ground(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw two or three textured regions: canvas (3, H, W) in [0, 1] and fine labels (H, W)."""
    canvas = np.zeros((3, SIDE, SIDE), np.float32)
    labels = np.zeros((SIDE, SIDE), np.uint8)
    kinds = rng.permutation(len(GROUND))[: rng.integers(2, 4)]
    region = _voronoi(rng, len(kinds))[1]
    for number, kind in enumerate(kinds):
        hue = rng.random()
        values = rng.permuted([rng.uniform(0.25, 0.5), rng.uniform(0.65, 0.95)])
        first = _rgb(hue, rng.uniform(0.3, 0.7), values[0])
        second = _rgb(hue + rng.uniform(-0.06, 0.06), rng.uniform(0.2, 0.6), values[1])
        period = np.float32(rng.uniform(7, 11))
        u, v = _turned(rng, 1)
        share = np.clip([*GROUND.values()][kind](u / period, v / period, period, rng), 0, 1)
        canvas = np.where(region == number, first + (second - first) * share, canvas)
        labels[region == number] = kind * len(HUES) + int(hue * len(HUES) + 0.5) % len(HUES)
    return canvas, labels


def _thing(canvas: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> None:
    """Paint one object with a shadow and a bevelled edge over what is there."""
    kind = rng.integers(len(THINGS))
    radius = np.float32(rng.uniform(13, 25))
    hue = (kind + rng.uniform(-2, 2)) / len(THINGS) % 1  # a weak hint, as in nature
    u, v = (c / radius for c in _turned(rng, 0.15))
    distance = [*THINGS.values()][kind](u, v) * radius  # in pixels, so clip(0.5 - distance) is antialiased
    canvas[:, 3:, 2:] *= 1 - 0.5 * np.clip(0.5 - distance[:-3, :-2] / 5, 0, 1)
    shade = np.clip(0.7 - distance / 12, 0.7, 1) - 0.15 * (u + v)
    colour = _rgb(hue, rng.uniform(0.5, 0.95), rng.uniform(0.7, 1)) * shade
    canvas += np.clip(0.5 - distance, 0, 1) * (colour - canvas)
    labels[distance < 0] = (len(GROUND) + kind) * len(HUES) + int(hue * len(HUES) + 0.5) % len(HUES)


def _scene(rng: np.random.Generator) -> tuple[Image.Image, np.ndarray]:
    """Draw ground, specks and three or four things: RGB 96 x 96 and fine labels, class * 8 + hue."""
    canvas, labels = _ground(rng)

    # Specks of all colours keep the label of their ground.
    count = rng.integers(6, 14)
    distance, number = _voronoi(rng, count)
    hsv = rng.uniform((0, 0.3, 0.3), (1, 0.9, 1), (count, 3))
    colours = np.stack([_rgb(*row)[:, 0, 0] for row in hsv], axis=1)
    radii = np.float32(rng.uniform(1, 2.8, count))
    canvas += np.clip(radii[number] + 0.5 - np.sqrt(distance), 0, 1) * (colours[:, number] - canvas)
    for _ in range(rng.integers(3, 5)):
        _thing(canvas, labels, rng)

    # The camera: light from one side, and sensor noise.
    slope = np.float32(rng.uniform(-0.25, 0.25, 2)) / (SIDE / 2)
    noise = rng.random((2, *canvas.shape), np.float32)
    canvas *= 1 + (slope[0] * (X - SIDE / 2) + slope[1] * (Y - SIDE / 2))
    canvas += (noise[0] - noise[1]) * np.float32(rng.uniform(0.04, 0.12))
    pixels = (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(np.moveaxis(pixels, 0, 2))), labels


class ShapesDataset:
    """Shaded things on textured ground, endless and without files; `fine` splits every class by its hue."""

    augment = False
    unpaired = ()
    splits = SPLITS

    def __init__(self, split: str, fine: bool = False, seed: int = 0):
        self.name = "shapes-fine" if fine else "shapes"
        self.split = split
        self.fine = fine
        self.seed = seed
        names = [*GROUND, *THINGS]  # the class is the texture or the form, not the colour
        if fine:
            names = [f"{hue} {name}" for name in names for hue in HUES]
        self.labels = LabelTable(tuple(names), tuple(range(len(names))), (IGNORE,))

    def __len__(self) -> int:
        return 1_000_000 if self.split == "training" else 200

    __getitem__ = FolderDataset.__getitem__  # read, then map to train ids

    def read(self, index: int) -> tuple[Image.Image, np.ndarray, str]:
        """Draw a scene and return it with its train ids (96, 96) as raw values, and a name for it."""
        where = f"{self.name}/{self.split}/{index}"
        if not 0 <= index < len(self):
            raise IndexError(f"{where}: expected an index below {len(self)}")
        image, fine = _scene(np.random.default_rng([self.seed, SPLITS.index(self.split), index]))
        return image, fine if self.fine else fine // len(HUES), where


Dataset = FolderDataset | ShapesDataset


def open_dataset(dataset: str, split: str, root: Path | None = None, strict: bool = True) -> Dataset:
    """Open "shapes", "shapes-fine", a folder below the data root, whose own dataset.toml wins, or a path."""
    if split not in SPLITS:
        raise DataError(f"split {split!r} is unknown; expected {', '.join(SPLITS)}{nearest(split, SPLITS)}")
    if dataset in ("shapes", "shapes-fine"):
        return ShapesDataset(split, fine=dataset == "shapes-fine")
    root = data_root(root)
    own = (root / dataset / "dataset.toml").is_file()
    if own or dataset in TABLES:
        return FolderDataset(root / dataset, split, strict, None if own else TABLES[dataset])
    if (folder := Path(dataset).expanduser()).is_dir():
        return FolderDataset(folder, split, strict)
    known = ["shapes", "shapes-fine", *TABLES, *(path.parent.name for path in root.glob("*/dataset.toml"))]
    hint = f"expected {', '.join(known)} or a folder with {LAYOUT}{nearest(dataset, known)}"
    raise DataError(f"data set {dataset!r} not found; {hint}")


# ---- training samples ----
def augment(image: Image.Image, labels: np.ndarray, size: int, rng: np.random.Generator) -> tuple:
    """Resize, crop, distort and flip at random: PIL RGB and (size, size) uint8, padded by 127 and 255."""
    # The short side becomes 0.5 to 2 times the crop; labels are taken by the nearest row and column.
    H, W = labels.shape
    scale = size * rng.uniform(0.5, 2.0) / min(H, W)
    h, w = (max(1, round(side * scale)) for side in (H, W))
    rows, columns = (((np.arange(n) + 0.5) * (N / n)).astype(np.intp) for n, N in ((h, H), (w, W)))

    # The window is chosen on labels alone: in ten tries, one class should fill at most three quarters.
    for _ in range(10):
        top = rng.integers(max(h - size, 0) + 1)
        left = rng.integers(max(w - size, 0) + 1)
        window = labels[rows[top : top + size]].take(columns[left : left + size], axis=1)
        counts = np.bincount(window.ravel(), minlength=256)[:IGNORE]
        if 0 < counts.max() <= 0.75 * counts.sum():
            break

    # Only the window's part of the image is ever resized.
    height, width = window.shape
    box = (left * W / w, top * H / h, (left + width) * W / w, (top + height) * H / h)
    image = distort(image.resize((width, height), Image.Resampling.BILINEAR, box), rng)
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
        window = window[:, ::-1]
    image = ImageOps.expand(image, (0, 0, size - width, size - height), (127, 127, 127))
    return image, np.pad(window, ((0, size - height), (0, size - width)), constant_values=IGNORE)


def distort(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Vary brightness (+-32), contrast and saturation (0.5-1.5), hue (+-18 of 180), each half of the time."""

    def maybe(low: float, high: float, neutral: float) -> float:
        return rng.uniform(low, high) if rng.random() < 0.5 else neutral

    def table(curve: np.ndarray) -> list[int]:
        return np.clip(curve, 0, 255).astype(int).tolist()

    brightness = maybe(-32, 32, 0)
    contrast = maybe(0.5, 1.5, 1)
    early = rng.random() < 0.5  # contrast before saturation and hue
    saturation = maybe(0.5, 1.5, 1)
    hue = maybe(-18, 18, 0) * 256 / 180  # Pillow's hue has 256 values

    ramp = np.arange(256.0)
    tone = np.clip(ramp + brightness, 0, 255) * (contrast if early else 1)
    image = image.point(3 * table(tone))
    if saturation != 1 or hue != 0:
        bands = table((ramp + hue) % 256) + table(ramp * saturation) + table(ramp)
        image = image.convert("HSV").point(bands).convert("RGB")
    return image if early else image.point(3 * table(ramp * contrast))


@dataclass
class Stream:
    """Endless training samples by global position: the same (seed, position) is the same sample, anywhere."""

    dataset: Dataset
    size: int  # pixels
    seed: int
    epoch: int = -1  # that `order` belongs to
    order: np.ndarray | None = None

    def __getitem__(self, position: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Return image (3, size, size) uint8, labels (size, size) uint8, index; DataError names the file."""
        epoch, offset = divmod(int(position), len(self.dataset))
        if epoch != self.epoch:
            self.order = np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))
            self.epoch = epoch
        index = int(self.order[offset])
        image, labels = self.dataset[index]
        if self.dataset.augment:
            rng = np.random.default_rng([self.seed, epoch, index])
            image, labels = augment(image, labels, self.size, rng)
        elif image.size != (self.size, self.size):
            image = ImageOps.fit(image, (self.size, self.size), Image.Resampling.BILINEAR)
            labels = ImageOps.fit(Image.fromarray(labels), (self.size, self.size), Image.Resampling.NEAREST)
        return np.ascontiguousarray(np.moveaxis(np.asarray(image), 2, 0)), np.array(labels), index
