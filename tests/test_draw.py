"""draw.py: pictures are written whole or not at all, and drawings fit any size."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import SUFFIXES, PictureError
from flowseg_tools import draw
from tests.conftest import corners, pixels

COLORS = np.array([[250, 10, 20], [30, 240, 50], [60, 70, 230]], dtype=np.uint8)
NAMES = ["sky", "road", "tree"]
ROOT = Path(__file__).parent.parent


def scene(width: int, height: int) -> tuple[Image.Image, np.ndarray]:
    """A grey photo and its labels: three vertical bands, and one ignored pixel."""
    labels = np.repeat((np.arange(width) * 3 // width)[None].astype(np.uint8), height, axis=0)
    labels[-1, -1] = 255
    return Image.new("RGB", (width, height), (90, 90, 90)), labels


def colors_in(image: Image.Image) -> set[tuple[int, ...]]:
    return {color for _, color in image.getcolors(maxcolors=image.width * image.height)}


# ---------------------------------------------------------------- writing


def test_palette_is_the_state_as_colour():
    mu = np.array([[-1, 0, 1, 9], [0.5, -0.5, -1, 9]])
    assert draw.palette(mu).tolist() == [[0, 128, 255], [191, 64, 0]]
    assert draw.palette(mu).dtype == np.uint8
    x = np.array([[[-3, 3, np.nan], [-1, 1, 0]]])
    assert pixels(draw.state_image(x)).tolist() == [[[0, 255, 128], [0, 255, 128]]]


def test_mask_round_trip(tmp_path):
    labels = np.array([[0, 1, 2], [2, 255, 0]], dtype=np.uint8)
    draw.write_mask(tmp_path / "m.png", labels, COLORS)
    mask = Image.open(tmp_path / "m.png")
    assert mask.mode == "P" and np.array_equal(mask, labels)
    assert mask.getpalette()[:9] == COLORS.ravel().tolist()
    assert np.array_equal(mask.convert("RGB"), draw.colorize(labels, COLORS))
    assert mask.convert("RGB").getpixel((1, 1)) == (0, 0, 0)


def test_more_than_255_classes_become_sixteen_bit_grey(tmp_path):
    labels = np.array([[0, 999]], dtype=np.uint16)
    draw.write_mask(tmp_path / "m.png", labels, np.zeros((1000, 3), dtype=np.uint8))
    mask = Image.open(tmp_path / "m.png")
    assert mask.mode == "I;16" and np.array_equal(mask, labels)


def test_a_mask_is_only_written_where_values_survive(tmp_path):
    with pytest.raises(PictureError, match=r"m\.jpg: expected \.png, got '\.jpg'"):
        draw.write_mask(tmp_path / "m.jpg", np.zeros((2, 2), np.uint8), COLORS)
    with pytest.raises(AssertionError, match="int64"):
        draw.write_mask(tmp_path / "m.png", np.zeros((2, 2), np.int64), COLORS)


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
def test_save_by_suffix(tmp_path, suffix):
    draw.save(tmp_path / f"a{suffix.upper()}", corners())
    with Image.open(tmp_path / f"a{suffix.upper()}") as image:
        assert image.format == SUFFIXES[suffix] and image.size == (48, 32)
    assert [path.name for path in tmp_path.iterdir()] == [f"a{suffix.upper()}"]


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def fail_halfway(self, file, *args, **options):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(PictureError, match=r"a\.png: No space left"):
        patch.setattr(Image.Image, "save", fail_halfway)
        draw.save(path, corners())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        draw.save(path, corners())
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_unwritable_places_and_unknown_suffixes(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dir.png").mkdir()
    for place in ("no/such/a.png", "file/a.png", "dir.png"):
        with pytest.raises(PictureError, match="choose a folder that can be written"):
            draw.save(tmp_path / place, corners())
    with pytest.raises(PictureError, match=r"try \.jpg"):
        draw.save(tmp_path / "a.jgp", corners())
    with pytest.raises(PictureError, match="cannot write"):
        draw.save(tmp_path / "none", corners())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dir.png", "file"]


# ---------------------------------------------------------------- drawing


def test_overlay_mixes_classes_leaves_ignored_pixels_and_marks_borders():
    photo, labels = scene(30, 20)
    drawn = draw.overlay(photo, labels, COLORS, alpha=0.5)
    assert drawn.size == photo.size and drawn.mode == "RGB"
    assert np.abs(pixels(drawn)[5, 3] - (COLORS[0].astype(int) + 90) / 2).max() <= 1
    assert drawn.getpixel((29, 19)) == (90, 90, 90)
    assert (pixels(drawn)[5, 9] > pixels(drawn)[5, 3]).all(), "no contour between the first two bands"
    assert photo.getpixel((3, 5)) == (90, 90, 90), "the photo itself was painted"
    with pytest.raises(AssertionError, match="photo"):
        draw.overlay(photo, labels.T, COLORS)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (100, 75), (4000, 300)])
def test_legend_shows_every_colour_and_the_whole_image(size):
    image = Image.new("RGB", size, (1, 2, 3))
    sheet = draw.with_legend(image, list(zip(NAMES, COLORS, (5.0, 80.0, 15.0), strict=True)))
    assert {tuple(map(int, color)) for color in COLORS} <= colors_in(sheet)
    assert (pixels(sheet) == (1, 2, 3)).all(-1).sum() == image.width * image.height
    assert (pixels(sheet)[0] == draw.PAPER).all() and (pixels(sheet)[:, -1] == draw.PAPER).all()


def test_legend_sorts_by_percent_and_grows_with_the_image():
    def swatch(width: int, percents: tuple) -> list[np.ndarray]:
        image = Image.new("RGB", (width, width // 2))
        drawn = pixels(draw.with_legend(image, list(zip(NAMES, COLORS, percents, strict=True))))
        return [np.argwhere((drawn == color).all(-1)) for color in COLORS]

    first, second, third = (points[0].tolist() for points in swatch(60, (5.0, 80.0, 15.0)))
    assert second < third < first  # one column: row order is the order
    first, second, third = (points[0].tolist() for points in swatch(60, (None, None, None)))
    assert first < second < third
    assert len(swatch(4000, (None,) * 3)[0]) > 9 * len(swatch(100, (None,) * 3)[0])


def test_legend_of_many_long_names_wraps_into_columns():
    entries = [(f"class {k} with a name\nthat never seems to end", (k, 255 - k, 7), None) for k in range(171)]
    sheet = draw.with_legend(Image.new("RGB", (100, 100)), entries)
    assert {color for _, color, _ in entries} <= colors_in(sheet)
    assert sheet.height < 1000 and sheet.width < 3000
    large = draw.with_legend(Image.new("RGB", (4000, 3000)), entries)
    assert large.width < 4200 and large.height < 4500, "the legend outgrows the picture"
    assert draw.with_legend(Image.new("RGB", (9, 9)), []).width > 9


@pytest.mark.parametrize("size", [(1, 1), (64, 64), (240, 180), (2000, 1500), (20000, 100), (3, 5000)])
def test_preview_and_strip_at_any_size(size):
    photo, labels = scene(*size)
    sheet = draw.preview([(photo, labels, np.zeros_like(labels))] * 2, NAMES, COLORS)
    assert 250 < sheet.width < 2200 if size[0] > 9 else sheet.width > 9
    assert sheet.height < 1600
    assert colors_in(draw.colorize(np.unique(labels)[None], COLORS)) <= colors_in(sheet)
    states = draw.strip([photo] * 11, [f"t = {k / 10}" for k in range(11)])
    assert states.width < 3000 and states.height < 1600
    with pytest.raises(AssertionError, match="2 frames, 1 captions"):
        draw.strip([photo] * 2, ["t = 0"])


def test_preview_legend_names_only_classes_that_occur():
    photo, labels = scene(64, 64)
    one = np.zeros_like(labels)
    drawn = colors_in(draw.preview([(photo, one, one)], NAMES, COLORS))
    assert tuple(COLORS[0].tolist()) in drawn
    assert not {tuple(COLORS[1].tolist()), (0, 0, 0)} & drawn


def test_small_masks_are_enlarged_without_new_colours():
    _, labels = scene(8, 8)
    enlarged = draw.fit(draw.colorize(labels, COLORS), 400)
    assert enlarged.size == (400, 400)
    assert colors_in(enlarged) == colors_in(draw.colorize(labels, COLORS))


def test_a_long_photo_needs_little_memory():
    program = """if True:
        import resource, numpy
        from flowseg_tools import draw
        from PIL import Image
        photo, labels = Image.new("RGB", (20000, 100)), numpy.eye(100, 20000, dtype="uint8")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        drawn = draw.overlay(photo, labels, numpy.eye(3, dtype="uint8"))
        draw.with_legend(drawn, [("sky", (1, 2, 3), 9.0)])
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True)
    assert int(run.stdout) < 120 * 1024  # KiB; one RGB copy is 6 MB


