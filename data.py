"""Data: label tables, folder data sets, the built-in procedural `shapes`, augmentation and sample order.

    image   PIL RGB, upright, or (3, H, W) uint8        labels  (H, W) uint8 train ids in [0, N), 255 = ignore

One table maps raw mask values to train ids to names; a raw value outside it is an error, never a guess.
Every random draw is keyed: a scene by (seed, split, index), the order of an epoch by (seed, epoch), an
augmentation by (seed, epoch, index). Workers, ranks and resuming can therefore not change a sample.
"""

import difflib
import re
import tomllib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from download import advice, data_root
from picture import SUFFIXES, PictureError, read_photo
from shapes import GROUND, HUES, THINGS, scene

IGNORE = 255
SPLITS = ("training", "validation", "test")
TABLES = {path.stem: path for path in sorted(Path(__file__).parent.glob("flowseg_data/labels/*.toml"))}
EXAMPLE = "images/<split>/, annotations/<split>/ and dataset.toml with the line: classes = ['sky', 'road']"


class DataError(Exception):
    """A problem with the user's data; the message is one line: given, expected, fix."""

    exit_code = 3

    def __str__(self) -> str:
        # A DataLoader worker's error returns with its traceback in front; the message is the last line.
        return super().__str__().strip().rpartition("\n")[2].removeprefix(f"{__name__}.DataError: ")


@dataclass(frozen=True)
class LabelTable:
    """Raw mask value -> train id -> class name."""

    classes: tuple[str, ...]  # names in train-id order
    ids: tuple[int, ...]  # raw value of each class, 0..65535
    ignore: tuple[int, ...]  # raw values that become 255

    def to_train(self, raw: np.ndarray, where: str) -> np.ndarray:
        """(H, W) raw integers -> (H, W) uint8 train ids; DataError names `where` and the unknown value."""
        lookup = np.full(max(*self.ids, *self.ignore, 255) + 2, -1, np.int16)  # the last: all values beyond
        lookup[list(self.ids)] = np.arange(len(self.ids))
        lookup[list(self.ignore)] = IGNORE
        last = len(lookup) - 1
        labels = lookup[raw if raw.dtype == np.uint8 else np.where((raw < 0) | (raw > last), last, raw)]
        if labels.min() < 0:
            fix = f"expected ids in {min(self.ids)}..{max(self.ids)}; add it to one list in dataset.toml"
            raise DataError(f"{where}: raw value {raw[labels < 0][0]} is in neither ids nor ignore; {fix}")
        return labels.astype(np.uint8)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'shapes'?" for the closest known word, or nothing."""
    match = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


def _parse_toml(text: str) -> tuple[dict, LabelTable, dict[str, str]]:
    """Return all keys, label table and the folder name of each split; ValueError says what is wrong."""
    given, known = tomllib.loads(text), ("name", "classes", "ids", "ignore", "splits")
    for key in given:
        if key not in known:
            raise ValueError(f"unknown key {key!r}; expected {', '.join(known)}{nearest(key, known)}")

    def values(key: str, kind: type, default: list) -> tuple:
        found = given.get(key, default)
        good = isinstance(found, list) and all(type(value) is kind for value in found)
        if not good or len(set(found)) < len(found):
            raise ValueError(f"{key} must be a list of different {kind.__name__} values, not {found!r}")
        return tuple(found)

    classes, ignore = values("classes", str, []), values("ignore", int, [])
    ids, splits = values("ids", int, [*range(len(classes))]), values("splits", str, [*SPLITS])
    if not 1 <= len(classes) <= IGNORE:
        raise ValueError(f"classes has {len(classes)} names; expected 1 to 255, since train id 255 is void")
    if len(ids) != len(classes) or not all(0 <= value < 65536 for value in ids + ignore):
        raise ValueError(f"{len(ids)} ids for {len(classes)} classes; expected one each, all within 0..65535")
    if both := set(ids) & set(ignore):
        raise ValueError(f"raw values {sorted(both)} are in both ids and ignore; keep one")
    if len(splits) not in (2, 3) or not isinstance(given.get("name", ""), str):
        raise ValueError(f"name is a string, splits the 2 or 3 folders of {', '.join(SPLITS)}")
    return given, LabelTable(classes, ids, ignore), dict(zip(SPLITS, splits, strict=False))


