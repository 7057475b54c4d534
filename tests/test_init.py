"""`flowseg init` drafts a dataset.toml that loads, for the layouts that annotation tools export."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import SPLITS, DataError, FolderDataset
from flowseg_tools.init import write_draft
from tests.test_data import ROOT, write

NAMES = ["background", "sky", "road"]
COLOURS = [(0, 0, 0), (128, 0, 0), (0, 128, 0)]
STEMS = ["0001TP_006690", "0006R0_f02070", "0016E5_01500", "0016E5_07959"]


def photo(stem: str) -> np.ndarray:
    rng = np.random.default_rng(list(stem.encode()))
    return rng.integers(0, 256, (40, 60, 3), np.uint8)


def mask(values: tuple[int, ...] = (0, 1, 2)) -> np.ndarray:
    return np.repeat(np.resize(np.array(values, np.uint8), (40, 6)), 10, 1)


def painted(values: np.ndarray) -> np.ndarray:
    return np.array(COLOURS, np.uint8)[values]


def paletted(path: Path, values: np.ndarray) -> None:
    image = Image.frombytes("P", values.shape[::-1], values.tobytes())
    image.putpalette([c for colour in COLOURS for c in colour] + [224, 224, 192] * 253)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def drafted(root: Path) -> tuple[list[FolderDataset], str]:
    """Draft, load both splits strictly, read every pair; return the splits and what was printed."""
    said = "\n".join(write_draft(root))
    parts = [FolderDataset(root, split) for split in SPLITS[:2]]
    for part in parts:
        for index in range(len(part)):
            image, labels = part[index]
            assert image.size == labels.shape[::-1]
    assert f"flowseg info {root}" in said and f"flowseg train --dataset {root}" in said
    return parts, said


def test_cvat_segmentation_mask(tmp_path):
    for stem in STEMS:
        write(tmp_path / f"JPEGImages/{stem}.jpg", photo(stem))
        write(tmp_path / f"SegmentationClass/{stem}.png", painted(mask()))
        write(tmp_path / f"SegmentationObject/{stem}.png", painted(mask((2, 1, 0))))
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/default.txt").write_text("\n".join(STEMS))
    rows = [f"{name}:{r},{g},{b}::" for name, (r, g, b) in zip(NAMES, COLOURS, strict=True)]
    (tmp_path / "labelmap.txt").write_text("\n".join(["# label:color_rgb:parts:actions", *rows]))
    parts, said = drafted(tmp_path)
    assert [len(part) for part in parts] == [3, 1] and "to fill in: names" not in said
    assert parts[0].labels.classes == tuple(NAMES)
    assert parts[0].labels.ids == ("#000000", "#800000", "#008000")
    assert "SegmentationClass" in str(parts[0].pairs[0][1])


def test_roboflow_masks(tmp_path):
    for split, stems in {"train": STEMS[:2], "valid": STEMS[2:3], "test": STEMS[3:]}.items():
        for stem in stems:
            name = f"{split}/{stem}_png.rf.a123456789abcdef"
            write(tmp_path / f"{name}.jpg", photo(stem))
            write(tmp_path / f"{name}_mask.png", mask())
        rows = "".join(f"{k}, {name}\n" for k, name in enumerate(NAMES))
        (tmp_path / split / "_classes.csv").write_text("Pixel Value, Class\n" + rows)
    parts, said = drafted(tmp_path)
    assert [len(part) for part in parts] == [2, 1] and parts[0].splits == SPLITS
    assert parts[0].labels.classes == tuple(NAMES) and "to fill in" not in said


@pytest.mark.parametrize("first", [[], ["__ignore__"]])
def test_labelme2voc(tmp_path, first):
    for stem in STEMS:
        write(tmp_path / f"JPEGImages/{stem}.jpg", photo(stem))
        paletted(
            tmp_path / f"SegmentationClass/{stem}.png",
            np.where(mask((0, 1, 2, 3)) == 3, 255, mask((0, 1, 2, 3))).astype(np.uint8),
        )
        write(tmp_path / f"SegmentationClassVisualization/{stem}.jpg", painted(mask()))
    (tmp_path / "class_names.txt").write_text("\n".join([*first, "_background_", "sky", "road"]))
    parts, said = drafted(tmp_path)
    assert parts[0].labels.classes == ("_background_", "sky", "road")
    assert parts[0].labels.ids == (0, 1, 2) and parts[0].labels.ignore == (255,) and "255" in said


def test_voc_with_lists_and_images_without_masks(tmp_path):
    base = tmp_path / "VOCdevkit/VOC2012"
    for stem in STEMS:
        write(base / f"JPEGImages/{stem}.jpg", photo(stem))
        paletted(base / f"SegmentationClass/{stem}.png", mask())
        paletted(base / f"SegmentationObject/{stem}.png", mask((2, 0, 1)))
    write(base / "JPEGImages/2007_unlabelled.jpg", photo("x"))
    for folder in ("Main", "Segmentation"):
        (base / "ImageSets" / folder).mkdir(parents=True)
        (base / f"ImageSets/{folder}/train.txt").write_text("\n".join(STEMS[:3]) + "\n")
        (base / f"ImageSets/{folder}/val.txt").write_text(STEMS[3] + "\n")
        (base / f"ImageSets/{folder}/trainval.txt").write_text("\n".join(STEMS) + "\n")
    parts, said = drafted(tmp_path)
    assert [len(part) for part in parts] == [3, 1] and "Segmentation/val.txt" in said
    assert "names of classes for 0, 1, 2" in said and parts[0].labels.ids == (0, 1, 2)


def test_cityscapes(tmp_path):
    for k, stem in enumerate(STEMS):
        split, city = ("train", f"city{k}") if k else ("val", "frankfurt")
        name = f"{split}/{city}/{city}_{k:06d}_000019"
        write(tmp_path / f"leftImg8bit/{name}_leftImg8bit.png", photo(stem))
        write(tmp_path / f"gtFine/{name}_gtFine_labelIds.png", mask((7, 8, 33)))
        write(tmp_path / f"gtFine/{name}_gtFine_instanceIds.png", mask((7, 8, 33)).astype(np.uint16) * 1000)
        write(tmp_path / f"gtFine/{name}_gtFine_color.png", painted(mask()))
        (tmp_path / f"gtFine/{name}_gtFine_polygons.json").write_text("{}")
    parts, said = drafted(tmp_path)
    assert [len(part) for part in parts] == [3, 1] and parts[0].labels.ids == (7, 8, 33)
    assert "gtFine/{split}/*_gtFine_labelIds.png" in said and "names of classes for 7, 8, 33" in said


def test_two_flat_folders(tmp_path):
    for stem in STEMS:
        write(tmp_path / f"photos/{stem}.jpg", photo(stem))
        write(tmp_path / f"masks/{stem}.png", mask((0, 1, 255)))
    parts, said = drafted(tmp_path)
    assert [len(part) for part in parts] == [3, 1] and "names of classes for 0, 1" in said
    assert parts[0].labels.ignore == (255,)


def test_camvid_as_published(tmp_path):
    for stem in STEMS:
        write(tmp_path / f"701_StillsRaw_full/{stem}.png", photo(stem))
        write(tmp_path / f"LabeledApproved_full/{stem}_L.png", painted(mask()))
    rows = ["0 0 0\tVoid", "128 0 0\tSky", "0 128 0\tRoad", "7 8 9\tNever seen"]
    (tmp_path / "label_colors.txt").write_text("\n".join(rows))
    parts, _ = drafted(tmp_path)
    assert parts[0].labels.classes == ("Sky", "Road", "Never seen") and parts[0].labels.ignore == ("#000000",)


@pytest.mark.parametrize(
    "names",
    [
        "names:\n  0: background\n  1: sky\n  2: road\n",
        "names: ['background', \"sky\", road]\n",
        "nc: 3\nnames:\n- background\n- 'sky'\n- road\npath: x\n",
    ],
)
def test_ultralytics(tmp_path, names):
    for split, stems in {"train": STEMS[:3], "val": STEMS[3:]}.items():
        for stem in stems:
            write(tmp_path / f"images/{split}/{stem}.jpg", photo(stem))
            write(tmp_path / f"masks/{split}/{stem}.png", mask((0, 1, 2, 255)))
    (tmp_path / "data.yaml").write_text(f"path: .\ntrain: images/train\nmasks_dir: masks\n{names}")
    parts, _ = drafted(tmp_path)
    assert [len(part) for part in parts] == [3, 1]
    assert parts[0].labels.classes == tuple(NAMES) and parts[0].labels.ignore == (255,)


def test_mmsegmentation(tmp_path):
    for split, stems in {"train": STEMS[:3], "val": STEMS[3:]}.items():
        for stem in stems:
            write(tmp_path / f"img_dir/{split}/{stem}.jpg", photo(stem))
            paletted(tmp_path / f"ann_dir/{split}/{stem}.png", mask())
    assert [len(part) for part in drafted(tmp_path)[0]] == [3, 1]


def test_kitti(tmp_path):
    for k, stem in enumerate(STEMS):
        write(tmp_path / f"training/image_2/{k:06d}_10.png", photo(stem))
        write(tmp_path / f"training/semantic/{k:06d}_10.png", mask((7, 8, 9)))
        write(tmp_path / f"training/semantic_rgb/{k:06d}_10.png", painted(mask()))
        write(tmp_path / f"training/instance/{k:06d}_10.png", mask((7, 8, 9)).astype(np.uint16) * 256)
        write(tmp_path / f"testing/image_2/{k:06d}_10.png", photo("t" + stem))
    parts, _ = drafted(tmp_path)
    assert [len(part) for part in parts] == [3, 1] and parts[0].labels.ids == (7, 8, 9)
    assert "semantic/" in str(parts[0].pairs[0][1])


def test_supervisely_masks(tmp_path):
    for stem in STEMS:
        write(tmp_path / f"ds/img/{stem}.jpg", photo(stem))
        write(tmp_path / f"ds/masks_machine/{stem}.jpg.png", np.stack([mask()] * 3, 2))
        write(tmp_path / f"ds/masks_human/{stem}.jpg.png", painted(mask()))
    classes = [{"title": name, "shape": "bitmap", "color": "#123456"} for name in NAMES[1:]]
    (tmp_path / "meta.json").write_text(json.dumps({"classes": classes, "tags": []}))
    parts, said = drafted(tmp_path)
    assert parts[0].labels.classes == ("sky", "road", "class 0") and parts[0].labels.ids == (1, 2, 0)
    assert "masks_machine" in str(parts[0].pairs[0][1]) and "names of classes for 0" in said


def test_our_own_layout(tmp_path):
    for split, stems in {"training": STEMS[:3], "validation": STEMS[3:]}.items():
        for stem in stems:
            write(tmp_path / f"images/{split}/{stem}.jpg", photo(stem))
            write(tmp_path / f"annotations/{split}/{stem}.png", mask())
    parts, said = drafted(tmp_path)
    assert [len(part) for part in parts] == [3, 1] and "annotations/{split}/*" in said


@pytest.mark.parametrize(
    "folders, shades",
    [(("images", "annotations"), 256), (("z", "b"), 256), (("z", "b"), 3), (("input", "target"), 2)],
)
def test_grey_images_are_not_taken_for_masks(tmp_path, folders, shades):
    """A grey image has no more values than a mask may have: names tell, and which of the two has more."""
    rng = np.random.default_rng(0)
    for stem in STEMS:
        write(tmp_path / folders[0] / f"{stem}.png", rng.integers(0, shades, (40, 60), np.uint8))
        write(tmp_path / folders[1] / f"{stem}.png", mask((0, 1)))
    parts, _ = drafted(tmp_path)
    assert parts[0].pairs[0][0].parent.name == folders[0] and len(parts[0].labels.classes) == 2


def test_masks_that_cannot_be_read_are_said_and_do_not_end_the_draft(tmp_path):
    for stem in STEMS:
        write(tmp_path / f"photos/{stem}.jpg", photo(stem))
        write(tmp_path / f"masks/{stem}.png", mask())
    Image.fromarray(mask()).save(tmp_path / f"masks/{STEMS[1]}.png", "JPEG")
    said = "\n".join(write_draft(tmp_path))
    assert f"{STEMS[1]}.png" in said and "3 masks that were read" in said


def run(*arguments: str, code: int = 0) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "flowseg", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == code, done.stderr
    return done


def test_the_commands_work_together(tmp_path):
    """init, then info with a preview, on the command line; a second init and a wrong folder are one line."""
    test_two_flat_folders(tmp_path)
    (tmp_path / "dataset.toml").unlink()
    assert "dataset.toml" in run("init", str(tmp_path)).stdout
    facts = json.loads(run("info", str(tmp_path), "--json", "--preview", str(tmp_path / "check.png")).stdout)
    assert facts["problems"] == [] and [row["raw"] for row in facts["classes"]] == [0, 1]
    assert Image.open(tmp_path / "check.png").width > 300
    for folder, word in ((tmp_path, "exists"), (tmp_path / "nowhere", "no such folder")):
        error = run("init", str(folder), code=3).stderr
        assert error.count("\n") == 1 and error.startswith("error: ") and word in error


def test_it_never_overwrites(tmp_path):
    test_two_flat_folders(tmp_path)
    before = (tmp_path / "dataset.toml").read_bytes()
    with pytest.raises(DataError, match=r"dataset\.toml exists"):
        write_draft(tmp_path)
    assert (tmp_path / "dataset.toml").read_bytes() == before


@pytest.mark.parametrize(
    "files, words",
    [
        (
            {"a.jpg": None, "a.json": '{"shapes": []}', "b.jpg": None, "b.json": "{}"},
            ["2 .json files", "polygons", "labelme"],
        ),
        ({"images/a.jpg": None, "annotations.xml": "<x/>"}, ["1 .xml files", "CVAT"]),
        ({"a.jpg": None, "masks/a.npy": "x"}, ["1 .npy files", "PNG"]),
        ({"a.jpg": None, "b.jpg": None}, ["2 pictures", "no masks"]),
        ({"notes.md": "x"}, ["no pictures"]),
        ({}, ["no pictures"]),
    ],
)
def test_what_is_there_instead_of_masks_is_said(tmp_path, files, words):
    for name, text in files.items():
        if text is None:
            write(tmp_path / name, photo(name))
        else:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
    with pytest.raises(DataError) as caught:
        write_draft(tmp_path)
    message = str(caught.value)
    assert message.startswith(str(tmp_path)) and "\n" not in message
    assert all(word.lower() in message.lower() for word in words), message
    assert not (tmp_path / "dataset.toml").exists()


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        write_draft(tmp_path / "nowhere")