def test_curves_rise_and_fall_in_their_own_colours():
    steps = np.linspace(0, 1000, 30)
    series = {"up": [(s, s / 10) for s in steps], "down": [(s, 100 - s / 10) for s in steps]}
    drawn = np.asarray(draw.plots({"mIoU": series}, "step", 540))
    for color, slope in zip(draw.LINES[:2], (-1, 1), strict=True):
        y, x = np.nonzero((np.abs(drawn[80:] - color) <= 12).all(-1))
        assert len(x) > 200 and np.sign(np.corrcoef(x, y)[0, 1]) == slope
    assert draw.plots({"mIoU": {"flat": [(0, 0), (5, 0)]}}, "step", 540).size == (900, 540)


# ---------------------------------------------------------------- looked at by people


def test_clear_classes_show_the_photo_and_keep_their_contours():
    photo, labels = scene(30, 20)
    drawn = draw.overlay(photo, labels, COLORS, clear=(1,))
    assert drawn.getpixel((15, 5)) == (90, 90, 90)
    assert drawn.getpixel((3, 5)) != (90, 90, 90)
    assert (pixels(drawn)[5, 19] > 90).any(), "no contour where the clear class ends"


def written(labels: np.ndarray, names: dict, **options) -> np.ndarray:
    """Where names were written on a black picture, (H, W)."""
    picture = Image.new("RGB", labels.shape[::-1])
    draw.name_regions(picture, labels, names, **options)
    return pixels(picture).any(-1)