def read_mask(path: Path) -> np.ndarray:
    """Read a mask's raw values as (H, W) integers; a palette image gives its indices."""
    if path.suffix.lower() in (".jpg", ".jpeg"):
        raise DataError(f"{path}: a mask saved as JPEG, which changes its values; save masks as PNG")
    try:
        with Image.open(path) as image:
            mask = ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow's decoders raise a dozen kinds; each means this file
        raise DataError(f"{path}: cannot be read ({error}); replace or remove it") from None
    if mask.mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
        wanted = "one value per pixel; save it as 8-bit grey or palette PNG"
        raise DataError(f"{path}: a mask saved as {mask.mode}; expected {wanted}")
    return np.array(mask, np.int32 if mask.mode.startswith("I") else np.uint8)


def _by_stem(folder: Path) -> dict[str, Path]:
    """Image files below a folder by relative path without suffix, in natural order, hidden files skipped."""
    found: dict[str, Path] = {}
    files = [(re.sub(r"\d+", lambda n: n[0].zfill(20), str(path)), path) for path in folder.rglob("*")]
    for _, path in sorted(files):  # a2 before a10
        name = path.relative_to(folder)
        if path.suffix.lower() not in SUFFIXES or any(part.startswith(".") for part in name.parts):
            continue
        other = found.setdefault(name.with_suffix("").as_posix(), path)
        if other != path:
            raise DataError(f"{path}: has the same stem as {other.name}; keep one of them")
    return found


class Folder:
    """images/<split>/ and annotations/<split>/ with equal stems, and dataset.toml, or `toml` in its place;
    what is missing raises DataError, or if not `strict` is listed in `unpaired`."""

    augment = True

    def __init__(self, root: Path, split: str, strict: bool = True, toml: Path | None = None):
        toml = toml or Path(root) / "dataset.toml"
        if not toml.is_file():
            raise DataError(f"{root}: has no dataset.toml; expected a folder with {EXAMPLE}")
        try:
            given, self.labels, folders = _parse_toml(toml.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{toml}: {error}") from None
        self.name, self.split, self.splits = given.get("name") or Path(root).resolve().name, split, [*folders]
        if split not in folders:
            raise DataError(f"{self.name} has no {split} split; expected {' or '.join(folders)}")
        dirs = [Path(root) / kind / folders[split] for kind in ("images", "annotations")]
        own = f"make it, or name the folders by splits in {toml}"
        fix = advice(toml.stem, Path(root).parent) if toml in TABLES.values() else own
        images, masks = map(_by_stem, dirs)
        self.pairs = [(images[stem], masks[stem]) for stem in images if stem in masks]
        self.unpaired = [f"{folder}: no such folder; {fix}" for folder in dirs if not folder.is_dir()][:1]
        if not self.unpaired and not images:
            self.unpaired = [f"{dirs[0]}: holds no image; expected files such as a.jpg with {dirs[1]}/a.png"]
        missing = (images, masks, "annotation", dirs[1]), (masks, images, "image", dirs[0])
        for files, others, kind, folder in () if self.unpaired else missing:
            alone = [path for stem, path in files.items() if stem not in others]
            lack = f"no {kind} with the same stem in {folder}; {len(alone)} of {len(files)} files have none"
            self.unpaired += [f"{path}: {lack}" for path in alone[:1]]
        if strict and len(self.pairs) < max(1, len(images)):
            raise DataError(self.unpaired[0])

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Image.Image, np.ndarray]:
        image, raw, where = self.read(index)
        return image, self.labels.to_train(raw, where)

    def read(self, index: int) -> tuple[Image.Image, np.ndarray, str]:
        """Read the image, its raw mask (H, W), which must have its size, and the mask's path."""
        try:
            image, raw = read_photo(self.pairs[index][0]), read_mask(self.pairs[index][1])
        except PictureError as error:
            raise DataError(str(error)) from None
        if image.size != raw.shape[::-1]:
            sizes = "its mask is {1} x {0}, the image {2} x {3} pixels".format(*raw.shape, *image.size)
            raise DataError(f"{self.pairs[index][0]}: {sizes}; expected equal sizes; export the mask again")
        return image, raw, str(self.pairs[index][1])


