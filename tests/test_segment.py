"""segment.py: everything that people keep in folders, with weights that were never trained."""

import hashlib
import io
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from data import DataError, PictureError, open_dataset
from flowseg_tools import segment
from flowseg_tools.predict import assign_photo, segment_photo
from flowseg_tools.segment import find_photos
from model import CheckpointInfo, ModelConfig
from tests.conftest import untrained
from tests.test_cli import fails, flowseg

NAMES = ["left", "right", "top"]
IDS = [7, 300, 12]  # raw values, one too large for 8 bits
CONFIG = ModelConfig(
    num_classes=3,
    encoding_dims=5,
    hidden_size=16,
    depth=1,
    num_heads=2,
    nerf_depth=1,
    nerf_width=8,
    conv_width=8,
)


@pytest.fixture(scope="module")
def model():
    return untrained(CONFIG)


@pytest.fixture
def here(model, tmp_path):
    """A folder with weights and a function that runs `flowseg segment` there."""
    model.save(tmp_path / "w.safetensors", classes=NAMES, ids=IDS, crop_size=32, dataset="mine")

    def segment(*arguments):
        return flowseg("segment", *arguments, "--steps", 1, "--checkpoint", "w.safetensors", cwd=tmp_path)

    return SimpleNamespace(folder=tmp_path, segment=segment)


def noise(width, height, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def digests(folder):
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


# ---------------------------------------------------------------- finding


@pytest.fixture
def album(tmp_path) -> Path:
    names = ("b.jpg", "a.PNG", "sub/c.d.webp", "sub/deep/e.tiff", ".hidden.jpg", ".cache/f.jpg", "notes.txt")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.jpg").mkdir()
    return tmp_path


def found(*paths: str | Path) -> dict[str, str]:
    photos, refused = find_photos([str(path) for path in paths])
    assert refused == []
    return {photo.name: name.as_posix() for photo, name in photos}


def test_folders_are_searched_in_order_and_names_keep_sub_folders(album):
    assert list(found(album).items()) == [
        ("a.PNG", "a.PNG"),
        ("b.jpg", "b.jpg"),
        ("c.d.webp", "sub/c.d.webp"),
        ("e.tiff", "sub/deep/e.tiff"),
    ]


def test_globs_keep_the_folders_below_their_fixed_part(album):
    assert found(f"{album}/*.jpg") == {"b.jpg": "b.jpg"}
    both = {"c.d.webp": "sub/c.d.webp", "e.tiff": "sub/deep/e.tiff"}
    assert found(f"{album}/**/*.[tw]*") == both
    assert found(f"{album}/**/deep/*") == found(f"{album}/*/**/e.*") == {"e.tiff": "sub/deep/e.tiff"}
    assert found(f"{album}/sub/**") == {"c.d.webp": "c.d.webp", "e.tiff": "deep/e.tiff"}


def test_a_named_file_is_taken_whatever_its_suffix_and_only_once(album):
    (album / "odd[1].jpg").touch()
    assert found(album / "notes.txt", album / ".hidden.jpg") == {
        "notes.txt": "notes.txt",
        ".hidden.jpg": ".hidden.jpg",
    }
    assert found(album / "odd[1].jpg") == {"odd[1].jpg": "odd[1].jpg"}
    assert len(found(album, album / "b.jpg", album)) == 5


def test_links_to_folders_are_followed_and_loops_end(album):
    other = album.parent / f"{album.name} elsewhere"
    other.mkdir()
    (other / "linked.jpg").touch()
    (album / "sub" / "link").symlink_to(other)
    (other / "back").symlink_to(album)
    assert found(album)["linked.jpg"] == "sub/link/linked.jpg"
    assert len(found(album)) == 5
    assert found(f"{album}/**/*.jpg") == {"b.jpg": "b.jpg", "linked.jpg": "sub/link/linked.jpg"}


@pytest.fixture
def deep(album):
    """An album with a picture 1200 folders down; pytest itself could not remove those."""
    place = album / "sub"
    for _ in range(1200):
        place = place / "d"
        os.mkdir(place)
    (place / "end.jpg").touch()
    yield album
    while place != album / "sub":
        for file in place.iterdir():
            file.unlink()
        place.rmdir()
        place = place.parent


def test_a_deep_tree_is_searched(deep):
    assert "end.jpg" in found(deep)


def test_what_is_no_regular_file_is_never_opened(album):
    for name in ("fifo.jpg", "sub/fifo.png"):
        os.mkfifo(album / name)
    assert not {"fifo.jpg", "fifo.png"} & found(album).keys()
    with pytest.raises(PictureError, match=r"fifo\.jpg"):
        found(album / "fifo.jpg")


def test_thumbnails_of_other_programs_are_left_out(album):
    for folder in ("@eaDir", ".thumbnails", "sub/@eaDir/deep", "__MACOSX"):
        (album / folder).mkdir(parents=True)
        (album / folder / "thumb.jpg").touch()
    assert "thumb.jpg" not in found(album)


@pytest.mark.parametrize("out", ["in/a-mask.png", "in/earlier/deep"])
def test_what_was_made_before_is_no_photo(here, out):
    (here.folder / "in").mkdir()
    for name in ("a.jpg", "a-mask-b.jpg", "a-mask-map.png"):
        PHOTO.save(here.folder / "in" / name)
    kinds = ["--overlay", "--confidence", "--entropy", "--trajectory"]
    assert here.segment("in/a.jpg", "-o", out, *kinds).returncode == 0
    result = here.segment("in", "-o", "out")
    assert result.stdout.count(" -> ") == 3 and "3 segmented" in result.stderr


def test_a_folder_that_cannot_be_listed_is_named_and_fails(here, monkeypatch):
    (here.folder / "in" / "secret").mkdir(parents=True)
    PHOTO.save(here.folder / "in" / "a.jpg")
    real = os.listdir

    def refuse(path):
        if Path(path).name == "secret":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "listdir", refuse)
    result = here.segment("in", "-o", "out")
    fails(result, 1, "in/secret", "Permission denied")
    assert result.stdout == "in/a.jpg -> out/a.png\n" and "1 segmented, 1 failed" in result.stderr


