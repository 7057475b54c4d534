"""What check.py finds in a data set, and the wrong tables that it recognises."""

from pathlib import Path

import numpy as np
import pytest

from data import FolderDataset, ShapesDataset, open_dataset
from flowseg_tools.check import describe, hints, problems
from tests.test_data import CLASSES, make_folder, mask_of, write


def report(root: Path) -> list[str]:
    return problems(open_dataset(str(root), "training", strict=False))[1]


def test_problems_counts_pixels_exactly(tmp_path):
    masks = [mask_of(0, 1, 2, 255), mask_of(2)]
    found = problems(FolderDataset(make_folder(tmp_path, masks, CLASSES + "ignore = [255]"), "training"))
    assert found == ({"images": 2, "checked": 2, "pixels": [48, 48, 240], "ignored": 48}, [])


def test_problems_limit_takes_evenly_spaced_samples(tmp_path):
    root = make_folder(tmp_path, [mask_of(0)] * 4 + [mask_of(1)] * 5)
    counts, _ = problems(FolderDataset(root, "training"), limit=3)
    assert counts["checked"] == 3 and counts["pixels"] == [192, 384, 0]


def test_problems_reports_every_kind_once_with_first_file_and_count(tmp_path):
    root = make_folder(tmp_path, [mask_of(0, 1, 2)] * 10)
    images, masks = root / "images/training", root / "annotations/training"
    (masks / "a0.png").unlink()
    (images / "a1.jpg").unlink()
    for k in (2, 3):
        write(masks / f"a{k}.png", np.dstack([mask_of(0, 9)] * 2 + [mask_of(9, 0)]))
    write(masks / "a4.png", mask_of(0)[:5])
    write(masks / "a5.png", mask_of(0, 77))
    (images / "a6.jpg").write_bytes((images / "a6.jpg").read_bytes()[:200])
    (masks / "a7.png").unlink()
    write(masks / "a7.jpg", mask_of(0))
    lines = report(root)
    for name, words in [
        ("a0.jpg", "annotations/training/*; 1 of 9"),
        ("a1.png", "images/training/*; 1 of 9"),
        ("a2.png", "of colours"),
        ("a4.jpg", "16 x 5"),
        ("a5.png", "raw value 77"),
        ("a6.jpg", "cannot be read"),
        ("a7.jpg", "saved as JPEG"),
    ]:
        matching = [line for line in lines if words in line]
        assert len(matching) == 1 and name in matching[0], (words, lines)
    assert "1 more" in next(line for line in lines if "of colours" in line)
    assert len(lines) == 7


@pytest.mark.parametrize(
    "toml, values, expected",
    [
        ("classes = ['no', 'yes']", (0, 255), "ids = [0, 255]"),
        ("classes = ['no', 'yes']\nignore = [255]", (0, 255), "ids = [0, 255]"),  # silently IoU 0 elsewhere
        (CLASSES, (1, 2, 3), "ids = [1, 2, 3]"),
        (CLASSES + "ignore = [255]", (0, 1, 2, 3, 255), "ignore = [0]"),
        (CLASSES, (0, 1, 2, 255), "ignore = [255]"),
        (CLASSES, tuple(range(0, 60, 3)), "JPEG"),
    ],
)
def test_problems_recognises_usual_mistakes(tmp_path, toml, values, expected):
    lines = report(make_folder(tmp_path, [mask_of(*values)] * 2, toml))
    assert expected in lines[0]


def test_an_on_off_mask_with_the_right_table_is_no_problem(tmp_path):
    toml = "classes = ['no', 'yes']\nids = [0, 255]"
    assert report(make_folder(tmp_path, [mask_of(0, 255)], toml)) == []


def test_hints_are_silent_about_a_table_that_fits():
    table = ShapesDataset("test").labels
    assert hints({0, 3, 255}, table) == [] and hints(set(), table) == []


def test_describe_reports_every_split_with_table_counts_and_problems(tmp_path):
    make_folder(tmp_path, [mask_of(0, 1)] * 2, CLASSES + "splits = ['training', 'validation']")
    make_folder(tmp_path, [mask_of(9)], CLASSES + "splits = ['training', 'validation']", "validation")
    facts = describe(str(tmp_path))
    assert facts["classes"][2] == {"id": 2, "raw": 2, "name": "car"} and facts["ignore"] == ()
    assert list(facts["splits"]) == ["training", "validation"]
    assert facts["splits"]["training"] == {"images": 2, "checked": 2, "pixels": [192, 192, 0], "ignored": 0}
    assert len(facts["problems"]) == 1 and facts["problems"][0].startswith("validation: ")
    assert str(tmp_path / "annotations/validation/a0.png") in facts["problems"][0]


def test_describe_samples_the_endless_scenes():
    facts = describe("shapes", limit=3)
    assert [part["checked"] for part in facts["splits"].values()] == [3, 3, 3]
    assert facts["splits"]["training"]["images"] == 1_000_000 and facts["problems"] == []


def test_one_kind_of_problem_is_one_line_whatever_its_message_says(tmp_path):
    """Errors are grouped by their kind: numbers and names in the message do not matter."""
    root = make_folder(tmp_path / "a (1) 7", [mask_of(0, 77), mask_of(0, 78), mask_of(1)])
    lines = report(root)
    assert len(lines) == 1 and "a0.png: raw value 77" in lines[0] and "1 more" in lines[0]
