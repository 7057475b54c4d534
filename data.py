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
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from importlib import import_module
from io import BytesIO
from pathlib import Path
from unicodedata import normalize

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

IGNORE = 255  # the train id of pixels that count neither in the loss nor in the score
SPLITS = ("training", "validation", "test")
TABLES_DIR = Path(__file__).parent / "flowseg_tools/tables"
TABLES = {path.stem: path for path in sorted(TABLES_DIR.glob("labels/*.toml"))}
FOREIGN, BEGINNINGS = tomllib.loads((TABLES_DIR / "foreign.toml").read_text()).values()  # what is not read
KEYS = {"name": "", "classes": [], "ids": [], "ignore": [], "splits": [], "validation": 0.0,
        "colors": [], "clear": [],
        "images": "images/{split}/*", "masks": "annotations/{split}/*"}  # fmt: skip
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")  # no other decoder ever sees a user's bytes
SUFFIXES = {f".{name.lower()}": name for name in FORMATS} | {
    ".jpg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG", ".tif": "TIFF"}  # fmt: skip
CONVERT = "convert photos to JPEG, masks to PNG"
LOSSY = {"JPEG", "MPO", "AVIF", "HEIF", "jpeg", "tiff_jpeg", "webp"}  # formats, and compressions of a TIFF
LITTER = ("@eaDir", "#recycle", "$RECYCLE.BIN", "__MACOSX", "lost+found")  # folders that systems make
MAX_PIXELS = 250_000_000  # a larger picture is taken for a decompression bomb
MANY_BYTES = 256_000_000  # a larger file is read only if it begins like a picture


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
    ids: tuple[int | str, ...]  # raw value of each class: all numbers in 0..65535, or all colours "#rrggbb"
    ignore: tuple[int | str, ...]  # raw values that become 255
    colors: tuple[str, ...] = ()  # of the classes in pictures; none: those of the centroids
    clear: tuple[str, ...] = ()  # classes that overlays leave as they are

    @property
    def colours(self) -> bool:
        return isinstance(self.ids[0], str)

    @property
    def values(self) -> np.ndarray:
        """The numbers of ids, then of ignore; that of the colour "#rrggbb" is 0xRRGGBB."""
        return np.array([int(str(raw).replace("#", "0x"), 0) for raw in self.ids + self.ignore])

    @cached_property
    def _lookup(self) -> np.ndarray:
        """Train id + 1 of every number, or 0 where the table has none."""
        lookup = np.zeros(1 << 24 if self.colours else 1 << 16, np.uint16)
        lookup[self.values] = IGNORE + 1
        lookup[self.values[: len(self.ids)]] = np.arange(len(self.ids)) + 1
        return lookup

    def to_train(self, raw: np.ndarray, where: str) -> np.ndarray:
        """Map (H, W) raw numbers to (H, W) uint8 train ids; DataError names `where` and an unknown value."""
        if raw.min() >= 0 and raw.max() < len(self._lookup) and (labels := self._lookup.take(raw)).all():
            return (labels - 1).astype(np.uint8)
        values = self.values
        value = np.setdiff1d(raw, values)[0]
        fault = (
            f"raw value {value} is in neither ids nor ignore, which go from {min(values)} to {max(values)}"
        )
        if self.colours:  # red, green and blue are compared, 8 bits each
            distance = (values[:, None] >> [16, 8, 0] & 255) - (value >> np.array([16, 8, 0]) & 255)
            closest = values[(distance**2).sum(1).argmin()]
            fault = (
                f"raw value #{value:06x} is in neither ids nor ignore; the nearest there is #{closest:06x}"
            )
        raise DataError(f"{where}: {fault}; add it to one of them in dataset.toml", "unknown value")


def _require(good: bool, problem: str) -> None:
    if not good:
        raise ValueError(problem)


