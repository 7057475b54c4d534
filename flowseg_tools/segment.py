"""The segment command: which photos are meant, which files each one gets, and how they are made.

Every photo goes through the network by itself, so it gives the same bytes alone, in a folder and in
any order.
"""

import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from data import FOREIGN, MAX_PIXELS, SUFFIXES, PictureError, read_photo, scan
from flowseg_tools import draw
from flowseg_tools.predict import Mode, assign_photo, decode, to_input
from flowseg_tools.runs import replace_text
from model import FlowSeg

Photo = Path | str  # a file, or "-", which is standard input
NETWORK = Lock()  # one photo at a time: the network uses all cores by itself


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
    confidence: np.ndarray  # (H, W), the probability of the label
    entropy: np.ndarray | None  # (H, W) in [0, 1]: 1 if all classes are equally probable
    states: list[np.ndarray]  # (h, w, 3) each, of the flow


# ---------------------------------------------------------------- what is meant


def find_photos(paths: Sequence[str | Path], output: Path | None = None) -> list[tuple[Photo, Path]]:
    """The photos of files, folders, globs and "-", each with the path of its outputs, without suffix.

    Outputs keep the sub-folders of their photos, and no two are the same. Pictures that a folder holds below
    `output` were made from its photos before and are left out. PictureError: nothing was found.
    """
    found: dict[Photo, Path] = {}  # photo -> its path below the folder that was asked for
    for given in paths:
        if given == "-":
            found["-"] = Path("stdin")
        else:
            found.update(_photos_at(Path(given), output))
    stems: dict[Path, Photo] = {}
    for photo, name in found.items():
        stem = name.with_suffix("")
        while stem in stems:  # a.jpg beside a.png: a and a_png
            stem = stem.with_name(f"{stem.name}_{name.suffix[1:]}")
        stems[stem] = photo
    return [(photo, stem) for stem, photo in stems.items()]


def _photos_at(given: Path, output: Path | None) -> dict[Photo, Path]:
    """Photos of a file, a folder or a glob; their paths begin below the folder, or the glob's fixed part."""
    if given.is_file():  # asked for by name, so whatever its suffix is
        return {given: Path(given.name)}
    if given.is_dir():
        root = given
        files = list(scan(given))
        if output:
            made = output.resolve()
            files = [file for file in files if made not in file.resolve().parents]
    else:
        root = next(folder for folder in given.parents if folder.is_dir())
        files = [Path(file) for file in glob(str(given), recursive=True)]
    found = {}
    for file in sorted(files):
        name = file.relative_to(root)
        hidden = any(part.startswith(".") for part in name.parts)
        if file.suffix.lower() in (*SUFFIXES, *FOREIGN) and not hidden and not file.is_dir():
            found[file] = name
    if not found:
        expected = f"file, folder (not -o) or glob of {' '.join(SUFFIXES)}"
        raise PictureError(f"no photo at {given}; expected {expected}")
    return found


def plan(photos: list[tuple[Photo, Path]], output: Path, kinds: list[str], force: bool) -> Iterator[Task]:
    """What is to be done for every photo, in order.

    The mask is `output` if that has a suffix, else a file below that folder; the names of the files of other
    `kinds` begin with the mask's. Files that exist are made again only by `force`, and photos never.
    """
    single = bool(output.suffix) and not output.is_dir()
    originals = {_identity(photo) for photo, _ in photos if photo != "-"}
    makers: dict[Path, Photo] = {}
    for photo, stem in photos:
        mask = output if single else output / f"{stem}.png"
        files = {}
        problem = ""
        for kind in ["mask", *kinds]:
            file = mask if kind == "mask" else mask.with_name(f"{mask.stem}-{kind}")
            there = file.exists()
            if there and (_identity(file) in originals or (single and not force)):
                problem = f"{file} exists; choose another -o, or --force (never for a photo)"
            elif makers.setdefault(file, photo) != photo:
                problem = f"{photo}: {file} is made of {makers[file]}; choose another -o for one of them"
            elif force or not there:
                files[kind] = file
        yield Task(photo, mask, files, problem)


