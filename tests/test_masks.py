"""Masks are read by the values that they store, whatever their layout, or refused by name; so are colours."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import IGNORE, DataError, FolderDataset, LabelTable, PictureError, Stream, read_mask
from tests.test_data import problems

# 8 x 5 pixels, so that rows of few bits need padding in most formats.
TWO = np.arange(40).reshape(5, 8) % 2
FOUR = np.arange(40).reshape(5, 8) % 4
SIXTEEN = np.arange(40).reshape(5, 8) * 7 % 16
MANY = np.arange(40).reshape(5, 8) * 6 % 256


def packed(values: np.ndarray, bits: int, align: int = 1) -> list[bytes]:
    """Rows of integers of `bits` bits, the first pixel in the highest ones; a row fills `align` bytes."""
    rows = []
    for row in values.tolist():
        if bits <= 8:
            text = "".join(f"{value:0{bits}b}" for value in row)
            text = text.ljust(-(-len(text) // 8) * 8, "0")
            data = bytes(int(text[k : k + 8], 2) for k in range(0, len(text), 8))
        else:
            data = b"".join(value.to_bytes(bits // 8, "big") for value in row)
        rows.append(data.ljust(-(-len(data) // align) * align, b"\0"))
    return rows


def png(path: Path, values: np.ndarray, bits: int, palette: list[tuple] | None = None) -> Path:
    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    height, width = values.shape
    header = struct.pack(">IIBBBBB", width, height, bits, 3 if palette else 0, 0, 0, 0)
    rows = b"".join(b"\0" + row for row in packed(values, bits))
    colours = chunk(b"PLTE", bytes(c for entry in palette for c in entry)) if palette else b""
    body = chunk(b"IHDR", header) + colours + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def tiff(
    path: Path, values: np.ndarray, bits: int, photometric: int = 1, order: str = "<", sample: int = 1,
    palette: list[tuple] | None = None, bands: int = 1, extra: tuple = (),
) -> Path:  # fmt: skip
    height, width = values.shape[:2]
    kind = {(1, 8): "u1", (2, 8): "i1", (1, 16): "u2", (2, 16): "i2", (1, 32): "u4", (2, 32): "i4",
            (3, 32): "f4", (3, 64): "f8"}  # fmt: skip
    if bits < 8:
        strip = b"".join(packed(values, bits))
    else:
        strip = values.astype(order + kind[sample, bits]).tobytes()
    entries = [(256, 4, [width]), (257, 4, [height]), (258, 3, [bits] * bands), (259, 3, [1]),
               (262, 3, [photometric]), (277, 3, [bands]), (278, 4, [height]), (279, 4, [len(strip)]),
               (339, 3, [sample] * bands)]  # fmt: skip
    if palette:
        full = palette + [(0, 0, 0)] * (2**bits - len(palette))
        entries.append((320, 3, [entry[k] * 257 for k in range(3) for entry in full]))
    if extra:
        entries.append((338, 3, list(extra)))
    entries = sorted([*entries, (273, 4, [0])])
    at = 8 + 2 + 12 * len(entries) + 4
    directory = b""
    beyond = b""
    for tag, type_, numbers in entries:
        code = {3: "H", 4: "I"}[type_]
        content = struct.pack(f"{order}{len(numbers)}{code}", *numbers)
        if tag == 273:
            content = b"AT__"
        if len(content) > 4:
            beyond += content
            content = struct.pack(order + "I", at + len(beyond) - len(content))
        directory += struct.pack(order + "HHI", tag, type_, len(numbers)) + content.ljust(4, b"\0")
    directory = directory.replace(b"AT__", struct.pack(order + "I", at + len(beyond)))
    start = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8)
    count = struct.pack(order + "H", len(entries))
    path.write_bytes(start + count + directory + b"\0\0\0\0" + beyond + strip)
    return path


def bmp(path: Path, values: np.ndarray, bits: int, palette: list[tuple]) -> Path:
    height, width = values.shape
    rows = b"".join(reversed(packed(values, bits, align=4)))
    colours = b"".join(bytes([blue, green, red, 0]) for red, green, blue in palette)
    offset = 54 + len(colours)
    header = struct.pack("<2sIHHI", b"BM", offset + len(rows), 0, 0, offset)
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, 0, len(rows), 0, 0, len(palette), 0)
    path.write_bytes(header + info + colours + rows)
    return path


def grey(count: int, step: int) -> list[tuple]:
    return [(k * step,) * 3 for k in range(count)]


COLOURS = [(200, k * 10, 255 - k * 10) for k in range(16)]
DEPTHS = [(1, TWO), (2, FOUR), (4, SIXTEEN), (8, MANY)]


@pytest.mark.parametrize("bits, values", [*DEPTHS, (16, MANY * 200)])
def test_grey_png_of_any_depth(tmp_path, bits, values):
    assert (read_mask(png(tmp_path / "m.png", values, bits)) == values).all()


@pytest.mark.parametrize("bits, values", DEPTHS[:3])
@pytest.mark.parametrize("palette", ["colours", "grey", "inverted", "black first"])
def test_indices_of_a_png_whatever_its_palette_shows(tmp_path, bits, values, palette):
    count = min(16, 2**bits)
    entries = {
        "colours": COLOURS[:count],
        "grey": grey(count, 255 // (count - 1)),
        "inverted": grey(count, 255 // (count - 1))[::-1],
        "black first": [(0, 0, 0)] * count,
    }[palette]
    assert (read_mask(png(tmp_path / "m.png", values, bits, entries)) == values).all()


@pytest.mark.parametrize("photometric", [0, 1], ids=["white is zero", "black is zero"])
@pytest.mark.parametrize("order", ["<", ">"], ids=["little endian", "big endian"])
@pytest.mark.parametrize("bits, values", DEPTHS)
def test_grey_tiff_of_any_depth_and_interpretation(tmp_path, bits, values, photometric, order):
    assert (read_mask(tiff(tmp_path / "m.tif", values, bits, photometric, order)) == values).all()


@pytest.mark.parametrize("order", ["<", ">"], ids=["little endian", "big endian"])
@pytest.mark.parametrize("bits, sample", [(8, 2), (16, 1), (16, 2), (32, 1), (32, 2)])
def test_wide_and_signed_tiff_is_read_exactly_or_refused_by_name(tmp_path, bits, sample, order):
    values = MANY * (100 if bits > 8 else 1) - (50 if sample == 2 else 0)
    values = values.clip(-128, 127) if (bits, sample) == (8, 2) else values
    path = tiff(tmp_path / "m.tif", values, bits, 1, order, sample)
    try:
        assert (read_mask(path) == values).all()
    except (DataError, PictureError) as error:
        assert str(path) in str(error) and "\n" not in str(error)
        assert (bits, sample, order) == (32, 1, ">") or (bits, sample) == (8, 2)


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "tiff_deflate"])
@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16", "I"])
def test_compressed_tiff(tmp_path, mode, compression):
    values = TWO if mode == "1" else MANY
    image = Image.fromarray(values.astype({"1": bool, "I;16": np.uint16, "I": np.int32}.get(mode, np.uint8)))
    if mode == "P":
        image = Image.frombytes("P", image.size, image.tobytes())
        image.putpalette([c for entry in COLOURS * 16 for c in entry])
    image.save(tmp_path / "m.tif", compression=compression)
    assert (read_mask(tmp_path / "m.tif") == values).all()


@pytest.mark.parametrize("bits, values", [(1, TWO), (4, SIXTEEN), (8, MANY)])
@pytest.mark.parametrize("palette", ["colours", "grey", "identity", "inverted"])
def test_bmp_of_any_depth_and_palette(tmp_path, bits, values, palette):
    count = 2**bits
    entries = {
        "colours": (COLOURS * 16)[:count],
        "grey": grey(count, 255 // (count - 1)),
        "identity": grey(count, 1),
        "inverted": grey(count, 255 // (count - 1))[::-1],
    }[palette]
    path = bmp(tmp_path / "m.bmp", values, bits, entries)
    try:
        assert (read_mask(path) == values).all()
    except (DataError, PictureError) as error:
        assert (bits, palette) == (4, "identity") and str(path) in str(error)


def test_bmp_whose_palette_has_fewer_entries_than_its_depth_allows(tmp_path):
    path = bmp(tmp_path / "m.bmp", TWO, 8, grey(2, 255))
    try:
        assert (read_mask(path) == TWO).all()
    except (DataError, PictureError) as error:
        assert str(path) in str(error)


@pytest.mark.parametrize("ids", [(0, 1, 2), (0, 7, 11), (0, 1, 255)])
def test_gif_gives_the_grey_that_was_saved(tmp_path, ids):
    """A GIF has no grey but that of its palette, whose order Pillow and others choose anew for each file."""
    values = np.resize(np.array(ids, np.uint8), (12, 16))
    Image.fromarray(values).save(tmp_path / "m.gif")
    assert (read_mask(tmp_path / "m.gif") == values).all()


def test_rgb_with_equal_channels_is_grey_and_opaque_alpha_is_nothing(tmp_path):
    for name, image in {
        "rgb.png": Image.fromarray(np.stack([MANY] * 3, 2).astype(np.uint8)),
        "rgba.png": Image.fromarray(np.stack([MANY, MANY, MANY, MANY * 0 + 255], 2).astype(np.uint8)),
        "la.png": Image.merge("LA", [Image.fromarray(MANY.astype(np.uint8)), Image.new("L", (8, 5), 255)]),
        "rgb.bmp": Image.fromarray(np.stack([MANY] * 3, 2).astype(np.uint8)),
        "rgb.tif": Image.fromarray(np.stack([MANY] * 3, 2).astype(np.uint8)),
    }.items():
        image.save(tmp_path / name)
        assert (read_mask(tmp_path / name) == MANY).all(), name
    Image.fromarray(np.stack([MANY] * 3, 2).astype(np.uint8)).save(tmp_path / "m.webp", lossless=True)
    assert (read_mask(tmp_path / "m.webp") == MANY).all()


def inexact(folder: Path) -> dict[str, tuple[Path, str]]:
    """Masks whose values are not what was labelled, each with the word that names why."""
    image = Image.fromarray(np.resize(MANY, (64, 64)).astype(np.uint8))
    rgb = image.convert("RGB")
    saves = {
        "jpeg": (image, "a.jpg", {}, "JPEG"),
        "jpeg named png": (image, "b.png", {"format": "JPEG"}, "JPEG"),
        "jpeg in tiff": (rgb, "c.tif", {"compression": "jpeg"}, "TIFF with loss"),
        "grey jpeg in tiff": (image, "d.tif", {"compression": "jpeg"}, "TIFF with loss"),
        "webp": (rgb, "e.webp", {"quality": 80}, "WEBP with loss"),
        "webp with alpha": (rgb.convert("RGBA"), "f.webp", {"quality": 80, "exif": Image.Exif()}, "WEBP"),
        "webp named png": (rgb, "g.png", {"format": "WEBP", "quality": 80}, "WEBP with loss"),
        "avif": (rgb, "h.avif", {}, "AVIF"),
        "pages": (image, "i.tif", {"save_all": True, "append_images": [image] * 4}, "several pages"),
        "animation": (
            image,
            "j.gif",
            {"save_all": True, "append_images": [image.rotate(90)]},
            "several pages",
        ),
        "animated png": (
            image,
            "k.png",
            {"save_all": True, "append_images": [image.rotate(90)]},
            "several pages",
        ),
        "cmyk": (rgb.convert("CMYK"), "l.tif", {}, "CMYK"),
        "float": (Image.fromarray(np.full((4, 4), 0.5, np.float32)), "m.tif", {}, "mode F"),
        "transparent": (Image.new("RGBA", (8, 8), (1, 1, 1, 9)), "n.png", {}, "RGBA"),
        "colours": (Image.new("RGB", (8, 8), (1, 2, 3)), "o.png", {}, "flowseg init"),
    }
    found = {}
    for kind, (picture, name, options, word) in saves.items():
        picture.save(folder / name, **options)
        found[kind] = folder / name, word
    return found


def test_what_cannot_be_read_exactly_is_refused_by_name(tmp_path):
    for kind, (path, word) in inexact(tmp_path).items():
        with pytest.raises(DataError) as caught:
            read_mask(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: ") and word in message and "\n" not in message, kind
        assert caught.value.kind and str(path) not in caught.value.kind, kind


def test_colours_of_sixteen_bits_are_refused(tmp_path):
    path = tiff(tmp_path / "m.tif", np.stack([MANY * 200] * 3, 2), 16, 2, bands=3)
    for colours in (False, True):
        with pytest.raises(DataError, match="16-bit"):
            read_mask(path, colours)


# ---- colours ----

CLASSES = "classes = ['sky', 'road', 'car']\n"
SCENE = np.repeat(np.repeat(np.array([[0, 1, 2], [2, 1, 255], [0, 0, 1]]), 8, 0), 10, 1)
SHADES = {0: (10, 20, 30), 1: (0, 0, 0), 2: (255, 255, 255), 255: (200, 0, 100)}
HEX = {k: "#{:02x}{:02x}{:02x}".format(*colour) for k, colour in SHADES.items()}


def scene(root: Path, mask: Image.Image, toml: str, name: str = "a.png") -> FolderDataset:
    for folder in ("images", "annotations"):
        (root / folder / "training").mkdir(parents=True)
    photo = np.random.default_rng(0).integers(0, 256, (*SCENE.shape, 3), np.uint8)
    Image.fromarray(photo).save(root / "images/training/a.png")
    mask.save(root / f"annotations/training/{name}")
    (root / "dataset.toml").write_text(toml)
    return FolderDataset(root, "training")


def test_colour_palette_and_grey_masks_of_a_scene_give_the_same_batch(tmp_path):
    painted = np.zeros((*SCENE.shape, 3), np.uint8)
    for k, colour in SHADES.items():
        painted[k == SCENE] = colour
    order = [2, 255, 0, 1]  # of the palette: a different one than that of the ids
    indexed = Image.fromarray(
        np.array([order.index(k) for k in SCENE.ravel()], np.uint8).reshape(SCENE.shape)
    )
    indexed = Image.frombytes("P", indexed.size, indexed.tobytes())
    indexed.putpalette([c for k in order for c in SHADES[k]])
    colours = f"ids = {[HEX[k] for k in (0, 1, 2)]}\nignore = ['{HEX[255].upper()}']"
    rgb = Image.fromarray(painted)
    opaque = rgb.copy()
    opaque.putalpha(255)
    data = [
        scene(tmp_path / "grey", Image.fromarray(SCENE.astype(np.uint8)), CLASSES + "ignore = [255]"),
        scene(tmp_path / "indices", indexed, CLASSES + "ids = [2, 3, 0]\nignore = [1]"),
        scene(tmp_path / "palette", indexed, CLASSES + colours),
        scene(tmp_path / "rgb", rgb, CLASSES + colours),
        scene(tmp_path / "rgba", opaque, CLASSES + colours),
        scene(tmp_path / "bmp", rgb, CLASSES + colours, "a.bmp"),
        scene(tmp_path / "gif", indexed, CLASSES + colours, "a.gif"),
    ]
    first = [Stream(data[0], 16, 3)[k] for k in range(6)]
    assert {k for _, labels, _ in first for k in np.unique(labels).tolist()} == {0, 1, 2, IGNORE}
    for other in data[1:]:
        for (image, labels, _), k in zip(first, range(6), strict=True):
            same_image, same_labels, _ = Stream(other, 16, 3)[k]
            assert (image == same_image).all() and (labels == same_labels).all(), other.name
        assert problems(other) == problems(data[0])


def test_grey_pixels_are_colours_where_ids_are_colours(tmp_path):
    toml = CLASSES + "ids = ['#000000', '#010101', '#ffffff']"
    mask = Image.fromarray(np.resize(np.array([0, 1, 255], np.uint8), SCENE.shape))
    labels = scene(tmp_path / "grey", mask, toml)[0][1]
    assert np.unique(labels).tolist() == [0, 1, 2]
    black_and_white = Image.fromarray(SCENE == 1)
    assert np.unique(scene(tmp_path / "bits", black_and_white, toml)[0][1]).tolist() == [0, 2]


def test_a_colour_outside_the_table_names_file_colour_and_the_nearest(tmp_path):
    mask = Image.new("RGB", SCENE.shape[::-1], (10, 20, 30))
    mask.putpixel((3, 3), (250, 250, 240))
    data = scene(tmp_path, mask, CLASSES + "ids = ['#0a141e', '#ff0000', '#00ff00']\nignore = ['#ffffff']")
    with pytest.raises(DataError) as caught:
        data[0]
    message = str(caught.value)
    assert "annotations/training/a.png" in message and "#fafaf0" in message and "#ffffff" in message
    assert "#ff0000" not in message


def test_masks_that_hold_no_colours_are_refused_where_ids_are_colours(tmp_path):
    path = tmp_path / "m.png"
    Image.fromarray(MANY.astype(np.uint16) * 200).save(path)
    with pytest.raises(DataError, match=r"I;16.*ids are colours"):
        read_mask(path, colours=True)


def test_the_table_of_colours_is_looked_up_like_that_of_numbers():
    table = LabelTable(("a", "b"), ("#000000", "#ffffff"), ("#00ff00",))
    raw = np.array([[0x000000, 0xFFFFFF, 0x00FF00]], np.uint32)
    assert table.to_train(raw, "m").tolist() == [[0, 1, IGNORE]]
    assert table.values.tolist() == [0, 0xFFFFFF, 0x00FF00]
