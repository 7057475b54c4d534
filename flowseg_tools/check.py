"""What training would trip over in a data set: what `flowseg info` reports, and `flowseg train` at its start.

A problem keeps training or the score from being right; a note is what somebody should know. Each is one line:
the first file that has it, what it is, how many files have it, the fix.
"""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from data import (
    FOREIGN,
    FORMATS,
    IGNORE,
    LITTER,
    MAX_PIXELS,
    SUFFIXES,
    DataError,
    Dataset,
    FolderDataset,
    LabelTable,
    augment,
    evenly_spaced,
    open_dataset,
    scan,
)
from flowseg_tools import draw

SCENES = 200  # of the endless built-in data sets: a sample is enough
NOTHING = "{dataset.name}: no pixel of {dataset.split} is labelled; correct ids and ignore, or the masks"
SAMPLE = 16  # images of each split that are read before training starts
Track = Callable[[Iterable[int], str], Iterable[int]]  # shows progress through indices, under a title


def quietly(indices: Iterable[int], title: str) -> Iterable[int]:
    return indices


def count_values(raw: np.ndarray) -> dict[int, int]:
    """Return the number of pixels of every value; runs of equal pixels, which make a mask, count at once."""
    pixels = raw.ravel()
    starts = np.concatenate([[0], np.flatnonzero(pixels[1:] != pixels[:-1]) + 1])
    lengths = np.diff(starts, append=pixels.size)
    values, which = np.unique(pixels[starts], return_inverse=True)
    return dict(zip(values.tolist(), np.bincount(which, lengths).astype(int).tolist(), strict=True))


class Checker:
    """Checks the splits of a data set one after the other, and compares the files of all of them.

    `problems`, `doubts` (what can be read, but is perhaps not what was meant) and `notes` are lists of lines
    by the kind of what they say; a line begins with its split.
    """

    def __init__(self, track: Track = quietly):
        self.track = track
        self.problems: defaultdict[str, list[str]] = defaultdict(list)
        self.doubts: defaultdict[str, list[str]] = defaultdict(list)
        self.notes: defaultdict[str, list[str]] = defaultdict(list)
        self.images: dict[bytes, tuple[str, Path]] = {}  # hash of the pixels -> split and file
        self.colours: dict[tuple, tuple[int, Path, list]] = {}  # colour of a palette -> index, mask, palette

    def check(self, dataset: Dataset, limit: int | None = None) -> tuple[dict, str]:
        """Read up to `limit` evenly spaced samples, or all; return counts, and what would end training.

        Counts: images, checked, pixels by train id, ignored pixels.
        """
        # Everything is read once; an error ends its file, not the check.
        errors = list(dataset.unpaired)
        unread = len(errors)
        pixels: Counter[int] = Counter()  # raw value -> pixels
        indices = evenly_spaced(len(dataset), limit)
        for index in self.track(indices, f"checking {dataset.split}"):
            try:
                image, raw, where = dataset.read(index)
                values = count_values(raw)
                pixels.update(values)
                if isinstance(dataset, FolderDataset):
                    self._look_at(dataset, index, image, set(values))
                dataset.labels.to_train(raw, where)
            except DataError as error:
                errors.append(error)

        # A hint explains unknown values, which then need no line of their own.
        fatal = [str(error) for error in errors[unread:]]
        mistakes = hints(set(pixels), dataset.labels)
        if mistakes:
            fatal = mistakes if fatal else []
            errors = [error for error in errors if error.kind != "unknown value"]
            errors += [DataError(line, line) for line in mistakes]
        N = len(dataset.labels.classes)
        found = [pixels[number] for number in dataset.labels.values.tolist()]
        if pixels and len(errors) == unread and not sum(found[:N]):
            errors.append(DataError(NOTHING.format(dataset=dataset), "nothing labelled"))
        for error in errors:
            self.problems[error.kind].append(f"{dataset.split}: {error}")
        counts = {
            "images": len(dataset),
            "checked": len(indices),
            "pixels": found[:N],
            "ignored": sum(found[N:]),
        }
        return counts, (fatal or [""])[0]

    def _look_at(self, dataset: FolderDataset, index: int, image: Image.Image, values: set[int]) -> None:
        """Look at one pair for what can be read, but is perhaps not what was meant."""
        path, mask_path = dataset.pairs[index]
        for remark in image.info["remarks"]:
            self.notes["remark"].append(f"{dataset.split}: {path}: {remark}")
        if image.info["several"]:
            pages = "holds several pages, of which only the first is used"
            self.doubts["pages"].append(f"{dataset.split}: {path}: {pages}; save that one alone")
        digest = sha256(image.tobytes()).digest()
        split, other = self.images.setdefault(digest, (dataset.split, path))
        if split != dataset.split:
            line = f"{path}: is the same image as {other} of {split}; keep it in one split"
            self.doubts["same image"].append(f"{dataset.split}: {line}")

        with Image.open(mask_path, formats=FORMATS) as mask:
            # A turn by 90 degrees changes the size, which is then an error; other turns do not.
            turn = image.info["orientation"]
            unseen = turn in (2, 3, 4) or (turn > 4 and image.width == image.height)
            if unseen and mask.getexif().get(0x0112, 1) != turn:
                fix = "see with --preview whether they fit; if not, turn the mask or remove the tag"
                line = f"{path}: EXIF orientation {turn} turns it, not its mask; {fix}"
                self.doubts["turn"].append(f"{dataset.split}: {line}")
            if not dataset.labels.colours:
                self._look_at_values(dataset, mask, mask_path, values)

    def _look_at_values(
        self, dataset: FolderDataset, mask: Image.Image, path: Path, stored: set[int]
    ) -> None:
        """Find values that viewers show as other ids than they are stored as, and palettes that differ."""
        palette = []
        if mask.mode == "P":
            entries = mask.getpalette() + 768 * [0]  # a file may leave out the end of its palette
            palette = list(zip(entries[::3], entries[1::3], entries[2::3], strict=True))
        grey = palette and all(len(set(palette[index])) == 1 for index in stored)
        few_bits = mask.mode == "1" or (mask.tile and ";" in str(mask.tile[0].args))
        if grey or (few_bits and not palette):
            shown = set(np.unique(mask.convert("L")).tolist())
            if shown != stored and shown <= set(dataset.labels.values.tolist()):
                both = f"read as {sorted(stored)}, but shown as {sorted(shown)}, which are in the table, too"
                line = f"{path}: {both}; masks in 8-bit grey leave no doubt"
                self.notes["shown"].append(f"{dataset.split}: {line}")

        # An index means the same class everywhere only if all palettes have the same order.
        for index in () if grey or not palette else stored:
            colour = palette[index]
            first, other, its_palette = self.colours.setdefault(colour, (index, path, palette))
            if colour not in (palette[first], *its_palette[index : index + 1]):
                name = "#{:02x}{:02x}{:02x}".format(*colour)
                line = f"{path}: the colour {name} is {index} in its palette, but {first} in that of {other}"
                line = f"{line}; write ids as colours, such as {name!r}"
                self.doubts["palettes"].append(f"{dataset.split}: {line}")
                break


