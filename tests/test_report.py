"""report.py: what an evaluation leaves behind: numbers, the confusion matrix, sheets of the worst images."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from data import FolderDataset, LabelTable, ShapesDataset
from flowseg_tools import draw, report
from flowseg_tools.predict import segment_photo
from model import FlowSeg, ModelConfig
from tests.conftest import pixels, untrained
from tests.test_cli import QUICK, fails, flowseg, make_folder
from train import Metrics, confusion_matrix, evaluate

NAMES = ("sky", "road", "tree")
COLORS = np.array([[250, 10, 20], [30, 240, 50], [60, 70, 230]], dtype=np.uint8)


@pytest.mark.parametrize("count", [2, 11, 19, 60, 150, 171, 255])
def test_every_class_of_a_confusion_matrix_has_room_for_its_name(count):
    names = [f"class {k}" for k in range(count)]
    sheet = report.confusion_picture(np.eye(count, dtype=np.int64) * 5, names)
    dark = (pixels(sheet) == report.DARK).all(-1)
    rows = np.flatnonzero(dark.any(1))
    pitch = (rows[-1] - rows[0] + 1) / count
    assert pitch >= 14.5 and max(sheet.size) < 4500
    # The diagonal runs from the top left to the bottom right, and names stand at the left of every row.
    assert (np.diff(dark.argmax(1)[rows]) >= 0).all()
    left = (pixels(sheet)[rows[0] : rows[-1] + 1, : np.flatnonzero(dark.any(0))[0]] != draw.PAPER).any((1, 2))
    assert left.mean() > 0.3


def test_rows_are_shares_of_the_label_and_absent_classes_are_grey():
    confusion = np.array([[3, 1, 0], [0, 0, 0], [0, 7, 0]])
    sheet = pixels(report.confusion_picture(confusion, NAMES))
    dark = np.argwhere((sheet == report.DARK).all(-1))
    size = (dark.max(0) - dark.min(0) + 1).min()
    top = dark.min(0)[0] - 2 * size  # of the only full cell: row 2, column 1
    left = dark.min(0)[1] - size
    cell = [
        [sheet[round(top + (r + 0.15) * size), round(left + (c + 0.15) * size)] for c in range(3)]
        for r in range(3)
    ]
    assert (np.array(cell[1]) == draw.GRID).all()
    assert tuple(cell[0][2]) == tuple(cell[2][0]) == tuple(cell[2][2]) == draw.PAPER
    assert sum(report.DARK) < sum(cell[0][0]) < sum(cell[0][1]) < sum(draw.PAPER)


def test_errors_are_red_what_is_right_is_grey_and_ignored_pixels_are_black():
    truth = np.array([[0, 1, 255, 2]], np.uint8)
    drawn = pixels(
        report.error_map(Image.new("RGB", (4, 1), (200, 100, 50)), truth, np.array([[0, 2, 1, 2]], np.uint8))
    )[0]
    assert len(set(drawn[0])) == len(set(drawn[3])) == 1
    assert drawn[1][0] > drawn[1][1] + 80 and drawn[2].tolist() == [0, 0, 0]


@pytest.mark.parametrize("size", [(1, 1), (96, 96), (2000, 1500), (40, 900)])
def test_sheets_of_any_size(size):
    labels = np.zeros(size[::-1], np.uint8)
    sheet = report.error_sheet("a.png: IoU 3%", Image.new("RGB", size), labels, labels + 1, NAMES, COLORS)
    assert 250 < max(sheet.size) < 2200
    assert {(250, 10, 20), (30, 240, 50)} <= {color for _, color in sheet.getcolors(1 << 24)}


def test_classes_are_sorted_with_unknown_numbers_at_the_end():
    rows = [{"name": name, "IoU": iou, "pixels": n} for name, iou, n in
            (("b", 0.5, 3), ("a", None, 0), ("c", 0.9, 1))]  # fmt: skip
    order = {
        key: [row["name"] for row in report.sort_classes(rows, key)] for key in ("name", "IoU", "pixels")
    }
    assert order == {"name": ["a", "b", "c"], "IoU": ["c", "b", "a"], "pixels": ["b", "c", "a"]}


class Few:
    """Three images: one that a prediction of class 0 gets right, one half, one wrong; one without a label."""

    name, split, labels = "few", "validation", LabelTable(NAMES, (0, 1, 2), (255,))

    def __len__(self):
        return 4

    def read(self, index):
        raw = np.full((8, 8), 255 if index == 3 else 1)
        if index < 2:
            raw[: 8 - 4 * index] = 0
        return Image.new("RGB", (8, 8)), raw, f"masks/{index}.png"

    def __getitem__(self, index):
        image, raw, where = self.read(index)
        return image, self.labels.to_train(raw, where)


def zeros(photo):
    return np.zeros(photo.size[::-1], np.uint8), None


def metrics_of(data):
    counts = [confusion_matrix(y, zeros(image)[0], 3) for image, y in map(data.__getitem__, range(len(data)))]
    ious = {i: Metrics(count).scores["mIoU"] for i, count in enumerate(counts)}
    return Metrics(sum(counts), ious)


def test_a_folder_gets_numbers_the_matrix_and_the_worst_images_first(tmp_path):
    data = Few()
    facts = {"mIoU": 0.5, "classes": []}
    report.write_report(tmp_path / "out", facts, metrics_of(data), data, COLORS, zeros, 2)
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["confusion.png", "report.json", "worst-01.png", "worst-02.png"]
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["worst"] == [{"image": "masks/2.png", "IoU": 0}, {"image": "masks/1.png", "IoU": 0.25}]
    for path in (tmp_path / "out").glob("*.png"):
        assert Image.open(path).width > 100


def test_a_file_gets_the_numbers_alone(tmp_path):
    data = Few()
    report.write_report(tmp_path / "r.json", {"mIoU": 0.5}, metrics_of(data), data, COLORS, zeros, 9)
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]
    assert [row["image"][-5] for row in json.loads((tmp_path / "r.json").read_text())["worst"]] == list("210")


def test_the_worst_images_of_a_folder_are_named_not_their_masks(tmp_path):
    data = FolderDataset(make_folder(tmp_path / "halves", count=1), "validation")
    counts = Metrics(np.eye(2, dtype=np.int64), {0: 0.5})
    report.write_report(tmp_path / "r.json", {}, counts, data, COLORS, zeros, 1)
    worst = json.loads((tmp_path / "r.json").read_text())["worst"]
    assert worst == [{"image": str(tmp_path / "halves/images/validation/0.png"), "IoU": 0.5}]


@pytest.fixture
def scenes(tmp_path):
    """A folder with random weights for the built-in scenes."""
    table = ShapesDataset("validation").labels
    config = ModelConfig(
        len(table.classes), hidden_size=16, depth=1, num_heads=2, nerf_width=8, conv_width=8, steps=1
    )
    model = untrained(config)
    facts = {"classes": table.classes, "ids": table.ids, "ignore": table.ignore}
    model.save(tmp_path / "w.safetensors", **facts, dataset="shapes", crop_size=32)
    return SimpleNamespace(folder=tmp_path, model=FlowSeg.load(tmp_path / "w.safetensors"))


def test_an_evaluation_knows_the_score_of_every_image(scenes):
    data = ShapesDataset("validation")
    metrics, _ = evaluate(scenes.model, data, 32, 1, limit=3)
    total = np.zeros_like(metrics.confusion)
    for index, iou in metrics.images.items():
        photo, labels = data[index]
        counts = confusion_matrix(labels, segment_photo(scenes.model, photo, 32, 1)[0], len(total))
        known = [
            value for value, pixels in zip(Metrics(counts).iou.tolist(), counts.sum(1), strict=True) if pixels
        ]
        assert iou == pytest.approx(np.mean(known))
        total += counts
    assert list(metrics.images) == [0, 99, 199] and np.array_equal(total, metrics.confusion)


def test_eval_writes_a_report_and_sorts_its_table(scenes):
    call = ("eval", "w.safetensors", "--limit", 3)
    result = flowseg(*call, "--report", "out", "--worst", 1, "--sort", "iou", cwd=scenes.folder)
    assert result.returncode == 0, result.stderr
    facts = json.loads((scenes.folder / "out" / "report.json").read_text())
    assert (scenes.folder / "out" / "worst-01.png").exists() and len(facts["worst"]) == 1
    assert facts["worst"][0]["image"].startswith("shapes/validation/")
    known = sorted((row["IoU"] for row in facts["classes"] if row["IoU"] is not None), reverse=True)
    shown = [line.split() for line in result.stdout.splitlines() if line.count("%") in (1, 2)]
    shown = [
        float(word[1].rstrip("%")) for word in shown if word[0] in {row["name"] for row in facts["classes"]}
    ]
    assert len(known) > 2 and shown[: len(known)] == pytest.approx([100 * iou for iou in known], abs=0.06)

    for target in ("no/where.json", "w.safetensors", "r.txt"):
        fails(flowseg(*call, "--report", target, cwd=scenes.folder), 2, target)
    fails(
        flowseg(*call, "--report", "w.safetensors/out", cwd=scenes.folder),
        2,
        "cannot write into w.safetensors",
    )
    fails(flowseg(*call, "--font", "w.safetensors", cwd=scenes.folder), 2, "--font", "w.safetensors")


def test_pictures_of_a_run_are_drawn_at_every_validation_and_never_end_it(tmp_path):
    make_folder(tmp_path / "halves")
    call = ("train", "--dataset", "halves", "-o", "run", *QUICK)
    assert flowseg(*call, "--max-steps", 2, cwd=tmp_path).returncode == 0
    folder = tmp_path / "run"
    assert Image.open(folder / "curves.png").width == 900 and Image.open(folder / "preview.png").width > 100
    for name in ("preview.png", "curves.png"):
        (folder / name).unlink()
    (folder / "preview.png").mkdir()
    result = flowseg(*call, "--max-steps", 4, "--allow-changes", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "warning: cannot write run/preview.png" in result.stderr
    assert (folder / "best.safetensors").exists()
