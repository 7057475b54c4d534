"""What `flowseg info` finds in a data set: its label table, counts, and what training would trip over."""

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from data import IGNORE, DataError, Dataset, LabelTable, ShapesDataset, evenly_spaced, open_dataset

SCENES = 200  # of the endless built-in data sets: a sample is enough


def describe(dataset: str, root: Path | None = None, limit: int | None = None) -> dict:
    """Return the label table of a data set and, for each split, its counts and problems; needs no PyTorch.

    limit: the most images that are read in each split, evenly spaced; all if not given.
    """
    data = open_dataset(dataset, "training", root, strict=False)
    if isinstance(data, ShapesDataset):
        limit = limit or SCENES
    table = data.labels
    rows = zip(table.classes, table.ids, strict=True)
    classes = [{"id": k, "raw": raw, "name": name} for k, (name, raw) in enumerate(rows)]
    facts = {"name": dataset, "classes": classes, "ignore": table.ignore, "splits": {}, "problems": []}
    for split in data.splits:
        counts, found = problems(open_dataset(dataset, split, root, strict=False), limit)
        facts["splits"][split] = counts
        facts["problems"] += [f"{split}: {problem}" for problem in found]
    return facts


def problems(dataset: Dataset, limit: int | None = None) -> tuple[dict, list[str]]:
    """Read up to `limit` evenly spaced samples, or all: counts, and one line for every kind of problem.

    Counts: images, checked, pixels by train id, ignored pixels. A line: the first file, what is wrong, how
    many files have it, the fix.
    """
    # Everything is read once; an error ends its file, not the check.
    pixels: Counter[int] = Counter()  # raw value -> pixels
    errors: defaultdict[str, list[DataError]] = defaultdict(list)  # kind -> errors
    indices = evenly_spaced(len(dataset), limit)
    for index in indices:
        try:
            _, raw, where = dataset.read(index)
            values, counts = np.unique(raw, return_counts=True)
            pixels.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
            dataset.labels.to_train(raw, where)
        except DataError as error:
            errors[error.kind].append(error)

    # Errors of one kind have one cause, so they share a line.
    lines = []
    for first, *others in errors.values():
        more = f" (and {len(others)} more such files)" if others else ""
        lines.append(f"{first}{more}")

    # The usual wrong tables explain many errors, so hints stand before them.
    counts = {
        "images": len(dataset),
        "checked": len(indices),
        "pixels": [pixels[raw] for raw in dataset.labels.ids],
        "ignored": sum(pixels[raw] for raw in dataset.labels.ignore),
    }
    return counts, [*dataset.unpaired, *hints(set(pixels), dataset.labels), *lines]


def hints(values: set[int], table: LabelTable) -> list[str]:
    """Recognise the usual wrong tables from the raw values that occur, and spell out the fix."""
    N = len(table.classes)
    unknown = values.difference(table.ids, table.ignore)
    if values == {0, 255} and 255 not in table.ids:
        return ["only the values 0 and 255 occur, an on/off mask; write ids = [0, 255] for its two classes"]

    from_one = list(range(1, N + 1))
    if table.ids == tuple(range(N)) and N in unknown and max(values - {IGNORE}) == N:
        zero = ", and ignore = [0] if 0 means unlabelled" if 0 in values else ""
        return [f"ids start at 1: values run to {N} for {N} classes; write ids = {from_one}{zero}"]
    if len(unknown) > 8:
        fix = "save masks as PNG and resize by nearest neighbour, or list all classes"
        return [f"{len(unknown)} stray values, as after JPEG or a smooth resize; {fix}"]
    if IGNORE in unknown:
        return ["255 occurs, which usually means unlabelled; then write ignore = [255]"]
    return []
