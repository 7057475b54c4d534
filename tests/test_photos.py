"""data.read_photo: photos come in upright as RGB, and what is no photo gets one line."""

import io
import os
import struct
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageFile

from data import FORMATS, DataError, PictureError, read_mask, read_photo
from tests.conftest import BLUE, GREEN, RED, WHITE, corners, pixels


def write(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, **options)
    return path


def png(path: Path, size: tuple[int, int], bits: int, rows: bytes) -> Path:
    """An RGB PNG by hand, for what Pillow does not write."""
    header = struct.pack(">IIBBBBB", *size, bits, 2, 0, 0, 0)
    chunks = (b"IHDR" + header, b"IDAT" + zlib.compress(rows), b"IEND")
    body = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(body))
    return path


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_comes_in_upright(tmp_path, orientation, suffix):
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # as the camera turned it
    stored = corners() if undo is None else corners().transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"jpg": {"quality": 95, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    photo = read_photo(write(tmp_path / f"a.{suffix}", stored, exif=exif, **options))
    assert photo.mode == "RGB" and photo.size == (48, 32)
    assert np.abs(pixels(photo) - pixels(corners())).max() <= 4
    assert photo.getexif().get(0x0112, 1) == 1, "a second reader would turn it again"


def test_damaged_exif_does_not_cost_the_photo(tmp_path):
    path = write(tmp_path / "a.jpg", corners(), exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert read_photo(path).size == (48, 32)


def test_transparency_is_composited_on_white(tmp_path):
    rgba = Image.new("RGBA", (3, 1))
    rgba.putdata([(255, 0, 0, 255), (0, 0, 0, 0), (0, 0, 0, 128)])
    expected = [[255, 0, 0], [255, 255, 255], [127, 127, 127]]
    assert np.abs(pixels(read_photo(write(tmp_path / "a.png", rgba)))[0] - expected).max() <= 1

    grey = Image.new("LA", (2, 1))
    grey.putdata([(40, 255), (40, 0)])
    assert pixels(read_photo(write(tmp_path / "la.png", grey)))[0].tolist() == [[40] * 3, [255] * 3]

    indexed = Image.new("P", (3, 1))
    indexed.putpalette([*RED, *GREEN, *BLUE])
    indexed.putdata([0, 1, 2])
    for options in ({"transparency": 1}, {"transparency": bytes([255, 0, 255])}):
        photo = read_photo(write(tmp_path / "p.png", indexed, **options))
        assert pixels(photo)[0].tolist() == [list(RED), list(WHITE), list(BLUE)]
    photo = read_photo(write(tmp_path / "p.gif", indexed, transparency=1))
    assert pixels(photo)[0].tolist() == [list(RED), list(WHITE), list(BLUE)]

    keyed = write(tmp_path / "rgb.png", corners(), transparency=RED)
    assert pixels(read_photo(keyed))[0, 0].tolist() == [255] * 3


def test_grey_one_bit_and_cmyk(tmp_path):
    grey = read_photo(write(tmp_path / "l.png", Image.new("L", (2, 2), 77)))
    assert grey.mode == "RGB" and grey.getpixel((0, 0)) == (77, 77, 77)
    assert read_photo(write(tmp_path / "1.png", Image.new("1", (2, 2), 1))).getpixel((1, 1)) == WHITE
    for name in ("cmyk.jpg", "cmyk.tif"):
        photo = read_photo(write(tmp_path / name, Image.new("CMYK", (8, 8), (0, 255, 255, 0))))
        assert np.abs(pixels(photo)[4, 4] - RED).max() <= 3


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bit_grey_keeps_its_gradient(tmp_path, name):
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    photo = read_photo(write(tmp_path / name, Image.fromarray(values)))
    assert pixels(photo)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_a_dark_sixteen_bit_photo_stays_dark(tmp_path):
    values = np.array([[0, 200]], dtype=np.uint16)
    assert pixels(read_photo(write(tmp_path / "a.png", Image.fromarray(values)))).max() == 1


def test_sixteen_bit_colour_keeps_its_gradient(tmp_path):
    photo = read_photo(
        png(tmp_path / "a.png", (2, 1), 16, b"\0" + struct.pack(">6H", 65535, 32768, 0, 257, 514, 771))
    )
    assert pixels(photo)[0].tolist() == [[255, 128, 0], [1, 2, 3]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 32768, 65535]], dtype=np.int32), [0, 128, 255]),
        (np.array([[0, 100, 200]], dtype=np.int32), [0, 100, 200]),
        (np.array([[-5, 100, 200]], dtype=np.int32), [0, 131, 255]),
        (np.array([[0.0, 0.5, 1.0]], dtype=np.float32), [0, 128, 255]),
        (np.array([[np.nan, 20.0, 255.0]], dtype=np.float32), [0, 20, 255]),
    ],
)
def test_integer_and_float_tiff_are_scaled_by_their_range(tmp_path, values, expected):
    photo = read_photo(write(tmp_path / "a.tif", Image.fromarray(values)))
    assert pixels(photo)[0, :, 0].tolist() == expected


