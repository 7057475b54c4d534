"""Baselines that FlowSeg is held against: by the tests, and by ablate.py, which trains them alike."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import IGNORE, FlowSeg, draw, squared_distances, time_left
from network import Config, Features, ImageEncoder


class CrossEntropy(FlowSeg):
    """The same network, a channel a class, its end state read as logits after one step."""

    def loss(self, image: Tensor, labels: Tensor, generator=None, count=None) -> tuple[Tensor, dict]:
        count = (labels != IGNORE).sum() if count is None else count
        logits = self.source(image) + self.velocity(self.source(image), image.new_zeros(len(image)), image)
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum") / count
        return loss, dict.fromkeys(("fm", "phi", "grad"), loss.detach())

    def soft_assignment(self, x: Tensor, total: Tensor | None = None) -> Tensor:
        return x.softmax(1) if total is None else total.add_(x.softmax(1))


class FirstStep(FlowSeg):
    """Only t = 0 is learned: no flow beyond one step."""

    def loss(self, image: Tensor, labels: Tensor, generator=None, count=None) -> tuple[Tensor, dict]:
        count = ((labels != IGNORE).sum() if count is None else count).clamp_min(1)
        t, features = image.new_zeros(len(image)), self.network.encode(image)
        return self._loss_at(self.source(image), t, features, labels, count)[:2]


class Leaky(FlowSeg):
    """Flow matching as it is usually written: t uniform, the truth in x_t, the error in v."""

    def loss(self, image: Tensor, labels: Tensor, generator=None, count=None) -> tuple[Tensor, dict]:
        valid = (labels != IGNORE)[:, None]
        count = (valid.sum() if count is None else count).clamp_min(1)
        t = draw(torch.rand, (len(image),), generator).to(image)
        x0, x1, left = self.source(image), self.paint(labels), time_left(t)
        x_t = x0.lerp(x1, 1 - left)
        v = self._velocity(x_t, t, self.network.encode(image))
        x1_hat = (x_t + left * v).detach()
        phi, grad = self.potential(x1_hat, labels)
        target = x1 - x0 - (grad if self.config.objective == "reshaped" else 0)
        loss = ((v - target).square() * valid).sum() / (count * self.config.dims)
        error = (x1_hat - x1).square().mean(1, True)
        maps = {"fm": error, "phi": phi, "grad": grad.norm(dim=1, keepdim=True)}
        return loss, {name: (value * valid).sum() / count for name, value in maps.items()}


class Unmasked(FlowSeg):
    """Pixels without a label are taught like those of class 0."""

    def loss(self, image: Tensor, labels: Tensor, generator=None, count=None) -> tuple[Tensor, dict]:
        return super().loss(image, labels.where(labels != IGNORE, 0), generator)  # one process, whole batches


class Noise(FlowSeg):
    """The source is noise, the same for every image when it samples."""

    generator = None  # of the training step

    def loss(self, image: Tensor, labels: Tensor, generator=None, count=None) -> tuple[Tensor, dict]:
        self.generator = generator
        try:
            return super().loss(image, labels, generator, count)
        finally:
            self.generator = None

    def source(self, image: Tensor) -> Tensor:
        own = self.generator or [torch.Generator().manual_seed(0) for _ in image]
        return draw(torch.randn, (len(image), self.config.dims, *image.shape[2:]), own).to(image)


class End(FlowSeg):
    """The network's output is read as the end x1_hat, not as the velocity."""

    def _velocity(self, x: Tensor, t: Tensor, features: Features) -> Tensor:
        return (super()._velocity(x, t, features) - x) / time_left(t)


class Annealed(FlowSeg):
    """The correction fades with the time left: grad Phi times 1 - t; so does `grad` in the log."""

    def _loss_at(self, x_t: Tensor, t: Tensor, *rest) -> tuple[Tensor, dict, Tensor]:
        self.left = time_left(t)
        return super()._loss_at(x_t, t, *rest)

    def potential(self, x1_hat: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        phi, grad = super().potential(x1_hat, labels)
        return phi, self.left * grad


class Transformed(FlowSeg):
    """Another T(d) than -log(d + eps); the gradient by autograd, image by image."""

    def logits(self, d: Tensor) -> Tensor:
        raise NotImplementedError

    def potential(self, x1_hat: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        y, (B, dims, H, W) = labels.where(labels != IGNORE, 0), x1_hat.shape
        phi, grad = x1_hat.new_empty(B, 1, H, W).float(), torch.empty_like(x1_hat).float()
        for i in range(B):
            with torch.enable_grad(), torch.autocast(x1_hat.device.type, enabled=False):
                x = x1_hat[i].flatten(1).mT.float().requires_grad_()  # (H W, dims)
                d = (x[:, None] - self.centroids).square().sum(-1)  # (H W, N)
                value = F.cross_entropy(self.logits(d) / self.config.tau, y[i].flatten(), reduction="none")
            phi[i], slope = value.detach().view(1, H, W), torch.autograd.grad(value.sum(), x)[0]
            grad[i] = slope.mT.view(dims, H, W)
        return phi, grad

    @torch.no_grad()
    def soft_assignment(self, x: Tensor, total: Tensor | None = None) -> Tensor:
        d, _ = squared_distances(x.movedim(1, -1).flatten(0, 2).float(), self.centroids)
        p = (self.logits(d) / self.config.tau).softmax(1).view(len(x), *x.shape[2:], -1).movedim(-1, 1)
        return p if total is None else total.add_(p)


class Linear(Transformed):
    """T(d) = -d."""

    def logits(self, d: Tensor) -> Tensor:
        return -d


class Sqrt(Transformed):
    """T(d) = -sqrt(d + eps)."""

    def logits(self, d: Tensor) -> Tensor:
        return -(d + self.config.eps).sqrt()


class Inverse(Transformed):
    """T(d) = 1 / (d + eps)."""

    def logits(self, d: Tensor) -> Tensor:
        return 1 / (d + self.config.eps)


def golden(num_classes: int, dims: int = 3) -> Tensor:
    """Centroids (N, dims) with alphas g^-1, g^-2, .., g the generalised golden ratio: g^(dims+1) = g + 1."""
    g = 2.0
    for _ in range(64):  # fixed-point iteration, contracts by more than 2 each time
        g = (1 + g) ** (1 / (dims + 1))
    alphas = g ** -torch.arange(1, dims + 1, dtype=torch.float64)
    c = torch.arange(1, num_classes + 1, dtype=torch.float64)[:, None] * alphas % 1
    low, high = c.aminmax(dim=0)
    return (2 * (c - low) / (high - low) - 1).float()


class Golden(FlowSeg):
    """Centroids by the golden ratio."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.centroids = golden(config.num_classes, config.dims)


class UNetwork(nn.Module):
    """A plain convolutional U-Net at full resolution, 0.9 M parameters; `forward` turns x0 into logits."""

    def __init__(self, num_classes: int, widths: tuple = (24, 48, 96, 144)):
        super().__init__()
        self.encoder = ImageEncoder(widths, stride=1)
        self.head = nn.Conv2d(widths[0], num_classes, 1)

    def encode(self, image: Tensor) -> Tensor:
        return self.head(self.encoder(image)[0])

    def forward(self, x: Tensor, t: Tensor, logits: Tensor) -> Tensor:
        return logits - x


class UNet(CrossEntropy):
    """The yardstick: a plain U-Net trained by cross-entropy."""

    def __init__(self, config: Config):
        super().__init__(config, UNetwork(config.num_classes))
