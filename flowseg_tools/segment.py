"""The segment command: which photos are meant, which files each one gets, and how they are made.

Every photo goes through the network by itself, so it gives the same bytes alone, in a folder and in
any order. The names of its outputs depend on the photo alone.
"""

import hashlib
import json
import math
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import glob
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from data import FOREIGN, FORMATS, MAX_PIXELS, SUFFIXES, PictureError, read_photo, scan
from flowseg_tools import draw
from flowseg_tools.predict import Mode, assign_photo, decode, to_input
from flowseg_tools.report import check_writable
from flowseg_tools.runs import RunError, replace_text
from flowseg_tools.terminal import describe_error, make_bar, printable
from model import FlowSeg

Photo = Path | str  # a file, or "-", which is standard input
NETWORK = Lock()  # one photo at a time: the network uses all cores by itself
THREADS = 3  # photos in hand at a time: one in the network, others are read or written
SMALL_PIXELS = 16_000_000  # of larger photos only one is in hand at a time: a pixel takes some 12 bytes
LARGE = Lock()
KINDS = {  # what can go beside a mask, by the end of its name, and the option that asks for it
    "overlay.png": "overlay", "confidence.png": "confidence", "confidence-map.png": "confidence",
    "entropy.png": "entropy", "entropy-map.png": "entropy",
    "trajectory.png": "trajectory", "trajectory.gif": "trajectory",
}  # fmt: skip
BAND_ROWS = 256  # rows of a photo whose pixels are counted or converted at a time
SIGNATURE = "photo"  # the key of the text in a mask that tells which photo it was made from
MADE = (".png", *(f"-{kind}" for kind in KINDS))  # what the names of our pictures end in
PICTURES = {*SUFFIXES, *FOREIGN}  # what cannot be read is named rather than passed over


class Task(NamedTuple):
    """What is to be done for one photo."""

    photo: Photo
    mask: Path
    files: dict[str, Path]  # what is still to be made: kind ("mask", "overlay.png", ...) -> file
    problem: str  # what keeps them from being made, or ""


@dataclass(frozen=True)
class Segmented:
    """What the network says of a photo of H x W pixels."""

    labels: np.ndarray  # (H, W) uint8 train ids
    confidence: Image.Image  # the probability of the label, as grey from 0 to 255
    entropy: Image.Image | None  # 255 if all classes are equally probable
    states: list[np.ndarray]  # (h, w, 3) each, of the flow
    classes: list[dict]  # a row for every class of the mask


# ---------------------------------------------------------------- what is meant


def find_photos(
    paths: Sequence[str], output: Path | None = None
) -> tuple[list[tuple[Photo, Path]], list[Task]]:
    """The photos of files, folders, globs and "-", each with its path below what was asked for.

    Folders that cannot be listed are returned as tasks that fail. What a folder holds below `output`, masks
    of ours and the pictures beside them were made before and are left out. PictureError: nothing was found.
    """
    found: dict[Photo, Path] = {}
    refused: dict[Path, str] = {}
    for given in paths:
        names: dict[Photo, Path] = {"-": Path("stdin")}
        if given != "-":
            names = _photos_at(Path(given), output, refused)
        if not names and not refused:
            expected = f"file, folder (not -o) or glob of {' '.join(SUFFIXES)}"
            raise PictureError(f"no photo at {given}; expected {expected}")
        for photo, name in names.items():
            found.setdefault(photo, name)
    tasks = [Task(place, place, {}, f"{place}: cannot be listed ({why})") for place, why in refused.items()]
    return list(found.items()), tasks


