"""Training and evaluation of FlowSeg; flowseg_tools/ has what surrounds a run.

One training step (`backward`, `update`, and the loop at the end) draws a batch, takes the gradient of
`FlowSeg.loss`, clips it, updates the weights, and lets an exponential moving average (EMA) follow them. Now
and then the EMA is scored by the function that `flowseg eval` calls, and everything that the next step
depends on is saved.

All randomness is a function of (seed, step, place in the batch) or of (seed, epoch, index), so a run that was
stopped and continued is the same run. Under torchrun every process takes its share of each batch and of the
validation images; the loss is a mean over the whole batch, so the number of processes changes only rounding.

A GPU works behind the host, which only tells it what to do next. Nothing in a step reads a value back, since
that would wait for the GPU: even a step without a finite gradient is left out by the GPU itself.
"""

import copy
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils.data import DataLoader

from data import IGNORE, MAX_PIXELS, Dataset, Stream, evenly_spaced
from flowseg_tools import records, runs, speed, start
from flowseg_tools.dinov2 import Alignment
from flowseg_tools.predict import Mode, read_ahead, segment_photo
from flowseg_tools.runs import RunError, process, summed
from flowseg_tools.settings import resolve_as
from flowseg_tools.terminal import make_bar, make_console, tracked
from model import FlowSeg, ModelConfig, check_ranges, weights_hash

MOST_FAILURES = 10  # steps in a row without a finite gradient
AGREE_EVERY = 10  # steps after which the processes of several GPUs agree whether to stop


@dataclass(frozen=True)
class TrainConfig:
    """Everything besides the network that determines a run; the defaults of the command line."""

    # What is trained on what, from what.
    recipe: str = ""  # a table of recipes.toml
    dataset: str = "shapes"
    root: str = ""  # folder of the named data sets
    preset: str = "tiny"
    init: str = ""  # weights or run directory to start from
    seed: int = 0
    # How long, on how much at a time.
    max_steps: int = 540
    batch_size: int = 8  # images per training step, over all processes
    grad_accum_steps: int = 1  # parts that a process splits its share of the batch into, to save memory
    crop_size: int = 96  # side of the training crop; evaluation resizes the short side to it
    # How the weights follow the gradient.
    optimizer: str = "muon"  # | adamw
    lr: float = 6e-3
    warmup_steps: int = 60  # linear warm-up, then cosine to zero
    weight_decay: float = 0.01
    grad_clip: float = 1.0  # largest gradient norm
    ema_decay: float = 0.995
    # Public networks that help.
    encoder: str = ""  # DINOv2 weights for the image path; none: its convolutions alone
    teacher: str = ""  # DINOv2 weights to align the tokens with (REPA); none: no alignment
    repa_depth: int = 8  # blocks before the tokens that are aligned; all blocks of a shallower network
    repa_weight: float = 0.5
    # When something else than a step is done.
    eval_every: int = 180
    save_every: int = 180
    save_minutes: float = 0.0  # also save when so many minutes have passed; 0: never
    log_every: int = 25
    # How it is computed, which does not change what is computed.
    num_workers: int = -1  # processes that load images; -1: as many as fit on CUDA, none elsewhere
    max_pixels: int = MAX_PIXELS  # the largest picture that is opened
    dtype: str = "auto"  # of the network's arithmetic; auto: bfloat16 on CUDA, float32 elsewhere
    gradient_dtype: str = "float32"  # of gradients between processes; bfloat16 helps slow networks
    compile: str = "auto"  # torch.compile the parts of the network: true, false, or on CUDA
    activation_checkpointing: bool = False  # recompute activations in the backward pass: slower, far smaller
    deterministic: bool = False  # refuse operations whose result may vary, on a GPU
    tensorboard: bool = False  # also write TensorBoard's file

    def __post_init__(self):
        check_ranges(self, TRAIN_RANGES)