@pytest.mark.parametrize("suffix", ["heic", "jp2", "DNG"])
def test_pictures_that_cannot_be_read_are_named_and_counted(here, suffix):
    (here.folder / "in").mkdir()
    PHOTO.save(here.folder / "in" / "a.jpg")
    (here.folder / "in" / f"b.{suffix}").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
    result = here.segment("in", "-o", "out")
    fails(result, 1, f"b.{suffix}")
    assert result.stdout == "in/a.jpg -> out/a.png\n" and "1 failed" in result.stderr


@pytest.mark.parametrize("name", ["missing.jpg", "folder.jpg", "*.bmp", "no/such/folder"])
def test_nothing_found_names_what_was_given(album, name):
    with pytest.raises(PictureError, match="no photo at") as caught:
        find_photos([str(album / name)])
    assert str(album / name) in str(caught.value) and ".jpg" in str(caught.value)


# ---------------------------------------------------------------- what people keep in folders


PHOTO = Image.fromarray(noise(40, 30))
GREY_16 = Image.fromarray(noise(40, 30, 1).astype(np.uint16) * 257)


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return PHOTO, {"exif": exif}


def frames(*others):
    return {"save_all": True, "append_images": [Image.new("RGB", *other) for other in others]}


# A kind of photo -> {name: (image, how it is saved)}
GOOD = {
    "modes of PNG": {
        f"{mode}.png": (PHOTO.convert(mode), {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")
    },
    "modes of TIFF": {
        f"{mode}.tif": (PHOTO.convert(mode), {}) for mode in ("1", "L", "LAB", "YCbCr", "CMYK", "I", "F")
    },
    "modes of JPEG": {f"{mode}.jpg": (PHOTO.convert(mode), {}) for mode in ("L", "CMYK")},
    "formats": {f"a.{end}": (PHOTO, {}) for end in ("jpg", "jpeg", "webp", "bmp", "tif", "tiff", "gif")},
    "turns": {f"{k}.jpg": turned(k) for k in range(1, 9)},
    "damaged EXIF": {"a.jpg": (PHOTO, {"exif": b"Exif\0\0II*\0\xff\xff\xff\xff garbage"})},
    "transparency": {
        "index.png": (PHOTO.quantize(8), {"transparency": 3}),
        "table.png": (PHOTO.quantize(8), {"transparency": bytes(range(8))}),
        "colour.png": (PHOTO, {"transparency": (1, 2, 3)}),
    },
    "sixteen bits": {"a.png": (GREY_16, {}), "b.tiff": (GREY_16, {})},
    "sizes": {
        "dot.png": (Image.new("RGB", (1, 1)), {}),
        "line.jpg": (Image.new("RGB", (1, 500)), {}),
        "long.png": (Image.new("RGB", (20000, 100)), {}),
    },
    "several frames": {
        "film.gif": (PHOTO, frames(((40, 30), "red"), ((40, 30), "blue"))),
        "pages.tif": (PHOTO, frames(((9, 9),))),
    },
    "names": {
        "a name [1] with #, ü and 'quotes'.jpg": (PHOTO, {}),
        "UPPER.JPG": (PHOTO, {}),
        "deep/er/still.webp": (PHOTO, {}),
    },
    "content of another suffix": {"a.jpg": (PHOTO, {"format": "PNG"})},
}


@pytest.mark.parametrize("kind", GOOD)
def test_every_kind_of_photo_gets_a_mask_of_the_size_of_the_upright_photo(here, kind):
    for name, (image, options) in GOOD[kind].items():
        (here.folder / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(here.folder / "in" / name, **options)
    before = digests(here.folder)
    result = here.segment("in", "-o", "out")
    assert result.returncode == 0 and "error" not in result.stderr

    lines = dict(line.split(" -> ") for line in result.stdout.splitlines())
    assert lines.keys() == {f"in/{name}" for name in GOOD[kind]}
    for name, (image, _) in GOOD[kind].items():
        with Image.open(here.folder / lines[f"in/{name}"]) as mask:
            expected = image.size[::-1] if kind == "turns" and name >= "5" else image.size
            assert (mask.mode, mask.size) == ("P", expected), name
            assert np.asarray(mask).max() < len(NAMES)
    after = digests(here.folder)
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == set(lines.values())

    again = here.segment("in", "-o", "out")
    assert again.stdout == "" and again.returncode == 0
    assert digests(here.folder) == after


def test_of_several_frames_the_first_is_taken_and_that_is_said(here):
    for name, (image, options) in GOOD["several frames"].items():
        image.save(here.folder / name, **options)
    PHOTO.save(here.folder / "first.gif")
    result = here.segment("film.gif", "pages.tif", "first.gif", "-o", "out")
    lines = result.stderr.splitlines()
    assert [line for line in lines if "film.gif" in line and "first of several" in line]
    assert [line for line in lines if "pages.tif" in line and "first of several" in line]
    assert not [line for line in lines if "first.gif" in line]
    masks = [Image.open(here.folder / "out" / f"{name}_gif.png") for name in ("film", "first")]
    assert np.array_equal(*masks)


def saved(image, kind):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def bomb():
    header = b"IHDR" + struct.pack(">IIBBBBB", 90000, 90000, 8, 2, 0, 0, 0)
    chunks = (header, b"IDAT" + zlib.compress(b"\0" * 99), b"IEND")
    whole = b"".join(struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + whole


# A kind of file -> {name: (content, what the error must name)}
BAD = {
    "cut": {
        "empty.jpg": (b"", "empty file"),
        "cut.png": (saved(PHOTO, "PNG")[:-900], "truncated"),
        "cut.jpg": (saved(PHOTO, "JPEG")[:700], "truncated"),
        "head.gif": (b"GIF89a", "not a picture"),
    },
    "no pictures": {
        "letter.jpg": (b"Dear all,\n", "not a picture"),
        "page.png": (b"<html>404</html>", "not a picture"),
    },
    "decoders that are not allowed": {
        "vector.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        "icon.bmp": (saved(PHOTO, "ICO"), "not a picture"),
    },
    "bombs": {"bomb.png": (bomb(), "--max-pixels")},
}


@pytest.mark.parametrize("kind", BAD)
def test_every_kind_of_bad_file_costs_one_line_and_the_others_go_on(here, kind):
    (here.folder / "in").mkdir()
    for name, (content, _) in BAD[kind].items():
        (here.folder / "in" / name).write_bytes(content)
    PHOTO.save(here.folder / "in" / "zz good.jpg")
    before = digests(here.folder)
    for states in (("segmented", ["in/zz good.jpg -> out/zz good.png"]), ("skipped", [])):
        result = here.segment("in", "-o", "out")
        assert result.returncode == 1 and result.stdout.splitlines() == states[1]
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == len(BAD[kind])
        for name, (_, words) in BAD[kind].items():
            assert [words in line for line in errors if f"in/{name}" in line] == [True], (name, errors)
        assert f"{len(errors)} failed" in result.stderr and f"1 {states[0]}" in result.stderr
    after = digests(here.folder)
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"out/zz good.png"}


def test_what_was_not_asked_for_is_left_alone(here):
    (here.folder / "in" / "folder.jpg").mkdir(parents=True)
    for name in (".hidden.jpg", "notes.txt", "film.mp4", "Thumbs.db", "good.png", "folder.jpg/inside.png"):
        (here.folder / "in" / name).write_bytes(saved(PHOTO, "PNG"))
    result = here.segment("in", "-o", "out")
    assert (result.returncode, result.stdout) == (0, "in/good.png -> out/good_png.png\n")


def test_a_link_that_leads_nowhere_is_named(here):
    (here.folder / "in").mkdir()
    PHOTO.save(here.folder / "in" / "a.jpg")
    (here.folder / "in" / "nowhere.jpg").symlink_to(here.folder / "in" / "gone.jpg")
    result = here.segment("in", "-o", "out")
    fails(result, 1, "in/nowhere.jpg", "No such file")
    assert result.stdout == "in/a.jpg -> out/a.png\n"


# ---------------------------------------------------------------- names of outputs


def test_the_name_of_a_mask_depends_on_its_photo_alone(here):
    Image.fromarray(noise(40, 30, seed=1)).save(here.folder / "b.png")
    (here.folder / "in").mkdir()
    (here.folder / "b.png").rename(here.folder / "in" / "b.png")
    assert here.segment("in", "-o", "out").stdout == "in/b.png -> out/b_png.png\n"
    first = digests(here.folder / "out")
    for name in ("b.jpg", "b.jpeg", "b.tif", "b.webp"):
        Image.fromarray(noise(40, 30, seed=2)).save(here.folder / "in" / name)
    result = here.segment("in", "-o", "out")
    assert result.returncode == 0 and "in/b.png: skipped" in result.stderr
    masks = digests(here.folder / "out")
    assert masks.items() >= first.items()
    assert masks.keys() == {"b.png", "b_jpeg.png", "b_png.png", "b_tif.png", "b_webp.png"}
    here.segment("in", "-o", "at once")
    assert digests(here.folder / "at once") == masks


def test_a_mask_of_another_photo_of_that_name_is_never_taken_for_this_ones(here):
    for folder in ("one", "two"):
        (here.folder / folder).mkdir()
        Image.fromarray(noise(40, 30, seed=len(folder))).save(here.folder / folder / "a.jpg")
    Image.fromarray(noise(40, 30, seed=9)).save(here.folder / "two" / "a.jpg")
    assert here.segment("one", "-o", "out").returncode == 0
    before = digests(here.folder / "out")
    fails(here.segment("two", "-o", "out"), 1, "two/a.jpg: out/a.png was made from another photo", "--force")
    assert digests(here.folder / "out") == before
    assert here.segment("one", "-o", "out").returncode == 0
    (here.folder / "one").rename(here.folder / "moved")
    assert "skipped" in here.segment("moved", "-o", "out").stderr

    retouched = Image.open(here.folder / "out" / "a.png")
    retouched.info.clear()
    retouched.save(here.folder / "out" / "a.png")
    assert "skipped" in here.segment("two", "-o", "out").stderr
    assert here.segment("two", "-o", "out", "--force").returncode == 0
    assert "skipped" in here.segment("two", "-o", "out").stderr


def test_without_an_output_the_mask_goes_beside_a_single_photo(here):
    (here.folder / "in").mkdir()
    PHOTO.save(here.folder / "in" / "photo.jpg")
    result = here.segment("in/photo.jpg", "--overlay")
    assert (result.returncode, result.stdout) == (0, "in/photo.jpg -> in/photo-mask.png\n")
    before = digests(here.folder / "in")
    assert before.keys() == {"photo.jpg", "photo-mask.png", "photo-mask-overlay.png"}
    fails(here.segment("in/photo.jpg"), 1, "in/photo-mask.png exists", "--force")
    assert digests(here.folder / "in") == before
    assert here.segment("in/photo.jpg", "--force").returncode == 0
    for paths in (["in"], ["in/*.jpg"], ["in/photo.jpg", "in/photo-mask.png"], ["-"]):
        fails(here.segment(*paths), 2, "-o")
    assert digests(here.folder / "in") == before


def test_a_folder_may_have_a_dot_in_its_name(here):
    (here.folder / "in").mkdir()
    for name in ("a.jpg", "b.jpg"):
        PHOTO.save(here.folder / "in" / name)
    assert here.segment("in/a.jpg", "in/b.jpg", "-o", "masks_2024.05").returncode == 0
    assert digests(here.folder / "masks_2024.05").keys() == {"a.png", "b.png"}
    (here.folder / "in" / "b.jpg").unlink()
    assert here.segment("in", "-o", "masks.v2").stdout == "in/a.jpg -> masks.v2/a.png\n"
    assert here.segment("in", "-o", "one.png").stdout == "in/a.jpg -> one.png\n"
    fails(here.segment("in/a.jpg", "-o", "mask.jgp"), 2, "mask.jgp", ".png")
    fails(here.segment("in/a.jpg", "one.png", "-o", "two.png"), 2, "two.png", "2 photos")


def test_labelmap_says_which_colour_is_which_class_and_names_masks_as_tools_expect(here, model):
    PHOTO.save(here.folder / "a.png")
    assert here.segment("a.png", "-o", "out", "--labelmap").stdout == "a.png -> out/a.png\n"
    lines = (here.folder / "out" / "labelmap.txt").read_text().splitlines()
    assert lines[0].startswith("# label:color_rgb")
    table = {tuple(map(int, line.split(":")[1].split(","))): line.split(":")[0] for line in lines[1:]}
    assert list(table.values()) == NAMES
    mask = Image.open(here.folder / "out" / "a.png")
    colors = np.asarray(mask.convert("RGB")).reshape(-1, 3).tolist()
    assert [table[tuple(color)] for color in colors] == [NAMES[k] for k in np.asarray(mask).ravel()]
    assert here.segment("a.png", "-o", "out", "--labelmap").returncode == 0  # the same labels

    fails(here.segment("a.png", "-o", "m.png", "--labelmap"), 2, "m.png", "-o masks")
    fails(here.segment("a.png", "-o", "raw", "--labelmap", "--ids", "raw"), 2, "--ids raw")
    model.save(here.folder / "w.safetensors", classes=["a:b", "c", "d"], ids=[0, 1, 2], crop_size=32)
    fails(here.segment("a.png", "-o", "new", "--labelmap"), 2, "a:b")
    model.save(here.folder / "w.safetensors", classes=["b", "c", "d"], ids=[0, 1, 2], crop_size=32)
    fails(here.segment("a.png", "-o", "out", "--labelmap"), 2, "labelmap.txt", "--force")
    assert here.segment("a.png", "-o", "out", "--labelmap", "--force").returncode == 0


COLORS = ("#ff0000", "#00ff00", "#0000ff")


def test_a_data_set_gives_the_colours_and_the_classes_that_stay_clear(here, model):
    PHOTO.save(here.folder / "a.jpg")
    facts = {"classes": NAMES, "ids": [0, 1, 2], "crop_size": 32, "colors": COLORS}
    model.save(here.folder / "w.safetensors", **facts, clear=NAMES)
    here.segment("a.jpg", "-o", "out", "--overlay", "--labelmap")
    mask = Image.open(here.folder / "out" / "a.png")
    assert mask.getpalette()[:9] == [255, 0, 0, 0, 255, 0, 0, 0, 255]
    assert "right:0,255,0::" in (here.folder / "out" / "labelmap.txt").read_text()
    bare = np.asarray(Image.open(here.folder / "out" / "a-overlay.png")).astype(int)
    model.save(here.folder / "w.safetensors", **facts)
    here.segment("a.jpg", "-o", "out", "--overlay", "--labelmap", "--force")
    painted = np.asarray(Image.open(here.folder / "out" / "a-overlay.png")).astype(int)
    same = (bare == painted).all(-1)
    assert bare.shape == painted.shape and 0.05 < same.mean() < 0.9

    for wrong in (COLORS[:2], ["red", *COLORS[1:]]):
        with pytest.raises(ValueError, match="colours"):
            CheckpointInfo(**facts | {"colors": wrong})


def test_raw_ids_that_are_colours_give_a_mask_of_colours(here, model):
    PHOTO.save(here.folder / "a.jpg")
    model.save(here.folder / "w.safetensors", classes=NAMES, ids=COLORS, crop_size=32)
    here.segment("a.jpg", "-o", "train.png")
    labels = np.asarray(Image.open(here.folder / "train.png"))
    table = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]])
    for force in ([], ["--force"]):
        assert here.segment("a.jpg", "-o", "raw.png", "--ids", "raw", *force).returncode == 0
        assert np.array_equal(np.asarray(Image.open(here.folder / "raw.png")), table[labels])


