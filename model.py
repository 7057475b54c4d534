"""FlowSeg: semantic segmentation as a flow from an image to a mask painted in category centroids.

The method is FlowSeg (arXiv 2603.19218), the network is PixNerd (arXiv 2507.23268) with an image path.
The file reads in this order: configuration, 1 encoding, 2 potential, 3 FlowSeg, 4 network, 5 files.

Symbols, each with one meaning:
    I        image, (B, 3, H, W) in [-1, 1]
    y        labels, (B, H, W) int64 in [0, N), 255 = ignore
    mu       centroids of the N classes, (N, dims)
    x0       source, the image followed by zero channels: the state at t = 0
    x1       mu[y], the mask painted in centroids: the state at t = 1
    x_t      a state on the way, (B, dims, H, W)
    v        velocity that the network predicts from x_t, t and I
    x1_hat   x_t + (1 - t) v, the end that the network aims at
    d_k      ||x1_hat - mu_k||^2, squared distance of a pixel to the centroid of class k
    p_k      softmax_k(-log(d_k + eps) / tau), soft assignment of a pixel to class k
    Phi      -log p_y, the potential of a pixel
Time, distances, potential and loss are float32, also where the network computes in bfloat16.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE = 255  # label of pixels that count neither in the loss nor in the metric; data.IGNORE is the same


@dataclass(frozen=True)
class ModelConfig:
    """Everything that determines the network and the flow; it is stored in every checkpoint."""

    num_classes: int  # N
    # The network; the defaults are the preset `tiny`.
    patch_size: int = 8  # P
    hidden_size: int = 128  # D, width of a token
    depth: int = 2  # transformer blocks
    num_heads: int = 4
    nerf_depth: int = 1  # blocks of the neural field
    nerf_width: int = 16  # Dx, width of a pixel inside the neural field
    nerf_mlp_ratio: int = 1  # r, expansion inside a block of the neural field
    conv_width: int = 24  # channels of the image encoder at full resolution
    tokens_of: str = "image"  # what the transformer reads: the image, once | state, at every step, as PixNerd
    # A public vision transformer beside it (flowseg_tools/dinov2.py), whose file tells its sizes; 0: none.
    vit_width: int = 0
    vit_depth: int = 12
    vit_patch: int = 14
    vit_grid: int = 37  # rows of patches that its positions were trained for
    vit_registers: int = 0  # tokens that belong to no patch
    finetune_encoder: bool = False  # train it, too
    # The flow. The paper has encoding kronecker, 3 dimensions, tau 1 and weight 1; docs/RESULTS.md compares.
    encoding: str = "coded"  # | kronecker
    encoding_dims: int = 0  # channels of the state; 0: 19, or 3 if kronecker
    objective: str = "reshaped"  # | vanilla: without the gradient of the potential
    eps: float = 3.0  # in units of the least squared distance between two centroids
    tau: float = 0.03  # at a centroid, its class is then e^10 times as probable as the next one
    phi_weight: float = 16.0  # of the potential beside the squared error
    later_share: float = 0.25  # of the images that are used a second time, at t > 0
    steps: int = 4  # Euler steps when the caller names none

    def __post_init__(self):
        check_ranges(self, MODEL_RANGES)
        if self.encoding_dims == 0:
            object.__setattr__(self, "encoding_dims", 3 if self.encoding == "kronecker" else 19)
        if self.patch_size & (self.patch_size - 1):
            raise ValueError(f"patch_size is {self.patch_size}; expected a power of two")
        if self.conv_width % 8:
            raise ValueError(f"conv_width is {self.conv_width}; expected a multiple of 8")
        if self.hidden_size % (4 * self.num_heads):
            expected = f"a multiple of 4 x {self.num_heads} heads"
            raise ValueError(f"hidden_size is {self.hidden_size}; expected {expected}")
        if self.encoding == "coded" and not self.num_classes <= 2 ** (self.encoding_dims - 3) <= 2**16:
            expected = f"{3 + (self.num_classes - 1).bit_length()} to 19 for {self.num_classes} classes"
            raise ValueError(f"encoding_dims is {self.encoding_dims}; expected {expected}")


MODEL_RANGES = {  # lowest and highest value of every number, or all words that are allowed
    "num_classes": (2, 255), "patch_size": (1, 64), "hidden_size": (4, 16_384), "depth": (0, 1000),
    "num_heads": (1, 1024), "nerf_depth": (0, 100), "nerf_width": (1, 4096), "nerf_mlp_ratio": (1, 64),
    "vit_width": (0, 4096), "vit_depth": (1, 100), "vit_patch": (1, 64), "vit_grid": (1, 1000),
    "vit_registers": (0, 100), "conv_width": (8, 4096), "encoding_dims": (0, 255),
    "tokens_of": ("image", "state"), "encoding": ("coded", "kronecker"),
    "objective": ("reshaped", "vanilla"), "eps": (1e-9, 1e6), "tau": (1e-4, 1e4),
    "phi_weight": (0.0, 1e6), "later_share": (0.0, 1.0), "steps": (1, 1000),
}  # fmt: skip


def check_ranges(config, ranges: dict[str, tuple]) -> None:
    """Raise ValueError for a field of another type than its range, or outside of it, as NaN always is."""
    for name, allowed in ranges.items():
        value = getattr(config, name)
        if isinstance(allowed[0], str):
            good = value in allowed
            expected = " or ".join(allowed)
        else:
            good = type(value) in (int, type(allowed[0])) and allowed[0] <= value <= allowed[1]
            kind = "a whole number" if isinstance(allowed[0], int) else "a number"
            expected = f"{kind} from {allowed[0]:,} to {allowed[1]:,}"
        if not good:
            raise ValueError(f"{name} is {value!r}; expected {expected}")


# 1 Encoding: a centroid for every class ------------------------------------------------------------------


def kronecker_centroids(num_classes: int, dims: int = 3) -> Tensor:
    """The paper's encoding: centroids (N, dims) float32 of a Kronecker sequence, scaled to [-1, 1].

    c_k = k (sqrt 2, sqrt 3, sqrt 5, ..) mod 1 for k = 1 .. N; each coordinate is then min-max normalised.
    """
    # The step of each coordinate is the square root of another prime.
    primes: list[int] = []
    candidate = 2
    while len(primes) < dims:
        if all(candidate % prime for prime in primes):
            primes.append(candidate)
        candidate += 1
    alphas = torch.tensor(primes, dtype=torch.float64).sqrt()

    # The sequence, in float64, because the product k sqrt(prime) is taken modulo 1.
    c = torch.arange(1, num_classes + 1, dtype=torch.float64)[:, None] * alphas % 1  # (N, dims)
    low, high = c.aminmax(dim=0)
    return (2 * (c - low) / (high - low).clamp_min(1e-12) - 1).float()


def coded_centroids(num_classes: int, dims: int) -> Tensor:
    """The default encoding: centroids (N, dims) float32, three class colours followed by a code word.

    The colours are the paper's centroids in 3 dimensions. The words of dims - 3 letters -1 or 1 differ in as
    many places as possible, so that all centroids lie about equally far from each other: of 16 letters, 32
    words differ in at least 8 of them, 128 in 6, 255 in 5 (a lexicode: Conway and Sloane, 1986).
    The first 16 of these words are orthogonal. Words of 8 letters would serve 16 classes, but in opposite
    pairs: a pixel undecided between the two of a pair would lie in the middle of all classes.
    """
    # All words in lexicographic order: the bits of 0, 1, 2, .., as letters -1 and 1.
    length = dims - 3
    bits = torch.arange(length - 1, -1, -1)
    letters = torch.arange(2**length)[:, None] >> bits & 1
    words = 2.0 * letters - 1  # (2^length, length)

    # The largest distance at which there are enough words.
    for distance in range(length, 0, -1):
        # Take each word that differs from all those taken before in at least `distance` places.
        chosen: list[int] = []
        free = torch.ones(len(words), dtype=torch.bool)
        while len(chosen) < num_classes and free.any():
            chosen.append(int(free.byte().argmax()))  # the first that is free
            free &= words @ words[chosen[-1]] <= length - 2 * distance  # equal minus different places
        if len(chosen) == num_classes:
            break
    return torch.cat([kronecker_centroids(num_classes, 3), words[chosen]], dim=1)


def least_spacing(centroids: Tensor) -> float:
    """The least squared distance between two of the centroids (N, dims)."""
    return float(torch.pdist(centroids.double()).min().square())


kronecker = kronecker_centroids  # the short names that scripts may import
Config = ModelConfig

# 2 Potential: its gradient attracts a pixel to its own centroid and repels it from all others ------------

CHUNK_CPU = 2**17  # distances computed at a time: half a megabyte of float32 stays in the cache of a core
CHUNK_GPU = 2**22  # 16 MB of float32 keep a GPU busy and are small beside its memory
LEAST_LOGIT = -60.0  # e^-60 is nothing beside 1; lower logits would make slow denormal numbers


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Arithmetic in the type of the tensors, also under autocast; the meta device does not know autocast."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Matrix products in full float32, whatever autocast or the user's choice of TF32 would make of them."""
    backend = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul
    chosen = backend.fp32_precision
    if chosen in ("tf32", "bf16"):
        backend.fp32_precision = "ieee"
    try:
        with without_autocast(device):
            yield
    finally:
        if chosen in ("tf32", "bf16"):
            backend.fp32_precision = chosen