COUNT = (1, 10**9)
TRAIN_RANGES = {  # lowest and highest value of every number, or all words that are allowed
    "seed": (0, 2**63 - 1), "max_steps": COUNT, "batch_size": (1, 10**6), "grad_accum_steps": (1, 10**6),
    "crop_size": (1, 2**16), "lr": (0.0, 1e30), "warmup_steps": (0, 10**9), "weight_decay": (0.0, 1e3),
    "grad_clip": (1e-12, 1e30), "ema_decay": (0.0, 1.0), "repa_depth": (1, 1000), "repa_weight": (0.0, 1e6),
    "eval_every": COUNT, "save_every": COUNT, "log_every": COUNT, "num_workers": (-1, 1024),
    "save_minutes": (0.0, 1e6), "max_pixels": (1, 10**12), "optimizer": ("adamw", "muon"),
    "dtype": ("auto", "float32", "bfloat16"), "gradient_dtype": ("float32", "bfloat16"),
    "compile": ("auto", "true", "false"),
}  # fmt: skip


def resolve(given: dict, settings: Iterable[str] = ()) -> tuple[TrainConfig, ModelConfig]:
    """Both configurations, from options by the names of their fields and from settings NAME=VALUE; RunError
    names what is unknown, out of range, or does not fit together."""
    return resolve_as(TrainConfig, given, settings)


# Evaluation ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metrics:
    """Scores, in [0, 1], of a confusion matrix: int64 (N, N), rows are labels, columns are predictions."""

    confusion: np.ndarray
    # By the index of an image, its mean IoU over the classes of its label; nan without a label.
    images: dict[int, float] = field(default_factory=dict)

    @property
    def iou(self) -> Tensor:
        """Intersection over union (N,), nan for a class that occurs in neither labels nor predictions."""
        counts = torch.from_numpy(self.confusion).double()
        right = counts.diag()
        return right / (counts.sum(0) + counts.sum(1) - right)

    @property
    def accuracy(self) -> Tensor:
        """The share of each class's labelled pixels that is right (N,), nan for a class without labels."""
        counts = torch.from_numpy(self.confusion).double()
        return counts.diag() / counts.sum(1)

    @property
    def scores(self) -> dict[str, float]:
        """mIoU and mAcc: means over the classes that occur; aAcc: the share of all pixels that is right."""
        counts = torch.from_numpy(self.confusion).double()
        return {
            "mIoU": float(self.iou.nanmean()),
            "aAcc": float(counts.trace() / counts.sum()),
            "mAcc": float(self.accuracy.nanmean()),
        }


def confusion_matrix(labels: np.ndarray, prediction: np.ndarray, num_classes: int) -> np.ndarray:
    """int64 (N, N) counts of (label, prediction) pairs; pixels labelled 255 do not count."""
    # Every pair is one number, and bincount counts numbers.
    valid = labels != IGNORE
    pairs = labels[valid].astype(np.int64) * num_classes + prediction[valid]
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def evaluate(
    model: FlowSeg, dataset: Dataset, short_side: int, steps: int, track: Callable = iter,
    limit: int | None = None, flip: bool = False, mode: Mode = "whole",
) -> tuple[Metrics, dict]:  # fmt: skip
    """Segment every image and compare at its original size; returns the metrics and their protocol.

    track: wraps the iterable of indices, for a progress bar. limit: most images, evenly spaced. Under
    torchrun the processes share the images and all get the same metrics; only the first hashes the weights.
    """
    # Counts are whole numbers, so their sum does not depend on who counted what.
    num_classes = len(dataset.labels.classes)
    indices = evenly_spaced(len(dataset), limit)
    rank, world = process()
    confusion = np.zeros((num_classes, num_classes), np.int64)
    ious = np.zeros(len(indices))  # of single images

    # Every process segments its share of the images, while a thread already reads the next one.
    samples = read_ahead(dataset.__getitem__, track(indices[rank::world]))
    for i, (photo, labels) in enumerate(samples):
        prediction, _ = segment_photo(model, photo, short_side, steps, mode, flip)
        counts = confusion_matrix(labels, prediction, num_classes)
        confusion += counts
        in_label = torch.from_numpy(counts.sum(1) > 0)  # a speck of another class does not count as a class
        ious[rank + i * world] = Metrics(counts).iou[in_label].mean()

    # Together they have counted all pixels.
    for values in (confusion, ious):
        summed(torch.from_numpy(values))  # in place
    protocol = {
        "dataset": dataset.name, "split": dataset.split, "images": len(indices),
        "evenly_spaced_of": len(dataset), "mode": mode, "flip": flip, "short_side": short_side,
        "compared_at": "original size", "steps": steps, "weights": weights_hash(model) if rank == 0 else "",
    }  # fmt: skip
    return Metrics(confusion, dict(zip(indices, ious.tolist(), strict=True))), protocol


