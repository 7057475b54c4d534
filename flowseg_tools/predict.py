"""Whole photos: resized for the network, seen in one window or several, brought back to their size.

What is resized is the probability of every class, never a state: between two centroids may lie a
third one. The probabilities (1, N, h, w) are by far the largest thing here. They are added up and
resized in bands of rows, so that nothing else is as large.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from model import CheckpointError, FlowSeg

Mode = Literal["whole", "slide"]
T = TypeVar("T")

MAX_RATIO = 4  # a long side is at most this many short sides, as 2048 and 512 in the usual protocol
BAND_VALUES = 2**23  # probabilities in a band of rows: 32 MiB


def short_side_of(model: FlowSeg, given: int | None = None) -> int:
    """The short side that photos get: the given one, or the training crop's. CheckpointError: neither."""
    if not (given or model.info.crop_size):
        raise CheckpointError("the weights name no training size; pass --short-side (of export: --size)")
    return given or model.info.crop_size


def to_input(photo: Image.Image, short_side: int) -> Tensor:
    """An RGB image resized to `short_side`, (1, 3, h, w) in [-1, 1]; its long side is limited."""
    assert photo.mode == "RGB", f"photo has mode {photo.mode}; expected RGB: photo.convert('RGB')"
    scale = min(short_side / min(photo.size), MAX_RATIO * short_side / max(photo.size))
    width = max(1, round(photo.width * scale))
    height = max(1, round(photo.height * scale))
    photo = photo.resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None] / 127.5 - 1


def windows(height: int, width: int, mode: Mode, side: int) -> list[tuple[slice, slice]]:
    """The (rows, columns) of the windows that together cover height x width pixels.

    whole: one window. slide: squares of `side` pixels that overlap by a third; the last one ends at
    the border.
    """
    if mode == "whole":
        return [(slice(0, height), slice(0, width))]
    if mode != "slide":
        raise ValueError(f"mode is {mode!r}; expected whole or slide")
    found = []
    for rows in _spans(height, side):
        for columns in _spans(width, side):
            found.append((rows, columns))
    return found


def _spans(length: int, side: int) -> list[slice]:
    """The windows of one axis."""
    step = max(1, side * 2 // 3)
    last = max(0, length - side)
    starts = [*range(0, last, step), last]
    return [slice(start, min(start + side, length)) for start in starts]


def in_bfloat16(device: torch.device) -> bool:
    """Whether the network computes in bfloat16, as GPUs do twice as fast; states and distances never do."""
    return device.type == "cuda"


@torch.no_grad()
def assign_photo(
    model: FlowSeg, photo: Image.Image, short_side: int, steps: int, mode: Mode = "whole",
    flip: bool = False,
) -> Tensor:  # fmt: skip
    """Soft assignments (1, N, h, w) of a photo resized to `short_side`, averaged over its views.

    The views are the windows of `mode` and, with `flip`, their mirror images.
    """
    device = model.centroids.device
    image = to_input(photo, short_side).to(device)  # (1, 3, h, w)
    height, width = image.shape[2:]
    views = []  # (rows, columns, end state)
    with torch.autocast(device.type, torch.bfloat16, enabled=in_bfloat16(device)):  # the network alone
        for rows, columns in windows(height, width, mode, short_side):
            window = image[..., rows, columns]
            views.append((rows, columns, model.sample(window, steps)))
            if flip:
                mirrored = model.sample(window.flip(-1), steps)
                views.append((rows, columns, mirrored.flip(-1)))

    # The sum is large, so it is not allocated before the network has done its work.
    p = image.new_zeros(1, model.config.num_classes, height, width)
    for rows, columns, x in views:
        window = p[..., rows, columns]
        band_height = _band_height(p.device, model.config.num_classes * x.shape[3])
        for top in range(0, x.shape[2], band_height):
            band = slice(top, top + band_height)
            window[:, :, band] += model.soft_assignment(x[:, :, band])
    return p.div_(p.sum(1, keepdim=True))


def _band_height(device: torch.device, values_per_row: int) -> int:
    """Rows whose soft assignment is computed at a time: a GPU needs few and large products.

    A CPU takes a single row, which fits its cache. The last bits of a product depend on its size.
    """
    return 1 if device.type == "cpu" else max(1, BAND_VALUES // values_per_row)


@torch.no_grad()
def decode(p: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The most probable class (B, H, W) uint8 and its probability (B, H, W) at `size` = (H, W).

    p: (B, N, h, w). It is resized bilinearly, in bands of rows.
    """
    H, W = size
    B, N = p.shape[:2]
    labels = torch.empty(B, H, W, dtype=torch.uint8, device=p.device)
    confidence = torch.empty(B, H, W, device=p.device)
    centres_x = _pixel_centres(W, p.device)
    centres_y = _pixel_centres(H, p.device)
    band_height = max(1, BAND_VALUES // (B * N * W))
    for rows in torch.arange(H, device=p.device).split(band_height):
        grid = torch.stack(torch.meshgrid(centres_x, centres_y[rows], indexing="xy"), dim=-1)
        grid = grid.expand(B, -1, -1, -1)  # (B, rows, W, 2)
        band = F.grid_sample(p, grid, padding_mode="border", align_corners=False)  # (B, N, rows, W)
        confidence[:, rows], best = band.max(1)
        labels[:, rows] = best.byte()
    return labels, confidence


def _pixel_centres(length: int, device: torch.device) -> Tensor:
    """Where the pixels of an axis that runs from -1 to 1 have their centres, (length,)."""
    return (2 * torch.arange(length, device=device) + 1) / length - 1


def segment_photo(
    model: FlowSeg, photo: Image.Image | np.ndarray, short_side: int | None = None,
    steps: int | None = None, mode: Mode = "whole", flip: bool = False,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Train ids (H, W) uint8 of a photo and their probabilities (H, W) float32, at its own size.

    photo: an RGB image or an array (H, W, 3) uint8. short_side is by default that of the training
    crops, steps the number of Euler steps that the checkpoint was made for.
    """
    if not isinstance(photo, Image.Image):
        photo = Image.fromarray(photo)
    if steps is None:
        steps = model.config.steps
    p = assign_photo(model, photo, short_side_of(model, short_side), steps, mode, flip)
    labels, confidence = decode(p, photo.size[::-1])
    return labels[0].cpu().numpy(), confidence[0].cpu().numpy()


def read_ahead(read: Callable[[int], T], indices: Iterable[int]) -> Iterator[T]:
    """Yield read(index) of all indices in order, while another thread already reads the next one."""
    waiting: deque[Future] = deque()
    with ThreadPoolExecutor(1) as pool:
        for index in indices:
            waiting.append(pool.submit(read, index))
            if len(waiting) > 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
