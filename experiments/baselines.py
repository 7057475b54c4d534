"""Baselines that FlowSeg is compared with: the tests use them, and ablate.py trains them like FlowSeg."""

from dataclasses import replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import (
    IGNORE,
    Features,
    FlowSeg,
    Generator,
    ImageEncoder,
    ModelConfig,
    conv_block,
    draw_random,
    least_spacing,
    squared_distances,
    time_left,
)

Loss = tuple[Tensor, dict[str, Tensor]]  # the loss and the diagnostics


class CrossEntropy(FlowSeg):
    """The same network with a softmax head: the end of one step has a channel for every class, its logit.

    The centroids only colour the pictures. Two classes leave the third channel of the image unused.
    """

    def __init__(self, config: ModelConfig, network: nn.Module | None = None):
        channels = max(3, config.num_classes)
        config = replace(config, encoding="kronecker", encoding_dims=channels, steps=1)
        super().__init__(config, network)

    def loss(
        self, image: Tensor, labels: Tensor, generator: Generator = None, count: Tensor | None = None
    ) -> Loss:
        if count is None:
            count = (labels != IGNORE).sum()
        x0 = self.source(image)
        t = image.new_zeros(len(image))
        logits = x0 + self._velocity(x0, t, self.network.encode_image(image))
        logits = logits[:, : self.config.num_classes]
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum") / count.clamp_min(1)
        return loss, dict.fromkeys(("fm_error", "phi", "grad_phi"), loss.detach())

    def soft_assignment(self, x: Tensor) -> Tensor:
        return x[:, : self.config.num_classes].softmax(1)


class Leaky(FlowSeg):
    """Flow matching as it is usually written: one state per image, which holds the truth, at a uniform t.

    The error is that of v against v_gt - w grad Phi, not that of the end. The label can be read from x_t.
    """

    def loss(
        self, image: Tensor, labels: Tensor, generator: Generator = None, count: Tensor | None = None
    ) -> Loss:
        if count is None:
            count = (labels != IGNORE).sum()
        t = draw_random(torch.rand, (len(image),), generator).to(image)
        x0 = self.source(image)
        x1 = self.encode_labels(labels)
        x_t = x0.lerp(x1, 1 - time_left(t))
        v = self._velocity(x_t, t, self.network.encode_image(image))
        x1_hat = (x_t + time_left(t) * v).detach()
        phi, grad = self.potential(x1_hat, labels)
        target = x1 - x0
        if self.config.objective == "reshaped":
            target = target - self.config.phi_weight * grad
        valid = (labels != IGNORE)[:, None]  # (B, 1, H, W)
        count = count.clamp_min(1)
        loss = ((v - target).square() * valid).sum() / (count * self.config.encoding_dims)

        fm_error = (x1_hat - x1).square().mean(1, keepdim=True)  # (B, 1, H, W)
        maps = {"fm_error": fm_error, "phi": phi, "grad_phi": grad.norm(dim=1, keepdim=True)}
        return loss, {name: (values * valid).sum() / count for name, values in maps.items()}


class Unmasked(FlowSeg):
    """Pixels without a label are trained like those of class 0."""

    def loss(
        self, image: Tensor, labels: Tensor, generator: Generator = None, count: Tensor | None = None
    ) -> Loss:
        # All pixels of this batch count, so this is right for one process and whole batches only.
        return super().loss(image, labels.where(labels != IGNORE, 0), generator)


class Noise(FlowSeg):
    """The source is noise; in sampling it is the same for every image."""

    generator: Generator = None  # of the training step

    def loss(
        self, image: Tensor, labels: Tensor, generator: Generator = None, count: Tensor | None = None
    ) -> Loss:
        self.generator = generator
        try:
            return super().loss(image, labels, generator, count)
        finally:
            self.generator = None

    def source(self, image: Tensor) -> Tensor:
        own = self.generator or [torch.Generator().manual_seed(0) for _ in image]
        shape = (len(image), self.config.encoding_dims, *image.shape[2:])
        return draw_random(torch.randn, shape, own).to(image)


class End(FlowSeg):
    """The output of the network is read as the end x1_hat instead of the velocity."""

    def _velocity(self, x_t: Tensor, t: Tensor, features: Features) -> Tensor:
        return (super()._velocity(x_t, t, features) - x_t) / time_left(t)