def _photos_at(given: Path, output: Path | None, refused: dict[Path, str]) -> dict[Photo, Path]:
    """Photos of a file, a folder or a glob; their paths begin below the folder, or the glob's fixed part."""
    if given.is_file():  # asked for by name, so whatever its suffix is
        return {given: Path(given.name)}
    root = next(folder for folder in (given, *given.parents) if folder.is_dir())
    pattern = given.relative_to(root).parts
    if not pattern or "**" in pattern:
        files = scan(root, refused)
        if pattern:
            files = [file for file in files if _matches(file.relative_to(root).parts, pattern)]
    else:
        files = [Path(file) for file in glob(str(given)) if os.path.isfile(file)]
    made = output.resolve() if output else None
    found = {}
    for file in sorted(files):
        visible = file.suffix.lower() in PICTURES and not file.name.startswith(".")
        if visible and made not in file.resolve().parents:
            found[file] = file.relative_to(root)

    # The masks of earlier runs, and the pictures named after them, are no photos.
    masks = [file for file in found if file.suffix == ".png" and SIGNATURE in _header(file)[2]]
    made = {mask.with_name(f"{mask.stem}{kind}") for mask in masks for kind in MADE}
    return {file: name for file, name in found.items() if file not in made}


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a path are those of a glob, in which ** stands for any number of folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[skip:], pattern[1:]) for skip in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


# ---------------------------------------------------------------- what each photo gets


def choose_output(paths: Sequence[str], count: int, output: Path | None, labelmap: bool) -> tuple[Path, bool]:
    """Where masks go, and whether that is the file of a single one. RunError: it cannot be said."""
    named = len(paths) == 1 and (paths[0] == "-" or Path(paths[0]).is_file())  # one photo, by its name
    if output is None:
        if named and paths[0] != "-" and not labelmap:
            photo = Path(paths[0])
            return photo.with_name(f"{photo.stem}-mask.png"), True
        raise RunError(f"{count} photos without -o; add -o FOLDER (or -o mask.png for one photo)")
    png = output.suffix.lower() == ".png"
    single = not output.is_dir() and (png or (named and bool(output.suffix)))
    if single and (count > 1 or not png):
        raise RunError(f"-o {output} for {count} photos; expected a .png for one, else a folder")
    if "-" in paths and not single:
        raise RunError(f"-o {output} for standard input; expected a .png, as in -o mask.png")
    if labelmap and single:
        raise RunError(f"--labelmap with -o {output}; expected a folder, as in -o masks")
    return output, single


def mask_name(name: Path, by_stem: bool = False) -> Path:
    """The path of a mask below the output folder; it depends on the photo alone, and a.jpg is not a.png.

    by_stem: a.png for every photo called a, as annotation tools expect it.
    """
    if by_stem or name.suffix.lower() in ("", ".jpg"):
        return name.with_suffix(".png")
    return name.with_name(f"{name.stem}_{name.suffix[1:]}.png")


def plan(
    photos: list[tuple[Photo, Path]], output: Path, single: bool, kinds: list[str], force: bool,
    by_stem: bool = False,
) -> Iterator[Task]:  # fmt: skip
    """What is to be done for every photo, in order.

    The mask is `output` if that is for a single photo, else a file below that folder; the names of the
    files of other `kinds` begin with the mask's. Files that exist are made again only by `force`, and photos
    never.
    """
    originals = {_identity(photo) for photo, _ in photos if os.path.exists(photo)}
    makers: dict[Path, Photo] = {}
    for photo, name in photos:
        mask = output if single else output / mask_name(name, by_stem)
        files = {}
        problem = ""
        for kind in ["mask", *kinds]:
            file = mask if kind == "mask" else mask.with_name(f"{mask.stem}-{kind}")
            there = file.exists()
            if there and (_identity(file) in originals or (kind == "mask" and _is_photo(file))):
                problem = f"{photo}: {file} exists and is a photo, never written over; choose another -o"
            elif there and single and not force:
                problem = f"{photo}: {file} exists; choose another -o, or --force to write it again"
            elif makers.setdefault(file, photo) != photo:
                problem = f"{photo}: {file} is made of {makers[file]}; choose another -o for one of them"
            elif force or not there:
                files[kind] = file
        yield Task(photo, mask, files, problem)