def merged(found: dict[str, list[str]]) -> list[str]:
    """Return the first line of every kind, with the number of others and the other splits that have it."""
    lines = []
    for first, *others in found.values():
        split = first.partition(":")[0]
        splits = [line.partition(":")[0] for line in others]
        also = [name for name in dict.fromkeys(splits) if name != split]
        more = []
        if len(others) > len(also):
            more.append(f"and {len(others)} more such files")
        if also:
            more.append(f"also in {' and '.join(also)}")
        lines.append(f"{first} ({', '.join(more)})" if more else first)
    return lines


def describe(
    dataset: str, root: Path | None = None, limit: int | None = None, track: Track = quietly,
    max_pixels: int | None = None,
) -> dict:  # fmt: skip
    """Return the label table of a data set and, for each split, its counts; then problems and notes of all.

    limit: the most images that are read in each split, evenly spaced; all if not given.
    """
    parts = [open_dataset(dataset, "training", root, strict=False)]
    parts += [open_dataset(dataset, split, root, strict=False) for split in parts[0].splits[1:]]
    folder = isinstance(parts[0], FolderDataset)
    table = parts[0].labels
    rows = zip(table.classes, table.ids, strict=True)
    classes = [{"id": k, "raw": raw, "name": name} for k, (name, raw) in enumerate(rows)]
    facts = {"name": dataset, "classes": classes, "ignore": table.ignore, "splits": {}}
    checker = Checker(track)
    for part in parts:
        part.max_pixels = max_pixels or MAX_PIXELS
        facts["splits"][part.split], _ = checker.check(part, limit or (None if folder else SCENES))
    facts["problems"] = merged(checker.problems) + merged(checker.doubts)
    facts["notes"] = merged(checker.notes) + absent_classes(table, facts["splits"]["training"])
    if folder:
        facts["notes"] += _left_out(parts)
    return facts


def absent_classes(table: LabelTable, counts: dict) -> list[str]:
    """Return a line that names the classes without a labelled pixel in training, if there are any."""
    absent = [name for name, pixels in zip(table.classes, counts["pixels"], strict=True) if not pixels]
    if not absent or not sum(counts["pixels"]):
        return []
    names = ", ".join(absent[:5]) + (", .." if len(absent) > 5 else "")
    share = f"{len(absent)} of {len(table.classes)} classes have no labelled pixel"
    return [f"training: {share} in the {counts['checked']:,} images that were read: {names}"]