def test_colours_of_a_dataset_toml_are_checked(tmp_path):
    for kind in ("images", "annotations"):
        for split in ("training", "validation"):
            (tmp_path / kind / split).mkdir(parents=True)
            PHOTO.convert("L").point(lambda _: 0).save(tmp_path / kind / split / "a.png")
    toml = tmp_path / "dataset.toml"
    toml.write_text('classes = ["sky", "road"]\ncolors = ["#0000FF", "#808080"]\nclear = ["sky"]\n')
    table = open_dataset(str(tmp_path), "training").labels
    assert (table.colors, table.clear) == (("#0000ff", "#808080"), ("sky",))
    wrong = {
        'colors = ["#0000ff"]': "2 classes",
        'colors = ["blue", "grey"]': "#00ff80",
        "colors = [1, 2]": "#00ff80",
        'clear = ["ski"]': "sky",
        "clear = [0]": "names",
    }
    for line, words in wrong.items():
        toml.write_text(f'classes = ["sky", "road"]\n{line}\n')
        with pytest.raises(DataError, match=r"dataset\.toml") as caught:
            open_dataset(str(tmp_path), "training")
        assert words in str(caught.value) and line.split()[0] in str(caught.value)


@pytest.mark.parametrize(
    ("report", "words"),
    [("a.jpg", "NAME.json"), ("photos.json", "photo"), ("notes.json", "no report"), ("new/r.json", "folder"),
     ("folder.json", "NAME.json")],
)  # fmt: skip
def test_a_report_that_cannot_be_written_is_refused_before_the_work(here, report, words):
    PHOTO.save(here.folder / "a.jpg")
    PHOTO.save(here.folder / "photos.json", "PNG")
    (here.folder / "notes.json").write_text('{"mine": 1}')
    (here.folder / "folder.json").mkdir()
    before = digests(here.folder)
    fails(here.segment("a.jpg", "photos.json", "-o", "out", "--report", report), 2, report, words)
    assert digests(here.folder) == before