def _identity(path: Path) -> tuple[int, int]:
    """Device and inode of a file: the same for all names that it has."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


# ---------------------------------------------------------------- many photos


def segment_all(planned: Iterable[Task], work: Callable[..., dict]) -> Iterator[dict]:
    """Let `work(photo, files)`, a `segment_one`, do what was planned; yield a record of each photo, in order.

    A record has photo, mask, state (segmented, skipped or failed), note to the user, and what `work` returns.
    """

    def attempt(task: Task) -> dict:
        record = {"photo": str(task.photo), "mask": str(task.mask), "state": "segmented", "note": ""}
        try:
            if task.problem:
                raise PictureError(task.problem)
            if not task.files:
                note = f"{task.photo}: skipped, {task.mask} exists (--force)"
                return record | {"state": "skipped", "note": note}
            return record | work(task.photo, task.files)
        except (PictureError, OSError) as error:
            return record | {"state": "failed", "note": f"error: {error}"}

    # While one photo is in the network, another is read or written.
    pool = ThreadPoolExecutor(2)
    try:
        futures = [pool.submit(attempt, task) for task in planned]
        for future in futures:
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C no other photo is begun


def tell(records: Iterator[dict], total: int, out: Console, err: Console, quiet: bool) -> list[dict]:
    """Say what becomes of each photo; of several also how fast it goes, if someone watches, and the sum."""
    told = []
    counted = total > 1 and not quiet
    # A bar stays whole only if its own console prints what comes above it.
    screen = err if err.is_terminal and out.is_terminal else out
    with Progress(console=err, transient=True, disable=not counted or not err.is_terminal) as bar:
        task = bar.add_task("", total=total)
        for record in records:
            told.append(record)
            if record["state"] == "segmented":
                screen.print(f"{record['photo']} -> {record['mask']}")
            if record["state"] == "failed":
                err.print(record["note"], style="red")
            elif record["note"] and not quiet:
                err.print(record["note"])
            speed = bar.tasks[0].speed or 0
            bar.update(task, advance=1, description=f"{speed:.1f} images/s")
    if counted:
        counts = Counter(record["state"] for record in told)
        err.print(", ".join(f"{count} {state}" for state, count in counts.items()))
    return told


def report(file: Path, records: list[dict]) -> None:
    """Write the records as JSON; photos that were skipped keep the record that the file has of them."""
    earlier = {}
    if file.exists():
        with suppress(ValueError, TypeError, KeyError):  # the file is no report
            earlier = {record["photo"]: record for record in json.loads(file.read_text())}
    kept = []
    for record in records:
        if record["state"] == "skipped":
            record = earlier.get(record["photo"], record)
        kept.append(record)
    replace_text(file, json.dumps(kept, indent=2) + "\n")


# ---------------------------------------------------------------- one photo


def segment_one(
    model: FlowSeg, path: Photo, files: dict[str, Path], *, short_side: int | None = None,
    steps: int | None = None, mode: Mode = "whole", flip: bool = False, raw_ids: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> dict:  # fmt: skip
    """Segment a photo and write its `files` by their kinds; returns a note and the classes of the mask.

    short_side, steps: by default the checkpoint's own. raw_ids: the mask has the values of the data set
    instead of train ids.
    """
    short_side = short_side or model.info.crop_size
    steps = steps or model.config.steps
    source = sys.stdin.buffer.read() if path == "-" else path
    photo = read_photo(source, max_pixels)
    found = _compute(model, photo, short_side, steps, mode, flip, files.keys())
    colors = draw.palette(model.centroids.cpu().numpy())
    classes = _classes(model, found)
    for kind, file in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        if kind == "mask":
            _write_mask(file, found.labels, colors, model.info.ids if raw_ids else None)
        else:
            _write_picture(kind, file, photo, found, colors, classes)
    remarks = list(photo.info["remarks"])
    if photo.info["frames"] > 1:
        remarks.append(f"the first of {photo.info['frames']} frames")
    note = f"{path}: {'; '.join(remarks)}" if remarks else ""
    return {"note": note, "classes": classes}


def _compute(
    model: FlowSeg, photo: Image.Image, short_side: int, steps: int, mode: Mode, flip: bool, kinds: Set[str]
) -> Segmented:
    """What the network says of a photo: entropy and states only if one of the kinds needs them."""
    size = photo.size[::-1]  # (H, W)
    entropy = None
    states = []
    with NETWORK:
        p = assign_photo(model, photo, short_side, steps, mode, flip)  # (1, N, h, w)
        labels, confidence = decode(p, size)
        if "entropy.png" in kinds:
            # The largest entropy of N probabilities is ln N. It overwrites p, which is not needed any more.
            share = torch.special.entr(p, out=p).sum(1, keepdim=True) / math.log(p.shape[1])
            entropy = F.interpolate(share, size, mode="bilinear")[0, 0].cpu().numpy()
        if kinds & {"trajectory.png", "trajectory.gif"}:
            image = to_input(photo, short_side).to(p.device)
            states = [x[0, :3].movedim(0, 2).cpu().numpy() for x in model.trajectory(image, steps)]
    return Segmented(labels[0].byte().cpu().numpy(), confidence[0].cpu().numpy(), entropy, states)


def _classes(model: FlowSeg, found: Segmented) -> list[dict]:
    """A row for every class of the mask: name, train id, pixels, percent, mean confidence."""
    rows = []
    for k in np.unique(found.labels).tolist():
        here = found.labels == k
        rows.append(
            {
                "class": model.info.classes[k],
                "id": k,
                "pixels": int(here.sum()),
                "percent": 100 * float(here.mean()),
                "confidence": float(found.confidence[here].mean()),
            }
        )
    return rows


def _write_mask(file: Path, labels: np.ndarray, colors: np.ndarray, ids: Sequence[int] | None) -> None:
    """Write train ids, or the raw value `ids[k]` of every class k, in the colours of the classes."""
    if ids is None:
        ids = range(len(colors))
    values = np.array(ids, dtype=np.min_scalar_type(max(ids)))
    shades = np.zeros((max(ids) + 1, 3), np.uint8)
    shades[values] = colors
    draw.write_mask(file, values[labels], shades)


def _write_picture(
    kind: str, file: Path, photo: Image.Image, found: Segmented, colors: np.ndarray, classes: list[dict]
) -> None:
    """Draw and write one of the pictures that can go beside a mask."""
    match kind:
        case "overlay.png":
            entries = [(row["class"], colors[row["id"]], row["percent"]) for row in classes]
            picture = draw.overlay(photo, found.labels, colors)
            draw.save(file, draw.with_legend(picture, entries))
        case "confidence.png":
            draw.save(file, _grey(found.confidence))
        case "entropy.png":
            draw.save(file, _grey(found.entropy))
        case "trajectory.png":
            steps = len(found.states) - 1
            captions = [f"t = {i / steps:.2f}" for i in range(steps + 1)]
            frames = [draw.state_image(x) for x in found.states]
            draw.save(file, draw.strip(frames, captions))
        case "trajectory.gif":
            draw.save_animation(file, found.states)


def _grey(shares: np.ndarray) -> Image.Image:
    """Values in [0, 1] as grey of 8 bits."""
    return Image.fromarray(np.rint(255 * shares.clip(0, 1)).astype(np.uint8))
