"""Segmenting photos: which files each one gets, what is kept, and how its pictures are made.

Every photo goes through the network by itself, so it gives the same bytes alone, in a folder and in any order.
A photo that fails costs nothing but itself.
"""

import math
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import picture
from model import FlowSeg, assign_photo, to_input
from picture import PictureError

ENDINGS = {"overlay": "-overlay.png", "side_by_side": "-side-by-side.png", "confidence": "-confidence.png",
           "entropy": "-entropy.png", "trajectory": "-trajectory.png", "animation": "-trajectory.gif"}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What is asked for of every photo: how it is segmented, and the kinds of files that it gets."""

    size: int
    steps: int
    mode: str  # of `assign_photo`
    kinds: list[str]  # keys of ENDINGS, or "mask"
    raw: bool  # masks of raw ids
    force: bool  # overwrite what exists
    max_pixels: int


def segment_all(model: FlowSeg, photos: list[tuple], output: Path, options: Options) -> Iterator[dict]:
    """Segment photos (path or "-", stem) to the mask `output`, or to a folder if that has no suffix .png.

    One record a photo, in order: photo, mask, and "error", or "skipped", or frames and classes.
    """
    lock, pool = Lock(), ThreadPoolExecutor(2)  # while one photo is computed, another is read or written
    try:
        planned = list(plan(photos, output, options))
        work = [pool.submit(_attempt, model, *one, options, lock) for one in planned]
        yield from (future.result() for future in work)
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C nothing more is begun


def plan(photos: list[tuple], output: Path, options: Options) -> Iterator[tuple]:
    """(photo, mask, files still to be written, what speaks against it): kinds of files by their paths."""
    originals = {_identity(photo) for photo, _ in photos if photo != "-"}
    owner = {}  # file -> photo that it is made of
    for photo, stem in photos:
        mask = output if is_mask(output) else output / f"{stem}.png"
        files = {mask if kind == "mask" else mask.with_name(mask.stem + ENDINGS[kind]): kind
                 for kind in options.kinds}  # fmt: skip
        problem = ""
        for file in list(files):
            there = file.exists()
            if there and (_identity(file) in originals or (is_mask(output) and not options.force)):
                problem = f"{file} exists; choose another -o, or --force (never for a photo)"
            elif owner.setdefault(file, photo) != photo:
                problem = f"{photo}: {file} is already made of {owner[file]}; segment it into another -o"
            elif there and not options.force:
                del files[file]  # finished before
        yield photo, mask, files, problem


def is_mask(output: Path) -> bool:
    return output.suffix.lower() == ".png" and not output.is_dir()


def _identity(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _attempt(
    model: FlowSeg,
    photo: Path | str,
    mask: Path,
    files: dict[Path, str],
    problem: str,
    options: Options,
    lock: Lock,
) -> dict:
    record = {"photo": str(photo), "mask": str(mask)}
    try:
        if problem:
            raise PictureError(problem)
        if not files:
            return record | {"skipped": True}
        mask.parent.mkdir(parents=True, exist_ok=True)
        return record | _segment_one(model, photo, files, options, lock)
    except (PictureError, OSError) as error:
        return record | {"error": str(error)}


def _segment_one(
    model: FlowSeg, path: Path | str, files: dict[Path, str], options: Options, lock: Lock
) -> dict:
    """Write the files of one photo; returns its frames and what `statistics` says of its classes."""
    photo = picture.read_photo(sys.stdin.buffer.read() if path == "-" else path, options.max_pixels)
    kinds, states, shape = set(files.values()), [], photo.size[::-1]
    with lock:  # the network has all cores to itself
        p = assign_photo(model, photo, options.size, options.steps, mode=options.mode)
        labels, confidence = (values[0].cpu().numpy() for values in model.decode(p, shape))
        if "entropy" in kinds:  # of the soft assignments, in units of the most there can be; in place of p
            entropy = torch.special.entr(p, out=p).sum(1, keepdim=True) / math.log(p.shape[1])
            entropy = F.interpolate(entropy, shape, mode="bilinear")[0, 0].cpu().numpy()
        if kinds & {"trajectory", "animation"}:
            image = to_input(photo, options.size).to(p.device)
            states = [x[0, :3].movedim(0, 2).cpu().numpy() for x in model.trajectory(image, options.steps)]

    labels, colors = labels.astype(np.uint8), picture.palette(model.centroids.cpu().numpy())
    classes = statistics(labels, confidence, model.metadata["classes"])
    entries = [(c["class"], colors[c["id"]], c["percent"]) for c in classes]
    for file, kind in files.items():
        match kind:
            case "mask":
                ids = model.metadata["ids"] if options.raw else list(range(len(colors)))
                table, shades = (
                    np.array(ids, np.min_scalar_type(max(ids))),
                    np.zeros((max(ids) + 1, 3), np.uint8),
                )
                shades[ids] = colors
                picture.write_mask(file, table[labels], shades)
            case "overlay":
                picture.save(file, picture.with_legend(picture.overlay(photo, labels, colors), entries))
            case "side_by_side":
                pair = [photo, picture.colorize(labels, colors)]
                picture.save(file, picture.with_legend(picture.grid(pair, ["photo", "mask"], 2), entries))
            case "confidence" | "entropy":
                values = confidence if kind == "confidence" else entropy
                picture.save(file, Image.fromarray(np.rint(255 * values.clip(0, 1)).astype(np.uint8)))
            case "trajectory":
                times = [f"t = {i / options.steps:.2f}" for i in range(len(states))]
                picture.save(file, picture.strip([*map(picture.state_image, states)], times))
            case "animation":
                picture.save_animation(file, states)
    return {"frames": photo.info.get("frames", 1), "classes": classes}


def statistics(labels: np.ndarray, confidence: np.ndarray, names: list[str]) -> list[dict]:
    """Pixels, percent and mean confidence of each class in a mask (H, W)."""
    rows = list(zip(labels, confidence, strict=True))  # by rows: counting copies to 64 bits
    pixels = sum(np.bincount(row, minlength=len(names)) for row, _ in rows)
    total = sum(np.bincount(row, weights, len(names)) for row, weights in rows)
    return [{"class": names[k], "id": int(k), "pixels": int(pixels[k]), "percent": 100 * pixels[k] / labels.size,
             "confidence": total[k] / pixels[k]} for k in np.flatnonzero(pixels)]  # fmt: skip