class Shapes:
    """Things on textured ground, endless and without files; classes by form and texture, not by colour."""

    augment, unpaired, splits = False, (), SPLITS

    def __init__(self, split: str, fine: bool = False, seed: int = 0):
        self.name, self.split, self.fine, self.seed = "shapes-fine" if fine else "shapes", split, fine, seed
        names = [f"{hue} {name}".strip() for name in (*GROUND, *THINGS) for hue in (HUES if fine else [""])]
        self.labels = LabelTable(tuple(names), tuple(range(len(names))), (IGNORE,))

    def __len__(self) -> int:
        return 1_000_000 if self.split == "training" else 200

    __getitem__ = Folder.__getitem__  # read, then to train ids

    def read(self, index: int) -> tuple[Image.Image, np.ndarray, str]:
        """Draw a scene; its raw values are its train ids."""
        where = f"{self.name}/{self.split}/{index}"
        if not 0 <= index < len(self):
            raise IndexError(f"{where}: expected an index below {len(self)}")
        image, fine = scene(np.random.default_rng([self.seed, SPLITS.index(self.split), index]))
        return image, fine if self.fine else fine // len(HUES), where


def open_dataset(dataset: str, split: str, root: Path | None = None, strict: bool = True) -> Folder | Shapes:
    """Open "shapes", "shapes-fine", a folder below the data root, whose own dataset.toml wins over the table
    shipped for its name, or a path; DataError otherwise."""
    if split not in SPLITS:
        raise DataError(f"split {split!r} is unknown; expected {', '.join(SPLITS)}{nearest(split, SPLITS)}")
    if dataset in ("shapes", "shapes-fine"):
        return Shapes(split, fine=dataset == "shapes-fine")
    root = data_root(root)
    own = (root / dataset / "dataset.toml").is_file()
    if own or dataset in TABLES:
        return Folder(root / dataset, split, strict, None if own else TABLES[dataset])
    if (folder := Path(dataset).expanduser()).is_dir():
        return Folder(folder, split, strict)
    known = ["shapes", "shapes-fine", *TABLES, *(path.parent.name for path in root.glob("*/dataset.toml"))]
    hint = f"expected {', '.join(known)} or a folder with {EXAMPLE}{nearest(dataset, known)}"
    raise DataError(f"data set {dataset!r} not found; {hint}")


def augment(image: Image.Image, labels: np.ndarray, size: int, rng: np.random.Generator) -> tuple:
    """Random resize, crop, distortion and flip -> (PIL RGB, (size, size) uint8); padding is 127 and 255."""
    H, W = labels.shape
    scale = size * rng.uniform(0.5, 2.0) / min(H, W)
    h, w = max(1, round(H * scale)), max(1, round(W * scale))
    rows, columns = (((np.arange(n) + 0.5) * (N / n)).astype(np.intp) for n, N in ((h, H), (w, W)))

    # The window is chosen on labels alone, and only its part of the image is ever resized.
    for _ in range(10):
        top, left = rng.integers(max(h - size, 0) + 1), rng.integers(max(w - size, 0) + 1)
        window = labels[rows[top : top + size]].take(columns[left : left + size], axis=1)
        counts = np.bincount(window.ravel(), minlength=256)[:IGNORE]
        if 0 < counts.max() <= 0.75 * counts.sum():
            break
    bottom, right = top + window.shape[0], left + window.shape[1]
    box = (left * W / w, top * H / h, right * W / w, bottom * H / h)
    image = distort(image.resize((right - left, bottom - top), Image.Resampling.BILINEAR, box), rng)

    if rng.random() < 0.5:
        image, window = ImageOps.mirror(image), window[:, ::-1]
    below, beside = size - window.shape[0], size - window.shape[1]
    image = ImageOps.expand(image, (0, 0, beside, below), (127,) * 3)
    return image, np.pad(window, ((0, below), (0, beside)), constant_values=IGNORE)