# Optimization --------------------------------------------------------------------------------------------


def orthogonal(matrix: Tensor) -> Tensor:
    """About the orthogonal matrix nearest to `matrix`: its singular values become 0.7 to 1.2.

    Five Newton-Schulz steps X <- (a I + b A + c A^2) X with A = X X' (Jordan et al., Muon, 2024) need no
    decomposition. On CUDA bfloat16 is enough for them. On a CPU in float32 the steps are taken on the small
    matrix A alone, A <- S A S, and only their product P meets the long side of X.
    """
    # The short side first, and singular values of at most 1, where the steps converge.
    tall = matrix.shape[0] > matrix.shape[1]
    X = matrix.mT if tall else matrix
    X = X / (X.norm() + 1e-7)
    if X.is_cuda:
        # As written above.
        X = X.bfloat16()
        for _ in range(5):
            A = X @ X.mT
            X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    else:
        # The same steps: X = P X0, where P is the product of all S = a I + b A + c A^2.
        A = X @ X.mT
        identity = torch.eye(len(X), dtype=X.dtype, device=X.device)
        P = identity
        for _ in range(5):
            S = 3.4445 * identity - 4.7750 * A + 2.0315 * A @ A
            P = S @ P
            A = S @ A @ S
        X = P @ X
    return (X.mT if tall else X).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Descent along orthogonalised momentum, for matrices W (rows, columns) with gradient G:

        M <- M + (1 - beta) (G - M)
        W <- (1 - lr decay) W - lr 0.2 sqrt(max(rows, columns)) orthogonal(G + beta (M - G))

    A convolution (out, in, k, k) counts as a matrix (out, in k k), which torch.optim.Muon does not take. With
    the factor 0.2 sqrt(..) an update is as large as one of AdamW, so that both have the same learning rate
    (Liu et al., Moonlight, 2025). Under torchrun each process updates its share of the matrices and sends it.
    """

    found_inf: Tensor | None = None  # 1 where the step is to change nothing, as for PyTorch's fused AdamW

    def __init__(self, params: list[Tensor], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """Update all matrices that have a gradient."""
        rank, world = process()
        group = self.param_groups[0]
        rate, beta = group["lr"], group["momentum"]
        sent = []
        for i, weight in enumerate(group["params"]):
            if weight.grad is None:
                continue

            # M, which begins at zero.
            if weight not in self.state:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
            momentum = self.state[weight]["momentum"]

            # Where the step is to change nothing, the gradient is taken to be the momentum, which then stays.
            G = weight.grad
            if self.found_inf is not None:
                G = G.where(self.found_inf == 0, momentum)
            momentum.lerp_(G, 1 - beta)

            # Each matrix has one owner, which sends the others what became of it.
            owner = i % world
            if owner == rank:
                direction = G.lerp(momentum, beta).flatten(1)
                size = 0.2 * max(direction.shape) ** 0.5
                moved = weight * (1 - rate * group["weight_decay"])
                moved.add_(orthogonal(direction).view_as(weight), alpha=-rate * size)
                if self.found_inf is not None:
                    moved = moved.where(self.found_inf == 0, weight)
                weight.copy_(moved)
            if world > 1:
                sent.append(dist.broadcast(weight, owner, async_op=True))

        # Messages travel while other matrices are computed.
        for message in sent:
            message.wait()


# Layers that Muon leaves to AdamW: the first ones, which see colours and time, and the last ones.
FIRST = ("patch_embed", "pixel_embed", "time_mlp.0", "image_encoder.down.0.0.")
LAST = ("head", "image_to_velocity", "token_to_velocity")


def make_optimizers(objective: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW and, if it is wanted, Muon for the matrices and convolutions between the first and last layers.

    Matrices decay; biases, norms and embeddings do not. AdamW's second moment forgets after about 100 steps
    instead of the usual 1000, because runs may be short.
    """
    # Which parameter goes where.
    hidden, matrices, others, public = [], [], [], []
    for name, parameter in objective.named_parameters():
        outer = name.removeprefix("model.network.").startswith((*FIRST, *LAST))
        if not parameter.requires_grad:
            continue
        if name.startswith("model.network.vit."):  # it was trained already
            public.append(parameter)
        elif parameter.ndim < 2:
            others.append(parameter)
        elif config.optimizer == "adamw" or outer:
            matrices.append(parameter)
        else:
            hidden.append(parameter)

    # The learning rate of a group is that of the step, times its lr_scale.
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if public:
        groups.append({"params": public, "weight_decay": config.weight_decay, "lr_scale": 0.1})
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.99), fused=True)
    return [adamw, Muon(hidden, config.lr, config.weight_decay)] if hidden else [adamw]


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then cosine to zero at max_steps."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    return config.lr * warm * 0.5 * (1 + math.cos(math.pi * step / config.max_steps))