@pytest.mark.parametrize("output", ["file/out", "file/m.png", "/proc/flowseg/out"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(here, output):
    PHOTO.save(here.folder / "a.jpg")
    (here.folder / "file").touch()
    fails(
        here.segment("a.jpg", "-o", output), 2, "cannot write into", output.rpartition("/")[0].split("/fl")[0]
    )


# ---------------------------------------------------------------- whatever happens


def plan_of(folder, names):
    return [segment.Task(name, folder / name, {"mask": folder / name}, "") for name in names]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), ["--short-side", "--mode slide"]),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), ["--short-side", "--mode slide"]),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB"), ["--short-side"]),
        (ZeroDivisionError("division"), ["ZeroDivisionError", "test_segment.py:"]),
        (RecursionError("deep"), ["RecursionError"]),
        (OSError(28, "No space left on device"), ["No space left"]),
    ],
)
def test_any_error_at_one_photo_fails_that_photo_alone(tmp_path, error, words):
    def work(photo, files):
        if photo == "b":
            raise error
        return {}

    records = list(segment.segment_all(plan_of(tmp_path, "abc"), work))
    assert [record["state"] for record in records] == ["segmented", "failed", "segmented"]
    assert records[1]["note"].startswith("error: ") and "\n" not in records[1]["note"]
    assert all(word in records[1]["note"] for word in [*words, "b"])