def squared_distances(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances d (N, M) of centroids (N, dims) to pixels x (M, dims), and the nearest class (1, M).

    |mu|^2 - 2 mu.x + |x|^2 is one fast product, but it cancels near a centroid, exactly where 1 / (d + eps)
    matters. Therefore the least distance is taken again, by direct differences.
    """
    with exact_float32(x.device):
        return _squared_distances(x, centroids)


def _squared_distances(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """The same where the caller has already asked for exact products, so that it compiles as one graph."""
    d = torch.addmm(centroids.square().sum(1, keepdim=True), centroids, x.T, alpha=-2)
    d += x.square().sum(1)
    _, nearest = d.min(0, keepdim=True)  # five times as fast as argmin on a CPU
    exact = (x - centroids[nearest[0]]).square().sum(1)
    return d.scatter_(0, nearest, exact[None]), nearest


@torch.no_grad()
def potential_gradient(
    x: Tensor, labels: Tensor, centroids: Tensor, eps: float, tau: float = 1.0,
    of_chunk: Callable | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The potential Phi = -log p_y of pixels and its gradient in x, where p = softmax(-log(d + eps) / tau).

    x: (M, dims); labels: (M,) int64 in [0, N); returns phi (M,) and grad (M, dims), float32, or float64 if x
    is. Pixels are processed in chunks, so memory does not grow with the image. of_chunk: a compiled
    `potential_of_chunk`.
    """
    of_chunk = of_chunk or potential_of_chunk
    x = x if x.dtype == torch.float64 else x.float()
    mu = centroids.to(x)
    chunk = max(1, (CHUNK_CPU if x.device.type == "cpu" else CHUNK_GPU) // len(mu))  # pixels
    phi = x.new_empty(len(x))
    grad = torch.empty_like(x)
    with exact_float32(x.device):
        for start in range(0, len(x), chunk):
            part = slice(start, start + chunk)
            phi[part], grad[part] = of_chunk(x[part], labels[None, part], mu, eps, tau)
    return phi, grad


def potential_of_chunk(x: Tensor, y: Tensor, mu: Tensor, eps: float, tau: float) -> tuple[Tensor, Tensor]:
    """Phi (M,) and its gradient (M, dims) for x (M, dims), y (1, M), mu (N, dims). With s_k = d_k + eps:

    grad Phi = (2 / tau) [ (1 - p_y) (x - mu_y) / s_y  -  sum over k != y of p_k (x - mu_k) / s_k ]
                           attraction to the label        repulsion from the other classes
    """
    # The soft assignment, from distances.
    d, nearest = _squared_distances(x, mu)  # (N, M), (1, M)
    s = d.add_(eps)  # (N, M)
    logits = s.log().neg_()  # (N, M)
    logits = logits.sub_(logits.gather(0, nearest)).div_(tau)  # the largest is 0
    logit_y = logits.gather(0, y)  # (1, M)
    p = logits.clamp_min_(LEAST_LOGIT).softmax(0)  # (N, M)

    # The logit of the nearest class is 0, so log p_nearest is minus the log of the softmax's denominator.
    phi = -(logit_y + p.gather(0, nearest).log())[0]  # (M,)

    # The two terms of the gradient.
    attraction = ((1 - p.gather(0, y)) / s.gather(0, y)).T * (x - mu[y[0]])  # (M, dims)
    w = p.div_(s).scatter_(0, y, 0)  # (N, M): p_k / s_k of the other classes
    repulsion = w.sum(0)[:, None] * x - w.T @ mu  # (M, dims), without the (M, N, dims) of all x - mu_k
    return phi, (2 / tau) * (attraction - repulsion)


# 3 FlowSeg: source, loss, sampler, decoding --------------------------------------------------------------

Generator = torch.Generator | list[torch.Generator] | None  # one for the batch, or one for each image


def draw_random(kind: Callable, shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Random numbers (B, ..) by kind = torch.rand or randn, drawn on the CPU: equal for every device."""
    if isinstance(generator, list):
        return torch.stack([kind(shape[1:], generator=own) for own in generator])
    return kind(shape, generator=generator)


def time_left(t: Tensor) -> Tensor:
    """1 - t as (B, 1, 1, 1), which broadcasts; at least 1e-3, where the last Euler step of 1000 begins."""
    return (1 - t).clamp_min(1e-3)[:, None, None, None]


class FlowSeg(nn.Module):
    """The network with its centroids: training loss, sampler and decoding."""

    compiled_potential: Callable | None = None  # of a chunk, if speed.compile_parts has made one

    def __init__(self, config: ModelConfig, network: nn.Module | None = None):
        super().__init__()
        self.config = config
        self.network = network or Network(config)
        encode = {"coded": coded_centroids, "kronecker": kronecker_centroids}[config.encoding]
        with torch.device("cpu"):  # also where the network is built on the meta device, without values
            mu = encode(config.num_classes, config.encoding_dims)
        self.register_buffer("centroids", mu, persistent=False)  # (N, dims)
        self.eps = config.eps * least_spacing(mu)
        self.info = CheckpointInfo()

    def velocity(self, x: Tensor, t: Tensor, image: Tensor) -> Tensor:
        """v (B, dims, H, W) float32 at x (B, dims, H, W) and t (B,) in [0, 1), given an image (B, 3, H, W) in
        [-1, 1] whose sides are multiples of the patch size. ValueError: another shape."""
        self._check(image)
        B, _, H, W = image.shape
        P = self.config.patch_size
        shape = (B, self.config.encoding_dims, H, W)
        if H % P or W % P:
            raise ValueError(f"image is {H} x {W}; expected multiples of the patch size {P} (`sample` pads)")
        if x.shape != shape or t.shape != (B,):
            raise ValueError(f"x is {tuple(x.shape)}, t {tuple(t.shape)}; expected {shape} and ({B},)")
        return self._velocity(x, t, self.network.encode_image(image))

    def _velocity(self, x_t: Tensor, t: Tensor, features: "Features") -> Tensor:
        return self.network(x_t, t, features)

    def source(self, image: Tensor) -> Tensor:
        """x0 (B, dims, H, W): the image followed by zero channels; in memory the channels come last."""
        x0 = F.pad(image.movedim(1, -1), (0, self.config.encoding_dims - image.shape[1]))
        return x0.contiguous().movedim(-1, 1)

    def encode_labels(self, labels: Tensor) -> Tensor:
        """x1 = mu[y] (B, dims, H, W); ignored pixels get the centroid of class 0 and must be masked."""
        return self.centroids[labels.where(labels != IGNORE, 0)].movedim(-1, 1)

    def potential(self, x1_hat: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Phi (B, 1, H, W) and its gradient (B, dims, H, W); ignored pixels count as class 0."""
        y = labels.where(labels != IGNORE, 0).flatten()  # (B H W,)
        pixels = x1_hat.movedim(1, -1).flatten(0, 2)  # (B H W, dims)
        constants = (self.centroids, self.eps, self.config.tau)
        phi, grad = potential_gradient(pixels, y, *constants, self.compiled_potential)
        return phi.view_as(labels)[:, None], grad.view(*labels.shape, -1).movedim(-1, 1)

    def loss(
        self, image: Tensor, labels: Tensor, generator: Generator = None, count: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Reshaped flow matching without the label leak: the loss and detached diagnostics.

        image: (B, 3, H, W) float in [-1, 1]; labels: (B, H, W) int64 in [0, N), 255 = ignore. All values are
        means over `count` pixels, by default the labelled pixels of this batch: given the count of a larger
        batch, the losses of its parts add up to that of the whole.

        With x0 = I, a state (1 - t) x0 + t mu[y] would hand the network the label: I is known, so mu[y] can
        be solved for. Sampling has no label and would never visit such a state. Therefore no state is made
        from the truth. Every image is used at t = 0, where the state is the image itself, and a random share
        of the images a second time, at a uniform t on the straight line to the end that the network aimed at
        from there, where sampling goes:

            x1_hat = x0 + v(x0, 0), without gradient;   x_t = (1 - t) x0 + t x1_hat
            loss = R(x0, 0) + R(x_t, t), where every state counts the same

        R is the paper's |v - stopgrad(v_gt - grad Phi)|^2, measured in the end instead of the velocity, since
        the velocity that is needed grows like 1 / (1 - t). The potential has a weight w beside the squared
        error, of which the paper's is 1: R has the gradient of |x1_hat - mu[y]|^2 + 2 w Phi(x1_hat).

            R = mean over pixels and channels of |x1_hat - stopgrad(mu[y] - w grad Phi(x1_hat))|^2

        With an eps below the distances of centroids, the pull 2 / tau (x1_hat - mu[y]) / (d_y + eps) would be
        weaker at a wrong centroid than half way. With the default it grows as far as centroids lie.
        """
        # What is random: the time of every image, and which of them are used at that time, too.
        self._check(image, labels)
        count = ((labels != IGNORE).sum() if count is None else count).clamp_min(1)
        t, choice = draw_random(torch.rand, (len(image), 2), generator).unbind(1)  # on the CPU
        chosen = (choice < self.config.later_share).nonzero()[:, 0].to(image.device, non_blocking=True)
        t = t.to(image, non_blocking=True)

        # The first state: the image itself.
        x0 = self.source(image)
        features = self.network.encode_image(image)
        loss, stats, x1_hat = self._loss_at(x0, torch.zeros_like(t), features, labels, count)

        # The second state of a random share of the images; it counts like any other.
        if len(chosen):
            t = t[chosen]
            x_t = x0[chosen].lerp(x1_hat[chosen], 1 - time_left(t))
            features = Features(*(values[chosen] for values in features))
            later, _, _ = self._loss_at(x_t, t, features, labels[chosen], count)
            loss = loss + later
        return loss, stats

    def _loss_at(
        self, x_t: Tensor, t: Tensor, features: "Features", labels: Tensor, count: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """R and diagnostics at one state per image, and the detached x1_hat (B, dims, H, W)."""
        # The end that the network aims at, its error, and the correction of its target.
        dims = self.config.encoding_dims
        x1_hat = torch.addcmul(x_t, time_left(t), self._velocity(x_t, t, features))
        error = x1_hat - self.encode_labels(labels)  # = (1 - t) (v - v_gt)
        phi, grad = self.potential(x1_hat.detach(), labels)
        residual = error
        if self.config.objective == "reshaped":
            residual = error.add(grad, alpha=self.config.phi_weight)

        # The mean over labelled pixels and channels; `count` may be that of a larger batch.
        valid = (labels != IGNORE)[:, None]  # (B, 1, H, W)
        loss = (residual.square().sum(1, keepdim=True) * valid).sum() / (count * dims)

        # Diagnostics, as means over the same pixels.
        fm_error = error.detach().norm(dim=1, keepdim=True).square() / dims  # (B, 1, H, W)
        maps = {"fm_error": fm_error, "phi": phi, "grad_phi": grad.norm(dim=1, keepdim=True)}
        stats = {name: (values * valid).sum() / count for name, values in maps.items()}
        return loss, stats, x1_hat.detach()

    @torch.no_grad()
    def trajectory(
        self, image: Tensor, steps: int | None = None, velocity: Callable | None = None
    ) -> Iterator[Tensor]:
        """The states x (B, dims, H, W) of S = `steps` Euler steps x <- x + v(x, i / S) / S, from x0 to x1.

        image: (B, 3, H, W) float in [-1, 1] of any size; its sides are padded to multiples of the patch size.
        velocity: a callable (x, t) that takes the place of the network.
        """
        self._check(image)
        steps = self.config.steps if steps is None else steps
        if steps < 1:
            raise ValueError(f"steps is {steps}; expected at least 1")

        # The network takes whole patches; what is padded is cut off again.
        H, W = image.shape[-2:]
        P = self.config.patch_size
        image = F.pad(image, (0, -W % P, 0, -H % P), mode="replicate")

        # The image is read once, for all steps.
        velocity = velocity or partial(self._velocity, features=self.network.encode_image(image))
        x = self.source(image)
        yield x[..., :H, :W]
        for i in range(steps):
            t = torch.full((len(x),), i / steps, device=x.device)
            x = x + velocity(x, t) / steps
            yield x[..., :H, :W]

    def sample(self, image: Tensor, steps: int | None = None, velocity: Callable | None = None) -> Tensor:
        """The last state x1 (B, dims, H, W) of `trajectory`: the same image always gives the same mask."""
        *_, x = self.trajectory(image, steps, velocity)
        return x

    def segment(self, image: Tensor, steps: int | None = None) -> Tensor:
        """Train ids (B, H, W) int64 of images (B, 3, H, W) float in [-1, 1]."""
        return self.soft_assignment(self.sample(image, steps)).argmax(1)

    @torch.no_grad()
    def soft_assignment(self, x: Tensor) -> Tensor:
        """p_k (B, N, H, W) float32 of states x (B, dims, H, W); 0 for classes that training never saw."""
        pixels = x.movedim(1, -1).flatten(0, 2).float()  # (B H W, dims)
        logits = (squared_distances(pixels, self.centroids)[0] + self.eps).log() / -self.config.tau
        for name in self.info.unseen:  # undecided pixels may end near its centroid
            logits[self.info.classes.index(name)] = -math.inf
        return logits.softmax(0).view(-1, len(x), *x.shape[2:]).movedim(0, 1)

    def _check(self, image: Tensor, labels: Tensor | None = None) -> None:
        """Raise ValueError for another shape, type or, on the CPU, where looking costs little, label."""
        if image.ndim != 4 or image.shape[1] != 3 or not image.is_floating_point():
            given = f"{tuple(image.shape)} {image.dtype}"
            raise ValueError(f"image is {given}; expected (B, 3, H, W) float in [-1, 1]")
        if labels is None:
            return
        if labels.shape != image[:, 0].shape or labels.dtype != torch.int64:
            given = f"{tuple(labels.shape)} {labels.dtype}"
            raise ValueError(f"labels are {given}; expected {tuple(image[:, 0].shape)} torch.int64")
        last = self.config.num_classes - 1
        if labels.device.type == "cpu" and (highest := labels.where(labels != IGNORE, 0).max()) > last:
            raise ValueError(f"labels run to {highest}; expected 0..{last} or {IGNORE}")

    def save(self, path: str | Path, write: Callable | None = None, **metadata) -> None:
        """Write the weights atomically as .safetensors; metadata: fields of CheckpointInfo."""
        facts = {"format": FORMAT, "config": asdict(self.config), **asdict(self.described(metadata))}
        (write or write_tensors)(self.stored(), path, facts)

    def described(self, facts: dict) -> "CheckpointInfo":
        """What a checkpoint of this model says of itself. ValueError: a wrong value, or too few classes."""
        info = CheckpointInfo(**facts)
        if len(info.classes) not in (0, self.config.num_classes):
            raise ValueError(f"{len(info.classes)} classes; the network has {self.config.num_classes}")
        return info

    def stored(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint holds."""
        return self.state_dict()

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "FlowSeg":
        """The model that `save` wrote, in eval mode. CheckpointError: any other file.

        Nothing that a file says is believed unchecked: its tensors are read only after the network was built
        without values and has the same names and shapes.
        """
        try:
            if not Path(path).is_file():
                raise CheckpointError(f"{path} is no file; pass one from `flowseg train`")
            with safe_open(path, "pt") as file:
                # The configuration, and the network that it describes, without values.
                facts = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
                if facts.pop("format", None) != FORMAT:
                    reason = f"is no FlowSeg checkpoint or an older one; expected {FORMAT}"
                    raise CheckpointError(f"{path} {reason} from this version's `flowseg train`")
                config = ModelConfig(**facts.pop("config", {}))
                if config.vit_width and cls is FlowSeg:
                    raise CheckpointError(f"{path} has a DINOv2 encoder; read it with DinoFlowSeg.load")
                with torch.device("meta"):
                    model = cls(config)
                model.info = model.described(facts)

                # Names and shapes are compared before any tensor is read.
                shapes = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
                if shapes != {name: tensor.shape for name, tensor in model.state_dict().items()}:
                    raise ValueError("its tensors are not those of its configuration")
                weights = {name: file.get_tensor(name) for name in shapes}
            if listed := tensor_faults(weights, model.state_dict()):
                raise ValueError(listed)
        except (SafetensorError, OSError, TypeError, ValueError, RuntimeError, RecursionError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            fix = "move it away, or pass another from `flowseg train`"
            raise CheckpointError(f"{path} is damaged ({reason}); {fix}") from error
        model.load_state_dict(weights, assign=True)
        return model.to(device).eval()


# 4 Network: PixNerd with an image path -------------------------------------------------------------------
#
# A transformer reads patches of P x P pixels. Each of its tokens then generates the weights of a small
# neural field, which renders the velocity of the pixels in that token's own patch from their states.
# PixNerd's tokens read the state x_t, at every step of the flow. By default ours read the image instead,
# and what a convolutional encoder sees in it: then they are computed once, and a step is the field alone.
# Shapes: L = H/P W/P tokens of width D, P P pixels in a patch, width Dx inside the neural field.


class Features(NamedTuple):
    """What is computed once per image, for every step of the flow."""

    tokens: Tensor  # (B, L, D), the tokens; where they are of the state, what the image adds to them
    queries: Tensor  # (B, L, P P, Dx), added to the pixel queries of the neural field
    velocity: Tensor  # (B, dims, H, W), added to the velocity


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last dimension, in float32."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda or not torch.is_grad_enabled():
            return super().forward(x.float()).to(x.dtype)
        return Normed.apply(x.float(), self.weight, self.eps).to(x.dtype)


class Normed(torch.autograd.Function):
    """The same with a gradient written out: three times as fast on a CPU, where PyTorch has no kernel for it,
    as it has on CUDA, and passes over all pixels many times."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]
        scale = (mean_square + eps).rsqrt()
        unit = x * scale
        ctx.save_for_backward(unit, scale, weight)
        return unit * weight

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """With n = x / rms: grad_x = (g w - n mean(g w n)) / rms and grad_w = sum of g n over all vectors."""
        unit, scale, weight = ctx.saved_tensors
        product = grad * unit
        mean = product @ weight[:, None] / len(weight)
        grad_x = (grad * weight).addcmul_(unit, mean, value=-1).mul_(scale)
        return grad_x, product.flatten(0, -2).sum(0), None


def rotary_angles(height: int, width: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine (L, head_dim / 2) of the 2-D rotary embedding. Positions run from 0 to 16 on a grid of
    any size, as PixNerd's weights expect."""
    frequency = 10000 ** -(torch.arange(0, head_dim, 4, device=device) / head_dim)  # (h/4,)
    x = torch.linspace(0, 16, width, device=device).repeat(height)  # (L,)
    y = torch.linspace(0, 16, height, device=device).repeat_interleave(width)  # (L,)
    angle = torch.stack([x[:, None] * frequency, y[:, None] * frequency], dim=-1)  # (L, h/4, 2)
    return angle.flatten(1).cos(), angle.flatten(1).sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn interleaved pairs of the last dimension: x (B, heads, L, h), cos and sin (L, h / 2)."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Self-attention with RMS-normalised, rotated queries and keys."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.q_norm = RMSNorm(hidden_size // num_heads, eps=1e-6)
        self.k_norm = RMSNorm(hidden_size // num_heads, eps=1e-6)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # Queries, keys and values; the first two know their positions.
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, L, 3, heads, h)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, L, h) each
        q = rotate(self.q_norm(q), cos, sin)
        k = rotate(self.k_norm(k), cos, sin)
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).flatten(2))  # (B, L, D)


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x), with as many weights as an MLP of inner width 4 D has in its two matrices."""

    def __init__(self, hidden_size: int):
        super().__init__()
        inner = int(2 / 3 * 4 * hidden_size)
        self.w1 = nn.Linear(hidden_size, inner, bias=False)
        self.w2 = nn.Linear(inner, hidden_size, bias=False)
        self.w3 = nn.Linear(hidden_size, inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Transformer block whose norms are shifted, scaled and gated by the condition c (adaLN)."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.norm1 = RMSNorm(hidden_size, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = RMSNorm(hidden_size, eps=1e-6)
        self.mlp = SwiGLU(hidden_size)
        self.modulation = nn.Linear(hidden_size, 6 * hidden_size)

    def forward(self, x: Tensor, c: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        modulation = self.modulation(c)[:, None]  # (B, 1, 6 D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, cos, sin)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class NerfBlock(nn.Module):
    """Residual MLP over the pixels of a patch, whose two matrices are generated by the patch's token."""

    def __init__(self, hidden_size: int, width: int, ratio: int):
        super().__init__()
        self.norm = RMSNorm(width, eps=1e-6)
        self.param_generator = nn.Linear(hidden_size, 2 * width * ratio * width)

    def forward(self, q: Tensor, s: Tensor) -> Tensor:
        """q: (B, L, P P, Dx), the pixels of the patches; s: (B, L, D), their tokens."""
        width = q.shape[-1]
        w1, w2 = self.param_generator(s).chunk(2, dim=-1)  # (B, L, Dx r Dx) each
        w1 = F.normalize(w1.unflatten(-1, (width, -1)), dim=-2)  # (B, L, Dx, r Dx), unit columns
        w2 = F.normalize(w2.unflatten(-1, (-1, width)), dim=-2)  # (B, L, r Dx, Dx)

        # A batched product: every patch has matrices of its own.
        return q + F.silu(self.norm(q) @ w1) @ w2  # (B, L, P P, Dx)


def conv_block(channels_in: int, channels: int, stride: int = 1) -> nn.Sequential:
    """Two 3 x 3 convolutions, each with group norm and SiLU."""
    layers: list[nn.Module] = []
    for inputs, step in ((channels_in, stride), (channels, 1)):
        layers += [nn.Conv2d(inputs, channels, 3, step, 1, bias=False), nn.GroupNorm(8, channels), nn.SiLU()]
    return nn.Sequential(*layers)


def map_pixels(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear map of the channels of x (B, C, H, W): faster than a 1 x 1 convolution if they come last."""
    return layer(x.movedim(1, -1)).movedim(-1, 1)


class ImageEncoder(nn.Module):
    """Convolutional pyramid with a top-down path, as in a feature pyramid network; it runs once per image.

    Level i has stride 2^i. On the way back each level is mapped to the width of the finer one before it is
    enlarged, and added to it, so that little is computed at full resolution.
    """

    def __init__(self, widths: list[int]):
        super().__init__()
        self.down = nn.ModuleList([conv_block(3, widths[0])])
        self.down.extend(conv_block(fine, coarse, stride=2) for fine, coarse in pairwise(widths))
        lateral = (nn.Linear(coarse, fine, bias=False) for fine, coarse in pairwise(widths))
        self.lateral = nn.ModuleList(lateral)
        self.up = nn.ModuleList(conv_block(fine, fine) for fine in widths[:-1])

    def forward(self, image: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> the levels (B, widths[i], H / 2^i, W / 2^i), from fine to coarse."""
        # Down: every level halves the resolution of the one before.
        x = image.contiguous(memory_format=torch.channels_last)  # twice as fast on a CPU
        levels = []
        for block in self.down:
            x = block(x)
            levels.append(x)

        # Up: every level is added to the finer one.
        for i in reversed(range(len(self.up))):
            narrow = map_pixels(self.lateral[i], levels[i + 1])
            wide = F.interpolate(narrow, scale_factor=2, mode="bilinear")
            levels[i] = self.up[i](wide + levels[i])
        return levels


def pixels_of_patches(x: Tensor, size: int) -> Tensor:
    """(B, C, H, W) -> (B, L, P P, C), patches and their pixels in row-major order."""
    rows = x.movedim(1, -1).unflatten(2, (-1, size)).unflatten(1, (-1, size))  # (B, H/P, P, W/P, P, C)
    return rows.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def image_of_patches(pixels: Tensor, height: int, width: int) -> Tensor:
    """(B, L, P P, C) -> (B, C, H, W), the inverse of `pixels_of_patches`; channels come last in memory."""
    size = int(pixels.shape[2] ** 0.5)
    rows = pixels.unflatten(2, (size, size)).unflatten(1, (height // size, width // size))
    return rows.transpose(2, 3).flatten(3, 4).flatten(1, 2).movedim(-1, 1)


def cosine_basis(size: int, device: torch.device) -> Tensor:
    """Positions of the pixels in a patch (P P, 64): cos(pi fx px) cos(pi fy py) / (1 + fx fy). The eight
    frequencies are linspace(0, 8, 8) and so no whole numbers, as PixNerd's weights expect."""
    position = torch.linspace(0, 1, size, device=device)  # (P,)
    f = torch.linspace(0, 8, 8, device=device)
    wave = (math.pi * position[:, None] * f).cos()  # (P, 8)
    basis = wave[None, :, :, None] * wave[:, None, None, :] / (1 + f[:, None] * f)  # (py, px, fx, fy)
    return basis.flatten(2).flatten(0, 1)


class Network(nn.Module):
    """PixNerd: a transformer over patches, each of whose tokens generates a neural field for its pixels.

    `encode_image` reads the image once; `forward` maps x_t and t to the velocity, given those features.
    With tokens_of = "state" and an image path of zeros this is PixNerd itself.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # recompute activations in the backward pass to save memory
        P = config.patch_size
        D = config.hidden_size
        dims = config.encoding_dims
        width = config.nerf_width

        # PixNerd.
        channels_read = 3 if config.tokens_of == "image" else dims
        self.patch_embed = nn.Linear(channels_read * P * P, D)
        self.time_mlp = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        self.null_class = nn.Parameter(torch.zeros(D))
        self.blocks = nn.ModuleList(Block(D, config.num_heads) for _ in range(config.depth))
        self.pixel_embed = nn.Linear(dims + 64, width)  # of [x_t(i, j), cosine_basis(i, j)]
        nerf_blocks = (NerfBlock(D, width, config.nerf_mlp_ratio) for _ in range(config.nerf_depth))
        self.nerf_blocks = nn.ModuleList(nerf_blocks)
        self.head_norm = RMSNorm(width, eps=1e-6)
        self.head = nn.Linear(width, dims)

        # The image path: levels at strides 1, 2, 4, .., P, and a velocity at each of them.
        growth = [1, 2, 4, 6, 6, 6, 6]
        widths = [config.conv_width * growth[level] for level in range(P.bit_length())]
        self.image_encoder = ImageEncoder(widths)
        self.image_to_token = nn.Linear(widths[-1], D, bias=False)
        self.image_to_pixel = nn.Linear(widths[0], width, bias=False)
        heads = (nn.Linear(channels, dims, bias=False) for channels in widths[:-1])
        self.image_to_velocity = nn.ModuleList(heads)
        self.token_to_velocity = nn.Linear(D, dims, bias=False)

        # Blocks start as the identity and whatever is added to the velocity at zero, as in DiT. Of the state,
        # a pixel query begins with its colours, as where weights of PixNerd are extended to more channels.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in self.blocks:
            nn.init.zeros_(block.modulation.weight)
        for layer in (self.head, self.token_to_velocity, *self.image_to_velocity):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.pixel_embed.weight[:, 3:dims])

    def encode_image(self, image: Tensor) -> Features:
        """What is computed once for images (B, 3, H, W), whose sides are multiples of P."""
        P = self.config.patch_size
        levels = self.image_encoder(image)
        grid = levels[-1].shape[2:]
        tokens = self.tokens_of_image(image, levels[-1])

        # The transformer, if it reads the image: the source x0 is the image, and t is 0.
        if self.config.tokens_of == "image":
            time = self.embed_time(image.new_zeros(1))
            tokens = self.transform(pixels_of_patches(image, P), time, grid, tokens)
            velocity = self.coarse_velocity(tokens, grid)
        else:
            velocity = image.new_zeros(len(image), self.config.encoding_dims, *grid)

        # A velocity from coarse to fine, as a Laplacian pyramid: every level refines the enlarged one before.
        for i in reversed(range(len(levels) - 1)):
            wide = F.interpolate(velocity, scale_factor=2, mode="bilinear")
            velocity = wide + map_pixels(self.image_to_velocity[i], levels[i])

        # Positions enter the pixel queries linearly and are the same at every step, so they are added here.
        pixels = pixels_of_patches(levels[0], P)  # (B, L, P P, C)
        position_weight = self.pixel_embed.weight[:, self.config.encoding_dims :]  # (Dx, 64)
        position = cosine_basis(P, image.device) @ position_weight.T  # (P P, Dx)
        return Features(tokens, self.image_to_pixel(pixels) + position, velocity)

    def tokens_of_image(self, image: Tensor, coarse: Tensor) -> Tensor:
        """What images (B, 3, H, W) add to their tokens (B, L, D): the encoder's coarsest level, mapped."""
        return self.image_to_token(coarse.flatten(2).transpose(1, 2))

    def transform(self, pixels: Tensor, time: Tensor, grid: tuple[int, int], tokens: Tensor) -> Tensor:
        """The transformer on a grid of patches with pixels (B, L, P P, C) and what is added to their tokens
        (B, L, D), under the condition of the time's embedding (B, D) -> tokens (B, L, D)."""
        channels = pixels.shape[-1]
        weight = self.patch_embed.weight.unflatten(1, (channels, -1))
        weight = weight.transpose(1, 2).flatten(1)  # pixels first
        tokens = F.linear(pixels.flatten(2), weight, self.patch_embed.bias) + tokens
        condition = F.silu(time + self.null_class)
        cos, sin = rotary_angles(*grid, self.config.hidden_size // self.config.num_heads, pixels.device)
        for block in self.blocks:
            tokens = self._run(block, tokens, condition, cos, sin)
        return tokens

    def coarse_velocity(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """What tokens (B, L, D) say at once about their patches, without a neural field: (B, dims, h, w)."""
        return self.token_to_velocity(tokens).unflatten(1, grid).movedim(-1, 1)

    def embed_time(self, t: Tensor) -> Tensor:
        """Embedding (B, D) of t (B,) in [0, 1], in float32 also under autocast. The largest period is 10
        instead of the usual 10,000, as PixNerd never scales t up."""
        frequency = torch.exp(-math.log(10) / 128 * torch.arange(128, device=t.device))
        angle = t.float()[:, None] * frequency  # (B, 128)
        with without_autocast(t.device):
            return self.time_mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))

    def forward(self, x: Tensor, t: Tensor, features: Features) -> Tensor:
        """The velocity (B, dims, H, W) float32 at x (B, dims, H, W) and t (B,) in [0, 1]."""
        H, W = x.shape[2:]
        P = self.config.patch_size
        grid = (H // P, W // P)
        pixels = pixels_of_patches(x, P)  # (B, L, P P, C)
        time = self.embed_time(t)  # (B, D)
        velocity = features.velocity.float()

        # The transformer, if it reads the state.
        tokens = features.tokens  # (B, L, D)
        if self.config.tokens_of == "state":
            tokens = self.transform(pixels, time, grid, tokens)
            coarse = self.coarse_velocity(tokens, grid).float()
            velocity = velocity + F.interpolate(coarse, scale_factor=P, mode="bilinear")

        # The neural field: every token generates the weights that render its own P x P pixels.
        s = F.silu(time[:, None] + tokens)  # (B, L, D)
        out = self._run(self.render_patches, pixels, s, features.queries)  # (B, L, P P, C)
        return image_of_patches(out.float(), H, W) + velocity

    def render_patches(self, x: Tensor, s: Tensor, queries: Tensor) -> Tensor:
        """The neural fields of tokens s (B, L, D) at their pixels: states x (B, L, P P, C) and what the image
        adds to the queries -> velocity (B, L, P P, C)."""
        state_weight = self.pixel_embed.weight[:, : x.shape[-1]]
        q = F.linear(x, state_weight, self.pixel_embed.bias) + queries  # (B, L, P P, Dx)
        for block in self.nerf_blocks:
            q = block(q, s)
        return self.head(self.head_norm(q))

    def _run(self, function: Callable, *inputs: Tensor) -> Tensor:
        """function(*inputs); its activations are kept for the backward pass, or recomputed there."""
        if self.activation_checkpointing:
            return checkpoint(function, *inputs, use_reentrant=False)
        return function(*inputs)


# 5 Files: weights as .safetensors, with metadata as JSON strings -----------------------------------------

FORMAT = "flowseg-3"
HEX_COLOR = re.compile("#[0-9a-f]{6}")


class CheckpointError(Exception):
    """A file of weights that cannot be used; the message is one line and says what to do."""

    exit_code = 5


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says besides its weights and their configuration. ValueError: a wrong value."""

    classes: tuple[str, ...] = ()  # names in the order of train ids; none: a backbone, which cannot segment
    ids: tuple[int | str, ...] = ()  # raw mask value of each class, a number or a colour "#rrggbb"
    ignore: tuple[int | str, ...] = ()  # raw mask values that are ignored
    colors: tuple[str, ...] = ()  # "#rrggbb" of each class in pictures; none: those of the centroids
    clear: tuple[str, ...] = ()  # classes that overlays leave as they are
    unseen: tuple[str, ...] = ()  # classes that no label had in training; they are never answered
    dataset: str = ""  # a name, or the absolute path of a folder
    root: str = ""  # data root of a named data set
    crop_size: int = 0  # side of the training crop; evaluation makes it the short side
    step: int = 0
    mIoU: float | None = None  # validation scores at that step, in [0, 1]
    aAcc: float | None = None
    mAcc: float | None = None
    protocol: dict = field(default_factory=dict)  # how the scores were measured
    environment: dict = field(default_factory=dict)  # versions and commit

    def __post_init__(self):
        # Lists: their types, and no value twice.
        for name in ("classes", "ids", "ignore", "colors", "clear", "unseen"):
            kinds = (int, str) if name in ("ids", "ignore") else (str,)
            values = getattr(self, name)
            good = type(values) in (list, tuple) and all(type(value) in kinds for value in values)
            if not good or (name != "colors" and len(set(values)) < len(values)):
                expected = " or ".join(kind.__name__ for kind in kinds)
                raise ValueError(f"{name} is {values!r}; expected a list of different values, {expected}")
            object.__setattr__(self, name, tuple(values))  # JSON has lists only
            for value in values if name in ("ids", "ignore", "colors") else ():
                if type(value) is str and not HEX_COLOR.fullmatch(value):
                    raise ValueError(f"{name} has {value!r}; colours are written '#rrggbb'")

        # What belongs together.
        if len(self.classes) != len(self.ids) or len(self.colors) not in (0, len(self.classes)):
            counts = f"{len(self.ids)} ids and {len(self.colors)} colours for {len(self.classes)} classes"
            raise ValueError(f"{counts}; expected one each")
        if self.unseen and not set(self.unseen) < set(self.classes):
            raise ValueError(f"unseen is {self.unseen!r}; expected some of the classes")

        # Everything else: types and ranges.
        for name, kind in {"dataset": str, "root": str, "protocol": dict, "environment": dict}.items():
            if type(getattr(self, name)) is not kind:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected {kind.__name__}")
        scores = [name for name in ("mIoU", "aAcc", "mAcc") if getattr(self, name) is not None]
        check_ranges(self, {"crop_size": (0, 2**20), "step": (0, 2**53)} | dict.fromkeys(scores, (0.0, 1.0)))


def tensor_faults(found: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    """How many tensors are missing, unknown, of another shape or not finite, and the first three; or ""."""
    wrong = []
    for name in sorted(expected.keys() | found.keys()):
        wanted = tuple(expected[name].shape) if name in expected else "nothing"
        given = tuple(found[name].shape) if name in found else "missing"
        if given == wanted and found[name].numel():
            finite = torch.stack(found[name].aminmax()).isfinite().all()  # takes no memory
            given = given if finite else "not finite"
        if given != wanted:
            wrong.append(f"{name} is {given}, expected {wanted}")
    shown = wrong[:3] if len(wrong) <= 3 else [*wrong[:3], ".."]
    return f"{len(wrong)} faults: {'; '.join(shown)}" if wrong else ""


def write_tensors(tensors: dict[str, Tensor], path: str | Path, metadata: dict, keep: str = "") -> None:
    """Write a .safetensors file whole or not at all; a file that it replaces is kept under the name `keep`.

    It grows in a folder .NAME.part beside it, so that whatever a kill leaves there is found and removed.
    """
    path = Path(path)
    folder = path.with_name(f".{path.name}.part")
    part = folder / path.name
    try:
        # A folder of its own, in place of what a kill may have left.
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # rmtree leaves a file or a link of that name, which is not followed
            folder.unlink()
        folder.mkdir()

        # The whole file, on the disk before it gets its name.
        strings = {key: json.dumps(value, allow_nan=False) for key, value in metadata.items()}
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, part, strings)
        part.chmod(0o666 & folder.stat().st_mode)  # what the umask allows; safetensors makes it 0600
        _sync(part)

        # Its name, and that of the file before it.
        if keep and path.exists():
            os.replace(path, path.with_name(keep))
        os.replace(part, path)
        with suppress(OSError):  # some network shares refuse it for a folder
            _sync(path.parent)  # the new name, too
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {path}: {error}; the file before it is kept") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sync(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk; Windows cannot open a folder."""
    if os.name == "posix":
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def weights_hash(model: nn.Module) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of all weights, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
