"""The report of an evaluation: its numbers, the confusion matrix as a picture, sheets of the worst images."""

import json
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from data import IGNORE, Dataset, FolderDataset
from flowseg_tools import draw
from flowseg_tools.runs import RunError, replace_text

WRONG = (214, 48, 40)
DARK = (16, 58, 112)  # a share of 100 %


def write_report(
    target: Path, facts: dict, metrics, dataset: Dataset, palette: np.ndarray, predict: Callable, worst: int
) -> None:
    """Write an evaluation into a file NAME.json, or into a folder with pictures.

    facts: what goes into the file. metrics: train.Metrics of the data set. predict: photo -> (labels,
    confidence), as it was for the metrics; it is asked again for the `worst` images.
    """
    classes = dataset.labels.classes
    scored = [(iou, index) for index, iou in metrics.images.items() if not math.isnan(iou)]
    sheets = []
    facts["worst"] = []
    for iou, index in sorted(scored)[:worst]:
        photo, raw, name = dataset.read(index)
        picture = str(dataset.pairs[index][0]) if isinstance(dataset, FolderDataset) else name
        facts["worst"].append({"image": picture, "IoU": iou})
        if target.suffix != ".json":
            truth = dataset.labels.to_train(raw, name)
            title = f"{'/'.join(Path(picture).parts[-2:])}: IoU {iou:.1%}"
            sheets.append(error_sheet(title, photo, truth, predict(photo)[0], classes, palette))

    text = json.dumps(facts, indent=2, allow_nan=False) + "\n"
    if target.suffix == ".json":
        replace_text(target, text)
        return
    target.mkdir(parents=True, exist_ok=True)
    replace_text(target / "report.json", text)
    draw.save(target / "confusion.png", confusion_picture(metrics.confusion, classes))
    for i, sheet in enumerate(sheets):
        draw.save(target / f"worst-{i + 1:02}.png", sheet)


def check_writable(folder: Path) -> None:
    """RunError if nothing can be written into a folder, or into the one in which it would be made."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise RunError(f"cannot write into {there} ({error.strerror}); choose another folder") from error


def sort_classes(rows: Sequence[dict], key: str) -> list[dict]:
    """Rows of classes sorted by a column: names upwards, numbers downwards, unknown numbers at the end."""
    known = [row for row in rows if row[key] is not None]
    unknown = [row for row in rows if row[key] is None]
    return sorted(known, key=lambda row: row[key], reverse=key != "name") + unknown


def confusion_picture(confusion: np.ndarray, classes: Sequence[str]) -> Image.Image:
    """What the pixels of each label were taken for; confusion: int64 (N, N), rows are labels."""
    count = len(classes)
    cell = int(np.clip(900 / count, 15, 64))
    size = int(np.clip(0.75 * cell, 11, 20))
    face = draw.font(size)
    names = [draw.shorten(name, face, 16 * size) for name in classes]
    head = math.ceil(max(face.getlength(name) for name in names)) + 2 * size  # room for names
    side = count * cell

    # The square root of a share makes small ones visible. Classes without labelled pixels have grey rows.
    totals = confusion.sum(1, keepdims=True)
    shares = confusion / totals.clip(1)  # (N, N)
    colors = draw.PAPER + np.sqrt(shares)[..., None] * (np.array(DARK) - draw.PAPER)
    colors[totals[:, 0] == 0] = draw.GRID
    cells = Image.fromarray(np.rint(colors).astype(np.uint8)).resize((side, side), Image.Resampling.NEAREST)

    # Names at the left, and the same turned by a right angle above the columns.
    sheet = Image.new("RGB", (head + side + size, 2 * size + head + side + size), draw.PAPER)
    corner = (head, 2 * size + head)
    left = Image.new("RGB", (head, side), draw.PAPER)
    above = left.copy()
    for k, name in enumerate(names):
        y = (k + 0.5) * cell
        ImageDraw.Draw(left).text((head - size / 2, y), name, draw.INK, face, anchor="rm")
        ImageDraw.Draw(above).text((size / 2, y), name, draw.INK, face, anchor="lm")
    sheet.paste(left, (0, corner[1]))
    sheet.paste(above.rotate(90, expand=True), (head, 2 * size))
    sheet.paste(cells, corner)

    # Lines between the cells and, where they are large enough, the numbers in them.
    pen = ImageDraw.Draw(sheet)
    title = "rows: labels, columns: predictions; % of the pixels with that label"
    pen.text((size / 2, size / 2), title, draw.INK, face)
    for k in range(count + 1):
        at = k * cell
        color = draw.RULE if k % 10 == 0 and count > 20 else draw.GRID  # every tenth guides the eye
        pen.line((corner[0] + at, corner[1], corner[0] + at, corner[1] + side), color)
        pen.line((corner[0], corner[1] + at, corner[0] + side, corner[1] + at), color)
    for row, column in np.argwhere(shares >= 0.005):
        if cell >= 2 * size:
            share = shares[row, column]
            middle = (corner[0] + (column + 0.5) * cell, corner[1] + (row + 0.5) * cell)
            ink = draw.PAPER if share > 0.2 else draw.INK
            pen.text(middle, f"{100 * share:.0f}", ink, face, anchor="mm")
    return sheet


def error_sheet(
    title: str, photo: Image.Image, truth: np.ndarray, prediction: np.ndarray, classes: Sequence[str],
    palette: np.ndarray,
) -> Image.Image:  # fmt: skip
    """Image, truth, prediction and errors of one image, with a legend of the classes in it."""
    side = int(np.clip(max(photo.size), 400, 800))
    tiles = [photo, draw.colorize(truth, palette), draw.colorize(prediction, palette)]
    tiles.append(error_map(photo, truth, prediction))
    captions = ["image", "truth", "prediction", "errors (red)"]
    sheet = draw.grid([draw.fit(tile, side) for tile in tiles], captions, 2, title)
    entries = draw.legend_entries(np.concatenate([truth, prediction]), classes, palette)
    return draw.with_legend(sheet, entries, most=24, size=20)


def error_map(photo: Image.Image, truth: np.ndarray, prediction: np.ndarray) -> Image.Image:
    """The photo in light grey, red where the prediction is wrong, black where there is no label."""
    grey = photo.convert("L").convert("RGB")
    picture = Image.blend(grey, Image.new("RGB", photo.size, "white"), 0.5)
    wrong = (truth != prediction) & (truth != IGNORE)
    picture.paste(Image.blend(grey, Image.new("RGB", photo.size, WRONG), 0.75), mask=Image.fromarray(wrong))
    picture.paste("black", mask=Image.fromarray(truth == IGNORE))
    return picture