def _parse_toml(path: Path, root: Path) -> tuple[dict, LabelTable]:
    """Return all keys of a dataset.toml, defaults from KEYS, and its table; ValueError says what is wrong."""
    content = path.read_bytes()
    _require(b"\0" not in content, "is not UTF-8 but probably UTF-16; save it as UTF-8")
    try:
        given = tomllib.loads(content.decode("utf-8-sig"))  # with or without a byte-order mark
    except RecursionError:
        raise ValueError("has brackets in brackets, hundreds deep; expected plain lists") from None
    for key, value in given.items():
        _require(key in KEYS, f"unknown key {key!r}; expected {', '.join(KEYS)}{nearest(key, KEYS)}")
        kind = type(KEYS[key])
        _require(type(value) is kind, f"{key} is {value!r}; expected a {kind.__name__}")
    keys = KEYS | given
    for key in ("classes", "splits"):
        different = all(isinstance(name, str) for name in keys[key]) and len({*keys[key]}) == len(keys[key])
        _require(different, f"{key} is {keys[key]!r}; expected a list of different strings")
    for key in ("images", "masks"):
        starred = keys[key].count("*") == keys["images"].count("*") > 0
        _require(starred, f"{key} is {keys[key]!r}; expected a pattern with *, as many as images has")

    # No split contains another, and that for testing is optional. A share is taken out of the training split.
    places = [Path(name) for name in keys["splits"]]
    for place in places:
        inside = place.parts and not place.is_absolute() and ".." not in place.parts
        alone = sum(place == other or place in other.parents for other in places) == 1
        fix = "expected names of folders or list files, none inside another"
        _require(bool(inside and alone), f"splits is {keys['splits']!r}; {fix}")
    share = keys["validation"]
    _require(0 <= share < 1, f"validation is {share}; expected a share below 1, such as 0.2")
    tested = (root / keys["images"].partition("{split}")[0] / "test").is_dir()
    splits = keys["splits"] or (["training"] if share else SPLITS[: 2 + tested])
    splits = [*splits[:1], *splits] if share else splits
    _require(len(splits) in (2, 3), f"splits is {keys['splits']}; expected those of {', '.join(SPLITS)}")
    keys["splits"] = dict(zip(SPLITS, splits, strict=False))

    # Raw values are all numbers or all colours, and each stands in one place.
    N = len(keys["classes"])
    fix = "expected 2 to 255; what is no object is a class, too, such as 'background'"
    _require(2 <= N <= IGNORE, f"classes has {N} name(s); {fix}")
    ids = keys["ids"] or list(range(N))
    _require(len(ids) == N, f"ids has {len(ids)} values for {N} classes; expected one for each")
    raw = [value.lower() if isinstance(value, str) else value for value in ids + keys["ignore"]]
    for value in raw:
        number = type(value) is int and 0 <= value <= 65535
        colour = type(value) is str and re.fullmatch("#[0-9a-f]{6}", value)
        right = (number or colour) and type(value) is type(raw[0])
        _require(right, f"ids or ignore has {value!r}; expected all in 0..65535, or all such as '#00ff80'")
        _require(raw.count(value) == 1, f"ids and ignore have {value!r} {raw.count(value)} times; keep one")

    # For pictures: the colours of classes, and classes that overlays leave as they are.
    colors = [color.lower() if isinstance(color, str) else "" for color in keys["colors"]]
    right = len(colors) in (0, N) and all(re.fullmatch("#[0-9a-f]{6}", color) for color in colors)
    _require(right, f"colors is {keys['colors']!r}; expected one for each of {N} classes, such as '#00ff80'")
    for name in keys["clear"]:
        known = f"expected names of classes{nearest(str(name), keys['classes'])}"
        _require(name in keys["classes"], f"clear has {name!r}; {known}")
    return keys, LabelTable(
        tuple(keys["classes"]), tuple(raw[:N]), tuple(raw[N:]), tuple(colors), tuple(keys["clear"])
    )


# ---- pictures ----
def _read(source: str | Path | bytes, max_pixels: int, convert: Callable):
    """Return what `convert` makes of a picture that is decoded and upright; PictureError names the file."""
    where = "standard input" if isinstance(source, bytes) else Path(source)
    suffix = "" if isinstance(source, bytes) else where.suffix.lower()
    content = b""
    try:
        content = source if isinstance(source, bytes) else _content(where, 16 * max_pixels)
        if FOREIGN.get(suffix) == "raw":  # its first picture is a thumbnail
            raise UnidentifiedImageError
        return convert(_decode(content, max_pixels))
    except Exception as error:  # decoders raise anything on damaged bytes
        reason = getattr(error, "strerror", None) or error
        fix = f"give a {', '.join(FORMATS)} file"
        if isinstance(error, UnidentifiedImageError):
            reason, fix = _foreign(content, suffix, fix)
        elif isinstance(error, Image.DecompressionBombError):
            fix = f"above {max_pixels:,} pixels it needs your trust: --max-pixels N (max_pixels)"
        raise PictureError(f"{where}: cannot be read ({reason}); {fix}") from error


