"""picture.py: photos come in upright as RGB, pictures go out whole or not at all, drawings fit any size."""

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import picture
from picture import PictureError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
COLORS = np.array([[250, 10, 20], [30, 240, 50], [60, 70, 230]], dtype=np.uint8)
NAMES = ["sky", "road", "tree"]


def corners(size: tuple[int, int] = (48, 32)) -> Image.Image:
    """Four flat quarters, all different, so that each of the eight orientations looks different."""
    image = Image.new("RGB", size, WHITE)
    width, height = size[0] // 2, size[1] // 2
    for color, place in ((RED, (0, 0)), (GREEN, (width, 0)), (BLUE, (0, height))):
        image.paste(color, (*place, place[0] + width, place[1] + height))
    return image


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def write(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, **options)
    return path


def scene(width: int, height: int) -> tuple[Image.Image, np.ndarray]:
    """A grey photo and its labels: three vertical bands, and one ignored pixel."""
    labels = np.repeat((np.arange(width) * 3 // width)[None].astype(np.uint8), height, axis=0)
    labels[-1, -1] = 255
    return Image.new("RGB", (width, height), (90, 90, 90)), labels


def png(path: Path, size: tuple[int, int], bits: int, rows: bytes) -> Path:
    """An RGB PNG by hand, for what Pillow does not write."""
    header = struct.pack(">IIBBBBB", *size, bits, 2, 0, 0, 0)
    chunks = (b"IHDR" + header, b"IDAT" + zlib.compress(rows), b"IEND")
    body = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(body))
    return path


def colors_in(image: Image.Image) -> set[tuple[int, ...]]:
    return {color for _, color in image.getcolors(maxcolors=image.width * image.height)}


# Reading


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_comes_in_upright(tmp_path, orientation, suffix):
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # as the camera turned it
    stored = corners() if undo is None else corners().transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"jpg": {"quality": 95, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    photo = picture.read_photo(write(tmp_path / f"a.{suffix}", stored, exif=exif, **options))
    assert photo.mode == "RGB" and photo.size == (48, 32)
    assert np.abs(pixels(photo) - pixels(corners())).max() <= 4
    assert photo.getexif().get(0x0112, 1) == 1, "a second reader would turn it again"


def test_damaged_exif_does_not_cost_the_photo(tmp_path):
    path = write(tmp_path / "a.jpg", corners(), exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert picture.read_photo(path).size == (48, 32)


def test_transparency_is_composited_on_white(tmp_path):
    rgba = Image.new("RGBA", (3, 1))
    rgba.putdata([(255, 0, 0, 255), (0, 0, 0, 0), (0, 0, 0, 128)])
    expected = [[255, 0, 0], [255, 255, 255], [127, 127, 127]]
    assert np.abs(pixels(picture.read_photo(write(tmp_path / "a.png", rgba)))[0] - expected).max() <= 1

    grey = Image.new("LA", (2, 1))
    grey.putdata([(40, 255), (40, 0)])
    assert pixels(picture.read_photo(write(tmp_path / "la.png", grey)))[0].tolist() == [[40] * 3, [255] * 3]

    indexed = Image.new("P", (3, 1))
    indexed.putpalette([*RED, *GREEN, *BLUE])
    indexed.putdata([0, 1, 2])
    for options in ({"transparency": 1}, {"transparency": bytes([255, 0, 255])}):
        photo = picture.read_photo(write(tmp_path / "p.png", indexed, **options))
        assert pixels(photo)[0].tolist() == [list(RED), list(WHITE), list(BLUE)]
    photo = picture.read_photo(write(tmp_path / "p.gif", indexed, transparency=1))
    assert pixels(photo)[0].tolist() == [list(RED), list(WHITE), list(BLUE)]

    keyed = write(tmp_path / "rgb.png", corners(), transparency=RED)
    assert pixels(picture.read_photo(keyed))[0, 0].tolist() == [255] * 3


def test_grey_one_bit_and_cmyk(tmp_path):
    grey = picture.read_photo(write(tmp_path / "l.png", Image.new("L", (2, 2), 77)))
    assert grey.mode == "RGB" and grey.getpixel((0, 0)) == (77, 77, 77)
    assert picture.read_photo(write(tmp_path / "1.png", Image.new("1", (2, 2), 1))).getpixel((1, 1)) == WHITE
    for name in ("cmyk.jpg", "cmyk.tif"):
        photo = picture.read_photo(write(tmp_path / name, Image.new("CMYK", (8, 8), (0, 255, 255, 0))))
        assert np.abs(pixels(photo)[4, 4] - RED).max() <= 3


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bit_grey_keeps_its_gradient(tmp_path, name):
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    photo = picture.read_photo(write(tmp_path / name, Image.fromarray(values)))
    assert pixels(photo)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_a_dark_sixteen_bit_photo_stays_dark(tmp_path):
    values = np.array([[0, 200]], dtype=np.uint16)
    assert pixels(picture.read_photo(write(tmp_path / "a.png", Image.fromarray(values)))).max() == 1


def test_sixteen_bit_colour_keeps_its_gradient(tmp_path):
    photo = picture.read_photo(
        png(tmp_path / "a.png", (2, 1), 16, b"\0" + struct.pack(">6H", 65535, 32768, 0, 257, 514, 771))
    )
    assert pixels(photo)[0].tolist() == [[255, 128, 0], [1, 2, 3]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 32768, 65535]], dtype=np.int32), [0, 128, 255]),
        (np.array([[-5, 100, 200]], dtype=np.int32), [0, 100, 200]),
        (np.array([[0.0, 0.5, 1.0]], dtype=np.float32), [0, 128, 255]),
        (np.array([[np.nan, 20.0, 255.0]], dtype=np.float32), [0, 20, 255]),
    ],
)
def test_integer_and_float_tiff_are_scaled_by_their_range(tmp_path, values, expected):
    photo = picture.read_photo(write(tmp_path / "a.tif", Image.fromarray(values)))
    assert pixels(photo)[0, :, 0].tolist() == expected