def _left_out(parts: list[FolderDataset]) -> list[str]:
    """Return a line for images without a mask, one for pictures in no split, one for folders left out."""
    used = {path for part in parts for pair in part.pairs for path in pair}
    unmasked = {path for part in parts for path in part.left_out} - used
    others = set()
    if not any(part.unpaired for part in parts):
        files = scan(parts[0].root)
        others = {path for path in files if path.suffix.lower() in (*SUFFIXES, *FOREIGN)} - used - unmasked
    folders = []
    for above, names, _ in os.walk(parts[0].root):
        folders += [
            Path(above, name) for name in names if name in LITTER or Path(name).suffix.lower() in SUFFIXES
        ]
    lines = []
    for paths, what in (
        (unmasked, "images have no mask and are left out"),
        (others, "other pictures are in no split"),
        (folders, "folders are left out"),
    ):
        lines += [f"{len(paths):,} {what}, such as {path}" for path in sorted(paths)[:1]]
    return lines


def before_training(parts: list[Dataset], say: Callable[[str], None]) -> None:
    """Read a sample of every split and `say` what is wrong; DataError for what would make a run worthless."""
    checker = Checker()
    absent = []
    for part in parts:
        counts, fatal = checker.check(part, SAMPLE)
        if fatal:
            raise DataError(f"{part.name}, {part.split}: {fatal}; `flowseg info` lists every problem")
        labelled = sum(counts["pixels"]) > 0
        if not labelled and not any((part[index][1] != IGNORE).any() for index in range(len(part))):
            raise DataError(NOTHING.format(dataset=part))
        if part.split == "training" and counts["checked"] == counts["images"]:
            absent = absent_classes(part.labels, counts)
    for line in merged(checker.problems) + merged(checker.doubts) + absent:
        say(f"warning: {line}")


def fingerprint(parts: list[Dataset]) -> dict:
    """Return what a resumed run looks at again: classes, ids, ignore, and the files of every split."""
    table = parts[0].labels
    facts = {"classes": list(table.classes), "ids": list(table.ids), "ignore": list(table.ignore)}
    for part in parts:
        names = []
        for pair in part.pairs if isinstance(part, FolderDataset) else ():
            names += [os.path.relpath(path, part.root).replace(os.sep, "/") for path in pair]
        digest = sha256(json.dumps(names).encode()).hexdigest()[:8]
        facts[f"{part.split} files"] = f"{len(part):,} images, list {digest}"
    return facts


def draw_preview(dataset: str, root: Path | None, file: Path) -> None:
    """Draw eight samples: the image, its mask with a legend, and an augmented crop under its mask."""
    from model import kronecker_centroids  # torch is needed for nothing else here

    data = open_dataset(dataset, "training", root, strict=False)
    classes = data.labels.classes
    palette = draw.palette(kronecker_centroids(len(classes)).numpy(), data.labels.colors)
    clear = draw.clear_ids(classes, data.labels.clear)
    tiles = []
    seen = set()
    for index in evenly_spaced(len(data), 8):
        image, labels = data[index]
        seen.update(np.unique(labels).tolist())
        crop = image
        crop_labels = labels
        if data.augment:
            crop, crop_labels = augment(image, labels, min(256, *image.size), np.random.default_rng(index))
        for tile in (image, draw.colorize(labels, palette), draw.overlay(crop, crop_labels, palette, clear)):
            tiles.append(ImageOps.contain(tile, (320, 320), Image.Resampling.NEAREST))
    entries = [(name, palette[k], None) for k, name in enumerate(classes) if k in seen]
    if IGNORE in seen:
        entries.append(("ignored", (0, 0, 0), None))
    sheet = draw.grid(tiles, ["image", "mask", "training crop"], columns=3)
    draw.save(file, draw.with_legend(sheet, entries))


def hints(values: set[int], table: LabelTable) -> list[str]:
    """Recognise the usual wrong tables from the raw values that occur, and spell out the fix."""
    N = len(table.classes)
    numbers = table.values.tolist()
    unknown = values.difference(numbers)
    if len(unknown) > 8:
        fix = "save masks as PNG and resize by nearest neighbour, or list all classes"
        return [f"{len(unknown)} stray values, as after JPEG or a smooth resize; {fix}"]
    if table.colours:
        return []
    if values == {0, 255} and 255 not in numbers[:N]:
        return ["only the values 0 and 255 occur, an on/off mask; write ids = [0, 255] for its two classes"]

    from_one = list(range(1, N + 1))
    if table.ids == tuple(range(N)) and N in unknown and max(values - {IGNORE}) == N:
        zero = ", and ignore = [0] if 0 means unlabelled" if 0 in values else ""
        return [f"ids start at 1: values run to {N} for {N} classes; write ids = {from_one}{zero}"]
    if IGNORE in unknown:
        return ["255 occurs, which usually means unlabelled; then write ignore = [255]"]
    return []
