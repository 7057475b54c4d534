"""What check.py finds in a data set, and the wrong tables that it recognises."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import SPLITS, DataError, FolderDataset, ShapesDataset, open_dataset
from flowseg_tools.check import (
    before_training,
    count_values,
    describe,
    draw_preview,
    fingerprint,
    hints,
)
from tests.test_data import CLASSES, make_folder, mask_of, problems, write


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


def test_one_cause_is_one_line_for_all_splits(tmp_path):
    """With the number of files, and the other splits that have it."""
    toml = CLASSES + "ignore = [255]\nsplits = ['training', 'validation', 'test']"
    root = make_folder(tmp_path, [mask_of(0, 77)] * 3, toml)
    make_folder(tmp_path, [mask_of(0, 78)] * 2, toml, "validation")
    make_folder(tmp_path, [mask_of(0, 1, 255)] * 2, toml, "test")
    for split in ("training", "test"):
        (root / f"annotations/{split}/a0.png").unlink()
        second = Image.new("RGB", (16, 12), split.replace("training", "red").replace("test", "blue"))
        (root / f"images/{split}/a1.jpg").unlink()
        Image.new("RGB", (16, 12), "red").save(
            root / f"images/{split}/a1.tif", save_all=True, append_images=[second]
        )
    lines = describe(str(root))["problems"]
    assert len(lines) == 4, lines
    for words, end in (
        ("no mask fits", " (also in test)"),
        ("raw value 77", " (and 3 more such files, also in validation)"),
        ("several pages", " (also in test)"),
        ("is the same image as", "one split"),
    ):
        assert [line.endswith(end) for line in lines if words in line] == [True], (words, lines)


# ---- what can be read, but is perhaps not what was meant ----


def split_folder(root: Path, training: list, validation: list, toml: str = CLASSES) -> Path:
    make_folder(root, training, toml)
    return make_folder(root, validation, toml, "validation")


def palette_mask(values: np.ndarray, palette: list[int]) -> Image.Image:
    mask = Image.frombytes("P", values.shape[::-1], values.tobytes())
    mask.putpalette(palette)
    return mask


def test_palettes_that_differ_between_files_are_one_line_with_two_files_and_the_colour(tmp_path):
    root = split_folder(tmp_path, [mask_of(0, 1, 2)] * 3, [mask_of(0, 1, 2)])
    red_blue = [0, 0, 0, 255, 0, 0, 0, 0, 255]
    blue_red = [0, 0, 0, 0, 0, 255, 255, 0, 0]
    for name, palette in {"a0": red_blue, "a1": blue_red, "a2": blue_red[:6]}.items():
        values = mask_of(0, 1) if name == "a2" else mask_of(0, 1, 2)
        palette_mask(values, palette).save(root / f"annotations/training/{name}.png")
    problems_found = describe(str(root))["problems"]
    assert len(problems_found) == 1
    for word in ("a0.png", "a1.png", "#0000ff", "colours", "1 more"):
        assert word in problems_found[0], problems_found


def test_palettes_in_one_order_are_no_problem(tmp_path):
    root = split_folder(tmp_path, [mask_of(0, 1, 2)] * 2, [mask_of(0, 1, 2)])
    twice_black = [0, 0, 0, 255, 0, 0, 0, 0, 0]  # indices 0 and 2 look the same in every file
    for k, values in enumerate((mask_of(0, 1, 2), mask_of(2, 1))):
        palette_mask(values, twice_black).save(root / f"annotations/training/a{k}.png")
    assert describe(str(root))["problems"] == []


@pytest.mark.parametrize("turn, said", [(2, True), (3, True), (4, True), (1, False)])
def test_a_turn_that_keeps_the_size_is_said(tmp_path, turn, said):
    root = split_folder(tmp_path, [mask_of(0, 1, 2)] * 2, [mask_of(0, 1, 2)])
    exif = Image.Exif()
    exif[0x0112] = turn
    path = root / "images/training/a0.jpg"
    Image.open(path).save(path, exif=exif)
    lines = [line for line in describe(str(root))["problems"] if f"EXIF orientation {turn}" in line]
    assert len(lines) == int(said) and all("a0.jpg" in line for line in lines)


def test_a_quarter_turn_is_named_where_sizes_differ_and_where_they_are_square(tmp_path):
    root = split_folder(tmp_path, [mask_of(0, 1, 2), mask_of(0, 1, 2)[:, :12]], [mask_of(0, 1, 2)])
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a0", "a1"):
        path = root / f"images/training/{name}.jpg"
        Image.open(path).save(path, exif=exif)
    lines = [line for line in describe(str(root))["problems"] if "EXIF orientation 6" in line]
    assert len(lines) == 2 and "12 x 16" in lines[0] and "16 x 12" in lines[0] and "a1.jpg" in lines[1]


def test_the_same_image_in_two_splits_is_found_by_its_content(tmp_path):
    root = split_folder(tmp_path, [mask_of(0, 1, 2)] * 3, [mask_of(0, 1, 2)] * 3)
    Image.open(root / "images/training/a1.jpg").save(root / "images/validation/a2.png")
    (root / "images/validation/a2.jpg").unlink()
    lines = describe(str(root))["problems"]
    assert len(lines) == 1 and "training/a1.jpg" in lines[0] and "validation/a2.png" in lines[0]


def test_pages_and_scaled_values_of_images_are_said(tmp_path):
    root = split_folder(tmp_path, [mask_of(0, 1, 2)] * 2, [mask_of(0, 1, 2)])
    for name in ("a0", "a1"):
        (root / f"images/training/{name}.jpg").unlink()
    pages = [Image.new("RGB", (16, 12), colour) for colour in ("red", "blue")]
    pages[0].save(root / "images/training/a0.tif", save_all=True, append_images=pages[1:])
    decibels = np.linspace(-30, -5, 192, dtype=np.float32).reshape(12, 16)
    Image.fromarray(decibels).save(root / "images/training/a1.tif")
    facts = describe(str(root))
    assert (
        len(facts["problems"]) == 1
        and "a0.tif" in facts["problems"][0]
        and "several pages" in facts["problems"][0]
    )
    assert any("a1.tif" in note and "-30..-5" in note for note in facts["notes"])


def test_values_that_viewers_show_as_other_ids_are_a_note(tmp_path):
    """Tools that make files smaller write grey 0 and 255 as one bit; a table with 1 and 255 cannot tell."""
    root = split_folder(tmp_path, [mask_of(0, 1, 2)] * 2, [mask_of(0, 1, 2)], CLASSES + "ignore = [255]")
    Image.fromarray(mask_of(0, 1) == 1).save(root / "annotations/training/a0.png")
    facts = describe(str(root))
    assert facts["problems"] == [] and facts["splits"]["training"]["pixels"][1] == 96 + 64
    assert any("a0.png" in note and "[0, 255]" in note for note in facts["notes"])


def test_classes_without_a_pixel_are_a_note_that_says_how_much_was_read(tmp_path):
    root = split_folder(tmp_path, [mask_of(0, 1)] * 2, [mask_of(0, 2)])
    notes = [note for note in describe(str(root))["notes"] if "no labelled pixel" in note]
    assert len(notes) == 1 and "1 of 3" in notes[0] and "2 images" in notes[0] and "car" in notes[0]


def test_a_split_where_nothing_is_labelled_is_a_problem_and_ends_training_before_it_starts(tmp_path):
    root = split_folder(tmp_path, [mask_of(0, 1, 2)] * 2, [mask_of(255)] * 20, CLASSES + "ignore = [255]")
    lines = describe(str(root))["problems"]
    assert len(lines) == 1 and "no pixel of validation is labelled" in lines[0]
    parts = [open_dataset(str(root), split) for split in ("training", "validation")]
    with pytest.raises(DataError, match="no pixel of validation is labelled"):
        before_training(parts, print)
    write(root / "annotations/validation/a7.png", mask_of(1))  # not in the sample, but labelled
    before_training(parts, print)


def test_an_on_off_mask_is_explained_once_and_ends_training(tmp_path):
    toml = "classes = ['no', 'yes']"
    root = split_folder(tmp_path, [mask_of(0, 255)] * 2, [mask_of(0, 255)], toml)
    lines = report(root)
    assert len(lines) == 1 and "ids = [0, 255]" in lines[0]
    part = open_dataset(str(root), "training")
    with pytest.raises(DataError, match=r"ids = \[0, 255\]") as caught:
        before_training([part], print)
    assert "neither ids nor ignore" not in str(caught.value)
    (root / "dataset.toml").write_text(toml + "\nignore = [255]")
    said = []
    before_training([open_dataset(str(root), "training")], said.append)
    assert len(said) == 2 and "ids = [0, 255]" in said[0] and "yes" in said[1]


def test_training_is_told_of_a_damaged_image_before_it_starts(tmp_path):
    root = split_folder(tmp_path, [mask_of(0, 1, 2)] * 3, [mask_of(0, 1, 2)])
    path = root / "images/training/a1.jpg"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"a1\.jpg"):
        before_training([open_dataset(str(root), "training")], print)


def test_nothing_is_said_of_the_built_in_scenes():
    said = []
    before_training([open_dataset("shapes", split) for split in ("training", "validation")], said.append)
    assert said == []


def test_a_fingerprint_changes_with_labels_and_files_but_not_with_the_place(tmp_path):
    def of(name: str) -> dict:
        return fingerprint([open_dataset(str(tmp_path / name), split) for split in SPLITS[:2]])

    for name in ("one", "two"):
        split_folder(tmp_path / name, [mask_of(0, 1, 2)] * 3, [mask_of(0, 1, 2)])
    first = of("one")
    assert of("two") == first and first["training files"].startswith("3 images")
    json.dumps(first)
    (tmp_path / "two/images/training/a1.jpg").rename(tmp_path / "two/images/training/b1.jpg")
    (tmp_path / "two/annotations/training/a1.png").rename(tmp_path / "two/annotations/training/b1.png")
    assert {name for name, value in of("two").items() if value != first[name]} == {"training files"}
    (tmp_path / "one/dataset.toml").write_text("classes = ['road', 'sky', 'car']")
    assert {name for name, value in of("one").items() if value != first[name]} == {"classes"}


def test_colours_that_are_stray_are_one_hint(tmp_path):
    toml = "classes = ['a', 'b']\nids = ['#000000', '#ffffff']"
    smooth = np.repeat(np.linspace(0, 255, 16, dtype=np.uint8)[None], 12, 0)
    root = make_folder(tmp_path, [np.stack([smooth] * 3, 2)] * 2, toml)
    lines = report(root)
    assert len(lines) == 1 and "14 stray values" in lines[0]


def test_the_preview_has_image_mask_and_crop_of_eight_samples(tmp_path):
    root = split_folder(tmp_path / "set", [mask_of(0, 1, 255)] * 9, [mask_of(0)], CLASSES + "ignore = [255]")
    draw_preview(str(root), None, tmp_path / "check.png")
    sheet = Image.open(tmp_path / "check.png")
    assert sheet.width > 200 and sheet.height > 200
    draw_preview("shapes", None, tmp_path / "shapes.png")
    assert (tmp_path / "shapes.png").stat().st_size > 10_000


def test_values_are_counted_like_one_by_one():
    rng = np.random.default_rng(0)
    for raw in (
        rng.integers(0, 5, (9, 7)),
        rng.integers(-3, 3, (8, 1)).astype(np.int32),
        np.full((4, 4), 9, np.uint8),
    ):
        values, counts = np.unique(raw, return_counts=True)
        assert count_values(raw) == dict(zip(values.tolist(), counts.tolist(), strict=True))
