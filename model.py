"""FlowSeg: semantic segmentation as a flow from the photo to a mask painted in category centroids.

Symbols, one meaning each (paper: arXiv 2603.19218; network: PixNerd, arXiv 2507.23268):
    I       image, (B, 3, H, W) in [-1, 1]            y       labels, (B, H, W) in [0, N), 255 = ignore
    mu      centroids of the N classes, (N, dims)     x1      mu[y], the encoded mask: the end of the flow
    x0      source: I followed by zero channels       x_t     (1 - t) x0 + t x1_hat', a state on the way
    v       velocity the network predicts             x1_hat  x_t + (1 - t) v, the end it heads for
Time runs from t = 0 (photo) to t = 1 (mask). Everything is channels first; distances are float32.

The file reads in the order of the method: encoding, potential, FlowSeg; the network is in network.py.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from network import Config, Features, Network
from public import CheckpointError, faults, read_pixnerd, widened
from public import load_dinov2 as load_dinov2

IGNORE = 255  # label of pixels that count neither in the loss nor in the metric
PRIMES = [n for n in range(2, 1614) if all(n % k for k in range(2, math.isqrt(n) + 1))]  # 255 of them


def kronecker(num_classes: int, dims: int = 3) -> Tensor:
    """Centroids (N, dims) in [-1, 1]: c_k = k (sqrt 2, sqrt 3, sqrt 5, ..) mod 1, min-max normalised."""
    alphas = torch.tensor(PRIMES[:dims], dtype=torch.float64).sqrt()
    c = torch.arange(1, num_classes + 1, dtype=torch.float64)[:, None] * alphas % 1
    low, high = c.aminmax(dim=0)
    return (2 * (c - low) / (high - low).clamp_min(1e-12) - 1).float()


def coded(num_classes: int, dims: int = 3) -> Tensor:
    """Centroids (N, dims): the three of `kronecker`, which are the colours, then the words of a code.

    Words differ by as much as `dims` allows and are about equally long, so no class has a head start; with
    many classes in many dimensions that is much more room than a Kronecker sequence gives.
    """
    colors = kronecker(num_classes, 3)
    return colors if dims == 3 else torch.cat([colors, lexicode(num_classes, dims - 3)], dim=1)


def lexicode(num_words: int, length: int) -> Tensor:
    """(num_words, length) in [-1, 1], on the coarsest grid that has enough words: in lexicographic order,
    each word that is far enough from all before it, for the largest such distance (Conway, Sloane 1986)."""
    levels = 2
    while levels**length < num_words:
        levels += 1
    words = torch.cartesian_prod(*[torch.arange(levels)] * length).view(-1, length)
    for spacing in range(length, 0, -1):  # squared, in grid steps; no more is possible (pigeonhole principle)
        free, chosen = torch.ones(len(words), dtype=torch.bool), []
        while len(chosen) < num_words and free.any():
            chosen.append(int(free.byte().argmax()))  # the first
            free &= (words - words[chosen[-1]]).square().sum(1) >= spacing
        if len(chosen) == num_words:
            break
    return 2 * words[chosen].float() / (levels - 1) - 1


def squared_distances(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """||x_m - mu_k||^2 for x (M, dims) -> (M, N), and the nearest class (M, 1). One fast product, but it
    cancels near a centroid, exactly where 1/(d + eps) matters: the least is taken again, by differences."""
    with torch.autocast(x.device.type, enabled=False):  # it would make the product bfloat16
        d = torch.addmm(centroids.square().sum(1), x, centroids.T, alpha=-2)  # |mu|^2 - 2 x.mu
    d += x.square().sum(1, keepdim=True)
    nearest = d.argmin(1, keepdim=True)
    return d.scatter_(1, nearest, (x - centroids[nearest[:, 0]]).square().sum(1, keepdim=True)), nearest


@torch.no_grad()
def potential_gradient(
    x: Tensor, labels: Tensor, centroids: Tensor, eps: float, tau: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Phi = -log p_y and its gradient in x, where p = softmax_k(-log(d_k + eps) / tau), d_k = |x - mu_k|^2.

    x: (M, dims), labels: (M,) int64 in [0, N) -> phi (M,), grad (M, dims); float32, or float64 if x is.
    grad Phi = (2 / tau) sum_k ([k = y] - p_k) (x - mu_k) / (d_k + eps): the label attracts, the other classes
    repel. Worked off in chunks of pixels, so the extra memory does not grow with the image.
    """
    x = x if x.dtype == torch.float64 else x.float()
    centroids = centroids.to(x)
    phi, grad = x.new_empty(len(x)), torch.empty_like(x)
    chunk = max(1, 2 ** (17 if x.device.type == "cpu" else 22) // len(centroids))  # half a MB fits a cache
    for i in range(0, len(x), chunk):
        x_i, y_i = x[i : i + chunk], labels[i : i + chunk, None]
        d, nearest = squared_distances(x_i, centroids)
        logits = d.add_(eps).log().neg_()  # d is d + eps from here on
        logits.sub_(logits.gather(1, nearest)).div_(tau)
        log_own = logits.gather(1, y_i)
        p = logits.clamp_min_(-60).softmax(1)  # lower, products with denormal numbers would take all the time
        phi[i : i + chunk] = -(log_own + p.gather(1, nearest).log())[:, 0]
        own = (1 - p.gather(1, y_i)) / d.gather(1, y_i)  # taken first: it cancels most
        weight = p.div_(d).scatter_(1, y_i, 0)  # p_k / (d_k + eps) of the other classes
        repel = weight.sum(1, keepdim=True) * x_i - weight @ centroids
        grad[i : i + chunk] = (2 / tau) * (own * (x_i - centroids[y_i[:, 0]]) - repel)
    return phi, grad


FORMAT = "flowseg-1"
Generator = torch.Generator | list[torch.Generator] | None  # of a batch, or one an image


class FlowSeg(nn.Module):
    """The network with its centroids: training loss, sampler, decoding and file format."""

    def __init__(self, config: Config, network: nn.Module | None = None):
        super().__init__()
        self.config = config
        self.network = network or Network(config)
        encode = {"kronecker": kronecker, "coded": coded}[config.encoding]
        mu = encode(config.num_classes, config.dims)
        self.register_buffer("centroids", mu, persistent=False)  # (N, dims)
        self.metadata: dict = {}  # what the file says besides the weights: class names, step, mIoU, ...
        self.alignment: nn.Module | None = None  # see public.py: in training only

    def velocity(self, x: Tensor, t: Tensor, image: Tensor) -> Tensor:
        """v_theta(x_t, t, I): x (B, dims, H, W), t (B,) in [0, 1], image (B, 3, H, W) -> as x, float32."""
        self._check(image)
        B, _, H, W = image.shape
        p, shape = self.config.patch_size, (B, self.config.dims, H, W)
        if H % p or W % p:
            raise ValueError(f"image is {H} x {W}; expected multiples of the patch size {p} (`sample` pads)")
        if x.shape != shape or t.shape != (B,):
            raise ValueError(f"x is {tuple(x.shape)}, t {tuple(t.shape)}; expected {shape} and ({B},)")
        return self._velocity(x, t, self.network.encode(image))

    def _velocity(self, x: Tensor, t: Tensor, features: Features) -> Tensor:
        return self.network(x, t, features)

    def source(self, image: Tensor) -> Tensor:
        """x0 (B, dims, H, W): the image and zeros."""
        return F.pad(image, (0, 0, 0, 0, 0, self.config.dims - image.shape[1]))

    def potential(self, x1_hat: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Phi (B, 1, H, W) and its gradient (B, dims, H, W) at the estimate; ignored pixels as class 0."""
        y, c = labels.where(labels != IGNORE, 0).flatten(), self.config
        with torch.autocast(x1_hat.device.type, enabled=False):  # it would make the repulsion bfloat16
            pixels = x1_hat.movedim(1, -1).flatten(0, 2)  # (B H W, dims)
            phi, grad = potential_gradient(pixels, y, self.centroids, c.eps, c.tau)
        return phi.view_as(labels)[:, None], grad.view(*labels.shape, -1).movedim(-1, 1)

    def loss(
        self, image: Tensor, labels: Tensor, generator: Generator = None, count: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Reshaped flow matching without the label leak; returns the loss and detached diagnostics.

        image: (B, 3, H, W) in [-1, 1]; labels: (B, H, W) int64 in [0, N), 255 = ignore. All are means over
        `count` pixels, by default the labelled ones here: with those of a larger batch, its parts add up.

        A state x_t = (1 - t) I + t mu[y] would hand the network the label (I is known: solve for mu[y]), and
        sampling, which has no label, would never visit it. So no state is made from the truth. Every image is
        used twice: at t = 0, where the state is the photo, and at a uniform t on the straight way to the end
        that the model itself saw from there, where the sampler will be:

            x1_hat' = x0 + v(x0, 0),   x_t = (1 - t) x0 + t x1_hat',   loss = (R(x0, 0) + R(x_t, t)) / 2.

        The target is what carries x_t to mu[y] in the time left. R measures it in x, as the velocity needed
        grows like 1 / (1 - t):  R = mean |x1_hat - stopgrad(mu[y] - grad Phi(x1_hat))|^2, which at t = 0 is
        the paper's |v - stopgrad(v_gt - grad Phi)|^2.
        """
        self._check(image, labels)
        t = draw(torch.rand, (len(image),), generator).to(image)
        count = ((labels != IGNORE).sum() if count is None else count).clamp_min(1)
        x0, features = self.source(image), self.network.encode(image)
        loss, stats, x1_hat = self._loss_at(x0, torch.zeros_like(t), features, labels, count)
        x_t = x0.lerp(x1_hat, 1 - time_left(t))
        later, stats_later, _ = self._loss_at(x_t, t, features, labels, count)
        return (loss + later) / 2, {k: (stats[k] + stats_later[k]) / 2 for k in stats}

    def _loss_at(
        self, x_t: Tensor, t: Tensor, features: Features, labels: Tensor, count: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Loss and diagnostics at one state, and the detached estimate x1_hat (B, dims, H, W)."""
        valid = (labels != IGNORE)[:, None]  # (B, 1, H, W)
        x1_hat = x_t + time_left(t) * self._velocity(x_t, t, features)
        error = x1_hat - self.paint(labels)  # (1 - t) (v - v_gt)
        phi, grad = self.potential(x1_hat.detach(), labels)
        residual = error + grad if self.config.objective == "reshaped" else error
        fm, slope = error.detach().square().mean(1, True), grad.norm(dim=1, keepdim=True)
        stats = {"fm": fm, "phi": phi, "grad": slope}
        stats = {name: (value * valid).sum() / count for name, value in stats.items()}
        return (residual.square() * valid).sum() / (count * self.config.dims), stats, x1_hat.detach()

    def paint(self, labels: Tensor) -> Tensor:
        """x1 = mu[y] (B, dims, H, W); ignored pixels are painted as class 0 and must be masked."""
        return self.centroids[labels.where(labels != IGNORE, 0)].movedim(-1, 1)

    @torch.no_grad()
    def trajectory(
        self, image: Tensor, steps: int | None = None, velocity: Callable | None = None
    ) -> Iterator[Tensor]:
        """States x (B, dims, H, W) of the Euler steps x <- x + v(x, i / S) / S, from the photo to the mask.

        image: (B, 3, H, W) in [-1, 1], any size: the sides are padded to multiples of the patch.
        velocity: a callable (x, t) that takes the network's place.
        """
        self._check(image)
        steps = self.config.steps if steps is None else steps
        if steps < 1:
            raise ValueError(f"steps is {steps}; expected at least 1")
        H, W = image.shape[-2:]
        p = self.config.patch_size
        image = F.pad(image, (0, -W % p, 0, -H % p), mode="replicate")
        if velocity is None:
            velocity = partial(self._velocity, features=self.network.encode(image))
        x = self.source(image)
        yield x[..., :H, :W]
        for i in range(steps):
            x = x + velocity(x, torch.full((len(x),), i / steps, device=x.device)) / steps
            yield x[..., :H, :W]

    def sample(self, image: Tensor, steps: int | None = None, velocity: Callable | None = None) -> Tensor:
        """End state x1 (B, dims, H, W) of `trajectory`: deterministic, the same image gives the same mask."""
        *_, x = self.trajectory(image, steps, velocity)
        return x

    def segment(self, image: Tensor, steps: int | None = None, size: tuple[int, int] | None = None) -> Tensor:
        """Train ids (B, H, W) int64 of images (B, 3, h, w) in [-1, 1], at `size` or the images' own."""
        return self.decode(self.soft_assignment(self.sample(image, steps)), size)[0].long()

    @torch.no_grad()
    def soft_assignment(self, x: Tensor, total: Tensor | None = None) -> Tensor:
        """p_k (B, N, H, W) float32 of states x (B, dims, H, W): softmax of -log(d_k + eps) / tau, row by row,
        which is added to `total` if that is given: several views then need no second copy."""
        c = self.config
        p = torch.zeros(len(x), c.num_classes, *x.shape[2:]).to(x.device) if total is None else total
        for states, probabilities in zip(x.unbind(2), p.unbind(2), strict=True):  # of a row
            d, _ = squared_distances(states.mT.flatten(0, 1).float(), self.centroids)  # (B W, N)
            logits = (d + c.eps).log() / -c.tau
            probabilities += logits.softmax(1).unflatten(0, (len(x), -1)).mT
        return p

    @torch.no_grad()
    def decode(self, p: Tensor, size: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        """Most probable class (B, H, W) int16 and its probability (B, H, W), at `size` or as large as p.

        p: (B, N, h, w). A state is never interpolated: between two centroids may lie a third. Probabilities
        are, bilinearly, in bands of rows, so the memory does not grow with `size`.
        """
        H, W = size or p.shape[2:]
        labels = torch.empty(len(p), H, W, dtype=torch.int16, device=p.device)
        confidence = torch.empty(len(p), H, W, device=p.device)
        centre_x, centre_y = ((2 * torch.arange(n, device=p.device) + 1) / n - 1 for n in (W, H))  # (-1, 1)
        height = max(1, 2**23 // (p[:, :, 0, 0].numel() * W))  # of a band
        for rows in torch.arange(H, device=p.device).split(height):
            grid = torch.stack(torch.meshgrid(centre_x, centre_y[rows], indexing="xy"), dim=-1)
            grid = grid.expand(len(p), -1, -1, -1)  # (B, rows, W, 2)
            band = F.grid_sample(p, grid, padding_mode="border", align_corners=False)  # (B, N, rows, W)
            confidence[:, rows], best = band.max(1)
            labels[:, rows] = best.short()
        return labels, confidence

    def _check(self, image: Tensor, labels: Tensor | None = None) -> None:
        if image.ndim != 4 or image.shape[1] != 3 or not image.is_floating_point():
            given = f"{tuple(image.shape)} {image.dtype}"
            raise ValueError(f"image is {given}; expected (B, 3, H, W) float in [-1, 1]")
        if labels is None:
            return
        given, expected = (tuple(labels.shape), labels.dtype), ((len(image), *image.shape[2:]), torch.int64)
        if given != expected:
            raise ValueError("labels are {} {}; expected {} {}".format(*given, *expected))
        n = self.config.num_classes
        if labels.device.type == "cpu" and (highest := labels.where(labels != IGNORE, 0).max()) >= n:
            raise ValueError(f"labels run to {highest}; expected 0..{n - 1} or {IGNORE}")  # elsewhere: a wait

    def save(self, path: str | Path, **metadata) -> None:
        """Write the weights atomically as safetensors; config and metadata travel as JSON strings."""
        write_tensors(self.state_dict(), path, {"format": FORMAT, "config": asdict(self.config), **metadata})

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "FlowSeg":
        """Read what `save` wrote, in eval mode; CheckpointError says what is wrong with any other file."""
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != json.dumps(FORMAT):
                    raise CheckpointError(f"{path} is no FlowSeg checkpoint; pass one from `flowseg train`")
                metadata = {key: json.loads(value) for key, value in metadata.items()}
                model = cls(Config(**metadata.pop("config")))
                model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} does not exist; pass a file from `flowseg train`") from error
        except (SafetensorError, OSError, TypeError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{path} is damaged or from another version ({reason})") from error
        model.metadata = metadata
        return model.to(device).eval()


def draw(kind: Callable, shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Random numbers (B, ..) from one generator or from one an image; on the CPU, so the same everywhere."""
    if isinstance(generator, list):
        return torch.stack([kind(shape[1:], generator=own) for own in generator])
    return kind(shape, generator=generator)


def time_left(t: Tensor) -> Tensor:
    """1 - t as (B, 1, 1, 1), kept off zero: a bare (B,) would broadcast along the width."""
    return (1 - t).clamp_min(1e-3)[:, None, None, None]


def write_tensors(tensors: dict[str, Tensor], path: str | Path, metadata: dict, keep: str = "") -> None:
    """Write a safetensors file with JSON metadata, all of it or nothing; the one before stays as `keep`."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.part")
    try:
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, temporary,
                  {k: json.dumps(v) for k, v in metadata.items()})  # fmt: skip
        _sync(temporary)
        if keep and path.exists():
            os.replace(path, path.with_name(keep))
        os.replace(temporary, path)
        _sync(path.parent)  # the new name, too
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {path}: {error}; the file before it is kept") from error


def _sync(path: Path) -> None:
    if os.name == "posix":  # Windows cannot open a folder
        number = os.open(path, os.O_RDONLY)
        os.fsync(number)
        os.close(number)


def import_pixnerd(path: str | Path) -> FlowSeg:
    """The EMA network of a public PixNerd checkpoint, blind to the image, with the least of classes: two."""
    network = read_pixnerd(path)
    return FlowSeg(network.config, network).eval()


def start_from(model: FlowSeg, path: str | Path) -> None:
    """Copy the network weights of a checkpoint, ours or a public PixNerd's; the classes may be others."""
    path = Path(path)
    source = FlowSeg.load(path) if path.suffix == ".safetensors" else from_public(path)
    weights = widened(source.network, model.network)
    if listed := faults(weights, model.network.state_dict()):
        raise CheckpointError(f"{path} has another network ({listed}); match --preset")
    model.network.load_state_dict(weights)


def from_public(path: Path) -> FlowSeg:
    """What `import_pixnerd` makes of a file; kept beside it as .safetensors, which is read the next time."""
    stamp = [path.stat().st_size, path.stat().st_mtime_ns] if path.exists() else None
    copy, source = path.with_suffix(".safetensors"), None
    with suppress(CheckpointError):  # there is none, or nothing of ours
        kept = FlowSeg.load(copy)
        source = kept.metadata.get("source")
    if source and source == stamp:
        return kept
    model = import_pixnerd(path)
    if os.environ.get("RANK", "0") == "0" and (source or not copy.exists()):  # other weights stay
        with suppress(CheckpointError):  # where it cannot write it goes on without
            model.save(copy, source=stamp)
    return model


def weights_hash(model: nn.Module) -> str:
    """First 16 hex digits of the SHA-256 of all weights, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def to_input(photo: Image.Image, size: int) -> Tensor:
    """RGB PIL image -> (1, 3, h, w) in [-1, 1], short side `size`, long side at most 4 times that."""
    assert photo.mode == "RGB", f"photo has mode {photo.mode}; expected RGB: photo.convert('RGB')"
    scale = min(size / min(photo.size), 4 * size / max(photo.size))
    width, height = (max(1, round(side * scale)) for side in photo.size)
    photo = photo.resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None] / 127.5 - 1


def assign_photo(model: FlowSeg, photo: Image.Image, size: int, steps: int, flip: bool, mode: str) -> Tensor:
    """Soft assignments (1, N, h, w) of a photo whose short side is made `size`.

    flip: averaged with the mirror image's. mode whole: one window; slide: the average of square windows that
    overlap by a third; tiles: of those of the training size that overlap by half and fade out to the border.
    """
    image = to_input(photo, size).to(model.centroids.device)  # (1, 3, h, w)
    most, crop = max(image.shape), model.metadata.get("size", size)
    side, step = {"whole": (most, most), "slide": (size, size * 2 // 3), "tiles": (crop, crop // 2)}[mode]
    spans = [[slice(max(0, min(i, n - side)), i + side) for i in range(0, max(1, n - side + step), step)]
             for n in image.shape[2:]]  # fmt: skip
    views = [(rows, columns, model.sample(image[..., rows, columns].flip(axes), steps).flip(axes))
             for rows, columns, axes in product(*spans, ([], [-1])[: 1 + flip])]  # fmt: skip
    p = image.new_zeros(1, model.config.num_classes, *image.shape[2:])  # large, so not before sampling
    for rows, columns, x in views:
        if mode == "tiles":
            fade_y, fade_x = (torch.hann_window(n + 2, periodic=False).to(p)[1:-1] for n in x.shape[2:])
            p[..., rows, columns] += model.soft_assignment(x) * fade_y[:, None] * fade_x
        else:
            model.soft_assignment(x, p[..., rows, columns])
    return p.div_(p.sum(1, keepdim=True))


def segment_photo(
    model: FlowSeg, photo: Image.Image | np.ndarray, size: int, steps: int, flip=False, mode="whole"
) -> tuple[np.ndarray, np.ndarray]:
    """Train ids (H, W) uint8 and their probabilities (H, W) float32 of a photo, RGB or (H, W, 3) uint8."""
    photo = photo if isinstance(photo, Image.Image) else Image.fromarray(photo)
    found = model.decode(assign_photo(model, photo, size, steps, flip, mode), photo.size[::-1])
    return found[0][0].byte().cpu().numpy(), found[1][0].cpu().numpy()