class Objective(nn.Module):
    """What is minimised: the loss of FlowSeg and, with a teacher, its alignment; one module, as DDP needs."""

    def __init__(self, model: FlowSeg, alignment: Alignment | None):
        super().__init__()
        self.model = model
        self.alignment = alignment

    def forward(
        self, image: Tensor, labels: Tensor, generators: list, count: Tensor, share: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and diagnostics of a part of the batch. count: labelled pixels of the whole batch; share: how
        much of its images are in this part."""
        loss, stats = self.model.loss(image, labels, generators, count)

        # The alignment is a mean over all tokens, so each part gives its share of it.
        if self.alignment:
            distance = share * self.alignment(image)
            loss = loss + self.alignment.weight * distance
            stats["repa_loss"] = distance.detach()
        return loss, {"loss": loss.detach(), **stats}


def batches(
    data: Dataset, config: TrainConfig, step: int, device: torch.device | str = "cpu"
) -> Iterator[list[Tensor]]:
    """The parts of this process's share of every batch, from `step` on: images, labels, indices."""
    # Positions in the endless order of samples: batch after batch, of each this process's share.
    rank, world = process()
    share = config.batch_size // world
    first = step * config.batch_size + rank * share
    total = config.max_steps * config.batch_size
    positions = (start + i for start in range(first, total, config.batch_size) for i in range(share))

    # The loader makes parts of them.
    loader = DataLoader(
        Stream(data, config.crop_size, config.seed),
        batch_size=share // config.grad_accum_steps,
        sampler=positions,
        **speed.loader_options(config.num_workers, torch.device(device)),
    )
    return iter(loader)


def noise_generators(config: TrainConfig, step: int) -> list[torch.Generator]:
    """One generator for each image of this process, keyed by seed, step and place in the batch."""
    rank, world = process()
    share = config.batch_size // world

    # Whoever computes the image at this place draws the same numbers.
    generators = []
    for place in range(rank * share, (rank + 1) * share):
        key = np.random.SeedSequence([config.seed, step, place]).generate_state(1)[0]
        generators.append(torch.Generator().manual_seed(int(key)))
    return generators


def backward(
    objective: nn.Module, parts: list, generators: list[torch.Generator], bfloat16: bool, device: torch.device
) -> dict[str, Tensor]:
    """Leave the gradient of the mean over all labelled pixels of the batch in the parameters.

    parts: what `batches` gave for one step. Returns what these parts contribute to the loss and its
    diagnostics: their sum over all processes is that of the batch.
    """
    objective.zero_grad()
    _, world = process()

    # uint8 travels to the device, a quarter of float32, and the host does not wait until it is there.
    here = []
    for images, labels, _ in parts:
        here.append((images.to(device, non_blocking=True), labels.to(device, non_blocking=True)))
    count = summed(sum((labels != IGNORE).sum() for _, labels in here))  # labelled pixels of the whole batch

    # One part after the other; their gradients add up.
    totals: dict[str, Tensor] = {}
    for i, (images, labels) in enumerate(here):
        own = generators[i * len(images) : (i + 1) * len(images)]
        share = len(images) / (len(generators) * world)

        # The gradients of all processes are exchanged once a step, while the last part is computed.
        waits = world > 1 and i < len(parts) - 1
        with objective.no_sync() if waits else nullcontext():
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                loss, stats = objective(images / 127.5 - 1, labels.long(), own, count, share)
            (loss * world).backward()  # DDP takes the mean over processes, each has a part of the sum
        for name, value in stats.items():
            totals[name] = totals.get(name, 0) + value
    return totals


def update(
    parameters: list[Tensor], optimizers: list[torch.optim.Optimizer], lr: float, grad_clip: float
) -> tuple[Tensor, Tensor]:
    """Step along the clipped gradient; returns its norm before, and whether that was finite.

    Without a finite gradient the step changes nothing, as found_inf tells the optimizers on the device.
    """
    # The norm of the whole gradient, as one vector.
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    finite = norm.isfinite()
    nn.utils.clip_grads_with_norm_(parameters, grad_clip, norm.where(finite, 0))  # norm 0: nothing to clip

    # One step of every optimizer, at the learning rate of this step.
    for optimizer in optimizers:
        optimizer.found_inf = (~finite).float()
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        optimizer.step()
    return norm, finite


# Training ------------------------------------------------------------------------------------------------


class Run:
    """One training run: what it works on, and how far it is."""

    def __init__(
        self, config: TrainConfig, network: ModelConfig, folder: Path, device: torch.device, console: Console,
        kind: type[FlowSeg], allow_changes: bool, stack: ExitStack,
    ):  # fmt: skip
        """Prepare a new run, or continue the one in `folder`; what is refused leaves no folder behind."""
        # Where and how.
        self.config = config
        self.folder = folder
        self.device = device
        self.console = console
        self.rank, self.world = process()
        self.bfloat16 = config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what CUDA needs to be deterministic
        torch.use_deterministic_algorithms(config.deterministic)

        # On what.
        self.loud = make_console(stderr=True, quiet=self.rank > 0)  # for what is wrong with data
        self.data, self.held_out = start.open_splits(config, self.loud)

        # What: the model, its average, and the alignment, which belongs to the state but is not exported.
        model, origin = start.make_model(self, network, kind)
        self.model = model.to(device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        alignment = start.make_alignment(config, self.model)
        self.seen = records.Seen(self.model.info)
        self.modules: dict[str, nn.Module] = {"model": self.model, "ema": self.ema, "seen": self.seen}
        if alignment:
            self.modules["alignment"] = alignment
        self.objective: nn.Module = Objective(self.model, alignment)
        self.optimizers = make_optimizers(self.objective, config)

        # How far it is: steps done, step last validated, best mIoU; and the first two as last saved.
        self.step, self.validated, self.best = start.enter_folder(self, allow_changes, stack)
        self.saved = (self.step, self.validated)
        self.objective = speed.speed_up(self)
        records.introduce(self, f"step {self.step} of the run" if self.step else origin)

    def due(self, period: int) -> bool:
        """Whether something that is done every `period` steps, and at the end, is to be done now."""
        return self.step > 0 and (self.step % period == 0 or self.step == self.config.max_steps)

    def validate(self, signals: list[int], bar: Progress) -> tuple[int, bool]:
        """Score the EMA and write its weights; returns what the processes agree on afterwards.

        A validation that a signal interrupts is done again when the run continues.
        """

        def until_stopped(indices: list[int]) -> Iterator[int]:
            for index in tracked(bar, indices, f"validating at step {self.step}"):
                if set(runs.STOPS) & set(signals):
                    return
                yield index

        steps = self.ema.config.steps
        records.note_unseen(self)
        metrics, protocol = evaluate(self.ema, self.held_out, self.config.crop_size, steps, until_stopped)
        stop, wants_save = runs.agree(signals)
        if not stop:
            score = metrics.scores["mIoU"]
            self.console.print(f"step {self.step}: validation mIoU {score:.1%}")
            if self.rank == 0:
                records.write_weights(self, metrics, protocol)
            self.validated = self.step
            self.best = max(self.best, score)
        return stop, wants_save


def train(
    config: TrainConfig, network: ModelConfig, folder: Path, device: str, console: Console,
    kind: type[FlowSeg] = FlowSeg, allow_changes: bool = False,
) -> int:  # fmt: skip
    """Train or continue the run in `folder`; returns 0, or 128 + the number of the signal that stopped it.

    kind: FlowSeg, or a baseline with its interface (experiments/baselines.py).
    """
    # Whatever is entered here is left again, in whatever way training ends.
    device = runs.pick_device(device)
    with ExitStack() as stack:
        stack.enter_context(runs.process_group(device))
        if process()[0] > 0:
            console = Console(quiet=True)
        run = Run(config, network, folder, device, console, kind, allow_changes, stack)
        signals = stack.enter_context(runs.caught_signals())
        stack.enter_context(records.remembered(run))
        bar = stack.enter_context(make_bar(console))
        stop = loop(run, signals, bar)
        del run  # DDP must be gone before the group of processes ends
    return 128 + stop if stop else 0


def loop(run: Run, signals: list[int], bar: Progress) -> int:
    """Train until the end, or until a signal; returns its number, or 0."""
    config = run.config
    task = bar.add_task("starting", total=config.max_steps, completed=run.step)
    loader = batches(run.data, config, run.step, run.device)
    parameters = [parameter for parameter in run.objective.parameters() if parameter.requires_grad]
    failures = torch.zeros((), device=run.device)  # steps in a row without a finite gradient
    often = run.device.type == "cpu" or run.world == 1  # to agree costs nothing
    saved_at = time.monotonic()
    started = run.step
    measured_from = run.step
    began = time.perf_counter()
    stop = 0
    wants_save = False

    while True:
        # What the processes agree on: the signal to stop for, and whether it is time to save.
        late = config.save_minutes and time.monotonic() - saved_at > 60 * config.save_minutes
        if often or run.step % AGREE_EVERY == 0 or run.step == config.max_steps:
            stop, wants_save = runs.agree(signals, bool(late) and run.rank == 0)

        # Validation.
        if run.due(config.eval_every) and run.validated < run.step and not stop:
            stop, wants_too = run.validate(signals, bar)
            wants_save = wants_save or wants_too
            measured_from = run.step
            began = time.perf_counter()

        # Saving. While steps fail, the healthy state from before is kept.
        if stop or wants_save or (run.due(config.save_every) and not int(failures)):
            records.save(run)
            saved_at = time.monotonic()
            wants_save = False
            signals[:] = [number for number in signals if number in runs.STOPS]
        if stop or run.step == config.max_steps:
            return stop

        # One training step: gradient, clipping, update.
        parts = [next(loader) for _ in range(config.grad_accum_steps)]
        run.seen.add(parts)
        generators = noise_generators(config, run.step)
        values = backward(run.objective, parts, generators, run.bfloat16, run.device)
        rate = learning_rate(run.step, config)
        norm, finite = update(parameters, run.optimizers, rate, config.grad_clip)
        failures = (failures + 1).where(~finite, 0)
        run.step += 1

        # The average follows the weights; at first it is an average of few steps.
        decay = min(config.ema_decay, run.step / (10 + run.step))
        with torch.no_grad():  # else every step would add to a graph that nobody needs
            torch._foreach_lerp_(list(run.ema.parameters()), list(run.model.parameters()), 1 - decay)

        # The report: a line of the log, and of the terminal unless a bar moves there. Here the host waits.
        bar.update(task, completed=run.step)
        seconds = (time.perf_counter() - began) / (run.step - measured_from)
        if run.due(config.log_every):
            facts = records.read_values(values, norm, failures)
            if facts["failures"] >= MOST_FAILURES:
                generators = noise_generators(config, run.step - 1)  # to draw again what was drawn
                raise RunError(records.explain_failure(run, parts, generators, facts["failures"]))
            records.tell(run, bar, records.report(run, facts, rate, seconds), seconds)
            measured_from = run.step
            began = time.perf_counter()
        elif run.step == started + 2:  # nobody has to wait for the first report
            records.tell(run, bar, f"{config.batch_size / seconds:.3g} images/s", seconds)