def test_first_frame_of_a_gif(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in (RED, BLUE)]
    path = write(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    assert picture.read_photo(path).getpixel((0, 0)) == RED


def test_content_decides_not_the_suffix(tmp_path):
    path = tmp_path / "really-a-png.jpg"
    corners().save(path, "PNG")
    assert pixels(picture.read_photo(path)).tolist() == pixels(corners()).tolist()


def bad_files(folder: Path) -> dict[str, Path]:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    names = ("empty.jpg", "text.jpg", "folder.jpg", "cut.jpg", "cut.png", "icon.png", "missing.jpg")
    files = {name: folder / name for name in names}
    files["empty.jpg"].write_bytes(b"")
    files["text.jpg"].write_text("not a picture")
    files["folder.jpg"].mkdir()
    for name, kind in (("cut.jpg", "JPEG"), ("cut.png", "PNG")):
        noise.save(files[name], kind)
        files[name].write_bytes(files[name].read_bytes()[:-2000])
    noise.save(files["icon.png"], "ICO")  # a picture, but not on the allow-list
    return files


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("empty.jpg", "empty file"),
        ("text.jpg", "not a picture"),
        ("folder.jpg", "Is a directory"),
        ("cut.jpg", "truncated"),
        ("cut.png", "truncated"),
        ("icon.png", "not a picture"),
        ("missing.jpg", "No such file"),
    ],
)
def test_bad_files_get_one_line_that_names_them(tmp_path, name, reason):
    path = bad_files(tmp_path)[name]
    with pytest.raises(PictureError) as caught:
        picture.read_photo(path)
    message = str(caught.value)
    assert str(path) in message and reason.lower() in message.lower() and "\n" not in message
    assert "give a whole JPEG" in message