def check_outputs(tasks: Sequence[Task], report_file: Path | None) -> None:
    """Fail before the work, not after it, if an output cannot be written. RunError names it."""
    folders = {task.mask.parent for task in tasks}
    if report_file:
        outputs = {file.resolve() for task in tasks for file in task.files.values()}
        photos = {Path(task.photo).resolve() for task in tasks}
        if report_file.resolve() in outputs | photos:
            raise RunError(f"--report {report_file} is a photo or another output; choose another name")
        if report_file.exists() and _records(report_file) is None:
            raise RunError(f"--report {report_file} exists and is no report; choose another name")
        folders.add(report_file.parent)
    for folder in folders:
        check_writable(folder)


def _identity(path: Path) -> tuple[int, int]:
    """Device and inode of a file: the same for all names that it has."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def signature(photo: Path | bytes) -> str:
    """A short hash of a photo's bytes, of which only both ends are read."""
    with BytesIO(photo) if isinstance(photo, bytes) else open(photo, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        content = file.read(65536)
        file.seek(max(0, size - 65536))
        content += file.read() + str(size).encode()
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _header(file: Photo) -> tuple[int, str, dict]:
    """Pixels, mode and texts of a picture whose pixels are not decoded; zero pixels if it is none."""
    Image.MAX_IMAGE_PIXELS = None  # `read_photo` has a limit of its own
    if os.path.isfile(file):  # a pipe is not opened
        with suppress(Exception), Image.open(file, formats=FORMATS) as image:
            return image.width * image.height, image.mode, image.info
    return 0, "", {}


def _is_photo(file: Path) -> bool:
    """Whether a file is a picture in colours that is none of our masks."""
    pixels, mode, texts = _header(file)
    return pixels > 0 and mode not in ("1", "L", "P", "I", "I;16") and SIGNATURE not in texts


def _made_from_another(task: Task) -> bool:
    """Whether the mask that is there says that it was made from other bytes than this photo's.

    One that says nothing was perhaps retouched, and is kept.
    """
    made_from = _header(task.mask)[2].get(SIGNATURE)
    return made_from is not None and made_from != signature(Path(task.photo))


# ---------------------------------------------------------------- many photos


def segment_all(planned: Iterable[Task], work: Callable[..., dict]) -> Iterator[dict]:
    """Let `work(photo, files)`, a `segment_one`, do what was planned; yield a record of each photo, in order.

    A record has photo, mask, state (segmented, skipped or failed), note to the user, and what `work` returns.
    Whatever goes wrong at a photo fails that photo alone.
    """

    def attempt(task: Task) -> dict:
        record = {"photo": str(task.photo), "mask": str(task.mask), "state": "segmented", "note": ""}
        try:
            if task.problem:
                raise PictureError(task.problem)
            if "mask" not in task.files and _made_from_another(task):
                fix = "choose another -o, or --force to make it again"
                raise PictureError(f"{task.photo}: {task.mask} was made from another photo; {fix}")
            if not task.files:
                note = f"{task.photo}: skipped, {task.mask} exists (--force)"
                return record | {"state": "skipped", "note": note}
            pixels, *_ = _header(task.photo)
            with LARGE if pixels > SMALL_PIXELS else nullcontext():
                return record | work(task.photo, task.files)
        except Exception as error:
            return record | {"state": "failed", "note": _explain(task.photo, error)}

    pool = ThreadPoolExecutor(THREADS)
    futures: deque[Future] = deque()
    try:
        futures.extend(pool.submit(attempt, task) for task in planned)
        while futures:
            yield futures[0].result()
            futures.popleft()
    except KeyboardInterrupt:  # no other photo is begun; those in hand are finished and belong in the report
        pool.shutdown(cancel_futures=True)
        yield from (future.result() for future in futures if not future.cancelled())
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _explain(photo: Photo, error: Exception) -> str:
    """What went wrong at a photo, in one line, with options of this command."""
    out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if out_of_memory or "allocate memory" in str(error):
        return f"error: {photo}: there is not enough memory; lower --short-side, or try --mode slide"
    line, _ = describe_error(error)
    return line if isinstance(error, PictureError) else f"{line} (at {photo})"


def tell(records: Iterator[dict], total: int, out: Console, err: Console, quiet: bool) -> Iterator[dict]:
    """Pass the records on, saying what becomes of each photo, and at the end the sum."""
    counts = Counter()
    # A bar stays whole only if its own console prints what comes above it.
    screen = err if err.is_terminal and out.is_terminal else out
    with make_bar(err, quiet) as bar:
        task = bar.add_task("segmenting", total=total)
        for record in records:
            yield record
            counts[record["state"]] += 1
            if record["state"] == "segmented":
                screen.print(printable(f"{record['photo']} -> {record['mask']}"))
            if record["state"] == "failed":
                err.print(printable(record["note"]), style="red")
            elif record["note"] and not quiet:
                err.print(printable(record["note"]))
            bar.advance(task)
    if total > 1 and not quiet:
        err.print(", ".join(f"{count} {state}" for state, count in counts.items()))


def report(file: Path, records: list[dict]) -> None:
    """Write the records as JSON; photos that were skipped keep the record that the file has of them."""
    earlier = {record["photo"]: record for record in _records(file) or []}
    kept = []
    for record in records:
        if record["state"] == "skipped":
            record = earlier.get(record["photo"], record)
        kept.append(record)
    replace_text(file, json.dumps(kept, indent=2, allow_nan=False) + "\n")


def _records(file: Path) -> list[dict] | None:
    """The records of an earlier report, or None if the file is none."""
    with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        found = json.loads(file.read_text()) if file.is_file() else [{}]
        if all(isinstance(record["photo"], str) for record in found):
            return found
    return None


# ---------------------------------------------------------------- one photo


def segment_one(
    model: FlowSeg, path: Photo, files: dict[str, Path], *, short_side: int, steps: int | None = None,
    mode: Mode = "whole", flip: bool = False, raw_ids: bool = False, max_pixels: int = MAX_PIXELS,
) -> dict:  # fmt: skip
    """Segment a photo and write its `files` by their kinds; returns a note and the classes of the mask.

    steps: by default the checkpoint's own. raw_ids: the mask has the data set's values, not train ids.
    """
    steps = steps or model.config.steps
    source = sys.stdin.buffer.read() if path == "-" else path
    photo = read_photo(source, max_pixels)
    found = _compute(model, photo, short_side, steps, mode, flip, files.keys())
    colors = draw.palette(model.centroids.cpu().numpy(), model.info.colors)
    clear = draw.clear_ids(model.info.classes, model.info.clear)
    for kind, file in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        if kind == "mask":
            ids = model.info.ids if raw_ids else range(len(colors))
            _write_mask(file, found.labels, colors, ids, signature(source))
        else:
            _write_picture(kind, file, photo, found, colors, clear)
    remarks = list(photo.info["remarks"])
    if photo.info["several"]:
        remarks.append("the first of several frames")
    note = f"{path}: {'; '.join(remarks)}" if remarks else ""
    return {"note": note, "classes": found.classes}


def _compute(
    model: FlowSeg, photo: Image.Image, short_side: int, steps: int, mode: Mode, flip: bool, kinds: Set[str]
) -> Segmented:
    """What the network says of a photo: entropy and states only if one of the kinds needs them."""
    size = photo.size[::-1]  # (H, W)
    entropy = None
    states = []
    with NETWORK:
        p = assign_photo(model, photo, short_side, steps, mode, flip)  # (1, N, h, w)
        labels, confidence = (found[0].cpu().numpy() for found in decode(p, size))
        classes = _classes(model, labels, confidence)
        confidence = _grey(confidence)
        if kinds & {"entropy.png", "entropy-map.png"}:
            # The largest entropy of N probabilities is ln N. It overwrites p, which is not needed any more.
            share = torch.special.entr(p, out=p).sum(1, keepdim=True) / math.log(p.shape[1])
            entropy = _grey(decode(share, size)[1][0].cpu().numpy())
        if kinds & {"trajectory.png", "trajectory.gif"}:
            image = to_input(photo, short_side).to(p.device)
            states = [x[0, :3].movedim(0, 2).cpu().numpy() for x in model.trajectory(image, steps)]
    return Segmented(labels, confidence, entropy, states, classes)


def _classes(model: FlowSeg, labels: np.ndarray, confidence: np.ndarray) -> list[dict]:
    """A row for every class of the mask: name, train id, pixels, percent, mean confidence."""
    pixels = np.zeros(256, np.int64)
    total = np.zeros(256)  # of the confidence
    for top in range(0, len(labels), BAND_ROWS):
        band = labels[top : top + BAND_ROWS].ravel()
        pixels += np.bincount(band, minlength=256)
        total += np.bincount(band, confidence[top : top + BAND_ROWS].ravel(), minlength=256)
    rows = []
    for k in pixels.nonzero()[0].tolist():
        count = int(pixels[k])
        row = {"class": model.info.classes[k], "id": k, "pixels": count}
        rows.append(row | {"percent": 100 * count / labels.size, "confidence": total[k] / count})
    return rows


def write_labelmap(folder: Path, model: FlowSeg, raw_ids: bool, force: bool) -> None:
    """Write which colour is which class into labelmap.txt, as annotation tools read it."""
    info = model.info
    colors = info.colors
    if raw_ids and isinstance(info.ids[0], str):
        colors = info.ids
    elif raw_ids and max(info.ids) > 255:
        raise RunError("--labelmap with --ids raw: ids over 255 have no colour; leave out --ids raw")
    lines = ["# label:color_rgb:parts:actions"]
    palette = draw.palette(model.centroids.cpu().numpy(), colors).tolist()
    for name, color in zip(info.classes, palette, strict=True):
        if ":" in name or not name.isprintable():
            raise RunError(f"--labelmap: labelmap.txt cannot hold the class name {name!r}; leave it out")
        lines.append(f"{name}:{','.join(map(str, color))}::")
    file = folder / "labelmap.txt"
    text = "\n".join(lines) + "\n"
    if file.is_file() and not force and file.read_text(encoding="utf-8", errors="replace") != text:
        raise RunError(f"{file} exists with other labels; choose another -o, or --force")
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(file, text)


def _write_mask(
    file: Path, labels: np.ndarray, colors: np.ndarray, ids: Sequence[int | str], made_from: str
) -> None:
    """Write the value ids[k] of every class k: a number in the colour of its class, or a colour."""
    texts = {SIGNATURE: made_from}
    if isinstance(ids[0], str):
        draw.save(file, draw.colorize(labels, draw.palette(colors, ids)), [".png"], texts=texts)
        return
    values = np.array(ids, dtype=np.min_scalar_type(max(ids)))
    shades = np.zeros((max(ids) + 1, 3), np.uint8)
    shades[values] = colors
    draw.write_mask(file, values[labels], shades, texts)


def _write_picture(
    kind: str, file: Path, photo: Image.Image, found: Segmented, colors: np.ndarray, clear: Set[int]
) -> None:
    """Draw and write one of the pictures that can go beside a mask."""
    match kind:
        case "overlay.png":
            entries = [(row["class"], colors[row["id"]], row["percent"]) for row in found.classes]
            names = {row["id"]: row["class"] for row in found.classes}
            draw.save(file, draw.overlay_sheet(photo, found.labels, colors, names, entries, clear))
        case "confidence.png":
            draw.save(file, found.confidence)
        case "confidence-map.png":
            draw.save(file, draw.heat(found.confidence, "probability of the class chosen"))
        case "entropy.png":
            draw.save(file, found.entropy)
        case "entropy-map.png":
            draw.save(file, draw.heat(found.entropy, "how undecided: 1 if all classes are equally probable"))
        case "trajectory.png":
            steps = len(found.states) - 1
            captions = [f"t = {i / steps:.2f}" for i in range(steps + 1)]
            frames = [draw.state_image(x) for x in found.states]
            draw.save(file, draw.strip(frames, captions))
        case "trajectory.gif":
            draw.save_animation(file, found.states)


def _grey(shares: np.ndarray) -> Image.Image:
    """Values in [0, 1] as grey of 8 bits."""
    grey = np.empty(shares.shape, np.uint8)
    for top in range(0, len(shares), BAND_ROWS):
        rows = slice(top, top + BAND_ROWS)
        grey[rows] = np.rint(255 * shares[rows].clip(0, 1))
    return Image.fromarray(grey)
