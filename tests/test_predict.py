"""predict.py: whole photos are resized, seen in windows and brought back to their own size."""

import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from flowseg_tools import predict
from flowseg_tools.predict import assign_photo, decode, segment_photo, to_input, windows
from model import CheckpointError, CheckpointInfo, FlowSeg, ModelConfig
from tests.conftest import untrained

ROOT = Path(__file__).parent.parent
SMALL = {
    "hidden_size": 16, "depth": 1, "num_heads": 2, "nerf_depth": 1, "nerf_width": 8, "conv_width": 8,
    "encoding_dims": 11,
}  # fmt: skip


def small(num_classes: int, **settings) -> FlowSeg:
    """A network with random weights; a new one is zero at its end, so that all pixels would be alike."""
    return untrained(ModelConfig(num_classes=num_classes, steps=1, **SMALL, **settings))


@pytest.fixture(scope="module")
def model():
    return small(14, tau=1.0)


real_height = predict._band_height


def photo(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def equal(found: tuple, expected: tuple) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


# ---------------------------------------------------------------- input and windows


@pytest.mark.parametrize(
    ("given", "expected"), [((640, 480), (128, 96)), ((10, 20), (96, 192)), ((2000, 10), (384, 2))]
)
def test_input_keeps_the_ratio_and_the_range(given, expected):
    image = to_input(Image.new("RGB", given, (0, 128, 255)), 96)
    assert image.shape == (1, 3, *expected[::-1])
    assert image[0, :, 0, 0].tolist() == pytest.approx([-1, 128 / 127.5 - 1, 1], abs=1e-6)


def test_whole_is_one_window_and_slide_is_one_where_it_fits():
    assert windows(30, 75, "whole", 30) == [(slice(0, 30), slice(0, 75))]
    assert windows(30, 20, "slide", 30) == [(slice(0, 30), slice(0, 20))]
    with pytest.raises(ValueError, match="tiles"):
        windows(30, 75, "tiles", 30)


@pytest.mark.parametrize("size", [(30, 75), (75, 30), (31, 30), (90, 90), (1, 1), (200, 7)])
@pytest.mark.parametrize("side", [1, 8, 30])
def test_windows_cover_the_image_and_overlap_by_a_third(size, side):
    count = np.zeros(size, int)
    found = windows(*size, "slide", side)
    for rows, columns in found:
        assert rows.stop - rows.start == min(side, size[0])
        assert columns.stop - columns.start == min(side, size[1])
        count[rows, columns] += 1
    assert count.min() >= 1 and len(set(map(str, found))) == len(found)
    starts = sorted({rows.start for rows, _ in found})
    assert all(b - a <= max(1, side * 2 // 3) for a, b in pairwise(starts))


def test_the_network_alone_computes_in_bfloat16_where_that_is_on(model, monkeypatch):
    """As on CUDA: states and probabilities stay float32, and nearly all pixels keep their class."""
    labels, confidence = segment_photo(model, photo(64, 48), 48, 2)
    seen = []
    real = model.soft_assignment
    monkeypatch.setattr(model, "soft_assignment", lambda x: seen.append(x.dtype) or real(x))
    monkeypatch.setattr(predict, "in_bfloat16", lambda device: True)
    close = segment_photo(model, photo(64, 48), 48, 2)
    assert set(seen) == {torch.float32}
    assert 0 < np.abs(close[1] - confidence).max() < 0.3
    assert (close[0] == labels).mean() > 0.97


def test_a_gpu_assigns_a_photo_in_few_blocks_of_pixels(model, monkeypatch):
    """A row at a time would be hundreds of launches."""
    seen = []
    real = model.soft_assignment
    monkeypatch.setattr(model, "soft_assignment", lambda x: seen.append(x.shape[2]) or real(x))
    monkeypatch.setattr(
        predict, "_band_height", lambda device, values: real_height(torch.device("cuda"), values)
    )
    segment_photo(model, photo(64, 48), 48, 1)
    assert seen == [48]


# ---------------------------------------------------------------- the average of all views


@pytest.mark.parametrize(("size", "mode"), [((64, 32), "whole"), ((45, 33), "whole"), ((33, 120), "whole"),
                                            ((45, 33), "slide"), ((33, 120), "slide")])  # fmt: skip
def test_with_flip_the_mirror_image_gives_the_mirrored_mask(model, size, mode):
    """Widths that the patch does not divide, too; windows only where they lie symmetrically themselves."""
    image, side = photo(*size), min(size)
    mirror = ImageOps.mirror(image)
    labels, confidence = segment_photo(model, image, side, 1, mode, flip=True)
    mirrored = segment_photo(model, mirror, side, 1, mode, flip=True)
    assert len(np.unique(labels)) > 3
    assert (mirrored[0][:, ::-1] == labels).mean() > 0.999  # but for ties
    assert np.abs(mirrored[1][:, ::-1] - confidence).max() < 1e-5
    plain = segment_photo(model, image, side, 1, mode)
    assert (segment_photo(model, mirror, side, 1, mode)[0][:, ::-1] != plain[0]).any()


def test_slide_is_whole_when_the_photo_fits_the_window(model):
    for size in ((40, 40), (80, 80), (7, 7)):
        whole, slide = (segment_photo(model, photo(*size), 40, 1, mode) for mode in ("whole", "slide"))
        assert equal(whole, slide)


def test_slide_averages_windows_that_cover_the_photo_and_overlap_by_a_third(model, monkeypatch):
    image, seen = photo(75, 30), []
    whole, real = to_input(image, 30), model.sample

    def note(window, steps):
        seen.append(window)
        return real(window, steps)

    monkeypatch.setattr(model, "sample", note)
    confidence = segment_photo(model, image, 30, 1, mode="slide")[1]
    total, count = torch.zeros(14, 30, 75), torch.zeros(75)
    for left, window in zip((0, 20, 40, 45), seen, strict=True):
        assert window.equal(whole[..., left : left + 30])
        total[..., left : left + 30] += model.soft_assignment(real(window, 1))[0]
        count[left : left + 30] += 1
    assert np.allclose(confidence, (total / count).max(0).values.numpy(), atol=1e-5)


@pytest.mark.parametrize("mode", ["whole", "slide"])
@pytest.mark.parametrize("flip", [False, True])
def test_what_is_averaged_is_a_probability(model, mode, flip):
    p = assign_photo(model, photo(75, 30), 30, 2, mode, flip)
    assert p.shape == (1, 14, 30, 75) and p.min() >= 0
    assert torch.allclose(p.sum(1), torch.ones(1, 30, 75), atol=1e-5)


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_large_bands_give_the_same_as_single_rows(model, mode, monkeypatch):
    single = assign_photo(model, photo(75, 40), 30, 2, mode)
    for height in (7, 1000):
        monkeypatch.setattr(predict, "_band_height", lambda device, values, height=height: height)
        assert torch.allclose(assign_photo(model, photo(75, 40), 30, 2, mode), single, atol=1e-5)


@pytest.mark.parametrize(("width", "classes"), [(683, 150), (512, 171), (2048, 150), (96, 14)])
def test_a_gpu_gets_few_products_and_bounded_memory(width, classes):
    """Single rows would be one product, of some 17 kernels, for each of the 512 rows."""
    rows = predict._band_height(torch.device("cuda"), width * classes)
    assert -(-512 // rows) <= 20 and rows * width * classes * 4 <= 2**25
    assert predict._band_height(torch.device("cpu"), width * classes) == 1


def test_images_are_read_in_order_and_one_ahead():
    begun, ahead = [], threading.Event()

    def read(index):
        begun.append(index)
        if index == 1:
            ahead.set()
        return index * index

    squares = predict.read_ahead(read, range(5))
    assert next(squares) == 0 and ahead.wait(10) and begun == [0, 1]
    assert list(squares) == [1, 4, 9, 16] and begun == [0, 1, 2, 3, 4]
    assert list(predict.read_ahead(read, [])) == []
    with pytest.raises(ZeroDivisionError):
        list(predict.read_ahead(lambda index: 1 // index, [1, 0]))


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the high-water mark of /proc")
def test_a_large_photo_of_many_classes_takes_little_memory():
    """171 probabilities of each of 6 million pixels would be 4 GB; a fresh process says what it took."""
    code = """if True:
        import numpy as np, torch
        from PIL import Image
        from flowseg_tools.predict import segment_photo
        from model import FlowSeg, ModelConfig
        from train import confusion_matrix

        def status(key):
            lines = open("/proc/self/status")
            return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024

        photo = Image.new("RGB", (3000, 2000))
        model = FlowSeg(ModelConfig(num_classes=171, encoding_dims=19)).eval()
        segment_photo(model, Image.new("RGB", (40, 30)), 32, 1)
        before = status("VmRSS")
        labels = segment_photo(model, photo, 128, 1, flip=True, mode="slide")[0]
        confusion_matrix(labels, labels, 171)
        print(status("VmHWM") - before)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 500  # MiB


# ---------------------------------------------------------------- back to the size of the photo


@pytest.mark.parametrize("size", [(16, 16), (40, 33), (7, 9), (300, 5)])
def test_decoding_to_a_size_is_bilinear_in_the_probabilities(size):
    model = small(11, tau=1.0)
    x = F.interpolate(model.encode_labels(torch.randint(0, 11, (2, 4, 4))), scale_factor=4)
    p = model.soft_assignment(x + 0.1 * torch.randn_like(x))  # without it there are ties
    labels, confidence = decode(p, size)
    expected = F.interpolate(p, size, mode="bilinear").max(1)
    assert torch.allclose(confidence, expected.values, atol=1e-5)
    assert (labels == expected.indices).float().mean() > 0.999


def test_a_border_between_two_classes_never_decodes_to_a_third():
    model = small(50)
    for a, b in [(0, 1), (3, 17), (20, 49)]:
        labels = torch.full((1, 8, 8), a)
        labels[:, :, 4:] = b
        p = model.soft_assignment(model.encode_labels(labels))
        assert set(decode(p, (64, 64))[0].unique().tolist()) == {a, b}


def test_decoding_at_the_own_size_is_argmax():
    model = small(11)
    labels = torch.randint(0, 11, (2, 9, 7))
    p = model.soft_assignment(model.encode_labels(labels))
    assert decode(p, (9, 7))[0].equal(labels.byte())


# ---------------------------------------------------------------- the short call


def test_an_array_is_a_photo_and_other_modes_are_named(model):
    image = photo(40, 30)
    expected = segment_photo(model, image, 32, 1)
    assert equal(segment_photo(model, np.asarray(image), 32, 1), expected)
    assert expected[0].shape == (30, 40) and expected[0].dtype == np.uint8
    assert expected[1].dtype == np.float32
    with pytest.raises(AssertionError, match="mode L; expected RGB"):
        segment_photo(model, Image.new("L", (9, 9)), 32, 1)


def test_size_and_steps_are_by_default_those_of_the_checkpoint(tmp_path):
    small(3).save(tmp_path / "w.safetensors", classes=["a", "b", "c"], ids=[0, 1, 2], crop_size=24)
    model = FlowSeg.load(tmp_path / "w.safetensors")
    assert equal(segment_photo(model, photo(40, 30)), segment_photo(model, photo(40, 30), 24, 1))
    assert not equal(segment_photo(model, photo(40, 30)), segment_photo(model, photo(40, 30), 32, 2))
    model.info = CheckpointInfo()
    with pytest.raises(CheckpointError, match="short-side"):
        segment_photo(model, photo(40, 30))
