"""`flowseg init`: looks at a folder of photos and masks, and drafts its dataset.toml.

A pattern is a folder, a * and what follows in the name. Of all pairs of patterns, the one is taken in
which most photos meet a mask of their name. What the folder does not tell is left to fill in, and said.
"""

import json
import re
import shlex
from collections import Counter, defaultdict
from functools import cache
from itertools import permutations
from pathlib import Path

import numpy as np

from data import IGNORE, SPLITS, SUFFIXES, DataError, PictureError, evenly_spaced, read_mask, scan
from flowseg_tools.check import Track, quietly

ROLES = {"train": "training", "training": "training", "val": "validation", "valid": "validation",
         "validation": "validation", "test": "test", "testing": "test"}  # fmt: skip
MASKS = 300  # masks that are read to find the values that occur
# Pictures of these names show the same regions as masks, but not one value for each class.
OTHERS = re.compile("object|inst|colou?r|visual|human|overlay|panoptic|edge|depth|rgb", re.IGNORECASE)
# What folders and files of photos and of masks are called.
OF_PHOTOS = re.compile("image|img|photo|picture|jpe?g|frame|camera|input", re.IGNORECASE)
OF_MASKS = re.compile("mask|label|annot|ann_|gt|seg|semantic|truth|target|class", re.IGNORECASE)
VOID = ("void", "unlabeled", "unlabelled", "ignore", "__ignore__")
NO_MASKS = {
    ".json": "polygons (Labelme, COCO) are not masks; export masks with labelme2voc, or from CVAT",
    ".xml": "boxes and polygons are not masks; export 'Segmentation mask' in CVAT",
    ".npy": "arrays are not pictures; save masks as PNG",
}
Value = int | str  # a number, or a colour "#rrggbb"


