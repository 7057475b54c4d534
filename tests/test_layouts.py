"""dataset.toml says by patterns, list files and a share where the pairs are, so exports need no script."""

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import SPLITS, DataError, FolderDataset, PictureError, open_dataset, read_photo, scan
from flowseg_tools.check import describe
from tests.test_data import CLASSES, error_of, mask_of, write
from tests.test_masks import tiff


def fill(root: Path, images: str, masks: str, stems: list[str], toml: str) -> Path:
    """Write pairs of a pattern each, with a different image for every stem, and the dataset.toml."""
    for stem in stems:
        rng = np.random.default_rng(list(stem.encode()))
        picture = rng.integers(0, 256, (12, 16, 3), np.uint8)
        write(root / images.replace("*", stem), picture)
        write(root / masks.replace("*", stem), mask_of(0, 1, 2))
    (root / "dataset.toml").write_text(CLASSES + toml)
    return root


def stems(data: FolderDataset) -> list[str]:
    return [image.stem for image, _ in data.pairs]


LETTERS = [f"{letter}{k}" for letter in "ab" for k in range(5)]


@pytest.mark.parametrize(
    "images, masks, files",
    [
        ("photos/*", "masks/*", ("photos/*.jpg", "masks/*.png")),
        ("*", "*_mask.png", ("*.jpg", "*_mask.png")),
        ("*.png", "*_L.png", ("*.png", "*_L.png")),
        ("img/*.jpg", "masks_machine/*.jpg.png", ("img/*.jpg", "masks_machine/*.jpg.png")),
        ("*/rgb.png", "*/labels.png", ("*/rgb.png", "*/labels.png")),
        ("*/img/*", "*/ann/*", ("one/img/*.jpg", "one/ann/*.png")),
        ("rgb/x_*.jpg", "lab/y_*.png", ("rgb/x_*.JPG", "lab/y_*.PNG")),
        ("../there/*", "masks/*", ("../there/*.jpg", "masks/*.png")),
    ],
)
def test_patterns_pair_images_and_masks_by_what_the_star_stands_for(tmp_path, images, masks, files):
    toml = f"images = '{images}'\nmasks = '{masks}'\nvalidation = 0.3"
    root = fill(tmp_path / "set", *files, LETTERS, toml)
    parts = [FolderDataset(root, split) for split in SPLITS[:2]]
    assert [len(part) for part in parts] == [7, 3] and parts[0].splits == SPLITS[:2]
    pairs = parts[0].pairs + parts[1].pairs
    assert len({image for image, _ in pairs}) == 10
    for image, mask in pairs:
        star = next(stem for stem in LETTERS if stem in str(image.relative_to(tmp_path)))
        assert star in str(mask.relative_to(tmp_path))
    assert parts[0][0][1].shape == (12, 16) and not parts[0].unpaired


def test_split_stands_for_each_entry_of_splits(tmp_path):
    for split, names in {"train": ["a/x1", "b/x1"], "val": ["c/x9"]}.items():
        fill(tmp_path, f"left/{split}/*_left.png", f"gt/{split}/*_gt_ids.png", names, "")
        write(tmp_path / f"gt/{split}/{names[0]}_gt_color.png", mask_of(7))
    toml = "images = 'left/{split}/*_left.png'\nmasks = 'gt/{split}/*_gt_ids.png'\nsplits = ['train', 'val']"
    (tmp_path / "dataset.toml").write_text(CLASSES + toml)
    assert [len(FolderDataset(tmp_path, split)) for split in SPLITS[:2]] == [2, 1]
    assert "test" in error_of(FolderDataset, tmp_path, "test")
    assert "such as" in describe(str(tmp_path))["notes"][-1]  # the colour pictures are said to be left out


def test_a_pattern_without_split_needs_lists_or_a_share(tmp_path):
    root = fill(tmp_path, "photos/*.jpg", "masks/*.png", LETTERS, "images = 'photos/*'\nmasks = 'masks/*'")
    message = error_of(FolderDataset, root, "training")
    assert "dataset.toml" in message and "'photos/*'" in message
    assert all(word in message for word in ("{split}", "splits", "validation = 0.2"))


# ---- lists ----

LISTS = "images = 'photos/*'\nmasks = 'masks/*'\nsplits = ['lists/train.txt', 'lists/val.txt']"