def distort(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Brightness +-32, contrast and saturation 0.5-1.5, hue +-18 of 180, each half of the time."""

    def maybe(low: float, high: float, neutral: float) -> float:
        return rng.uniform(low, high) if rng.random() < 0.5 else neutral

    brightness, contrast, early = maybe(-32, 32, 0), maybe(0.5, 1.5, 1), rng.random() < 0.5
    saturation, hue = maybe(0.5, 1.5, 1), maybe(-18, 18, 0) * 256 / 180
    ramp = np.arange(256.0)
    tone = np.clip(ramp + brightness, 0, 255) * (contrast if early else 1)
    image = image.point(3 * _bytes(tone))
    if saturation != 1 or hue != 0:
        bands = _bytes((ramp + hue) % 256) + _bytes(ramp * saturation) + _bytes(ramp)
        image = image.convert("HSV").point(bands).convert("RGB")
    return image if early else image.point(3 * _bytes(ramp * contrast))


def _bytes(curve: np.ndarray) -> list[int]:
    return np.clip(curve, 0, 255).astype(int).tolist()


class Stream:
    """Endless training samples by global position: the same (seed, position) is the same sample, anywhere."""

    def __init__(self, dataset: Folder | Shapes, size: int, seed: int):
        self.dataset, self.size, self.seed = dataset, size, seed
        self.epoch, self.order = -1, np.empty(0, np.int64)

    def __getitem__(self, position: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Return image (3, size, size) uint8, labels (size, size) uint8, index; DataError names the file."""
        epoch, offset = divmod(int(position), len(self.dataset))
        if epoch != self.epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))
            self.epoch, self.order = epoch, order
        index = int(self.order[offset])
        image, labels = self.dataset[index]
        if self.dataset.augment:
            rng = np.random.default_rng([self.seed, epoch, index])
            image, labels = augment(image, labels, self.size, rng)
        elif image.size != (self.size, self.size):
            image = ImageOps.fit(image, (self.size, self.size), Image.Resampling.BILINEAR)
            labels = ImageOps.fit(Image.fromarray(labels), (self.size, self.size), Image.Resampling.NEAREST)
        return np.ascontiguousarray(np.moveaxis(np.asarray(image), 2, 0)), np.array(labels), index


def evenly_spaced(total: int, limit: int | None = None) -> list[int]:
    """Up to `limit` evenly spaced indices below total, or all."""
    return np.unique(np.linspace(0, total - 1, min(total, limit or total)).astype(int)).tolist()


def problems(dataset: Folder | Shapes, limit: int | None = None) -> tuple[dict, list[str]]:
    """Read up to `limit` evenly spaced samples, or all: counts, and one line for every kind of problem.

    Counts: images, checked, pixels by train id, ignored pixels. A line: first file, what, how many, fix.
    """
    total, pixels, errors = len(dataset), Counter(), {}
    indices = evenly_spaced(total, limit)
    for index in indices:
        try:
            _, raw, where = dataset.read(index)
            pixels.update(dict(zip(*(a.tolist() for a in np.unique(raw, return_counts=True)), strict=True)))
            dataset.labels.to_train(raw, where)
        except DataError as error:  # one kind: the words after the file's name, up to a number or a bracket
            errors.setdefault(re.split(r"[\d(]", str(error).partition(": ")[2])[0], []).append(str(error))
    found = [first + f" (and {len(more)} more such files)" * bool(more) for first, *more in errors.values()]
    ids, ignored = ([pixels[raw] for raw in raws] for raws in (dataset.labels.ids, dataset.labels.ignore))
    counts = {"images": total, "checked": len(indices), "pixels": ids, "ignored": sum(ignored)}
    return counts, [*dataset.unpaired, *_hints(set(pixels), dataset.labels), *found]


def _hints(values: set[int], table: LabelTable) -> list[str]:
    """Recognise the usual wrong tables from the raw values that occur, and spell out the fix."""
    N, unknown = len(table.classes), values.difference(table.ids, table.ignore)
    if values == {0, 255} and 255 not in table.ids:
        return ["only the values 0 and 255 occur, an on/off mask; write ids = [0, 255] for its two classes"]
    if table.ids == (*range(N),) and N in unknown and max(values - {IGNORE}, default=0) == N:
        zero = ", and ignore = [0] if 0 means unlabelled" if 0 in values else ""
        return [f"ids start at 1: values run to {N} for {N} classes; write ids = {[*range(1, N + 1)]}{zero}"]
    if len(unknown) > 8:
        fix = "save masks as PNG and resize by nearest neighbour, or list all classes"
        return [f"{len(unknown)} stray values, as after JPEG or a smooth resize; {fix}"]
    return ["255 occurs, which usually means unlabelled; then write ignore = [255]"] if 255 in unknown else []