def test_first_frame_of_a_gif(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in (RED, BLUE)]
    path = write(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    assert read_photo(path).getpixel((0, 0)) == RED


@pytest.mark.parametrize("kind", ["TIFF", "GIF"])
def test_frames_are_looked_for_but_not_all_looked_at(monkeypatch, kind):
    """To count them takes seconds for each photo that has thousands."""
    buffer = io.BytesIO()
    frames = [Image.new("L", (4, 4), value) for value in range(50)]
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    plugin = Image.OPEN[kind][0]
    real = plugin._seek
    sought = []

    def seek(self, frame, *more):
        sought.append(frame)
        return real(self, frame, *more)

    monkeypatch.setattr(plugin, "_seek", seek)
    photo = read_photo(buffer.getvalue())
    assert photo.info["several"] and pixels(photo).max() == 0 and max(sought) <= 1


def test_content_decides_not_the_suffix(tmp_path):
    path = tmp_path / "really-a-png.jpg"
    corners().save(path, "PNG")
    assert pixels(read_photo(path)).tolist() == pixels(corners()).tolist()


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
        read_photo(path)
    message = str(caught.value)
    assert str(path) in message and reason.lower() in message.lower() and "\n" not in message
    assert ", ".join(FORMATS) in message


def test_every_cut_of_a_file_is_a_picture_error_or_a_photo(tmp_path):
    for kind in FORMATS:
        buffer = io.BytesIO()
        corners().save(buffer, kind)
        whole = buffer.getvalue()
        for end in range(1, len(whole), max(1, len(whole) // 40)):
            try:
                (tmp_path / "cut").write_bytes(whole[:end])
                assert read_photo(tmp_path / "cut").size == (48, 32)
            except PictureError as error:
                assert "\n" not in str(error)


def test_decompression_bombs_are_refused_and_the_limit_can_be_lifted(tmp_path, monkeypatch):
    path = write(tmp_path / "a.png", corners())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # as if the photo were above Pillow's own limit
    with pytest.raises(PictureError, match=r"a\.png") as caught:
        read_photo(path, max_pixels=1000)
    assert all(word in str(caught.value) for word in ("48 x 32", "1,000 pixels", "--max-pixels"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert read_photo(path, max_pixels=48 * 32).size == (48, 32)

    with pytest.raises(PictureError, match=r"b\.png.* 250,000,000 pixels"):
        read_photo(png(tmp_path / "b.png", (40000, 40000), 8, b"\0" * 1000))


def test_read_photo_sees_more_frames_and_takes_bytes():
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(
        buffer, "GIF", save_all=True, append_images=[Image.new("RGB", (4, 4), "red")]
    )
    assert read_photo(buffer.getvalue()).info["several"]
    with pytest.raises(PictureError, match="standard input: cannot be read"):
        read_photo(b"no")


class StandIn(ImageFile.ImageFile):
    """What pillow-heif registers: an opener for another format. This one takes raw RGB behind the header."""

    format = "HEIF"

    def _open(self):
        self.fp.seek(24)
        self._mode = "RGB"
        self._size = (4, 3)
        self.tile = [("raw", (0, 0, 4, 3), 24, "RGB")]


def test_heic_is_read_if_its_decoder_is_installed_and_never_as_a_mask(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 3), np.uint8)
    path = tmp_path / "a.heic"
    path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(12) + pixels.tobytes())
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # not installed
    with pytest.raises(PictureError, match=r"a\.heic: .*HEIC.*JPEG"):
        read_photo(path)

    def register():
        Image.register_open("HEIF", StandIn, lambda begin: begin[8:12] == b"heic")

    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register))
    assert np.array_equal(read_photo(path), pixels)
    with pytest.raises(DataError, match=r"a\.heic: .*HEIF with loss"):
        read_mask(path)


def test_of_a_file_of_many_bytes_only_the_beginning_is_read_if_it_is_no_picture(tmp_path):
    """The files are sparse: they say that they hold a terabyte, and take no room."""
    Image.new("RGB", (4, 3)).save(tmp_path / "small.png")
    (tmp_path / "nothing.jpg").touch()
    for name in ("small.png", "nothing.jpg"):
        os.truncate(tmp_path / name, 10**12)
        with pytest.raises(PictureError, match=f"{name}: .*(not a picture|1,000,000,000,000 bytes)"):
            read_photo(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with a name")
def test_what_is_no_regular_file_is_never_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", Path("/dev/zero")):
        for read in (read_photo, read_mask):
            with pytest.raises(PictureError, match=f"{path}: .*no regular file"):
                read(path)