def listed(root: Path, train: str, val: str = "b0\n") -> Path:
    fill(root, "photos/*.jpg", "masks/*.png", LETTERS, LISTS)
    (root / "lists").mkdir()
    (root / "lists/train.txt").write_text(train)
    (root / "lists/val.txt").write_text(val)
    return root


@pytest.mark.parametrize(
    "text",
    ["a3\na1\n", "\ufeffa3\r\na1\r\n\r\n", "photos/a3.jpg\nphotos/a1.jpg\n", "a3\na1\na3\n", "  a3 \na1"],
)
def test_a_list_names_images_by_star_or_path(tmp_path, text):
    data = FolderDataset(listed(tmp_path, text), "training")
    assert stems(data) == ["a3", "a1"] and data.unpaired == []
    assert stems(FolderDataset(tmp_path, "validation")) == ["b0"]


def test_a_name_that_is_no_image_is_said_and_counted(tmp_path):
    root = listed(tmp_path, "a1\nz9\nz8\n")
    message = error_of(FolderDataset, root, "training")
    assert "train.txt" in message and "'z9'" in message and "2 " in message
    data = FolderDataset(root, "training", strict=False)
    assert stems(data) == ["a1"] and len(data.unpaired) == 1


def test_images_without_a_mask_are_counted_and_left_out_where_a_list_chooses(tmp_path):
    root = listed(tmp_path, "a1\na2\na3\n")
    (root / "masks/a2.png").unlink()
    data = FolderDataset(root, "training")
    assert stems(data) == ["a1", "a3"] and [path.stem for path in data.left_out] == ["a2"]
    notes = describe(str(root))["notes"]
    assert any("1 images have no mask" in note and "a2.jpg" in note for note in notes)
    assert any("6 other pictures" in note or "12 other pictures" in note for note in notes)


def test_a_list_of_nothing_is_an_error(tmp_path):
    message = error_of(FolderDataset, listed(tmp_path, "\n"), "training")
    assert "no pair for training" in message


# ---- a share ----

SHARE = "images = 'photos/*'\nmasks = 'masks/*'\nvalidation = "


def test_a_share_is_the_same_for_all_time_and_on_every_machine(tmp_path):
    root = fill(tmp_path, "photos/*.jpg", "masks/*.png", LETTERS, SHARE + "0.3")
    first = {split: set(stems(FolderDataset(root, split))) for split in SPLITS[:2]}
    assert first["validation"] == {"a2", "a4", "b2"}  # by their SHA-256
    assert first["training"] | first["validation"] == set(LETTERS)
    assert not first["training"] & first["validation"]


@pytest.mark.parametrize("share, count, expected", [(0.01, 10, 1), (0.2, 4, 1), (0.99, 10, 9), (0.5, 2, 1)])
def test_a_share_leaves_no_split_empty(tmp_path, share, count, expected):
    root = fill(tmp_path, "photos/*.jpg", "masks/*.png", LETTERS[:count], SHARE + str(share))
    assert len(FolderDataset(root, "validation")) == expected
    assert len(FolderDataset(root, "training")) == count - expected


def test_a_share_of_one_pair_leaves_nothing_to_train_on(tmp_path):
    root = fill(tmp_path, "photos/*.jpg", "masks/*.png", ["a"], SHARE + "0.2")
    assert len(FolderDataset(root, "validation")) == 1
    assert "no pair for training" in error_of(FolderDataset, root, "training")


def test_a_share_is_of_the_pairs_and_images_without_mask_are_left_out(tmp_path):
    root = fill(tmp_path, "photos/*.jpg", "masks/*.png", LETTERS, SHARE + "0.3")
    for stem in ("a3", "b0", "b1"):
        (root / f"masks/{stem}.png").unlink()
    training = FolderDataset(root, "training")
    assert (len(training), len(FolderDataset(root, "validation"))) == (5, 2)
    assert sorted(path.stem for path in training.left_out) == ["a3", "b0", "b1"]


def test_a_share_is_taken_out_of_the_training_split(tmp_path):
    for split in ("train", "test"):
        fill(tmp_path, f"{split}/*.jpg", f"{split}/*_m.png", [f"{split}{k}" for k in range(10)], "")
    toml = "images = '{split}/*.jpg'\nmasks = '{split}/*_m.png'\nsplits = ['train', 'test']\nvalidation = 0.2"
    (tmp_path / "dataset.toml").write_text(CLASSES + toml)
    parts = [FolderDataset(tmp_path, split) for split in SPLITS]
    assert [len(part) for part in parts] == [8, 2, 10]
    assert all(image.parent.name == "train" for image, _ in parts[1].pairs)


