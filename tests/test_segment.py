"""`flowseg segment` before everything that people keep in folders, with weights that were never trained."""

import hashlib
import io
import json
import struct
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import picture
from model import FlowSeg, assign_photo, segment_photo
from network import Config
from tests.test_cli import fails, flowseg

NAMES = ["left", "right", "top"]
IDS = [7, 300, 12]  # raw values, one too large for 8 bits
CONFIG = Config(
    num_classes=3, dims=4, hidden=16, depth=1, heads=2, field_depth=1, field_width=8, conv_width=8
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = FlowSeg(CONFIG).eval()
    for value in model.parameters():  # zeros at the end of the network would give every photo the same mask
        torch.nn.init.normal_(value.data, std=0.2)
    return model


@pytest.fixture
def here(model, tmp_path):
    """A folder with weights and a function that runs `flowseg segment` there."""
    model.save(tmp_path / "w.safetensors", classes=NAMES, ids=IDS, size=32, dataset="mine")

    def segment(*arguments):
        return flowseg("segment", *arguments, "--steps", 1, "--checkpoint", "w.safetensors", cwd=tmp_path)

    return SimpleNamespace(folder=tmp_path, segment=segment)


def noise(width, height, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def digests(folder):
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def hostile(root):
    """Files that people have; returns the size of the upright photo of each good one, and the bad ones."""
    root.mkdir()
    photo = Image.fromarray(noise(40, 30))
    good = {f"mode-{mode}.png": (photo.convert(mode), {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")}
    good |= {
        f"tiff-{mode}.tif": (photo.convert(mode), {}) for mode in ("1", "L", "LAB", "YCbCr", "CMYK", "I", "F")
    }
    good |= {f"format.{end}": (photo, {}) for end in ("jpg", "jpeg", "webp", "bmp", "tif", "tiff", "gif")}
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        good[f"turned-{orientation}.jpg"] = photo, {"exif": exif}
    good |= {
        "cmyk.jpg": (photo.convert("CMYK"), {}),
        "grey.jpg": (photo.convert("L"), {}),
        "clear-index.png": (photo.quantize(8), {"transparency": 3}),
        "clear-table.png": (photo.quantize(8), {"transparency": bytes(range(8))}),
        "clear-colour.png": (photo, {"transparency": (1, 2, 3)}),
        "sixteen.png": (Image.fromarray(noise(40, 30, 1).astype(np.uint16) * 257), {}),
        "sixteen.tiff": (Image.fromarray(noise(40, 30, 1).astype(np.uint16) * 257), {}),
        "dot.png": (Image.new("RGB", (1, 1)), {}),
        "line.jpg": (Image.new("RGB", (1, 500)), {}),
        "long.png": (Image.new("RGB", (20000, 100)), {}),
        "film.gif": (
            photo,
            {
                "save_all": True,
                "append_images": [Image.new("RGB", (40, 30), name) for name in ("red", "blue")],
            },
        ),
        "pages.tif": (photo, {"save_all": True, "append_images": [Image.new("RGB", (9, 9))]}),
        "bad-exif.jpg": (photo, {"exif": b"Exif\0\0II*\0\xff\xff\xff\xff garbage"}),
        "a name [1] with #, ü and 'quotes'.jpg": (photo, {}),
        "folder.jpg/inside.png": (photo, {}),
        "deep/er/still.webp": (photo, {}),
    }
    for name, (image, options) in good.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(root / name, **options)
    photo.save(root / "renamed.jpg", "PNG")
    (root / "UPPER.JPG").write_bytes((root / "format.jpg").read_bytes())
    size = {name: image.size for name, (image, _) in good.items()} | {
        "renamed.jpg": (40, 30),
        "UPPER.JPG": (40, 30),
    }
    size |= {f"turned-{orientation}.jpg": (30, 40) for orientation in range(5, 9)}

    whole = (root / "mode-RGB.png").read_bytes()
    header = b"IHDR" + struct.pack(">IIBBBBB", 90000, 90000, 8, 2, 0, 0, 0)
    chunks = (header, b"IDAT" + zlib.compress(b"\0" * 99), b"IEND")
    bomb = b"".join(struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    bad = {
        "empty.jpg": (b"", "empty file"),
        "cut.png": (whole[:-900], "truncated"),
        "cut.jpg": ((root / "format.jpg").read_bytes()[:700], "truncated"),
        "head.gif": (b"GIF89a", "not a picture"),
        "letter.jpg": (b"Dear all,\n", "not a picture"),
        "page.png": (b"<html>404</html>", "not a picture"),
        "vector.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        "bomb.png": (b"\x89PNG\r\n\x1a\n" + bomb, "--max-pixels"),
    }
    icon = io.BytesIO()
    photo.save(icon, "ICO")
    bad["icon.bmp"] = icon.getvalue(), "not a picture"
    for name, (content, _) in bad.items():
        (root / name).write_bytes(content)
    for name in (".hidden.jpg", "notes.txt", "film.mp4", "Thumbs.db"):  # not asked for
        (root / name).write_bytes(whole)
    (root / "nowhere.jpg").symlink_to(root / "gone.jpg")
    return size, {name: words for name, (_, words) in bad.items()}


def test_a_hostile_folder(here):
    size, bad = hostile(here.folder / "in")
    assert len(size) + len(bad) > 50
    before = digests(here.folder)
    result = here.segment("in", "-o", "out")
    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    for name, words in bad.items():
        assert [words in line for line in errors if f"in/{name}" in line] == [True], (name, errors)
    assert len(errors) == len(bad)
    assert "film.gif: the first of 3 frames" in result.stderr
    assert "pages.tif: the first of 2 frames" in result.stderr
    assert f"{len(bad)} failed" in result.stderr and f"{len(size)} segmented" in result.stderr

    lines = dict(line.split(" -> ") for line in result.stdout.splitlines())
    assert {f"in/{name}" for name in size} == lines.keys()
    for name, expected in size.items():
        mask = Image.open(here.folder / lines[f"in/{name}"])
        assert (mask.mode, mask.size) == ("P", expected), name
        assert np.asarray(mask).max() < len(NAMES)
    after = digests(here.folder)
    assert {name: after[name] for name in before} == before
    assert {name for name in after if name not in before} == set(lines.values())

    again = here.segment("in", "-o", "out")
    assert f"{len(size)} skipped" in again.stderr and again.stdout == "" and again.returncode == 1
    assert digests(here.folder) == after


def test_the_same_bytes_alone_in_a_folder_in_any_order_and_with_more_threads(here):
    kinds = ["--overlay", "--confidence", "--entropy", "--side-by-side", "--trajectory"]
    names = [f"{k}.png" for k in range(3)]
    (here.folder / "in").mkdir()
    for k, name in enumerate(names):
        Image.fromarray(noise(41 + k, 50 - k, seed=k)).save(here.folder / "in" / name)
    here.segment("in", "-o", "folder", *kinds)
    expected = digests(here.folder / "folder")
    assert len(expected) == 3 * 7 and len(set(expected.values())) == 3 * 7

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
    assert digests(here.folder / "threads") == expected


def test_what_is_finished_is_kept_and_only_the_rest_is_made(here):
    Image.fromarray(noise(40, 30)).save(here.folder / "a.jpg")
    Image.fromarray(noise(30, 40)).save(here.folder / "b.jpg")
    here.segment("a.jpg", "-o", "out")
    (here.folder / "out" / "a.png").write_bytes(b"mine now")
    result = here.segment("a.jpg", "b.jpg", "-o", "out")
    assert (result.returncode, result.stdout) == (0, "b.jpg -> out/b.png\n")
    assert "a.jpg: skipped, out/a.png exists" in result.stderr and "1 skipped, 1 segmented" in result.stderr
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
    assert sorted(digests(here.folder / "in")) == ["a.png", "masks/a-overlay.png", "masks/a.png"]


def test_no_photo_and_no_other_output_is_written_over(here):
    for name in ("a.png", "b.png", "b-overlay.png"):
        Image.fromarray(noise(40, 30)).save(here.folder / name)
    before = digests(here.folder)
    fails(here.segment("a.png", "-o", ".", "--force"), 1, "a.png exists", "never for a photo")
    result = here.segment("b.png", "b-overlay.png", "-o", "out", "--overlay")
    fails(result, 1, "b-overlay.png: out/b-overlay.png is made of b.png")
    assert result.stdout == "b.png -> out/b.png\n"
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
    fails(
        here.segment("a.png", "-o", "m.png", "--max-pixels", 1000),
        1,
        "over 1,000 pixels: 40 x 30",
        "--max-pixels",
    )
    assert here.segment("a.png", "-o", "m.png", "--max-pixels", 1200).returncode == 0


def test_a_second_run_keeps_what_the_report_says_of_finished_photos(here):
    Image.fromarray(noise(40, 30)).save(here.folder / "a.png")
    call = ["-o", "out", "--json", "all.json"]
    assert here.segment("a.png", *call).returncode == 0
    before = json.loads((here.folder / "all.json").read_text())
    Image.fromarray(noise(20, 30)).save(here.folder / "b.png")
    assert here.segment("a.png", "b.png", *call).returncode == 0
    after = json.loads((here.folder / "all.json").read_text())
    assert after[:1] == before and after[1]["photo"] == "b.png" and after[1]["classes"]


def test_a_report_is_never_written_over_a_photo(here):
    Image.fromarray(noise(40, 30)).save(here.folder / "a.png")
    before = (here.folder / "a.png").read_bytes()
    result = here.segment("a.png", "--json", "a.png", "-o", "out")
    assert result.returncode == 2 and "expected NAME.json" in result.stderr
    assert (here.folder / "a.png").read_bytes() == before


def test_the_json_says_what_each_mask_holds(here, model):
    photo = noise(40, 30)
    Image.fromarray(photo).save(here.folder / "a.png")
    (here.folder / "b.png").write_bytes(b"")
    assert here.segment("a.png", "b.png", "-o", "out", "--json", "all.json").returncode == 1
    good, bad = json.loads((here.folder / "all.json").read_text())
    assert (good["photo"], good["mask"], good["state"]) == ("a.png", "out/a.png", "segmented")
    assert bad["state"] == "failed" and "empty file" in bad["note"]
    labels, confidence = segment_photo(model, photo, 32, 1)
    assert np.array_equal(labels, np.asarray(Image.open(here.folder / "out" / "a.png")))
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
    model.save(here.folder / "w.safetensors", classes=NAMES, ids=[7, 30, 12], size=32)
    here.segment("a.png", "-o", "raw.png", "--ids", "raw", "--force")
    raw = Image.open(here.folder / "raw.png")
    assert raw.mode == "P" and np.array_equal(np.asarray(raw), np.array([7, 30, 12])[np.asarray(train)])
    assert np.array_equal(raw.convert("RGB"), train.convert("RGB"))


def test_the_other_pictures(here, model):
    photo = noise(40, 30)
    Image.fromarray(photo).save(here.folder / "a.png")
    here.segment("a.png", "-o", "m.png", "--entropy", "--side-by-side", "--trajectory")
    p = assign_photo(model, Image.fromarray(photo), 32, 1, False, "whole")
    p = torch.nn.functional.interpolate(  # of the entropies: the largest is ln 3
        torch.special.entr(p).sum(1, True) / np.log(3), (30, 40), mode="bilinear"
    )  # fmt: skip
    entropy = Image.open(here.folder / "m-entropy.png")
    assert entropy.mode == "L" and np.abs(np.asarray(entropy) - 255 * p[0, 0].numpy()).max() <= 0.51
    both = np.asarray(Image.open(here.folder / "m-side-by-side.png"))
    assert both.shape[1] > 80 and both.shape[0] > 30

    film = Image.open(here.folder / "m-trajectory.gif")
    first = np.asarray(film.convert("RGB"))
    film.seek(film.n_frames - 1)
    last = np.asarray(film.convert("RGB"))
    assert film.n_frames > 20 and film.info["loop"] == 0 and (first != last).any()
    start = np.asarray(Image.fromarray(photo).resize((43, 32), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(first[::6, ::6].astype(int) - start).mean() < 12  # 256 colours


def test_an_array_is_a_photo_and_other_modes_are_named(model):
    photo = noise(40, 30)
    expected = segment_photo(model, Image.fromarray(photo), 32, 1)
    assert all(
        np.array_equal(a, b) for a, b in zip(segment_photo(model, photo, 32, 1), expected, strict=True)
    )
    assert expected[0].shape == (30, 40) and expected[0].dtype == np.uint8
    with pytest.raises(AssertionError, match="mode L; expected RGB"):
        segment_photo(model, Image.new("L", (9, 9)), 32, 1)


def test_a_backbone_without_classes_is_named(here, model):
    model.save(here.folder / "w.safetensors", source="public.ckpt")
    Image.fromarray(noise(40, 30)).save(here.folder / "a.png")
    fails(here.segment("a.png", "-o", "m.png"), 5, "w.safetensors is a backbone", "--init w.safetensors")
    fails(flowseg("eval", "w.safetensors", cwd=here.folder), 5, "without classes")
    assert flowseg("info", "w.safetensors", cwd=here.folder).returncode == 0


# Tiles


def test_tiles_are_windows_of_the_training_size_and_one_of_them_is_the_whole(model):
    model.metadata = {"size": 32}
    fits, large = noise(32, 32), noise(80, 64)
    same = [segment_photo(model, fits, 32, 1, mode=mode) for mode in ("whole", "tiles")]
    assert np.array_equal(same[0][0], same[1][0]) and np.abs(same[0][1] - same[1][1]).max() < 1e-5
    other = [segment_photo(model, large, 64, 1, mode=mode) for mode in ("whole", "tiles")]
    assert (other[0][0] != other[1][0]).any()


def test_tiles_blend_without_a_seam(model, monkeypatch):
    """Where one window is sure of class 0 and the next of class 1, the probability goes over gradually."""
    model.metadata, calls = {"size": 32}, []

    def certain(x, total=None):
        calls.append(x.shape)
        return torch.eye(3)[len(calls) % 2][None, :, None, None].expand(1, 3, *x.shape[2:])

    monkeypatch.setattr(model, "soft_assignment", certain)
    p = assign_photo(model, Image.new("RGB", (48, 32)), 32, 1, False, "tiles")
    assert [shape[2:] for shape in calls] == [(32, 32)] * 2
    assert torch.allclose(p.sum(1), torch.ones(1, 32, 48)) and (p[0, 1, :, :16] == 1).all()
    assert p[0, 1].diff(dim=1).abs().max() < 0.12, "a jump of 1 is a seam, one of 0.5 an average of two"


def test_decoding_runs_beside_the_network_and_a_stop_begins_nothing_more(tmp_path):
    import segment

    begun = []

    def work(photo, files):
        begun.append(photo)
        return {}

    names = [f"{k}.jpg" for k in range(200)]
    planned = [(name, tmp_path / name, {"mask": tmp_path / name}, "") for name in names]
    records = segment.segment_all(planned, work)
    assert next(records)["photo"] == "0.jpg"
    assert [record["photo"] for record in records] == names[1:] and sorted(begun) == sorted(names)


def test_read_photo_counts_frames_and_takes_bytes():
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(
        buffer, "GIF", save_all=True, append_images=[Image.new("RGB", (4, 4), "red")]
    )
    assert picture.read_photo(buffer.getvalue()).info["frames"] == 2
    with pytest.raises(picture.PictureError, match="standard input: cannot be read"):
        picture.read_photo(b"no")