def test_every_cut_of_a_file_is_a_picture_error_or_a_photo(tmp_path):
    for kind in picture.FORMATS:
        buffer = io.BytesIO()
        corners().save(buffer, kind)
        whole = buffer.getvalue()
        for end in range(1, len(whole), max(1, len(whole) // 40)):
            try:
                (tmp_path / "cut").write_bytes(whole[:end])
                assert picture.read_photo(tmp_path / "cut").size == (48, 32)
            except PictureError as error:
                assert "\n" not in str(error)


def test_decompression_bombs_are_refused_and_the_limit_can_be_lifted(tmp_path, monkeypatch):
    path = write(tmp_path / "a.png", corners())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # as if the photo were above Pillow's own limit
    with pytest.raises(PictureError, match=r"a\.png has over 1,000 pixels: 48 x 32; .* raise --max-pixels"):
        picture.read_photo(path, max_pixels=1000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert picture.read_photo(path, max_pixels=48 * 32).size == (48, 32)

    with pytest.raises(PictureError, match=r"b\.png has over 250,000,000 pixels"):
        picture.read_photo(png(tmp_path / "b.png", (40000, 40000), 8, b"\0" * 1000))


# Finding


@pytest.fixture
def album(tmp_path) -> Path:
    names = ("b.jpg", "a.PNG", "sub/c.d.webp", "sub/deep/e.tiff", ".hidden.jpg", ".cache/f.jpg", "notes.txt")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.jpg").mkdir()
    return tmp_path


def found(*paths: str | Path) -> dict[str, str]:
    return {photo.name: stem.as_posix() for photo, stem in picture.find_photos(paths)}


def test_folders_are_searched_in_order_and_stems_keep_sub_folders(album):
    assert list(found(album).items()) == [
        ("a.PNG", "a"),
        ("b.jpg", "b"),
        ("c.d.webp", "sub/c.d"),
        ("e.tiff", "sub/deep/e"),
    ]


def test_globs_keep_the_folders_below_their_fixed_part(album):
    assert found(f"{album}/*.jpg") == {"b.jpg": "b"}
    assert found(f"{album}/**/*.[tw]*") == {"c.d.webp": "sub/c.d", "e.tiff": "sub/deep/e"}


def test_a_named_file_is_taken_whatever_its_suffix_and_only_once(album):
    (album / "odd[1].jpg").touch()
    assert found(album / "notes.txt", album / ".hidden.jpg") == {
        "notes.txt": "notes",
        ".hidden.jpg": ".hidden",
    }
    assert found(album / "odd[1].jpg") == {"odd[1].jpg": "odd[1]"}
    assert len(picture.find_photos([album, album / "b.jpg", album])) == 5


def test_no_two_photos_share_an_output(album):
    for name in ("b.png", "sub/b.jpg"):
        (album / name).touch()
    stems = [stem for _, stem in picture.find_photos([album, album / "sub" / "b.jpg"])]
    assert len(set(stems)) == len(stems) == 6 and Path("b_png") in stems


@pytest.mark.parametrize("name", ["missing.jpg", "folder.jpg", "*.bmp", "no/such/folder"])
def test_nothing_found_names_what_was_given(album, name):
    with pytest.raises(PictureError, match="no photo at") as caught:
        picture.find_photos([album / name])
    assert str(album / name) in str(caught.value) and ".jpg" in str(caught.value)


# Writing


def test_palette_is_the_state_as_colour():
    mu = np.array([[-1, 0, 1, 9], [0.5, -0.5, -1, 9]])
    assert picture.palette(mu).tolist() == [[0, 128, 255], [191, 64, 0]]
    assert picture.palette(mu).dtype == np.uint8
    x = np.array([[[-3, 3, np.nan], [-1, 1, 0]]])
    assert pixels(picture.state_image(x)).tolist() == [[[0, 255, 128], [0, 255, 128]]]


def test_mask_round_trip(tmp_path):
    labels = np.array([[0, 1, 2], [2, 255, 0]], dtype=np.uint8)
    picture.write_mask(tmp_path / "m.png", labels, COLORS)
    mask = Image.open(tmp_path / "m.png")
    assert mask.mode == "P" and np.array_equal(mask, labels)
    assert mask.getpalette()[:9] == COLORS.ravel().tolist()
    assert np.array_equal(mask.convert("RGB"), picture.colorize(labels, COLORS))
    assert mask.convert("RGB").getpixel((1, 1)) == (0, 0, 0)


def test_more_than_255_classes_become_sixteen_bit_grey(tmp_path):
    labels = np.array([[0, 999]], dtype=np.uint16)
    picture.write_mask(tmp_path / "m.png", labels, np.zeros((1000, 3), dtype=np.uint8))
    mask = Image.open(tmp_path / "m.png")
    assert mask.mode == "I;16" and np.array_equal(mask, labels)


def test_a_mask_is_only_written_where_values_survive(tmp_path):
    with pytest.raises(PictureError, match=r"m\.jpg: expected \.png, got '\.jpg'"):
        picture.write_mask(tmp_path / "m.jpg", np.zeros((2, 2), np.uint8), COLORS)
    with pytest.raises(AssertionError, match="int64"):
        picture.write_mask(tmp_path / "m.png", np.zeros((2, 2), np.int64), COLORS)


@pytest.mark.parametrize("suffix", sorted(picture.SUFFIXES))
def test_save_by_suffix(tmp_path, suffix):
    picture.save(tmp_path / f"a{suffix.upper()}", corners())
    with Image.open(tmp_path / f"a{suffix.upper()}") as image:
        assert image.format == picture.SUFFIXES[suffix] and image.size == (48, 32)
    assert [path.name for path in tmp_path.iterdir()] == [f"a{suffix.upper()}"]


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def fail_halfway(self, file, *args, **options):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(PictureError, match=r"a\.png: No space left"):
        patch.setattr(Image.Image, "save", fail_halfway)
        picture.save(path, corners())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        picture.save(path, corners())
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_unwritable_places_and_unknown_suffixes(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dir.png").mkdir()
    for place in ("no/such/a.png", "file/a.png", "dir.png"):
        with pytest.raises(PictureError, match="choose a folder that can be written"):
            picture.save(tmp_path / place, corners())
    with pytest.raises(PictureError, match=r"try \.jpg"):
        picture.save(tmp_path / "a.jgp", corners())
    with pytest.raises(PictureError, match="cannot write"):
        picture.save(tmp_path / "none", corners())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dir.png", "file"]


# Drawing


def test_overlay_mixes_classes_leaves_ignored_pixels_and_marks_borders():
    photo, labels = scene(30, 20)
    drawn = picture.overlay(photo, labels, COLORS, alpha=0.5)
    assert drawn.size == photo.size and drawn.mode == "RGB"
    assert np.abs(pixels(drawn)[5, 3] - (COLORS[0].astype(int) + 90) / 2).max() <= 1
    assert drawn.getpixel((29, 19)) == (90, 90, 90)
    assert (pixels(drawn)[5, 9] > pixels(drawn)[5, 3]).all(), "no contour between the first two bands"
    assert photo.getpixel((3, 5)) == (90, 90, 90), "the photo itself was painted"
    with pytest.raises(AssertionError, match="photo"):
        picture.overlay(photo, labels.T, COLORS)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (100, 75), (4000, 300)])
def test_legend_shows_every_colour_and_the_whole_image(size):
    image = Image.new("RGB", size, (1, 2, 3))
    sheet = picture.with_legend(image, list(zip(NAMES, COLORS, (5.0, 80.0, 15.0), strict=True)))
    assert {tuple(map(int, color)) for color in COLORS} <= colors_in(sheet)
    assert (pixels(sheet) == (1, 2, 3)).all(-1).sum() == image.width * image.height
    assert (pixels(sheet)[0] == picture.PAPER).all() and (pixels(sheet)[:, -1] == picture.PAPER).all()


def test_legend_sorts_by_percent_and_grows_with_the_image():
    def swatch(width: int, percents: tuple) -> list[np.ndarray]:
        image = Image.new("RGB", (width, width // 2))
        drawn = pixels(picture.with_legend(image, list(zip(NAMES, COLORS, percents, strict=True))))
        return [np.argwhere((drawn == color).all(-1)) for color in COLORS]

    first, second, third = (points[0].tolist() for points in swatch(60, (5.0, 80.0, 15.0)))
    assert second < third < first  # one column: row order is the order
    first, second, third = (points[0].tolist() for points in swatch(60, (None, None, None)))
    assert first < second < third
    assert len(swatch(4000, (None,) * 3)[0]) > 9 * len(swatch(100, (None,) * 3)[0])


def test_legend_of_many_long_names_wraps_into_columns():
    entries = [(f"class {k} with a name\nthat never seems to end", (k, 255 - k, 7), None) for k in range(171)]
    sheet = picture.with_legend(Image.new("RGB", (100, 100)), entries)
    assert {color for _, color, _ in entries} <= colors_in(sheet)
    assert sheet.height < 1000 and sheet.width < 3000
    large = picture.with_legend(Image.new("RGB", (4000, 3000)), entries)
    assert large.width < 4200 and large.height < 4500, "the legend outgrows the picture"
    assert picture.with_legend(Image.new("RGB", (9, 9)), []).width > 9


@pytest.mark.parametrize("size", [(1, 1), (64, 64), (240, 180), (2000, 1500), (20000, 100), (3, 5000)])
def test_preview_and_strip_at_any_size(size):
    photo, labels = scene(*size)
    sheet = picture.preview([(photo, labels, np.zeros_like(labels))] * 2, NAMES, COLORS)
    assert 250 < sheet.width < 2200 if size[0] > 9 else sheet.width > 9
    assert sheet.height < 1600
    assert colors_in(picture.colorize(np.unique(labels)[None], COLORS)) <= colors_in(sheet)
    states = picture.strip([photo] * 11, [f"t = {k / 10}" for k in range(11)])
    assert states.width < 3000 and states.height < 1600
    with pytest.raises(AssertionError, match="2 frames, 1 captions"):
        picture.strip([photo] * 2, ["t = 0"])


def test_preview_legend_names_only_classes_that_occur():
    photo, labels = scene(64, 64)
    one = np.zeros_like(labels)
    drawn = colors_in(picture.preview([(photo, one, one)], NAMES, COLORS))
    assert tuple(COLORS[0].tolist()) in drawn
    assert not {tuple(COLORS[1].tolist()), (0, 0, 0)} & drawn


def test_small_masks_are_enlarged_without_new_colours():
    _, labels = scene(8, 8)
    enlarged = picture._fit(picture.colorize(labels, COLORS), 400)
    assert enlarged.size == (400, 400)
    assert colors_in(enlarged) == colors_in(picture.colorize(labels, COLORS))


def test_a_long_photo_needs_little_memory():
    program = """if True:
        import resource, numpy, picture
        from PIL import Image
        photo, labels = Image.new("RGB", (20000, 100)), numpy.eye(100, 20000, dtype="uint8")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        drawn = picture.overlay(photo, labels, numpy.eye(3, dtype="uint8"))
        picture.with_legend(drawn, [("sky", (1, 2, 3), 9.0)])
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"""
    where = {**os.environ, "PYTHONPATH": str(Path(picture.__file__).parent)}
    grown = subprocess.run([sys.executable, "-c", program], env=where, capture_output=True, check=True).stdout
    assert int(grown) < 120 * 1024  # KiB; one RGB copy is 6 MB