def test_a_name_stands_in_the_largest_region_of_its_class():
    labels = np.zeros((300, 400), np.uint8)
    labels[20:70, 20:90] = 1
    labels[120:280, 150:390] = 1
    where = written(labels, {0: "ground", 1: "thing"})
    assert where[130:270, 160:380].any() and not where[:75, :95].any()
    assert where[labels == 0].any()
    assert not written(labels, {0: "ground"}, clear=(0,)).any()
    assert not written(np.full((300, 400), 255, np.uint8), {0: "ground"}).any()


def test_a_name_that_does_not_fit_is_left_out_and_none_lies_on_another():
    labels = np.zeros((300, 400), np.uint8)
    labels[50:56, 50:350] = 1
    where = written(labels, {0: "ground", 1: "a long name in a thin line"})
    assert not where[50:56].any()
    for size in ((1, 1), (3, 500), (500, 3)):
        assert not written(np.zeros(size, np.uint8), {0: "anything"}).any()


def test_names_are_readable_with_150_classes():
    """Each of 150 classes has a box of its own; its name stands in it, at least twelve pixels high."""
    labels = np.arange(150, dtype=np.uint8).reshape(15, 10).repeat(60, 0).repeat(120, 1)
    where = written(labels, {k: f"class {k}" for k in range(150)})
    boxes = where.reshape(15, 60, 10, 120).transpose(0, 2, 1, 3).reshape(150, 60, 120)
    heights = boxes.any(2).sum(1)
    assert heights.min() >= 9 and boxes[:, :2].sum() == boxes[:, -2:].sum() == 0


def test_a_legend_with_a_limit_says_how_many_more_there_are():
    entries = [(f"class {k}", (k, 255 - k, 7), 100.0 if k == 0 else 1.0) for k in range(30)]
    sheet = draw.with_legend(Image.new("RGB", (400, 300)), entries, most=12)
    shown = {color for _, color, _ in entries} & colors_in(sheet)
    assert len(shown) == 11 and (0, 255, 7) in shown
    assert sheet.size == draw.with_legend(Image.new("RGB", (400, 300)), entries[:12]).size