def _content(path: Path, limit: int) -> bytes:
    """Return the bytes of a regular file. Of many bytes only the first are read if they begin no picture."""
    size = path.stat().st_size
    if not path.is_file() and not path.is_dir():
        raise ValueError("no regular file")  # a pipe would keep us waiting
    with open(path, "rb") as file:
        if size > MANY_BYTES:
            kind = ""
            with suppress(UnidentifiedImageError):
                kind = Image.open(file, formats=FORMATS).format
            if kind and size > limit:
                raise ValueError(f"{size:,} bytes, expected at most {limit:,}")
            file.seek(0)
            return file.read(-1 if kind else 4096)
        return file.read()


def _decode(content: bytes, max_pixels: int) -> Image.Image:
    """Decode a picture and turn it upright. Its info has "several" (are there more frames), "orientation" (of
    EXIF) and "layout" (how the file stores values, to Pillow)."""
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, max_pixels)  # Pillow's own limit is only raised
    formats = FORMATS
    if content[4:8] == b"ftyp":
        with suppress(ImportError):  # HEIC is read if somebody has installed its decoder
            import_module("pillow_heif").register_heif_opener()
            formats = (*FORMATS, "HEIF")
    image = Image.open(BytesIO(content), formats=formats)
    if image.width * image.height > max_pixels:
        raise Image.DecompressionBombError(f"{image.width} x {image.height}")

    # Some layouts Pillow takes for others.
    bits = {"1": 1, "L": 8}.get(image.mode)
    signed = image.format == "TIFF" and bits == 8 and image.tag_v2.get(339) == (2,)
    if signed or (image.format == "BMP" and bits not in (None, content[28])):
        raise ValueError("its numbers are stored in a way that Pillow gets wrong")

    # What only the file says is kept in info. Another object looks for more frames, as that may leave the
    # first; they are not counted, because the time for that grows with the square of their number.
    image.info |= {"several": False, "orientation": 1, "layout": str(image.tile[0][3]) if image.tile else ""}
    if image.format == "WEBP" and b"VP8L" not in content:
        image.info["compression"] = "webp"
    with suppress(Exception):
        image.info["several"] = Image.open(BytesIO(content), formats=formats).is_animated
    with suppress(Exception):  # damaged EXIF costs the turn, not the photo
        image.info["orientation"] = image.getexif().get(0x0112, 1)
    image.load()
    with suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _foreign(content: bytes, suffix: str, fix: str) -> tuple[str, str]:
    """Return what a file is that no decoder takes, and what to do."""
    if FOREIGN.get(suffix) == "raw":
        return "raw", CONVERT
    with suppress(Exception):
        tags = TiffImagePlugin.ImageFileDirectory_v2(content[:8])
        file = BytesIO(content)
        file.seek(tags.next)
        tags.load(file)
        kind = {1: "integers", 2: "signed integers", 3: "floating-point numbers"}[tags.get(339, (1,))[0]]
        return f"a TIFF with {tags.get(277, 1)} band(s) of {tags[258][0]}-bit {kind}", "export 8-bit RGB"
    begin = content[:200].decode("latin-1")  # a letter for every byte
    kinds = [kind for kind, pattern in BEGINNINGS.items() if re.match(pattern, begin, re.DOTALL)]
    kinds += [FOREIGN[suffix]] if suffix in FOREIGN else []
    return (kinds[0], CONVERT) if kinds else ("not a picture" if content else "empty file", fix)


