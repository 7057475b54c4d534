"""Baselines that FlowSeg is held against: by the tests, and by ablate.py, which trains them alike."""

import torch.nn.functional as F
from torch import Tensor, nn

from model import IGNORE, FlowSeg
from network import Config, ImageEncoder


class CrossEntropy(FlowSeg):
    """The same network, a channel a class, its end state read as logits after one step."""

    def loss(self, image: Tensor, labels: Tensor, generator=None) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self.source(image) + self.velocity(self.source(image), image.new_zeros(len(image)), image)
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORE)
        return loss, dict.fromkeys(("fm", "phi", "grad"), loss.detach())

    def soft_assignment(self, x: Tensor) -> Tensor:
        return x.softmax(1)


class Unmasked(FlowSeg):
    """Pixels without a label are taught like those of class 0."""

    def loss(self, image: Tensor, labels: Tensor, generator=None) -> tuple[Tensor, dict[str, Tensor]]:
        return super().loss(image, labels.where(labels != IGNORE, 0), generator)


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
        super().__init__(config)
        self.network = UNetwork(config.num_classes)
