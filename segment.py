"""Segmenting photos: which files each one gets, what is kept, and how the pictures are made.

Every photo goes through the network by itself, so it gives the same bytes alone, in a folder, in any order.
"""

import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Lock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.progress import Progress

import picture
from model import FlowSeg, assign_photo, to_input
from run import replace_text

Photo = Path | str  # "-" is standard input
NETWORK = Lock()  # it has all cores to itself


def plan(
    photos: list[tuple[Photo, Path]], output: Path, kinds: list[str], force: bool
) -> Iterator[tuple[Photo, Path, dict[str, Path], str]]:
    """(photo, mask, files still to be made by their kinds, what keeps them from being made) of each photo.

    The mask is `output`, if that has a suffix, or below that folder; other kinds end the names beside it.
    """
    single = output.suffix and not output.is_dir()
    originals = {os.stat(photo)[1:3] for photo, _ in photos if photo != "-"}  # inodes: names have variants
    makers = {}
    for photo, stem in photos:
        mask, files, problem = output if single else output / f"{stem}.png", {}, ""
        for kind in ["mask", *kinds]:
            file = mask if kind == "mask" else mask.with_name(f"{mask.stem}-{kind}")
            there = file.exists()
            if there and (os.stat(file)[1:3] in originals or (single and not force)):
                problem = f"{file} exists; choose another -o, or --force (never for a photo)"
            elif makers.setdefault(file, photo) != photo:
                problem = f"{photo}: {file} is made of {makers[file]}; choose another -o for one of them"
            elif force or not there:
                files[kind] = file
        yield photo, mask, files, problem


def segment_all(planned: Iterable[tuple], work: Callable[..., dict]) -> Iterator[dict]:
    """Let `work`, a `segment_one`, do what was planned; one record a photo, in order: photo, state
    (segmented, skipped or failed), note to the user, and what `work` says."""

    def attempt(photo: Photo, mask: Path, files: dict[str, Path], problem: str) -> dict:
        record = {"photo": str(photo), "mask": str(mask), "state": "segmented", "note": ""}
        try:
            if problem:
                raise picture.PictureError(problem)
            if not files:
                return record | {"state": "skipped", "note": f"{photo}: skipped, {mask} exists (--force)"}
            return record | work(photo, files)
        except (picture.PictureError, OSError) as error:
            return record | {"state": "failed", "note": f"error: {error}"}

    pool = ThreadPoolExecutor(2)  # while one photo is computed, another is read or written
    try:
        yield from map(lambda future: future.result(), [pool.submit(attempt, *one) for one in planned])
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C no other is begun


def tell(records: Iterator[dict], total: int, out: Console, err: Console, quiet: bool) -> list[dict]:
    """Say what becomes of each photo; of many also how far and how fast, if someone watches, and the sum."""
    screen = err if err.is_terminal and out.is_terminal else out  # the bar must know what is printed over it
    told, many = [], total > 1 and not quiet
    with Progress(console=err, transient=True, disable=not many or not err.is_terminal) as bar:
        task = bar.add_task("", total=total)
        for record in records:
            failed = record["state"] == "failed"
            if record["state"] == "segmented":
                screen.print(f"{record['photo']} -> {record['mask']}")
            if record["note"] and (failed or not quiet):
                err.print(record["note"], style="red" if failed else None)
            told.append(record)
            bar.update(task, advance=1, description=f"{bar.tasks[0].speed or 0:.1f} images/s")
    if many:
        counts = Counter(record["state"] for record in told)
        err.print(", ".join(f"{count} {state}" for state, count in counts.items()))
    return told


def report(file: Path, records: list[dict]) -> None:
    """Write the records as JSON; of what was skipped, those that the file has from an earlier time."""
    earlier = {}
    if file.exists():
        with suppress(ValueError, TypeError, KeyError):  # not a report
            earlier = {record["photo"]: record for record in json.loads(file.read_text())}
    kept = [earlier.get(r["photo"], r) if r["state"] == "skipped" else r for r in records]
    replace_text(file, json.dumps(kept, indent=2) + "\n")


def _compute(model: FlowSeg, photo: Image.Image, size: int, steps: int, mode: str, kinds: Set[str]) -> tuple:
    """Labels (H, W) uint8; their probabilities and, if that kind is asked for, the entropies of all as shares
    of ln N, (H, W) in [0, 1]; states [(h, w, 3)] of the flow for its kinds."""
    with NETWORK:
        p = assign_photo(model, photo, size, steps, False, mode)
        found = [*model.decode(p, photo.size[::-1])]
        if "entropy.png" in kinds:
            entropy = torch.special.entr(p, out=p).sum(1, keepdim=True) / math.log(p.shape[1])
            found += F.interpolate(entropy, photo.size[::-1], mode="bilinear")
        if flow := kinds & {"trajectory.png", "trajectory.gif"}:
            flow = model.trajectory(to_input(photo, size).to(p.device), steps)
        states = [x[0, :3].movedim(0, 2).cpu().numpy() for x in flow]
    labels, confidence, *entropy = (values[0].cpu().numpy() for values in found)
    return labels.astype(np.uint8), confidence, *(entropy or [None]), states


def segment_one(
    model: FlowSeg, size: int, steps: int, mode: str, raw: bool, max_pixels: int, path: Photo, files: dict
) -> dict:
    """Write the files of a photo by their kinds, the mask in the data set's values if raw; its classes."""
    photo = picture.read_photo(sys.stdin.buffer.read() if path == "-" else path, max_pixels)
    labels, confidence, entropy, states = _compute(model, photo, size, steps, mode, files.keys())
    colors, classes = picture.palette(model.centroids.cpu().numpy()), []
    for k in np.unique(labels).tolist():
        here, name = labels == k, model.metadata["classes"][k]
        classes += [{"class": name, "id": k, "pixels": int(here.sum()), "percent": 100 * float(here.mean()),
                     "confidence": float(confidence[here].mean())}]  # fmt: skip
    entries = [(c["class"], colors[c["id"]], c["percent"]) for c in classes]
    for kind, file in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        match kind:
            case "mask":
                ids = model.metadata["ids"] if raw else list(range(len(colors)))
                values, shades = np.array(ids), np.zeros((max(ids) + 1, 3), np.uint8)
                shades[ids] = colors
                picture.write_mask(file, values[labels].astype(np.min_scalar_type(max(ids))), shades)
            case "overlay.png":
                picture.save(file, picture.with_legend(picture.overlay(photo, labels, colors), entries))
            case "side-by-side.png":
                pair = picture.grid([photo, picture.colorize(labels, colors)], ["photo", "mask"], columns=2)
                picture.save(file, picture.with_legend(pair, entries))
            case "confidence.png" | "entropy.png":
                grey = 255 * (confidence if kind == "confidence.png" else entropy)
                picture.save(file, Image.fromarray(np.rint(grey.clip(0, 255)).astype(np.uint8)))
            case "trajectory.png":
                times = [f"t = {i / steps:.2f}" for i in range(len(states))]
                picture.save(file, picture.strip([*map(picture.state_image, states)], times))
            case "trajectory.gif":
                picture.save_animation(file, states)
    frames = photo.info.get("frames", 1)
    return {"note": f"{path}: the first of {frames} frames" if frames > 1 else "", "classes": classes}