def test_names_that_differ_in_the_composition_of_letters_are_the_same(tmp_path):
    """macOS decomposes letters in the names of files that it packs; masks come from another machine."""
    root = fill(tmp_path, "photos/*.jpg", "masks/*.png", ["a", "b"], SHARE + "0.5")
    name = "Grün"
    write(root / "photos" / f"{unicodedata.normalize('NFD', name)}.jpg", np.zeros((12, 16, 3), np.uint8))
    write(root / "masks" / f"{unicodedata.normalize('NFC', name)}.png", mask_of(0))
    assert sum(len(FolderDataset(root, split)) for split in SPLITS[:2]) == 3


# ---- the test split ----


def test_the_test_split_is_optional(tmp_path):
    for split in SPLITS[:2]:
        fill(
            tmp_path, f"images/{split}/*.jpg", f"annotations/{split}/*.png", [f"{split}{k}" for k in "01"], ""
        )
    assert open_dataset(str(tmp_path), "training").splits == SPLITS[:2]
    assert describe(str(tmp_path))["problems"] == []
    fill(tmp_path, "images/test/*.jpg", "annotations/test/*.png", ["t"], "")
    assert open_dataset(str(tmp_path), "test").splits == SPLITS


# ---- what is in a folder ----


def test_links_are_followed_but_never_in_a_circle(tmp_path):
    root = fill(tmp_path / "set", "photos/*.jpg", "masks/*.png", ["a", "b"], SHARE + "0.5")
    fill(tmp_path / "more", "photos/*.jpg", "masks/*.png", ["c", "d"], "")
    for kind in ("photos", "masks"):
        (root / kind / "linked").symlink_to(tmp_path / "more" / kind)
        (tmp_path / "more" / kind / "back").symlink_to(root / kind)
        (root / kind / "self").symlink_to(".")
    parts = [FolderDataset(root, split, strict=False) for split in SPLITS[:2]]
    assert sorted(stem for part in parts for stem in stems(part)) == ["a", "b", "c", "d"]


def test_hidden_files_litter_and_folders_named_like_pictures_are_left_out(tmp_path):
    for name in (
        "a.jpg",
        ".b.jpg",
        ".thumbs/c.jpg",
        "@eaDir/a.jpg/T.jpg",
        "clip.tif/d.jpg",
        "__MACOSX/e.jpg",
        "s/f.jpg",
    ):
        write(tmp_path / name, np.zeros((4, 4, 3), np.uint8))
    assert sorted(path.name for path in scan(tmp_path)) == ["a.jpg", "f.jpg"]
    assert list(scan(tmp_path / "nothing")) == []


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    root = fill(tmp_path, "photos/*.jpg", "masks/*.png", ["a", "b"], SHARE + "0.5")
    os.unlink(root / "photos/a.jpg")
    os.symlink("gone.jpg", root / "photos/a.jpg")
    found = [part for split in SPLITS[:2] if "a" in stems(part := FolderDataset(root, split))]
    with pytest.raises(DataError, match=r"photos/a\.jpg.*No such file"):
        found[0].read(stems(found[0]).index("a"))


def test_suffixes_of_pictures_that_cannot_be_read_are_named_with_their_kind(tmp_path):
    root = fill(tmp_path, "photos/*.jpg", "masks/*.png", ["a", "b"], SHARE + "0.5")
    heic = b"\0\0\0\x18ftypheic" + bytes(40)
    tiny_tiff = tiff(tmp_path / "thumbnail.tif", np.ones((5, 8, 1)), 8, 1).read_bytes()
    for name, content, kind in (
        ("a.heic", heic, "HEIC"),
        ("b.jpg", heic, "HEIC"),
        ("a.jp2", b"x", "JPEG 2000"),
        ("b.avif", b"\0\0\0\x1cftypmif1\0\0\0\0mif1avif" + bytes(40), "AVIF"),
        ("a.heic", b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40), "JPEG 2000"),
        ("b.nef", tiny_tiff, "raw"),
    ):
        for path in (root / "photos").glob(f"{name[0]}.*"):
            path.unlink()
        (root / "photos" / name).write_bytes(content)
        part = next(p for s in SPLITS[:2] if name[0] in stems(p := FolderDataset(root, s)))
        with pytest.raises(DataError, match=rf"photos/{name}: .*{kind}.*convert photos to JPEG"):
            part.read(stems(part).index(name[0]))


