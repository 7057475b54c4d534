"""Behaviour of data.py: tables, folders and their errors, shapes, augmentation, order, the report."""

import hashlib
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from data import (
    HUES,
    IGNORE,
    SPLITS,
    TABLES,
    DataError,
    Dataset,
    FolderDataset,
    LabelTable,
    ShapesDataset,
    Stream,
    augment,
    distort,
    open_dataset,
)
from flowseg_tools.check import Checker, merged

ROOT = Path(__file__).parent.parent
CLASSES = "classes = ['sky', 'road', 'car']\n"


def problems(dataset: Dataset, limit: int | None = None) -> tuple[dict, list[str]]:
    """Counts and problems of one split."""
    checker = Checker()
    counts, _ = checker.check(dataset, limit)
    return counts, merged(checker.problems) + merged(checker.doubts)


def write(path: Path, values: np.ndarray, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    (image.convert(mode) if mode else image).save(path)


def make_folder(root: Path, masks: list[np.ndarray], toml: str = CLASSES, split: str = "training") -> Path:
    for number, mask in enumerate(masks):
        rng = np.random.default_rng([number, len(split)])  # other images in other splits
        picture = rng.integers(0, 256, (*mask.shape[:2], 3), np.uint8)
        write(root / "images" / split / f"a{number}.jpg", picture)
        write(root / "annotations" / split / f"a{number}.png", mask)
    root.mkdir(exist_ok=True)
    (root / "dataset.toml").write_text(toml)
    return root


def mask_of(*values: int, dtype: type = np.uint8) -> np.ndarray:
    """A 12 x 16 mask in which every given value occurs."""
    return np.resize(np.array(values, dtype), (12, 16))


def error_of(action, *args) -> str:
    with pytest.raises(DataError) as caught:
        action(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- label tables ----


def test_table_maps_raw_values_including_the_last_class_and_ignore():
    table = LabelTable(("a", "b", "c"), (7, 300, 0), (255, 9))
    raw = np.array([[7, 300, 0], [255, 9, 7]])
    labels = table.to_train(raw, "m.png")
    assert labels.dtype == np.uint8
    assert labels.tolist() == [[0, 1, 2], [255, 255, 0]]


def test_table_of_255_classes_keeps_its_last_class_apart_from_ignore():
    table = LabelTable(tuple(map(str, range(255))), tuple(range(1, 256)), (0,))
    assert table.to_train(np.array([[255, 1, 0]], np.uint8), "m").tolist() == [[254, 0, 255]]


@pytest.mark.parametrize("value", [3, 254, 255, 256, 65535, 70000, -1])
def test_table_names_file_and_unknown_value(value):
    table = LabelTable(("a", "b", "c"), (0, 1, 2), ())
    message = error_of(table.to_train, np.array([[0, value]], np.int32), "some/m.png")
    assert message.startswith("some/m.png: ") and f"raw value {value} " in message


def test_a_table_maps_every_integer_type_alike():
    table = LabelTable(("a", "b"), (1, 65535), (0,))
    for dtype in (np.uint16, np.int32, np.int64):
        assert table.to_train(np.array([[0, 1, 65535]], dtype), "m").tolist() == [[IGNORE, 0, 1]]


def test_reading_data_needs_neither_torch_nor_a_terminal():
    code = "import data, sys; print(sorted({'torch', 'typer', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


# ---- shapes ----


def test_shapes_depend_on_seed_split_and_index_alone():
    forward = [ShapesDataset("training")[i] for i in range(4)]
    backward = [ShapesDataset("training")[i] for i in reversed(range(4))][::-1]
    for (a, la), (b, lb) in zip(forward, backward, strict=True):
        assert a.tobytes() == b.tobytes() and (la == lb).all()
    assert ShapesDataset("training", seed=1)[0][0].tobytes() != forward[0][0].tobytes()


def test_shapes_are_the_same_on_every_machine():
    digest = hashlib.sha256()
    for split in SPLITS:
        for index in range(5):
            image, labels = ShapesDataset(split)[index]
            digest.update(image.tobytes() + labels.tobytes())
    assert digest.hexdigest()[:16] == "b4b6214e130ed4ad"


def test_shapes_splits_share_no_scene():
    scenes = [{ShapesDataset(split)[i][0].tobytes() for i in range(40)} for split in SPLITS]
    assert len(set.union(*scenes)) == 120


def test_shapes_protocol_and_every_class_occurs():
    shapes = ShapesDataset("validation")
    image, labels = shapes[199]
    assert image.size == (96, 96) and image.mode == "RGB"
    assert labels.shape == (96, 96) and labels.dtype == np.uint8
    assert 12 <= len(shapes.labels.classes) == len(set(shapes.labels.classes)) <= 16
    with pytest.raises(IndexError, match="shapes/validation/200"):
        shapes[200]
    counts, found = problems(shapes)
    assert counts["checked"] == 200 and found == [] and counts["ignored"] == 0
    assert min(counts["pixels"]) > 0.01 * sum(counts["pixels"])


def test_fine_shapes_are_the_same_scenes_with_at_least_100_classes():
    coarse, fine = ShapesDataset("test"), ShapesDataset("test", fine=True)
    assert len(fine.labels.classes) >= 100
    for index in range(5):
        (a, labels), (b, refined) = coarse[index], fine[index]
        assert a.tobytes() == b.tobytes() and (refined // len(HUES) == labels).all()
        for k in np.unique(refined):
            assert fine.labels.classes[k].endswith(coarse.labels.classes[k // len(HUES)])


def test_colour_alone_does_not_give_the_class():
    def pixels(split: str, count: int, bins: int) -> tuple[np.ndarray, np.ndarray]:
        scenes = [ShapesDataset(split)[i] for i in range(count)]
        rgb = np.stack([np.asarray(image) for image, _ in scenes]).astype(np.int64) * bins // 256
        return (rgb @ [bins * bins, bins, 1]).ravel(), np.stack([labels for _, labels in scenes]).ravel()

    N, bins = len(ShapesDataset("test").labels.classes), 16
    colour, label = pixels("training", 500, bins)
    table = np.bincount(colour * N + label, minlength=bins**3 * N).reshape(-1, N)
    # The best table for the mean over classes weighs every class alike, so try that one as well.
    for weighted in (table, table / table.sum(0)):
        colour, label = pixels("test", 100, bins)
        confusion = np.bincount(label * N + weighted.argmax(1)[colour], minlength=N * N).reshape(N, N)
        true = np.diag(confusion)
        iou = true / (confusion.sum(0) + confusion.sum(1) - true)
        assert iou.mean() < 0.40


# ---- augmentation ----


def coded(H: int, W: int) -> tuple[Image.Image, np.ndarray]:
    """Quadrants of different grey, so that a pixel's grey is 60 times its label plus 30."""
    labels = (np.arange(H)[:, None] * 2 // H * 2 + np.arange(W) * 2 // W).astype(np.uint8)
    return Image.fromarray(labels * 60 + 30).convert("RGB"), labels


@pytest.fixture
def no_distortion(monkeypatch):
    monkeypatch.setattr("data.distort", lambda image, rng: image)


@pytest.mark.parametrize("H, W", [(96, 96), (60, 133), (171, 40), (301, 200)])
def test_augmentation_keeps_image_and_labels_aligned(no_distortion, H, W):
    image, labels = coded(H, W)
    for seed in range(30):
        a, b = augment(image, labels, 64, np.random.default_rng(seed))
        assert a.size == (64, 64) and a.mode == "RGB" and b.shape == (64, 64) and b.dtype == np.uint8
        grey = np.asarray(a)[..., 0].astype(int)
        assert (grey[b == IGNORE] == 127).all()
        # The bilinear seams between the quadrants may disagree, three pixels to either side.
        inner = np.ones(b.shape, bool)
        for axis in (0, 1):
            for shift in (-3, -1, 1, 3):
                inner &= np.roll(b, shift, axis) == b
        assert (abs(grey - (b.astype(int) * 60 + 30)) <= 2)[inner & (b != IGNORE)].all()


def test_a_small_scale_pads_with_ignore_and_a_large_one_does_not(no_distortion):
    class Fixed:
        def __init__(self, ratio):
            self.ratio = ratio

        def uniform(self, low, high):
            return self.ratio

        def integers(self, high):
            return 0

        def random(self):
            return 0.9

    image, labels = coded(100, 200)
    small, padded = augment(image, labels, 64, Fixed(0.5))
    assert (padded[:32] != IGNORE).all() and (padded[32:] == IGNORE).all()
    assert (np.asarray(small)[32:] == 127).all()
    assert (augment(image, labels, 64, Fixed(2.0))[1] != IGNORE).all()


def test_flip_happens_half_of_the_time_and_scale_spans_its_range(no_distortion):
    image, labels = coded(128, 128)
    flips, halves, shares = 0, 0, []
    for seed in range(200):
        b = augment(image, labels, 64, np.random.default_rng(seed))[1]
        rows = b[(b != IGNORE).any(1)]
        columns = rows[:, (rows != IGNORE).all(0)].astype(int)
        flips += columns[0, 0] % 2 > columns[0, -1] % 2
        shares.append((b != IGNORE).mean())
        halves += columns[0, 0] != columns[0, -1]
    assert 0.35 < flips / halves < 0.65
    assert min(shares) < 0.35 and max(shares) == 1


def test_crops_avoid_windows_that_one_class_fills(no_distortion):
    labels = np.zeros((400, 400), np.uint8)
    labels[:, 300:] = 1
    labels[:, :60] = IGNORE
    image = Image.fromarray(labels).convert("RGB")
    shares = []
    for seed in range(100):
        valid = augment(image, labels, 100, np.random.default_rng(seed))[1]
        counts = np.bincount(valid[valid != IGNORE], minlength=2)
        shares.append(counts.max() / counts.sum())
    # Ten tries find a mixed window nearly always; a single random one does in less than half of the cases.
    assert np.mean(np.array(shares) <= 0.75) > 0.8


def test_distortion_is_random_bounded_and_keeps_the_size():
    image = Image.new("RGB", (8, 8), (120, 90, 60))
    colours = {distort(image, np.random.default_rng(seed)).getpixel((0, 0)) for seed in range(60)}
    assert len(colours) > 40
    assert (120, 90, 60) in {tuple(c) for c in colours}  # all four draws are skipped once in 16
    image = Image.new("RGB", (1, 1), (100,) * 3)
    grey = np.array([distort(image, np.random.default_rng(s)).getpixel((0, 0))[0] for s in range(300)])
    assert grey.min() >= (100 - 32) * 0.5 - 2 and grey.max() <= (100 + 32) * 1.5 and np.ptp(grey) > 80


# ---- order ----


@pytest.fixture
def photos(tmp_path) -> FolderDataset:
    masks = [mask_of(0, 1, 2, k % 3) for k in range(7)]
    return FolderDataset(make_folder(tmp_path / "photos", masks), "training")


def same(a: tuple, b: tuple) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_position_gives_the_same_sample_in_any_order(photos):
    first = Stream(photos, 24, seed=3)
    samples = [first[p] for p in range(20)]
    for position in (19, 0, 7, 6, 13):
        assert same(Stream(photos, 24, seed=3)[position], samples[position])
        assert same(first[position], samples[position])
    assert not same(Stream(photos, 24, seed=4)[0], samples[0])


def test_an_epoch_visits_every_sample_once_and_augments_afresh(photos):
    stream = Stream(photos, 24, seed=0)
    epochs = [[stream[e * 7 + k] for k in range(7)] for e in range(3)]
    orders = [[index for *_, index in epoch] for epoch in epochs]
    assert all(sorted(order) == list(range(7)) for order in orders) and orders[0] != orders[1]
    images = {image.tobytes() for epoch in epochs for image, _, index in epoch if index == 0}
    assert len(images) == 3


def test_stream_layout(photos):
    image, labels, index = Stream(photos, 24, seed=0)[5]
    assert image.shape == (3, 24, 24) and image.dtype == np.uint8 and image.flags.c_contiguous
    assert labels.shape == (24, 24) and labels.dtype == np.uint8 and type(index) is int
    picture, truth = ShapesDataset("training")[Stream(ShapesDataset("training"), 96, 0)[4][2]]
    image, labels, _ = Stream(ShapesDataset("training"), 96, 0)[4]
    assert (image == np.asarray(picture).transpose(2, 0, 1)).all() and (labels == truth).all()
    image, labels, _ = Stream(ShapesDataset("training"), 48, 0)[4]
    assert image.shape == (3, 48, 48) and (labels == truth[1::2, 1::2]).mean() > 0.9


def test_workers_do_not_change_samples(photos):
    def batches(workers: int) -> list:
        return list(DataLoader(Stream(photos, 24, 0), 4, sampler=range(10, 26), num_workers=workers))

    for a, b in zip(batches(0), batches(2), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_an_error_keeps_its_kind_on_the_way_to_another_process():
    error = pickle.loads(pickle.dumps(DataError("a.png: broken", "damaged mask")))
    assert str(error) == "a.png: broken" and error.kind == "damaged mask"


def test_a_bad_file_is_named_in_one_line_even_by_a_worker(photos):
    victim = photos.pairs[2][0]
    victim.write_bytes(victim.read_bytes()[:300])
    message = error_of(photos.__getitem__, 2)
    assert message.startswith(f"{victim}: cannot be read")
    loader = DataLoader(Stream(photos, 24, 0), 1, sampler=range(7), num_workers=1)
    assert error_of(list, loader) == message


# ---- folders ----


def test_folder_reads_sub_folders_in_natural_order_and_skips_hidden_files(tmp_path):
    root = make_folder(tmp_path / "mine", [])
    for stem in ("b/a10", "b/a2", "a1", "b/a9"):
        write(root / f"images/training/{stem}.JPG", np.zeros((4, 4, 3), np.uint8))
        write(root / f"annotations/training/{stem}.png", mask_of(1)[:4, :4])
    for name in ("._a1.jpg", ".DS_Store", "notes.txt", ".thumbs/a1.jpg"):
        (root / "images/training" / name).parent.mkdir(exist_ok=True)
        (root / "images/training" / name).write_bytes(b"junk")
    folder = FolderDataset(root, "training")
    paths = [image for image, _ in folder.pairs]
    stems = [path.relative_to(root / "images/training").as_posix() for path in paths]
    assert stems == ["a1.JPG", "b/a2.JPG", "b/a9.JPG", "b/a10.JPG"]
    assert folder.name == "mine" and problems(folder)[1] == []


def test_splits_rename_the_folders(tmp_path):
    toml = CLASSES + "name = 'x'\nsplits = ['train', 'val', 'test']"
    root = make_folder(tmp_path, [mask_of(0)], toml, "val")
    folder = open_dataset(str(root), "validation")
    assert len(folder) == 1 and folder.name == "x" and folder.pairs[0][0].parent.name == "val"
    assert f"{root}/images/train: no such folder" in error_of(open_dataset, str(root), "training")


@pytest.mark.parametrize(
    "mode, dtype, values",
    [
        ("L", np.uint8, (0, 1, 2)),
        ("P", np.uint8, (0, 1, 2)),
        ("1", bool, (0, 1)),
        ("I;16", np.uint16, (0, 1, 2, 300)),
        ("I", np.int32, (0, 1, 2)),
    ],
)
def test_every_single_channel_mask_mode_is_read_as_it_is(tmp_path, mode, dtype, values):
    toml = "classes = ['a', 'b', 'c', 'd']\nids = [0, 1, 2, 300]"
    root, mask = make_folder(tmp_path, [mask_of(0)], toml), mask_of(*values, dtype=np.int32)
    image = Image.fromarray(mask.astype(dtype))
    if mode == "P":
        image = Image.frombytes("P", image.size, image.tobytes())
        image.putpalette([200, 10, 10, 10, 200, 10, 10, 10, 200])
    suffix = ".tif" if mode == "I" else ".png"
    path = root / f"annotations/training/a0{suffix}"
    (root / "annotations/training/a0.png").unlink()
    image.save(path)
    with Image.open(path) as saved:
        assert saved.mode == mode
    assert (FolderDataset(root, "training")[0][1] == np.where(mask == 300, 3, mask)).all()


def test_images_come_upright_and_as_rgb(tmp_path):
    root = make_folder(tmp_path, [mask_of(0)] * 3)
    picture, exif = Image.new("RGB", (12, 16)), Image.Exif()
    picture.paste((255, 255, 255), (0, 0, 12, 4))  # a white top, which turns to the right
    exif[0x0112] = 6
    picture.save(root / "images/training/a0.jpg", exif=exif, quality=95)
    for stem, image in (
        ("a1", Image.new("RGBA", (16, 12), (9, 8, 7, 0))),
        ("a2", Image.fromarray(np.full((12, 16), 200 * 257, np.uint16))),
    ):
        (root / f"images/training/{stem}.jpg").unlink()
        image.save(root / f"images/training/{stem}.png")
    folder = FolderDataset(root, "training")
    upright = np.asarray(folder[0][0])
    assert upright.shape == (12, 16, 3) and upright[:, 13:].min() > 200 and upright[:, :10].max() < 50
    assert folder[1][0].getpixel((0, 0)) == (255,) * 3 and folder[2][0].getpixel((0, 0)) == (200,) * 3


def test_missing_annotations_are_named_and_counted(tmp_path):
    root = make_folder(tmp_path, [mask_of(0)] * 4)
    for stem in ("a1", "a3"):
        (root / f"annotations/training/{stem}.png").unlink()
    message = error_of(FolderDataset, root, "training")
    assert message.startswith(str(root / "images/training/a1.jpg"))
    assert str(root / "annotations/training") in message
    assert "2 of 4" in message
    assert len(FolderDataset(root, "training", strict=False)) == 2


def test_equal_stems_are_refused(tmp_path):
    root = make_folder(tmp_path, [mask_of(0)])
    write(root / "images/training/a0.png", np.zeros((4, 4, 3), np.uint8))
    assert "a0" in (message := error_of(FolderDataset, root, "training")) and "same stem" in message


def test_sizes_that_differ_are_named(tmp_path):
    root = make_folder(tmp_path, [mask_of(0)])
    write(root / "annotations/training/a0.png", mask_of(0)[:10])
    message = error_of(FolderDataset(root, "training").__getitem__, 0)
    assert "16 x 10" in message and "16 x 12" in message and "a0.jpg" in message


def test_missing_parts_say_what_was_expected(tmp_path):
    message = error_of(open_dataset, str(tmp_path), "training")
    assert "dataset.toml" in message and f"flowseg init {tmp_path}" in message
    root = make_folder(tmp_path, [])
    assert f"{root}/images/training: no such folder" in error_of(FolderDataset, root, "training")
    (root / "images/training").mkdir(parents=True)
    assert f"{root}/images/training: holds no image" in error_of(FolderDataset, root, "training")
    write(root / "images/training/a.jpg", np.zeros((4, 4, 3), np.uint8))
    message = error_of(FolderDataset, root, "training")
    assert message.startswith(f"{root}/images/training/a.jpg: ") and "1 of 1" in message
    assert f"{root}/annotations/training/*" in message


def test_open_dataset_finds_names_paths_and_the_nearest_match(tmp_path, monkeypatch):
    make_folder(tmp_path / "streets", [mask_of(0)])
    assert open_dataset("streets", "training", tmp_path).name == "streets"
    monkeypatch.setenv("FLOWSEG_DATA", str(tmp_path))
    assert len(open_dataset("streets", "training")) == 1
    assert open_dataset(str(tmp_path / "streets"), "training").name == "streets"
    monkeypatch.chdir(tmp_path / "streets")
    assert open_dataset("./", "training").name == "streets"
    for name in ("shapes", "shapes-fine"):
        assert open_dataset(name, "test").name == name
    assert "did you mean 'streets'?" in error_of(open_dataset, "street", "training")
    assert "did you mean 'shapes'?" in error_of(open_dataset, "shape", "training")
    assert "did you mean 'training'?" in error_of(open_dataset, "shapes", "trainig")


@pytest.mark.parametrize(
    "toml, expected",
    [
        ("classes = [", ["dataset.toml: "]),
        ("", ["classes has 0 name"]),
        ("classes = []", ["classes has 0 name"]),
        ("classes = ['crack']", ["classes has 1 name", "background"]),
        ("classes = 'sky'", ["classes is 'sky'", "expected a list"]),
        ("classes = ['a', 'a']", ["classes is ['a', 'a']", "different"]),
        ("classes = ['a', 1]", ["classes is ['a', 1]", "strings"]),
        (f"classes = {[str(k) for k in range(256)]}", ["256 name"]),
        ("class = ['a']", ["unknown key 'class'", "ids, ignore, splits", "did you mean 'classes'?"]),
        (CLASSES + "ids = [0, 1]", ["2 values for 3 classes"]),
        (CLASSES + "ids = [0, 1, 1]", ["have 1 2 times"]),
        (CLASSES + "ids = [0, true, 2]", ["has True", "0..65535"]),
        (CLASSES + "ids = [0, 1, 65536]", ["has 65536", "0..65535"]),
        (CLASSES + "ids = [0, 1, 2.0]", ["has 2.0", "0..65535"]),
        (CLASSES + "ignore = [-1]", ["has -1", "0..65535"]),
        (CLASSES + "ignore = [2, 255]", ["have 2 2 times"]),
        (CLASSES + "ids = ['#000000', '#00ff00', '#12345']", ["has '#12345'", "#00ff80"]),
        (CLASSES + "ids = ['#000000', '#00ff00', 'red']", ["has 'red'", "#00ff80"]),
        (CLASSES + "ids = ['#000000', '#00ff00', 3]", ["has 3", "#00ff80"]),
        (CLASSES + "ids = ['#000000', '#00ff00', '#00FF00']", ["have '#00ff00' 2 times"]),
        (CLASSES + "ids = ['#000000', '#00ff00', '#0000ff']\nignore = [255]", ["has 255"]),
        (CLASSES + "ignore = ['#ffffff']", ["has '#ffffff'"]),
        (CLASSES + "splits = ['train']", ["splits is ['train']", "training, validation, test"]),
        (CLASSES + "splits = ['train', 'train']", ["splits is ['train', 'train']", "different"]),
        (CLASSES + "name = 3", ["name is 3", "expected a str"]),
        (CLASSES + "images = 3", ["images is 3", "expected a str"]),
        (CLASSES + "images = 'photos'", ["images is 'photos'", "*"]),
        (CLASSES + "masks = '{split}/*/*'", ["masks is '{split}/*/*'", "*"]),
        (CLASSES + "validation = 1", ["validation is 1", "float"]),
        (CLASSES + "validation = 1.0", ["validation is 1.0", "0.2"]),
        (CLASSES + "validation = nan", ["validation is nan", "0.2"]),
        (CLASSES + "splits = ['.', 'b']", ["splits is ['.', 'b']", "none inside another"]),
        (CLASSES + "splits = ['', 'b']", ["none inside another"]),
        (CLASSES + "splits = ['a', 'a/b']", ["none inside another"]),
        (CLASSES + "splits = ['a', './a/']", ["none inside another"]),
        (CLASSES + "splits = ['a', '../x']", ["none inside another"]),
        (CLASSES + "validation = 0.2\nsplits = ['a', 'b', 'c']", ["splits is ['a', 'b', 'c']"]),
    ],
)
def test_errors_of_dataset_toml(tmp_path, toml, expected):
    message = error_of(FolderDataset, make_folder(tmp_path, [mask_of(0)], toml), "training")
    assert message.startswith(str(tmp_path / "dataset.toml")) and all(word in message for word in expected)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with a name")
def test_a_pipe_is_no_dataset_toml(tmp_path):
    os.mkfifo(make_folder(tmp_path, [mask_of(0)], "") / "pipe")
    (tmp_path / "pipe").replace(tmp_path / "dataset.toml")
    with pytest.raises(DataError, match=r"has no dataset\.toml; flowseg init"):
        FolderDataset(tmp_path, "training")


def test_a_byte_order_mark_is_no_statement_and_utf_16_is_named(tmp_path):
    root = make_folder(tmp_path, [mask_of(0, 1)], "")
    text = "classes = ['Straße', '道路']\n"
    for encoding in ("utf-8", "utf-8-sig"):
        (root / "dataset.toml").write_text(text, encoding=encoding)
        assert FolderDataset(root, "training").labels.classes == ("Straße", "道路")
    for encoding in ("utf-16", "utf-16-le"):
        (root / "dataset.toml").write_text(text, encoding=encoding)
        message = error_of(FolderDataset, root, "training")
        assert "dataset.toml" in message and "UTF-16" in message and "UTF-8" in message


# ---- named data sets ----

COUNTS = {"ade20k": 150, "camvid": 11, "coco-stuff": 171}
HOLES = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}


def make_named(root: Path, name: str, splits: dict[str, list[np.ndarray]]) -> Path:
    for split, masks in splits.items():
        make_folder(root / name, masks, split=split)
    (root / name / "dataset.toml").unlink()
    return root


def test_named_tables_are_the_published_ones(tmp_path):
    tables = {name: open_dataset(name, "training", tmp_path, strict=False).labels for name in TABLES}
    assert {name: len(table.classes) for name, table in tables.items()} == COUNTS
    assert tables["ade20k"].ids == (*range(1, 151),) and tables["ade20k"].ignore == (0,)
    assert tables["coco-stuff"].ids == (*sorted(set(range(182)) - HOLES),)
    assert tables["coco-stuff"].ignore == (255,)
    assert tables["camvid"].ids == (*range(11),) and tables["camvid"].ignore == (11, 255)
    for name, first, last in (("ade20k", "wall", "flag"), ("coco-stuff", "person", "wood")):
        assert (tables[name].classes[0], tables[name].classes[-1]) == (first, last)


@pytest.mark.parametrize("hole", sorted(HOLES))
def test_a_hole_of_coco_stuff_is_an_error(tmp_path, hole):
    root = make_named(tmp_path, "coco-stuff", {"train2017": [mask_of(0, hole)]})
    message = error_of(open_dataset("coco-stuff", "training", root).__getitem__, 0)
    assert f"raw value {hole} is in neither" in message and "a0.png" in message


def test_a_named_data_set_is_read_in_its_official_layout(tmp_path):
    splits = {"training": [mask_of(0, 1, 150)], "validation": [mask_of(150)] * 2}
    root = make_named(tmp_path, "ade20k", splits)
    training, validation = (open_dataset("ade20k", split, root) for split in SPLITS[:2])
    assert (training.name, len(training), len(validation)) == ("ade20k", 1, 2)
    assert training[0][1][0, :3].tolist() == [IGNORE, 0, 149]
    message = error_of(open_dataset, "ade20k", "test", root)
    assert message == "ade20k has no test split; expected training or validation"
    (root / "ade20k/annotations/validation/a1.png").unlink()
    assert "a1.jpg" in error_of(open_dataset, "ade20k", "validation", root)
    assert "a1.jpg" in open_dataset("ade20k", "validation", root, strict=False).unpaired[0].args[0]


def test_a_dataset_toml_of_its_own_wins_over_the_shipped_table(tmp_path):
    make_folder(tmp_path / "ade20k", [mask_of(0)])
    assert open_dataset("ade20k", "training", tmp_path).labels.classes == ("sky", "road", "car")


def test_a_folder_in_the_working_directory_is_not_taken_for_a_named_data_set(tmp_path, monkeypatch):
    make_folder(tmp_path / "ade20k", [mask_of(0)])
    monkeypatch.chdir(tmp_path)
    message = error_of(open_dataset, "ade20k", "training", tmp_path / "elsewhere")
    assert message.startswith(f"{tmp_path}/elsewhere/ade20k/images/training: no such folder")
    assert open_dataset("./ade20k", "training", tmp_path / "elsewhere").labels.classes[0] == "sky"


@pytest.mark.parametrize("name", ["ade20k", "camvid", "coco-stuff"])
def test_an_absent_named_data_set_says_where_it_belongs_and_how_to_get_it(tmp_path, monkeypatch, name):
    message = error_of(open_dataset, name, "training", tmp_path)
    assert message.startswith(f"{tmp_path / name / 'images'}")
    assert message.endswith(f"flowseg download {name} --root {tmp_path}")
    monkeypatch.setenv("FLOWSEG_DATA", str(tmp_path))
    assert error_of(open_dataset, name, "training").endswith(f"flowseg download {name}")


# ---- real data ----


def real(name: str) -> Path:
    folder = Path(os.environ.get("FLOWSEG_SHARED", "/nowhere"), "data", name)
    if not folder.is_dir():
        pytest.skip(f"set FLOWSEG_SHARED to a folder with data/{name}")
    return folder


def test_the_ade20k_sample_has_all_ids_right(tmp_path):
    sample = real("ade20k-sample")
    (tmp_path / "ade20k").symlink_to(sample)
    names = [line.split("\t")[-1] for line in (sample / "objectInfo150.txt").read_text().splitlines()[1:]]
    seen = set()
    for split, count in (("training", 5), ("validation", 3)):
        data = open_dataset("ade20k", split, tmp_path)
        assert len(data) == count and problems(data)[1] == []
        assert data.labels.classes == tuple(name.split(",")[0].strip() for name in names)
        for index, (_, mask) in enumerate(data.pairs):
            raw = np.asarray(Image.open(mask)).astype(int)
            assert (data[index][1] == np.where(raw == 0, IGNORE, raw - 1)).all()
            seen |= set(np.unique(raw))
    assert 0 in seen and len(seen) > 40


def test_ade20k_photos_without_annotation_are_named(tmp_path):
    sample, folder = real("ade20k-sample"), tmp_path / "ade20k"
    for kind in ("images", "annotations"):
        shutil.copytree(sample / kind, folder / kind)
    shutil.copytree(sample / "images-without-annotation", folder / "images/validation", dirs_exist_ok=True)
    found = problems(open_dataset("ade20k", "validation", tmp_path, strict=False))[1]
    assert len(found) == 1 and "ADE_val_00001519.jpg: no mask" in found[0] and "4 of 7" in found[0]


def test_the_coco_stuff_sample_has_all_ids_right(tmp_path):
    """Against the published table and against the masks that another tool converted to train ids."""
    sample = real("cocostuff-sample")
    (tmp_path / "coco-stuff").symlink_to(sample)
    rows = [line.split("\t") for line in (sample / "classes171.tsv").read_text().splitlines()[1:]]
    expected, compared = np.full(256, IGNORE), 0
    expected[[int(row[1]) for row in rows]] = [int(row[0]) for row in rows]
    for split, count in (("training", 13), ("validation", 8)):
        data = open_dataset("coco-stuff", split, tmp_path)
        assert len(data) == count and data.labels.classes == tuple(row[3] for row in rows)
        assert data.labels.ids == tuple(int(row[1]) for row in rows)
        for index, (_, mask) in enumerate(data.pairs):
            labels = data[index][1]
            assert (labels == expected[np.asarray(Image.open(mask))]).all()
            converted = mask.with_name(f"{mask.stem}_labelTrainIds.png")
            if converted.exists():
                assert (labels == np.asarray(Image.open(converted))).all()
                compared += 1
    assert compared == len(list(sample.rglob("*_labelTrainIds.png")))


def test_camvid_is_clean():
    root = real("camvid-240").parent
    scans = [problems(open_dataset("camvid-240", split, root), limit=20) for split in SPLITS]
    counts = [len(open_dataset("camvid-240", split, root)) for split in SPLITS]
    assert counts == [367, 101, 233] and not any(found for _, found in scans)