def test_previews_have_equal_tiles_and_at_most_twelve_entries():
    rng = np.random.default_rng(0)
    palette = rng.integers(40, 200, (150, 3), dtype=np.uint8)
    rows = []
    for width, height in ((300, 200), (200, 300), (96, 96)):
        labels = rng.integers(0, 150, (height, width), dtype=np.uint8)
        rows.append((Image.new("RGB", (width, height), (1, 2, 3)), labels, labels))
    names = [f"class {k}" for k in range(150)]
    sheet = pixels(draw.preview(rows, names, palette, "step 7", ["IoU 1%", "", "IoU 3%"]))
    tile = (sheet == (1, 2, 3)).all(-1) | (sheet == draw.TILE).all(-1)
    columns = tile[:, : sheet.shape[1] // 3].any(0).sum()
    heights = np.diff(np.flatnonzero(np.diff(tile[:, 40].astype(int))))[::2]
    assert columns > 300 and set(heights.tolist()) == {columns}
    legend = sheet[np.flatnonzero(tile.any(1))[-1] + 1 :].reshape(-1, 3)
    drawn = {tuple(color) for color in legend.tolist()}
    assert len(drawn & {tuple(color) for color in palette.tolist()}) == 11


def test_a_heat_map_grows_lighter_and_has_a_scale():
    grey = Image.fromarray(np.arange(256, dtype=np.uint8)[None].repeat(200, 0).repeat(3, 1))
    sheet = draw.heat(grey, "probability")
    lightness = np.asarray(sheet.convert("L")).astype(int)
    row = lightness[150, 20 : 20 + 768]
    assert (np.diff(row) >= -1).all() and row[-1] - row[0] > 150
    legend = {tuple(color) for color in pixels(sheet)[260:].reshape(-1, 3).tolist()}
    assert set(draw.SCALE) <= legend
    assert draw.heat(Image.new("L", (1, 1)), "dot").width > 200


def test_pictures_to_look_at_are_neither_tiny_nor_huge():
    for size in ((1, 1), (96, 96), (640, 480), (3000, 2000), (20000, 100), (30000, 2000)):
        shown = draw.for_viewing(Image.new("L", size))
        assert max(shown.size) >= 430 and shown.width * shown.height <= 24_100_000
        assert shown.width / shown.height == pytest.approx(size[0] / size[1], rel=0.01)


def test_training_curves_have_a_panel_for_what_was_logged():
    log = [{"step": k, "loss": 5 / k, "lr": 1e-4} for k in range(1, 50)] + [{"step": 9, "loss": None}]
    assert draw.training_curves(log).size == (900, 600)
    assert draw.training_curves([]).size == (900, 300)
    drawn = draw.training_curves([*log, {"step": 25, "mIoU": 0.2}, {"step": 50, "mIoU": 0.3}])
    assert drawn.size == (900, 900)
    for top in (0, 300, 600):
        panel = pixels(drawn)[top : top + 300]
        assert (np.abs(panel - draw.LINES[0]) <= 12).all(-1).sum() > 100


@pytest.mark.parametrize("highest", [1e-6, 0.03, 0.9, 1, 1.01, 3.7, 48, 64.2, 99, 100, 480, 160_000, 7e8, 0])
def test_ticks_are_round_numbers_from_zero(highest):
    ticks = draw.round_ticks(highest)
    assert ticks[0] == 0 and ticks[-1] >= highest * (1 - 1e-9) and 2 <= len(ticks) <= 6
    assert ticks[-1] <= 2 * highest or highest == 0
    step = f"{ticks[1]:.3e}"
    assert step[:4] in ("1.00", "2.00", "2.50", "5.00") and np.allclose(np.diff(ticks), ticks[1])


def test_letters_that_the_font_lacks_are_named():
    assert draw.missing_letters(["sky", "road 7", "tree (small)…"]) == ""
    assert draw.missing_letters(["天空", "sky", "空"]) == "天空"


@pytest.fixture
def own_font():
    yield
    draw._font_file = None


def test_another_font_has_other_letters(own_font, tmp_path):
    path = Path("/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf")
    if not path.exists():
        pytest.skip("the font DejaVu Sans is not installed here")
    entries = [("мост", (1, 2, 3), None)]
    plain = draw.with_legend(Image.new("RGB", (90, 90)), entries)
    assert draw.missing_letters(["мост"])
    draw.use_font(path)
    assert draw.missing_letters(["мост"]) == ""
    assert (
        pixels(draw.with_legend(Image.new("RGB", (90, 90)), entries)).shape != pixels(plain).shape
        or (pixels(draw.with_legend(Image.new("RGB", (90, 90)), entries)) != pixels(plain)).any()
    )


def test_what_is_no_font_is_named(own_font, tmp_path):
    (tmp_path / "a.ttf").write_bytes(b"no")
    for name in ("a.ttf", "missing.ttf"):
        with pytest.raises(ValueError, match=name):
            draw.use_font(tmp_path / name)
