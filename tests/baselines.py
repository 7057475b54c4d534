"""Baselines that FlowSeg is held against: by the tests, and by ablate.py, which trains them alike."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import IGNORE, FlowSeg, draw, potential_gradient, sequence, time_left
from network import Config, ImageEncoder


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
        return self._loss_at(self.source(image, generator), t, features, labels, count)[:2]


class Leaky(FlowSeg):
    """Flow matching as it is usually written: t uniform, the truth in x_t, the error in v."""

    def loss(self, image: Tensor, labels: Tensor, generator=None, count=None) -> tuple[Tensor, dict]:
        valid = (labels != IGNORE)[:, None]
        count = (valid.sum() if count is None else count).clamp_min(1)
        t = draw(torch.rand, (len(image),), generator).to(image)
        x0, x1, left = self.source(image, generator), self.paint(labels), time_left(t)
        x_t = x0.lerp(x1, 1 - left)
        v = self._velocity(x_t, t, self.network.encode(image))
        x1_hat = (x_t + left * v).detach().movedim(1, -1)  # (B, H, W, dims)
        y, c = labels.where(labels != IGNORE, 0).flatten(), self.config
        phi, grad = potential_gradient(x1_hat.flatten(0, 2), y, self.centroids, c.eps, c.tau, c.transform)
        grad = grad.view(x1_hat.shape).movedim(-1, 1)
        target = x1 - x0 - (grad if c.objective == "reshaped" else 0)
        loss = ((v - target).square() * valid).sum() / (count * c.dims)
        error = (x1_hat.movedim(-1, 1) - x1).square().mean(1, True)
        maps = {"fm": error, "phi": phi.view_as(valid), "grad": grad.norm(dim=1, keepdim=True)}
        return loss, {name: (value * valid).sum() / count for name, value in maps.items()}


class Unmasked(FlowSeg):
    """Pixels without a label are taught like those of class 0."""

    def loss(self, image: Tensor, labels: Tensor, generator=None, count=None) -> tuple[Tensor, dict]:
        return super().loss(image, labels.where(labels != IGNORE, 0), generator)  # one process, whole batches


def golden(num_classes: int, dims: int = 3) -> Tensor:
    """Centroids (N, dims) with alphas g^-1, g^-2, .., g the generalised golden ratio: g^(dims+1) = g + 1."""
    g = 2.0
    for _ in range(64):  # fixed-point iteration, contracts by more than 2 each time
        g = (1 + g) ** (1 / (dims + 1))
    return sequence(num_classes, g ** -torch.arange(1, dims + 1, dtype=torch.float64))


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

    def forward(self, x: Tensor, t: Tensor, logits: Tensor) -> tuple[Tensor, None]:
        return logits - x, None


class UNet(CrossEntropy):
    """The yardstick: a plain U-Net trained by cross-entropy."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.network = UNetwork(config.num_classes)