def test_of_large_photos_one_is_in_hand_at_a_time(tmp_path, monkeypatch):
    sizes = {f"{k}": size for k, size in enumerate([4, 30, 4, 11, 30, 9, 10, 40, 11, 1] * 3)}
    monkeypatch.setattr(segment, "SMALL_PIXELS", 10)
    monkeypatch.setattr(segment, "_header", lambda photo: (sizes[photo], "RGB", {}))
    lock, hand, seen = threading.Lock(), [], []

    def work(photo, files):
        with lock:
            hand.append(sizes[photo])
            seen.append(list(hand))
        time.sleep(0.005)
        with lock:
            hand.remove(sizes[photo])
        if photo == "4":
            raise MemoryError
        return {}

    records = list(segment.segment_all(plan_of(tmp_path, sizes), work))
    assert [record["photo"] for record in records] == list(sizes)
    assert [record["photo"] for record in records if record["state"] == "failed"] == ["4"]
    assert all(sum(size > 10 for size in held) <= 1 and len(held) <= segment.THREADS for held in seen)
    assert max(len(held) for held in seen) > 1


def test_pixels_are_counted_from_the_header(tmp_path):
    PHOTO.save(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").write_bytes(bomb())
    (tmp_path / "c.jpg").write_bytes(b"no")
    assert [segment._header(tmp_path / f"{k}.jpg")[0] for k in "abcd"] == [1200, 8_100_000_000, 0, 0]


def run(folder, *arguments, **environment):
    """The command in a process of its own; returns the exit code and both streams as bytes."""
    command = [sys.executable, "-m", "flowseg", "segment", *arguments, "--steps", "1", "-c", "w.safetensors"]
    places = {"PYTHONPATH": str(Path(segment.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, env={**os.environ, **places, **environment}, capture_output=True, timeout=400
    )


def test_names_that_a_stream_cannot_print_end_nothing(here):
    names = ["plain.jpg", "街.jpg", "ü\x1b[31m.jpg", "line\nbreak.jpg", os.fsdecode(b"caf\xe9.jpg")]
    (here.folder / "in").mkdir()
    for name in names:
        PHOTO.save(here.folder / "in" / name)
    done = run(here.folder, "in", "-o", "out", "--report", "r.json", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode("ascii").splitlines()
    assert len(lines) == len(names) and b"\x1b" not in done.stdout
    assert (
        "in/\\u8857.jpg -> out/\\u8857.png" in lines
        and "in/line\\nbreak.jpg -> out/line\\nbreak.png" in lines
    )
    records = json.loads((here.folder / "r.json").read_text())
    assert {record["photo"] for record in records} == {f"in/{name}" for name in names}
    assert len(list((here.folder / "out").iterdir())) == len(names)


def test_a_reader_that_has_gone_ends_nothing(here):
    (here.folder / "in").mkdir()
    for k in range(6):
        Image.fromarray(noise(40, 30, seed=k)).save(here.folder / "in" / f"{k}.jpg")
    command = (
        f"{sys.executable} -m flowseg segment in -o out --steps 1 -c w.safetensors --report r.json | head -1"
    )
    places = {"PYTHONPATH": str(Path(segment.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, shell=True, cwd=here.folder, env={**os.environ, **places}, timeout=400)
    assert len(list((here.folder / "out").iterdir())) == 6
    assert len(json.loads((here.folder / "r.json").read_text())) == 6


def test_the_report_of_what_was_done_is_written_after_ctrl_c_too(here, monkeypatch):
    (here.folder / "in").mkdir()
    for k in range(3):
        PHOTO.save(here.folder / "in" / f"{k}.jpg")
    tell = segment.tell

    def interrupted(*arguments):
        for record in tell(*arguments):
            yield record
            if record["photo"] == "in/1.jpg":
                raise KeyboardInterrupt

    monkeypatch.setattr(segment, "tell", interrupted)
    assert here.segment("in", "-o", "out", "--report", "r.json").returncode == 130
    records = json.loads((here.folder / "r.json").read_text())
    assert [record["photo"] for record in records] == ["in/0.jpg", "in/1.jpg"]


def test_photos_in_hand_at_ctrl_c_are_finished_and_passed_on(album, monkeypatch):
    begun, stopping, done = threading.Barrier(segment.THREADS), threading.Event(), []

    class Pool(ThreadPoolExecutor):
        def shutdown(self, **options):
            stopping.set()
            super().shutdown(**options)

    def work(photo, files):
        if not stopping.is_set() and begun.wait(60) == 0:
            time.sleep(0.3)  # all 50 are planned by then
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        assert stopping.wait(60)
        done.append(str(photo))
        return {}

    monkeypatch.setattr(segment, "ThreadPoolExecutor", Pool)
    tasks = [
        segment.Task(f"{k}.jpg", album / f"{k}.png", {"mask": album / f"{k}.png"}, "") for k in range(50)
    ]
    records = []
    with pytest.raises(KeyboardInterrupt):
        records.extend(segment.segment_all(tasks, work))
    assert [record["photo"] for record in records] == sorted(done) and 3 <= len(done) < 50
    assert {record["state"] for record in records} == {"segmented"}


def test_with_json_stdout_is_json_and_nothing_else(here):
    PHOTO.save(here.folder / "a.jpg")
    (here.folder / "b.jpg").write_bytes(b"")
    result = here.segment("a.jpg", "b.jpg", "-o", "out", "--json")
    assert [record["state"] for record in json.loads(result.stdout)] == ["segmented", "failed"]
    assert "a.jpg -> out/a.png" in result.stderr


# ---------------------------------------------------------------- outputs


@pytest.mark.slow
def test_the_same_bytes_alone_in_a_folder_in_any_order_and_with_more_threads(here):
    kinds = ["--overlay", "--confidence", "--entropy", "--trajectory"]
    names = [f"{k}.png" for k in range(3)]
    (here.folder / "in").mkdir()
    for k, name in enumerate(names):
        Image.fromarray(noise(41 + k, 50 - k, seed=k)).save(here.folder / "in" / name)
    here.segment("in", "-o", "folder", *kinds)
    expected = digests(here.folder / "folder")
    assert len(expected) == 3 * 8 and len(set(expected.values())) == 3 * 8

    here.segment(*(f"in/{name}" for name in names[::-1]), "-o", "reversed", *kinds)
    for name in names:
        here.segment(f"in/{name}", "-o", "alone", *kinds)
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - threads if threads < 3 else 1)  # 1 becomes 2
    try:
        here.segment("in", "-o", "threads", *kinds)
    finally:
        torch.set_num_threads(threads)
    assert digests(here.folder / "reversed") == digests(here.folder / "alone") == expected
    with_threads = digests(here.folder / "threads")  # sums in another order may round a grey differently
    rounded = ("trajectory", "confidence", "entropy")
    same = [name for name in expected if not any(kind in name for kind in rounded)]
    assert len(same) == 3 * 2
    assert {name: with_threads[name] for name in same} == {name: expected[name] for name in same}


def test_what_is_finished_is_kept_and_only_the_rest_is_made(here):
    Image.fromarray(noise(40, 30)).save(here.folder / "a.jpg")
    Image.fromarray(noise(30, 40)).save(here.folder / "b.jpg")
    here.segment("a.jpg", "-o", "out")
    (here.folder / "out" / "a.png").write_bytes(b"mine now")
    result = here.segment("a.jpg", "b.jpg", "-o", "out")
    assert (result.returncode, result.stdout) == (0, "b.jpg -> out/b.png\n")
    assert "a.jpg: skipped, out/a.png exists" in result.stderr
    assert {"1 skipped", "1 segmented"} == set(result.stderr.splitlines()[-1].split(", "))
    assert here.segment("a.jpg", "b.jpg", "-o", "out", "--overlay").returncode == 0
    assert (here.folder / "out" / "a-overlay.png").exists()
    assert (here.folder / "out" / "a.png").read_bytes() == b"mine now"
    assert here.segment("a.jpg", "b.jpg", "-o", "out", "--force", "-q").stderr == ""
    assert Image.open(here.folder / "out" / "a.png").size == (40, 30)


def test_an_output_inside_the_folder_of_photos_is_not_taken_for_photos(here):
    (here.folder / "in").mkdir()
    Image.fromarray(noise(40, 30)).save(here.folder / "in" / "a.png")
    for _ in range(2):
        assert here.segment("in", "-o", "in/masks", "--overlay").returncode == 0
    assert sorted(digests(here.folder / "in")) == ["a.png", "masks/a_png-overlay.png", "masks/a_png.png"]


def test_no_photo_and_no_other_output_is_written_over(here):
    for name in ("a.png", "b.png", "b_png-overlay.png", "c.jpg", "c.png", "c_png.jpg"):
        Image.fromarray(noise(40, 30)).save(here.folder / name)
    before = digests(here.folder)
    for force in ([], ["--force"]):
        fails(here.segment("a.png", "-o", "a.png", *force), 1, "a.png exists and is a photo")
        fails(
            here.segment("c.jpg", "-o", ".", *force), 1, "c.png exists and is a photo"
        )  # not even asked for
        result = here.segment("b.png", "b_png-overlay.png", "-o", ".", "--overlay", *force)
        assert result.returncode == 1 and "b_png-overlay.png exists and is a photo" in result.stderr
    result = here.segment("c.png", "c_png.jpg", "-o", "out")
    fails(result, 1, "c_png.jpg: out/c_png.png is made of c.png")
    assert result.stdout == "c.png -> out/c_png.png\n"
    after = digests(here.folder)
    assert {name: after[name] for name in before} == before


def test_standard_input_goes_to_a_file(here, monkeypatch):
    buffer = io.BytesIO()
    Image.fromarray(noise(40, 30)).save(buffer, "PNG")
    (here.folder / "a.png").write_bytes(buffer.getvalue())
    here.segment("a.png", "-o", "from-file.png")

    def pipe(content):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))

    pipe(buffer.getvalue())
    assert here.segment("-", "-o", "from-pipe.png").returncode == 0
    after = digests(here.folder)
    assert after["from-pipe.png"] == after["from-file.png"]
    pipe(b"")
    fails(here.segment("-", "-o", "none.png"), 1, "standard input: cannot be read (empty file)")
    fails(here.segment("-", "-o", "folder"), 2, "-o folder", "expected a .png")
    assert not (here.folder / "folder").exists() and not (here.folder / "none.png").exists()


def test_max_pixels_refuses_and_allows(here):
    Image.fromarray(noise(40, 30)).save(here.folder / "a.png")
    result = here.segment("a.png", "-o", "m.png", "--max-pixels", 1000)
    fails(result, 1, "a.png", "1,000 pixels", "40 x 30", "--max-pixels")
    assert here.segment("a.png", "-o", "m.png", "--max-pixels", 1200).returncode == 0


def test_a_second_run_keeps_what_the_report_says_of_finished_photos(here):
    Image.fromarray(noise(40, 30)).save(here.folder / "a.png")
    call = ["-o", "out", "--report", "all.json"]
    assert here.segment("a.png", *call).returncode == 0
    before = json.loads((here.folder / "all.json").read_text())
    Image.fromarray(noise(20, 30)).save(here.folder / "b.png")
    assert here.segment("a.png", "b.png", *call).returncode == 0
    after = json.loads((here.folder / "all.json").read_text())
    assert after[:1] == before and after[1]["photo"] == "b.png" and after[1]["classes"]


def test_a_report_is_never_written_over_a_photo(here):
    Image.fromarray(noise(40, 30)).save(here.folder / "a.png")
    before = (here.folder / "a.png").read_bytes()
    result = here.segment("a.png", "--report", "a.png", "-o", "out")
    assert result.returncode == 2 and "expected NAME.json" in result.stderr
    assert (here.folder / "a.png").read_bytes() == before


def test_the_json_says_what_each_mask_holds(here, model):
    photo = noise(40, 30)
    Image.fromarray(photo).save(here.folder / "a.png")
    (here.folder / "b.png").write_bytes(b"")
    assert here.segment("a.png", "b.png", "-o", "out", "--report", "all.json").returncode == 1
    good, bad = json.loads((here.folder / "all.json").read_text())
    assert (good["photo"], good["mask"], good["state"]) == ("a.png", "out/a_png.png", "segmented")
    assert bad["state"] == "failed" and "empty file" in bad["note"]
    labels, confidence = segment_photo(model, photo, 32, 1)
    assert np.array_equal(labels, np.asarray(Image.open(here.folder / "out" / "a_png.png")))
    assert [c["class"] for c in good["classes"]] == [NAMES[k] for k in np.unique(labels)]
    for row in good["classes"]:
        mine = labels == row["id"]
        assert row["pixels"] == mine.sum() and row["percent"] == pytest.approx(100 * mine.mean())
        assert row["confidence"] == pytest.approx(confidence[mine].mean(), abs=1e-5)


def test_raw_ids_are_the_values_of_the_data_set(here, model):
    Image.fromarray(noise(40, 30)).save(here.folder / "a.png")
    here.segment("a.png", "-o", "raw.png", "--ids", "raw")
    here.segment("a.png", "-o", "train.png")
    raw, train = (Image.open(here.folder / f"{kind}.png") for kind in ("raw", "train"))
    assert raw.mode == "I;16" and np.array_equal(np.asarray(raw), np.array(IDS)[np.asarray(train)])
    model.save(here.folder / "w.safetensors", classes=NAMES, ids=[7, 30, 12], crop_size=32)
    here.segment("a.png", "-o", "raw.png", "--ids", "raw", "--force")
    raw = Image.open(here.folder / "raw.png")
    assert raw.mode == "P" and np.array_equal(np.asarray(raw), np.array([7, 30, 12])[np.asarray(train)])
    assert np.array_equal(raw.convert("RGB"), train.convert("RGB"))


def test_the_other_pictures(here, model):
    photo = noise(40, 30)
    Image.fromarray(photo).save(here.folder / "a.png")
    here.segment("a.png", "-o", "m.png", "--entropy", "--trajectory")
    p = assign_photo(model, Image.fromarray(photo), 32, 1)
    p = torch.nn.functional.interpolate(  # of the entropies: the largest is ln 3
        torch.special.entr(p).sum(1, True) / np.log(3), (30, 40), mode="bilinear"
    )  # fmt: skip
    entropy = Image.open(here.folder / "m-entropy.png")
    assert entropy.mode == "L" and np.abs(np.asarray(entropy) - 255 * p[0, 0].numpy()).max() <= 0.51

    film = Image.open(here.folder / "m-trajectory.gif")
    first = np.asarray(film.convert("RGB"))
    film.seek(film.n_frames - 1)
    last = np.asarray(film.convert("RGB"))
    assert film.n_frames > 20 and film.info["loop"] == 0 and (first != last).any()
    start = np.asarray(Image.fromarray(photo).resize((43, 32), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(first[::6, ::6].astype(int) - start).mean() < 12  # 256 colours


def test_mode_and_flip_are_those_of_eval(here, model):
    photo = noise(80, 30)
    Image.fromarray(photo).save(here.folder / "a.png")
    masks = []
    for mode, flip in (("whole", False), ("slide", False), ("slide", True)):
        options = ["--mode", mode, *["--flip"] * flip]
        assert here.segment("a.png", "-o", "m.png", "--force", *options).returncode == 0
        masks.append(np.asarray(Image.open(here.folder / "m.png")))
        assert np.array_equal(masks[-1], segment_photo(model, photo, 32, 1, mode, flip)[0])
    assert (masks[0] != masks[1]).any() and (masks[1] != masks[2]).any()


def test_a_backbone_without_classes_is_named(here, model):
    model.save(here.folder / "w.safetensors")
    Image.fromarray(noise(40, 30)).save(here.folder / "a.png")
    fails(here.segment("a.png", "-o", "m.png"), 5, "w.safetensors is a backbone", "--init w.safetensors")
    fails(flowseg("eval", "w.safetensors", cwd=here.folder), 5, "without classes")
    assert flowseg("info", "w.safetensors", cwd=here.folder).returncode == 0


def test_decoding_runs_beside_the_network_and_a_stop_begins_nothing_more(tmp_path):
    begun = []

    def work(photo, files):
        begun.append(photo)
        return {}

    names = [f"{k}.jpg" for k in range(200)]
    planned = [segment.Task(name, tmp_path / name, {"mask": tmp_path / name}, "") for name in names]
    records = segment.segment_all(planned, work)
    assert next(records)["photo"] == "0.jpg"
    assert [record["photo"] for record in records] == names[1:] and sorted(begun) == sorted(names)