class Annealed(FlowSeg):
    """The correction fades with the time left: it is (1 - t) grad Phi, and so is grad_phi in the log."""

    def _loss_at(
        self, x_t: Tensor, t: Tensor, features: Features, labels: Tensor, count: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        self.left = time_left(t)
        return super()._loss_at(x_t, t, features, labels, count)

    def potential(self, x1_hat: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        phi, grad = super().potential(x1_hat, labels)
        return phi, self.left * grad


class Transformed(FlowSeg):
    """Another T(d) than -log(d + eps); autograd computes the gradient, one image at a time."""

    def logits(self, d: Tensor) -> Tensor:
        """T(d) of squared distances."""
        raise NotImplementedError

    def potential(self, x1_hat: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        y = labels.where(labels != IGNORE, 0)
        phi = []
        grad = []
        for own_x1_hat, own_y in zip(x1_hat, y, strict=True):
            own_phi, own_grad = self._potential_of_image(own_x1_hat, own_y)
            phi.append(own_phi)
            grad.append(own_grad)
        return torch.stack(phi), torch.stack(grad)

    def _potential_of_image(self, x1_hat: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Phi (1, H, W) and its gradient (dims, H, W) of one image: x1_hat (dims, H, W), y (H, W)."""
        with torch.enable_grad(), torch.autocast(x1_hat.device.type, enabled=False):
            x = x1_hat.detach().flatten(1).mT.float().requires_grad_()  # (H W, dims)
            d = (x[:, None] - self.centroids).square().sum(-1)  # (H W, N)
            phi = F.cross_entropy(self.logits(d) / self.config.tau, y.flatten(), reduction="none")
        (grad,) = torch.autograd.grad(phi.sum(), x)  # (H W, dims)
        return phi.detach().view(1, *y.shape), grad.mT.view(x1_hat.shape)

    @torch.no_grad()
    def soft_assignment(self, x: Tensor) -> Tensor:
        pixels = x.movedim(1, -1).flatten(0, 2).float()  # (B H W, dims)
        d, _ = squared_distances(pixels, self.centroids)  # (N, B H W)
        p = (self.logits(d) / self.config.tau).softmax(0)
        return p.view(-1, len(x), *x.shape[2:]).movedim(0, 1)


class Linear(Transformed):
    """T(d) = -d."""

    def logits(self, d: Tensor) -> Tensor:
        return -d


class Sqrt(Transformed):
    """T(d) = -sqrt(d + eps)."""

    def logits(self, d: Tensor) -> Tensor:
        return -(d + self.eps).sqrt()


class Inverse(Transformed):
    """T(d) = 1 / (d + eps)."""

    def logits(self, d: Tensor) -> Tensor:
        return 1 / (d + self.eps)


def golden_centroids(num_classes: int, dims: int = 3) -> Tensor:
    """Centroids (N, dims) of the sequence with alphas g^-1, g^-2, ..; the generalised golden ratio g solves
    g^(dims+1) = g + 1."""
    g = 2.0
    for _ in range(64):  # a fixed-point iteration, whose error shrinks by more than 2 each time
        g = (1 + g) ** (1 / (dims + 1))
    alphas = g ** -torch.arange(1, dims + 1, dtype=torch.float64)
    c = torch.arange(1, num_classes + 1, dtype=torch.float64)[:, None] * alphas % 1  # (N, dims)
    low, high = c.aminmax(dim=0)
    return (2 * (c - low) / (high - low) - 1).float()


class Golden(FlowSeg):
    """Centroids by the golden ratio."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        with torch.device("cpu"):  # `load` builds the model on the meta device, where there are no values
            self.centroids = golden_centroids(config.num_classes, config.encoding_dims)
        self.eps = config.eps * least_spacing(self.centroids)


class PlainEncoder(nn.Module):
    """The convolutions of a plain U-Net from full resolution to a stride of 8, 0.9 M parameters.

    On the way back, each level is enlarged, joined to the channels of the finer level, and passes two
    convolutions. It shares only `conv_block` with FlowSeg, so the yardstick stays when our encoder changes.
    """

    def __init__(self, widths: list[int]):
        super().__init__()
        self.down = nn.ModuleList([conv_block(3, widths[0])])
        self.down.extend(conv_block(fine, coarse, stride=2) for fine, coarse in pairwise(widths))
        self.up = nn.ModuleList(conv_block(coarse + fine, fine) for fine, coarse in pairwise(widths))

    def forward(self, image: Tensor) -> list[Tensor]:
        """(B, 3, H, W), with sides that are multiples of 8 -> [features (B, widths[0], H, W)]."""
        x = image.contiguous(memory_format=torch.channels_last)
        levels = []
        for block in self.down:
            x = block(x)
            levels.append(x)
        for i in reversed(range(len(self.up))):
            wide = F.interpolate(x, scale_factor=2, mode="bilinear")
            x = self.up[i](torch.cat([wide, levels[i]], dim=1))
        return [x]


class Classifier(nn.Module):
    """An encoder with a linear head at full resolution."""

    def __init__(self, encoder: type[nn.Module], channels: int):
        super().__init__()
        widths = [24, 48, 96, 144]
        self.image_encoder = encoder(widths)
        self.head = nn.Conv2d(widths[0], channels, 1)

    def encode_image(self, image: Tensor) -> Tensor:
        """The logits (B, channels, H, W) of images (B, 3, H, W) whose sides are multiples of 8."""
        return self.head(self.image_encoder(image)[0])


class UNet(CrossEntropy):
    """The yardstick: a plain U-Net trained by cross-entropy; wherever the state is, it aims at the logits."""

    encoder: type[nn.Module] = PlainEncoder

    def __init__(self, config: ModelConfig):
        network = Classifier(self.encoder, max(3, config.num_classes))
        super().__init__(replace(config, patch_size=8), network)

    def _velocity(self, x_t: Tensor, t: Tensor, features: Tensor) -> Tensor:
        return (features - x_t) / time_left(t)


class ImagePath(UNet):
    """The image encoder of the preset tiny as a classifier: what is left without tokens, field and flow."""

    encoder = ImageEncoder