def read_photo(source: str | Path | bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return the photo in a file, or in its bytes, as upright 8-bit RGB; PictureError names the file.
    Transparency is white. info has "several" (frames), "orientation" and "remarks": what else was changed."""
    return _read(source, max_pixels, _to_rgb)


def _to_rgb(image: Image.Image) -> Image.Image:
    remarks = []
    info = {"several": image.info["several"], "orientation": image.info["orientation"], "remarks": remarks}
    if image.mode[0] in "IF":  # integers and floats, which Pillow would clip at 255
        values = np.asarray(image, np.float64)
        valid = np.isfinite(values) & (abs(values) < 1e30)
        with suppress(Exception):  # the tag by which GDAL says what stands for "no data"
            valid &= values != float(image.tag_v2[42113].strip("\0"))
        low, high = values[valid].min(), values[valid].max()
        if image.mode.startswith("I;"):  # 16 bits, whose full scale is known
            low, high = 0, 65535
        elif low >= 0 and high <= 255:
            low, high = 0, 255 if high > 1 else 1
        else:
            remarks.append(f"the values {low:g}..{high:g} are scaled to 0..255")
        if not valid.all():
            remarks.append(f"{np.count_nonzero(~valid)} pixels without a finite value are black")
        grey = np.where(valid, (values - low) / max(high - low, 1e-30), 0)
        image = Image.fromarray(np.rint(grey * 255).astype(np.uint8))
    if image.format == "TIFF" and image.mode == "RGBA" and 338 not in image.tag_v2:
        remarks.append("the fourth band, which is not marked as transparency, is left out")
        image = image.convert("RGB")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
    image.info = info
    return image


def read_mask(path: Path, colours: bool = False, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Return the numbers (H, W) that a mask stores: values, palette indices, or 0xRRGGBB if `colours`.
    DataError: they cannot be read exactly. PictureError: they cannot be read at all."""
    values = _read(path, max_pixels, lambda image: _stored(image, colours))
    if isinstance(values, str):
        raise DataError(f"{path}: a mask {values}", values)
    return values


def _stored(image: Image.Image, colours: bool) -> np.ndarray | str:
    """Return the numbers that a mask stores, or what keeps them from being exact, and the fix."""
    layout = image.info["layout"]
    if LOSSY & {image.format, image.info.get("compression")}:
        return f"saved as {image.format} with loss, which changes its values; save masks as PNG"
    if image.info["several"]:
        return "of several pages; save the one with the labels as PNG"
    if len(image.getbands()) > 1 and ";1" in layout:
        return "of 16-bit colours, which are read as 8-bit; save masks as 8-bit PNG"
    if image.mode in ("LA", "RGBA") and image.getchannel("A").getextrema() == (255, 255):
        image = image.convert(image.mode[:-1])
    if image.mode not in ("1", "L", "P", "RGB") and (colours or image.mode not in ("I", "I;16", "I;16B")):
        return f"in mode {image.mode}; save masks as 8-bit PNG, in RGB if ids are colours"

    if colours:  # those that are shown, whether pixel by pixel, by a palette or as grey
        image = image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
        numbers = np.frombuffer(image.tobytes("raw", "RGBX"), ">u4") >> 8
        return numbers.reshape(image.height, image.width)
    values = np.asarray(image)
    if image.mode == "RGB":
        if (values != values[..., :1]).any():
            return "of colours, but ids are numbers; write ids = ['#rrggbb', ..], which flowseg init lists"
        values = values[..., 0]
    elif image.mode in ("1", "L"):  # Pillow shows 1 as `step` if there are few bits, and inverts
        step = 255 if image.mode == "1" else 85 if ";2" in layout else 17 if ";4" in layout else 1
        values = np.asarray(image.convert("L")) // step
        if re.search(r";\d?I", layout):
            values = 255 // step - values
    elif image.format == "GIF":  # which has no grey but that of its palette
        red, green, blue = (image.getpalette()[k::3] for k in range(3))
        if red == green == blue:
            values = np.asarray(image.convert("L"))
    return values


# ---- folder data sets ----
def scan(folder: Path, refused: dict[Path, str] | None = None) -> Iterator[Path]:
    """Yield the regular files below a folder, also through links, but enter no folder twice. Hidden names are
    left out, and folders that systems make or that are named like a picture. A link that leads nowhere is
    yielded, so that reading names it. refused: gets the folders that cannot be listed, else an OSError."""
    entered = set()
    waiting = [folder] if folder.is_dir() else []
    while waiting:
        place = waiting.pop()
        try:
            status = place.stat()
            identity = (status.st_dev, status.st_ino)
            names = [] if identity in entered else os.listdir(place)
            entered.add(identity)
        except OSError as error:
            if refused is None:
                raise
            refused[place] = error.strerror or str(error)
            continue
        for path in (place / name for name in names if not name.startswith(".")):
            if os.path.isdir(path):
                if path.name not in LITTER and path.suffix.lower() not in SUFFIXES:
                    waiting.append(path)
            elif os.path.isfile(path) or not os.path.exists(path):
                yield path


def match(root: Path, pattern: str) -> dict[str, Path]:
    """Return the files that fit a pattern by what its * stands for, in natural order: a2 before a10."""
    head, _, tail = pattern.partition("*")
    above, _, lead = head.rpartition("/")
    parts = [re.escape(part) for part in (lead, *tail.split("*"))]
    parts[-1] = parts[-1] or "|".join(re.escape(suffix) for suffix in (*SUFFIXES, *FOREIGN))
    fits = re.compile("(.+)".join(f"(?:{part})" for part in parts), re.IGNORECASE)
    files = {path.relative_to(root / above).as_posix(): path for path in scan(root / above)}
    order = {name: re.sub(r"\d+", lambda digits: digits[0].zfill(20), name) for name in files}
    found: dict[str, Path] = {}
    for name in sorted(files, key=lambda name: (order[name], name)):
        if fit := fits.fullmatch(name):
            key = normalize("NFC", "/".join(fit.groups()))  # macOS writes letters with accents in two parts
            other = found.setdefault(key, files[name])
            if other != files[name]:
                raise DataError(f"{files[name]}: has the same stem as {other.name}; keep one of them")
    return found


class FolderDataset:
    """The pairs of images and masks of one split of a folder with a dataset.toml, or the name of a table.
    What is missing raises DataError; if not `strict`, `unpaired` has an error for each kind of it. `left_out`
    has the images without a mask where a list or a share chooses."""

    augment = True
    max_pixels = MAX_PIXELS

    def __init__(self, root: Path, split: str, strict: bool = True):
        self.root = Path(root)
        self.split = split
        toml = self.root / "dataset.toml"
        if not toml.is_file():  # a pipe is not opened
            toml = TABLES.get(self.root.name)
        if not toml:
            fix = f"flowseg init {shlex.quote(str(root))} drafts it"
            raise DataError(f"{root}: has no dataset.toml; {fix}")
        try:
            keys, self.labels = _parse_toml(toml, self.root)
        except ValueError as error:
            raise DataError(f"{toml}: {error}") from None
        self.name = keys["name"] or self.root.resolve().name
        self.splits = tuple(keys["splits"])
        if split not in self.splits:
            raise DataError(f"{self.name} has no {split} split; expected {' or '.join(self.splits)}")

        self.unpaired: list[DataError] = []
        self._choose(keys, toml)
        for error in self.unpaired if strict else ():
            if error.kind != "no image":  # a mask alone does no harm
                raise error

    def _lacks(self, kind: str, line: str) -> None:
        self.unpaired.append(DataError(line, kind))

    def _choose(self, keys: dict, toml: Path) -> None:
        """Set the pairs and `left_out`, and add to `unpaired` what is missing."""
        # The files that fit the patterns. What is a mask is no image, although it may fit both.
        place = keys["splits"][self.split]
        list_file = self.root / place
        listed = list_file.is_file()
        share = keys["validation"]
        if not listed and not share and "{split}" not in keys["images"]:
            fix = "write {split} in it, list files in splits, or validation = 0.2"
            raise DataError(f"{toml}: images is {keys['images']!r}, the same for every split; {fix}")
        place = list_file.stem if listed else place
        patterns = [keys[kind].replace("{split}", place) for kind in ("images", "masks")]
        images, masks = (match(self.root, pattern) for pattern in patterns)
        taken = set(masks.values())
        images = {key: path for key, path in images.items() if path not in taken}
        if not images:
            start = self.root / patterns[0].partition("*")[0].rpartition("/")[0]
            lack = "holds no image that fits the pattern" if start.is_dir() else "no such folder"
            self._lacks("no images", f"{start}: {lack}; {self._remedy(toml)}")
        elif listed:
            images = self._listed(list_file, images)

        # A share of the pairs, the first by a hash of their names, is held out of training.
        keys_of_pairs = [key for key in images if key in masks]
        if share and self.split != "test":
            ranked = sorted(keys_of_pairs, key=lambda key: sha256(key.encode()).digest())
            count = max(1, min(len(ranked) - 1, round(share * len(ranked))))
            keys_of_pairs = ranked[:count] if self.split == "validation" else ranked[count:]
        self.pairs = [(images[key], masks[key]) for key in keys_of_pairs]

        # Where a list or a share chooses, images may lack a mask; elsewhere every file needs its partner.
        alone = [path for key, path in images.items() if key not in masks]
        unused = [path for key, path in masks.items() if key not in images]
        self.left_out = alone if listed or share else []
        if alone and not self.left_out:
            count = f"{len(alone)} of {len(images)} images have none"
            self._lacks("no mask", f"{alone[0]}: no mask fits {self.root / patterns[1]}; {count}")
        if not self.pairs and not self.unpaired:
            line = f"{self.root}: no pair for {self.split}; correct images, masks or splits in {toml}"
            self._lacks("no pair", line)
        if unused and not (listed or share):
            count = f"{len(unused)} of {len(masks)} masks have none"
            self._lacks("no image", f"{unused[0]}: no image fits {self.root / patterns[0]}; {count}")

    def _listed(self, file: Path, images: dict[str, Path]) -> dict[str, Path]:
        """Return the images that a file lists, by what * stands for or by path."""
        known = {path.relative_to(self.root).as_posix(): key for key, path in images.items()}
        known |= {key: key for key in images}
        lines = normalize("NFC", file.read_text(encoding="utf-8-sig", errors="replace")).splitlines()
        names = [line.strip() for line in lines if line.strip()]
        unknown = [name for name in names if name not in known]
        if unknown:
            self._lacks("no such image", f"{file}: {unknown[0]!r} is no image; {len(unknown)} such names")
        return {known[name]: images[known[name]] for name in names if name in known}

    def _remedy(self, toml: Path) -> str:
        if toml not in TABLES.values():
            return f"put images there, or correct images and splits in {toml}"
        above = "" if self.root.parent == data_root() else f" --root {shlex.quote(str(self.root.parent))}"
        return f"run flowseg download {toml.stem}{above}"

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
            image = read_photo(image_path, self.max_pixels)
            raw = read_mask(mask_path, self.labels.colours, self.max_pixels)
        except PictureError as error:
            raise DataError(str(error), "unreadable") from None
        if image.size != raw.shape[::-1]:
            sizes = "the image is {} x {} pixels, its mask {} x {}".format(*image.size, *raw.shape[::-1])
            fix = "export the mask again, in equal size"
            if image.info["orientation"] != 1:
                fix = f"EXIF orientation {image.info['orientation']} turns the image: turn the mask as well"
            raise DataError(f"{image_path}: {sizes}; {fix}", "different sizes")
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
    max_pixels = MAX_PIXELS  # of the pictures that a folder holds; scenes are small

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


BUILT_IN = ("shapes", "shapes-fine")


def locate(dataset: str, root: str | Path | None = None) -> tuple[str, str]:
    """Return a name and the data root below which its folder is; or a folder, or a built-in name, and "".
    DataError: there is no such data set."""
    if dataset in BUILT_IN:
        return dataset, ""
    folder = Path(dataset).expanduser()
    named = not folder.is_absolute() and (data_root(root) / dataset / "dataset.toml").is_file()
    if dataset in TABLES or named:
        return dataset, str(data_root(root))
    if folder.is_dir():
        return str(folder), ""
    others = [path.parent.name for path in data_root(root).glob("*/dataset.toml")]
    known = [*BUILT_IN, *TABLES, *others]
    expected = f"{', '.join(known)} or a folder with a dataset.toml, which flowseg init DIR drafts"
    raise DataError(f"data set {dataset!r} not found; expected {expected}{nearest(dataset, known)}")


def open_dataset(dataset: str, split: str, root: str | Path | None = None, strict: bool = True) -> Dataset:
    """Open "shapes", "shapes-fine", a folder below the data root, or a path; DataError otherwise."""
    if split not in SPLITS:
        raise DataError(f"split {split!r} is unknown; expected {', '.join(SPLITS)}{nearest(split, SPLITS)}")
    place, above = locate(dataset, root)
    if place in BUILT_IN:
        return ShapesDataset(split, fine=place == "shapes-fine")
    return FolderDataset(Path(above, place), split, strict)


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