def draft(root: Path, track: Track = quietly) -> tuple[str, list[str], list[str]]:
    """Return the text of a dataset.toml, what was found, and what is left to fill in."""
    files = sorted(path.relative_to(root).as_posix() for path in scan(root))
    pictures = [name for name in files if Path(name).suffix.lower() in SUFFIXES]
    images, masks = best_patterns(root, pictures)
    if not masks:
        raise DataError(f"{root}: {_instead(files, pictures)}")
    photos = fitting(images, pictures)
    pairs = {key: name for key, name in fitting(masks, pictures).items() if key in photos}
    keys = {"images": images, "masks": masks}
    keys |= _splits(root, files, images, {key: photos[key] for key in pairs})
    found = [f"{len(pairs):,} pairs of an image and a mask"]

    # Masks hold numbers or colours; a file that names the values of the other kind is of no use.
    names, source = _names(root, files)
    paths = [root / name for name in pairs.values()]
    paths = [paths[k] for k in evenly_spaced(len(paths), MASKS)]
    colours = "colours" in [_looks(path)[0] for path in paths[:9]] or any(isinstance(v, str) for v in names)
    counts: Counter[Value] = Counter()  # value -> masks that have it
    unreadable = []
    for k in track(range(len(paths)), "reading masks"):
        try:
            values = np.unique(read_mask(paths[k], colours)).tolist()
            counts.update(f"#{value:06x}" if colours else value for value in values)
        except (DataError, PictureError) as error:
            unreadable.append(str(error))
    kind = "colours" if colours else "numbers"
    found.append(f"{len(counts)} {kind} in {len(paths) - len(unreadable):,} masks that were read")
    if names and not counts.keys() & names.keys():
        found.append(f"{source} names other values than the masks have, so it is not used")
        names = {}
    elif names:
        found.append(f"{len(names)} names in {source}")

    # Every value is a class or ignored; a class without a name is left to fill in.
    ignore = [value for value, name in names.items() if name.lower() in VOID]
    if IGNORE in counts and IGNORE not in names:
        ignore.append(IGNORE)
        found.append("255 has no name and is ignored")
    nameless = sorted(counts.keys() - names.keys() - set(ignore))
    rows = {value: name for value, name in names.items() if value not in ignore}
    rows |= {value: f"class {value}" for value in nameless}
    todo = [f"{error} ({len(unreadable)} such masks)" for error in unreadable[:1]]
    if nameless:
        values = ", ".join(str(value) for value in nameless)
        todo.append(f"names of classes for {values}; move to ignore what means unlabelled")
    if "validation" in keys:
        todo.append("splits, instead of validation, if neighbours are alike, as in a video")
    found += [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
    return _toml(keys, rows, ignore, counts, len(paths)), found, todo


def _toml(keys: dict, rows: dict[Value, str], ignore: list[Value], counts: Counter, read: int) -> str:
    """Return the text of a dataset.toml with comments."""
    lines = [
        f"# Drafted by `flowseg init`; {read:,} masks were read. * is a name, {{split}} an entry of splits."
    ]
    lines += [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
    lines.append("classes = [")
    for value, name in rows.items():
        lines.append(f"    {json.dumps(name, ensure_ascii=False)},  # {value}, in {counts[value]:,} masks")
    lines.append("]")
    lines.append(f"ids = {json.dumps(list(rows))}  # the raw value of each class")
    lines.append(
        f"ignore = {json.dumps(ignore)}  # raw values that count neither in the loss nor in the score"
    )
    return "\n".join(lines) + "\n"


# ---- patterns ----
def _folders(name: str) -> list[str]:
    """Return the folders that a pattern for this file may begin with; {split} is the name of a split."""
    parts = list(Path(name).parts[:-1])
    split = next((k for k, part in enumerate(parts) if part.lower() in ROLES), None)
    if split is not None:
        parts[split] = "{split}"
    folders = ["/".join(parts[: k + 1]) + "/" for k in range(split or 0, len(parts))]
    if split is None and len(parts) > 1:
        folders.append(f"*/{parts[-1]}/")
    return folders or [""]


def _ends(names: list[str]) -> list[str]:
    """Return what may follow the * of a pattern: nothing, a suffix, or the last words of the name as well."""
    counts: Counter[str] = Counter()
    for name in names:
        suffix = Path(name).suffix
        words = re.findall(r"[_.-][^_.-]+", Path(name).stem)[-3:]
        counts.update({"", suffix, *("".join(words[k:]) + suffix for k in range(len(words)))})
    return [end for end, count in counts.items() if count >= 0.15 * len(names)]


def fitting(pattern: str, names: list[str]) -> dict[tuple, str]:
    """Return the names that fit a pattern, by the name of their split and what every * stands for."""
    parts = [re.escape(part) for part in pattern.split("*")]
    parts[-1] = parts[-1] or r"\.\w+"
    split = "(" + "|".join(ROLES) + ")"
    fit = re.compile("(.+)".join(parts).replace(re.escape("{split}"), split), re.IGNORECASE)
    matches = [fit.fullmatch(name) for name in names]
    return {match.groups(): match.string for match in matches if match}


@cache
def _looks(path: Path) -> tuple[str, int]:
    """Return whether a picture holds numbers, colours or neither exactly, and how many different ones."""
    for colours, kind in ((False, "numbers"), (True, "colours")):
        try:
            return kind, len(np.unique(read_mask(path, colours)))
        except DataError:
            continue
        except PictureError:
            break
    return "photo", 1 << 24


def _misnamed(pattern: str, own: re.Pattern, other: re.Pattern) -> bool:
    """Return whether a pattern is named like the other kind of files only."""
    return bool(other.search(pattern)) and not own.search(pattern)


def best_patterns(root: Path, pictures: list[str]) -> tuple[str, str]:
    """Return the patterns of images and masks with most pairs, or two empty strings."""
    # Where a folder has many others, those of a scene or city, say, its * stands for them.
    below = defaultdict(list)
    for name in pictures:
        for folder in _folders(name):
            below[folder].append(name)
    parents = Counter(folder.rpartition("/")[0].rpartition("/")[0] for folder in below)
    sets = {}
    for folder, names in below.items():
        if parents[folder.rpartition("/")[0].rpartition("/")[0]] <= 12:
            for end in _ends(names):
                sets[f"{folder}*{end}"] = fitting(f"{folder}*{end}", names)

    # Most pairs come first, then what is named like masks, leaves few images alone, and is short.
    ranked = []
    for images, masks in permutations(sets, 2):
        if images.count("*") == masks.count("*"):
            common = [
                key
                for key in sets[images].keys() & sets[masks].keys()
                if sets[images][key] != sets[masks][key]
            ]
            alone = set(sets[images].values()) - set(sets[masks].values())
            stars = images.count("*")
            misnamed = _misnamed(images, OF_PHOTOS, OF_MASKS) + _misnamed(masks, OF_MASKS, OF_PHOTOS)
            other = bool(OTHERS.search(masks))
            rank = (-len(common), other, misnamed, len(alone), stars, len(images + masks))
            if common:
                ranked.append((rank, images, masks))
    ranked.sort()

    # A mask has few values and an image many; images of few colours, but no fewer than their masks, count if
    # there are no others. Most of the files that are looked at must be so, as some may be damaged.
    for least in (IGNORE + 2, 2):
        for _, images, masks in ranked[:100]:
            keys = sorted(sets[images].keys() & sets[masks].keys())
            some = [keys[k] for k in evenly_spaced(len(keys), 5)]
            right = 0
            for key in some:
                kind, count = _looks(root / sets[masks][key])
                is_mask = kind != "photo" and 0 < count <= IGNORE + 1
                right += is_mask and _looks(root / sets[images][key])[1] >= max(least, count)
            if 2 * right > len(some):
                return images, masks
    return "", ""


def _splits(root: Path, files: list[str], images: str, paired: dict[tuple, str]) -> dict:
    """Return the keys of a dataset.toml that make splits: folders, list files, or a share of the pairs.

    paired: the images that have a mask, by split and what * stands for.
    """
    if "{split}" in images:
        folders = {}
        for key in sorted(paired):
            folders.setdefault(
                ROLES[key[0].lower()], Path(paired[key]).parts[images.split("/").index("{split}")]
            )
        if "validation" in folders and "training" in folders:
            return {"splits": [folders[role] for role in SPLITS if role in folders]}
        rest = [folders[role] for role in ("training", "validation", "test") if role in folders]
        return {"splits": rest, "validation": 0.2}

    # List files stand together in a folder; those of segmentation come before others.
    known = {key[-1] for key in paired} | set(paired.values())
    lists = defaultdict(dict)
    for name in files:
        role = ROLES.get(Path(name).stem.lower())
        if role and Path(name).suffix == ".txt":
            lines = (root / name).read_text(encoding="utf-8", errors="replace").split("\n")
            if any(line.strip() in known for line in lines):
                lists[str(Path(name).parent)][role] = name
    for folder in sorted(lists, key=lambda folder: "seg" not in folder.lower()):
        if "training" in lists[folder] and "validation" in lists[folder]:
            return {"splits": [lists[folder][role] for role in SPLITS if role in lists[folder]]}
    return {"validation": 0.2}


# ---- names ----
def _names(root: Path, files: list[str]) -> tuple[dict[Value, str], str]:
    """Return the class names that a file of an annotation tool gives to values, and that file."""
    for wanted, read in READERS.items():
        for name in files:
            if Path(name).name.lower() == wanted:
                text = (root / name).read_text(encoding="utf-8-sig", errors="replace")
                lines = [line.strip() for line in text.splitlines()]
                try:
                    found = read(text, [line for line in lines if line and not line.startswith("#")])
                except (ValueError, KeyError, TypeError, IndexError):
                    continue
                if found:
                    return found, name
    return {}, ""


def _hex(channels) -> str:
    red, green, blue = (int(channel) for channel in channels)
    return f"#{red:02x}{green:02x}{blue:02x}"


def _labelmap(text: str, lines: list[str]) -> dict[Value, str]:
    """CVAT: name:red,green,blue:parts:actions."""
    rows = [line.split(":") for line in lines]
    return {_hex(row[1].split(",")): row[0] for row in rows}


def _label_colors(text: str, lines: list[str]) -> dict[Value, str]:
    """CamVid: red green blue name."""
    rows = [line.split(maxsplit=3) for line in lines]
    return {_hex(row[:3]): row[3] for row in rows}


def _classes_csv(text: str, lines: list[str]) -> dict[Value, str]:
    """Roboflow: Pixel Value, Class."""
    rows = [line.split(",", 1) for line in lines[1:]]
    return {int(value): name.strip() for value, name in rows}


def _class_names(text: str, lines: list[str]) -> dict[Value, str]:
    """labelme2voc: a name a line, from -1 on if the first one is __ignore__."""
    first = -1 if lines[0] == "__ignore__" else 0
    return {value: name for value, name in enumerate(lines, first) if value >= 0}


def _data_yaml(text: str, lines: list[str]) -> dict[Value, str]:
    """Ultralytics: names as a list or as a table, in the plain forms that its exports have."""
    after = re.split(r"(?m)^names:", text)[1]
    if after.strip().startswith("["):
        names = after.partition("]")[0].strip(" [").split(",")
        return {k: name.strip(" '\"\n") for k, name in enumerate(names)}
    block = re.match(r"\s*\n((?:[ \t]*(?:-|\d+:).*\n?)+)", after)[1]
    rows = re.findall(r"(?m)^[ \t]*(?:-|(\d+):)(.*)$", block)
    return {int(value or k): name.strip(" '\"") for k, (value, name) in enumerate(rows)}


def _machine_colors(text: str, lines: list[str]) -> dict[Value, str]:
    """Supervisely: {name: [value, value, value]}."""
    return {int(value[0]): name for name, value in json.loads(text).items()}


def _meta(text: str, lines: list[str]) -> dict[Value, str]:
    """Supervisely: classes with a title, which its export numbers from 1 on."""
    return {k: entry["title"] for k, entry in enumerate(json.loads(text)["classes"], 1)}


READERS = {
    "labelmap.txt": _labelmap, "label_colors.txt": _label_colors, "_classes.csv": _classes_csv,
    "class_names.txt": _class_names, "classes.txt": _class_names, "data.yaml": _data_yaml,
    "obj_class_to_machine_color.json": _machine_colors, "meta.json": _meta,
}  # fmt: skip


def _instead(files: list[str], pictures: list[str]) -> str:
    """Say what there is where no photos meet masks, and what to do."""
    counts = Counter(Path(name).suffix.lower() for name in files)
    for suffix, advice in NO_MASKS.items():
        if counts[suffix]:
            return f"no photos with masks of their names; {counts[suffix]:,} {suffix} files: {advice}"
    if not pictures:
        return "holds no pictures; expected photos, and a mask for each"
    return (
        f"{len(pictures):,} pictures, but no masks of the same names (a.jpg with a.png, or a_mask.png, say)"
    )


def write_draft(root: Path, track: Track = quietly) -> list[str]:
    """Write a dataset.toml into a folder that has none, and return the lines to print."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; expected one with photos and masks")
    file = root / "dataset.toml"
    if file.exists():
        raise DataError(f"{file} exists and is never overwritten; edit it, or move it away")
    text, found, todo = draft(root, track)
    file.write_text(text, encoding="utf-8")
    place = shlex.quote(str(root))
    lines = [f"found: {line}" for line in found] + [f"to fill in: {line}" for line in todo]
    lines += [
        f"written: {file}",
        f"next: flowseg info {place} --preview check.png",
        f"      flowseg train --dataset {place}",
    ]
    return lines