def test_an_avif_and_a_jfif_are_read(tmp_path):
    root = fill(tmp_path, "photos/*.jpg", "masks/*.png", ["a", "b", "c"], SHARE + "0.5")
    for old, new in (("a.jpg", "a.jfif"), ("b.jpg", "b.jpe")):
        (root / "photos" / old).rename(root / "photos" / new)
    Image.open(root / "photos/c.jpg").save(root / "photos/c.avif")
    (root / "photos/c.jpg").unlink()
    parts = [FolderDataset(root, split) for split in SPLITS[:2]]
    assert sum(len(part) for part in parts) == 3
    assert all(part[k][0].size == (16, 12) for part in parts for k in range(len(part)))


@pytest.mark.parametrize(
    "bands, bits, sample, words",
    [
        (5, 8, 1, ["5 band", "8-bit integers"]),
        (13, 16, 1, ["13 band", "16-bit integers"]),
        (3, 32, 3, ["3 band", "32-bit floating-point"]),
        (1, 64, 3, ["1 band", "64-bit floating-point"]),
        (4, 8, 1, ["4 band", "8-bit integers"]),
    ],
)
def test_a_tiff_that_is_no_photo_is_refused_in_words_that_say_what_it_is(
    tmp_path, bands, bits, sample, words
):
    values = np.ones((5, 8, bands))
    path = tiff(tmp_path / "a.tif", values, bits, 1, sample=sample, bands=bands, extra=(0,) * (bands - 1))
    with pytest.raises(PictureError) as caught:
        read_photo(path)
    message = str(caught.value)
    assert all(word in message for word in [str(path), *words, "export 8-bit RGB"]), message


def test_near_infrared_as_a_fourth_band_is_no_transparency(tmp_path):
    """Red, green, blue and near infrared without a mark for the fourth band: Pillow takes it for alpha."""
    values = np.full((5, 8, 4), 40)
    photo = read_photo(tiff(tmp_path / "rgbn.tif", values, 8, 2, bands=4))
    assert np.asarray(photo).tolist() == np.full((5, 8, 3), 40).tolist()
    assert len(photo.info["remarks"]) == 1 and "fourth band" in photo.info["remarks"][0]
    marked = read_photo(tiff(tmp_path / "rgba.tif", values, 8, 2, bands=4, extra=(2,)))
    assert np.asarray(marked).min() > 200 and marked.info["remarks"] == []


@pytest.mark.parametrize(
    "values, expected, said",
    [
        ([[-24.0, -14.0, -4.0]], [0, 128, 255], "-24..-4"),
        ([[280.0, 300.0, 320.0]], [0, 128, 255], "280..320"),
        ([[0.0, 0.5, 1.0]], [0, 128, 255], ""),
        ([[0.0, 100.0, 255.0]], [0, 100, 255], ""),
        ([[np.nan, 0.0, 255.0]], [0, 0, 255], "1 pixels"),
        ([[np.inf, 10.0, -10.0]], [0, 255, 0], "1 pixels"),
        ([[-3.4e38, 10.0, 20.0]], [0, 10, 20], "1 pixels"),
    ],
)
def test_values_beyond_those_of_photos_are_scaled_and_said_never_black_in_silence(
    tmp_path, values, expected, said
):
    Image.fromarray(np.array(values, np.float32)).save(tmp_path / "a.tif")
    photo = read_photo(tmp_path / "a.tif")
    assert np.asarray(photo)[0, :, 0].tolist() == expected
    assert said in "; ".join(photo.info["remarks"]) and bool(said) == bool(photo.info["remarks"])


def test_what_gdal_marks_as_no_data_is_left_out_of_the_range(tmp_path):
    image = Image.fromarray(np.array([[-9999.0, 100.0, 500.0]], np.float32))
    image.save(tmp_path / "a.tif", tiffinfo={42113: "-9999"})
    photo = read_photo(tmp_path / "a.tif")
    assert np.asarray(photo)[0, :, 0].tolist() == [0, 0, 255] and "100..500" in photo.info["remarks"][0]


def test_a_photo_without_any_value_is_refused(tmp_path):
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(PictureError, match=r"a\.tif"):
        read_photo(tmp_path / "a.tif")
