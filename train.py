"""Training and evaluation of FlowSeg; flowseg_tools/runs.py has what surrounds a run.

One training step: draw a batch, take the gradient of `FlowSeg.loss`, clip it, update the weights, and let an
exponential moving average (EMA) follow them. Now and then the EMA is scored by the function that
`flowseg eval` calls, and everything that the next step depends on is saved.

All randomness is a function of (seed, step, place in the batch) or of (seed, epoch, index), so a run that was
stopped and continued is the same run. Under torchrun every process takes its share of each batch and of the
validation images; the loss is a mean over the whole batch, so the number of processes changes only rounding.
"""

import copy
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from data import IGNORE, MAX_PIXELS, Dataset, Stream, evenly_spaced, open_dataset
from flowseg_tools import records, runs
from flowseg_tools.check import before_training, fingerprint
from flowseg_tools.dinov2 import Alignment, DinoFlowSeg, load_encoder
from flowseg_tools.predict import Mode, read_ahead, segment_photo
from flowseg_tools.pretrained import start_from
from flowseg_tools.runs import RunError, process, summed
from flowseg_tools.settings import command_for, resolve_as
from flowseg_tools.terminal import make_bar, make_console, tracked
from model import FlowSeg, ModelConfig, check_ranges, draw_random, weights_hash

MOST_FAILURES = 10  # steps in a row without a finite gradient


@dataclass(frozen=True)
class TrainConfig:
    """Everything besides the network that determines a run; the defaults of the command line."""

    recipe: str = ""  # a table of recipes.toml
    dataset: str = "shapes"
    root: str = ""  # folder of the named data sets
    preset: str = "tiny"
    init: str = ""  # weights or run directory to start from
    seed: int = 0
    max_steps: int = 600
    batch_size: int = 8  # images per training step, over all processes
    grad_accum_steps: int = 1  # parts that a process splits its share of the batch into, to save memory
    crop_size: int = 96  # side of the training crop; evaluation resizes the short side to it
    optimizer: str = "muon"  # | adamw
    lr: float = 6e-3
    warmup_steps: int = 60  # linear warm-up, then cosine to zero
    weight_decay: float = 0.01
    grad_clip: float = 1.0  # largest gradient norm
    ema_decay: float = 0.995
    encoder: str = ""  # DINOv2 weights for the image path; none: its convolutions alone
    teacher: str = ""  # DINOv2 weights to align the tokens with (REPA); none: no alignment
    repa_depth: int = 8  # blocks before the tokens that are aligned; all blocks of a shallower network
    repa_weight: float = 0.5
    eval_every: int = 200
    save_every: int = 200
    log_every: int = 25
    num_workers: int = 0  # processes that load images
    max_pixels: int = MAX_PIXELS  # the largest picture that is opened
    dtype: str = "auto"  # of the network's arithmetic; auto: bfloat16 on CUDA, float32 elsewhere
    compile: bool = False  # torch.compile the network
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
    "eval_every": COUNT, "save_every": COUNT, "log_every": COUNT, "num_workers": (0, 1024),
    "max_pixels": (1, 10**12),
    "dtype": ("auto", "float32", "bfloat16"), "optimizer": ("adamw", "muon"),
}  # fmt: skip


def resolve(given: dict, settings: Iterable[str] = ()) -> tuple[TrainConfig, ModelConfig]:
    """Both configurations, from options by the names of their fields and from settings NAME=VALUE.

    RunError names what is unknown, out of range, or does not fit together.
    """
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
    valid = labels != IGNORE
    pairs = labels[valid].astype(np.int64) * num_classes + prediction[valid]
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def evaluate(
    model: FlowSeg, dataset: Dataset, short_side: int, steps: int, track: Callable = iter,
    limit: int | None = None, flip: bool = False, mode: Mode = "whole",
) -> tuple[Metrics, dict]:  # fmt: skip
    """Segment every image and compare at its original size; returns the metrics and their protocol.

    track: wraps the iterable of indices, for a progress bar. limit: most images, evenly spaced. Under
    torchrun the processes share the images and all get the same result.
    """
    num_classes = len(dataset.labels.classes)
    indices = evenly_spaced(len(dataset), limit)
    rank, world = process()
    confusion = np.zeros((num_classes, num_classes), np.int64)
    ious = np.zeros(len(indices))  # of single images
    samples = read_ahead(dataset.__getitem__, track(indices[rank::world]))
    for i, (photo, labels) in enumerate(samples):
        prediction, _ = segment_photo(model, photo, short_side, steps, mode, flip)
        counts = confusion_matrix(labels, prediction, num_classes)
        confusion += counts
        in_label = torch.from_numpy(counts.sum(1) > 0)  # a speck of another class does not count as a class
        ious[rank + i * world] = Metrics(counts).iou[in_label].mean()
    for values in (confusion, ious):
        summed(torch.from_numpy(values))  # in place
    protocol = {
        "dataset": dataset.name, "split": dataset.split, "images": len(indices),
        "evenly_spaced_of": len(dataset), "mode": mode, "flip": flip, "short_side": short_side,
        "compared_at": "original size", "steps": steps, "weights": weights_hash(model),
    }  # fmt: skip
    return Metrics(confusion, dict(zip(indices, ious.tolist(), strict=True))), protocol


# Optimization --------------------------------------------------------------------------------------------


def orthogonal(matrix: Tensor) -> Tensor:
    """About the orthogonal matrix nearest to `matrix`: its singular values become 0.7 to 1.2.

    Five Newton-Schulz steps X <- (a I + b A + c A^2) X with A = X X' (Jordan et al., Muon, 2024) need no
    decomposition. On CUDA bfloat16 is enough for them. On a CPU in float32 the steps are taken on the small
    matrix A alone, A <- S A S, and only their product P meets the long side of X.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    X = matrix.mT if tall else matrix
    X = X / (X.norm() + 1e-7)
    if X.is_cuda:
        X = X.bfloat16()
        for _ in range(5):
            A = X @ X.mT
            X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    else:
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

    def __init__(self, params: list[Tensor], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """Update all matrices that have a gradient."""
        rank, world = process()
        group = self.param_groups[0]
        sent = []
        for i, weight in enumerate(group["params"]):
            if weight.grad is None:
                continue
            if weight not in self.state:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
            momentum = self.state[weight]["momentum"]
            momentum.lerp_(weight.grad, 1 - group["momentum"])
            owner = i % world
            if owner == rank:
                direction = weight.grad.lerp(momentum, group["momentum"]).flatten(1)
                size = 0.2 * max(direction.shape) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(orthogonal(direction).view_as(weight), alpha=-group["lr"] * size)
            if world > 1:
                sent.append(dist.broadcast(weight, owner, async_op=True))
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
        if self.alignment:
            distance = share * self.alignment(image)  # a mean over all tokens of the batch
            loss = loss + self.alignment.weight * distance
            stats["repa_loss"] = distance.detach()
        return loss, {"loss": loss.detach(), **stats}


def batches(data: Dataset, config: TrainConfig, step: int) -> Iterator[list[Tensor]]:
    """The parts of this process's share of every batch, from `step` on: images, labels, indices."""
    rank, world = process()
    share = config.batch_size // world
    first = step * config.batch_size + rank * share
    total = config.max_steps * config.batch_size
    positions = (start + i for start in range(first, total, config.batch_size) for i in range(share))
    loader = DataLoader(
        Stream(data, config.crop_size, config.seed),
        batch_size=share // config.grad_accum_steps,
        sampler=positions,
        num_workers=config.num_workers,
        timeout=300 if config.num_workers else 0,  # seconds for a batch
        worker_init_fn=runs.outlive_signals,
    )
    return iter(loader)


def noise_generators(config: TrainConfig, step: int) -> list[torch.Generator]:
    """One generator for each image of this process, keyed by seed, step and place in the batch."""
    rank, world = process()
    share = config.batch_size // world
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
    _, world = process()
    count = sum((labels != IGNORE).sum() for _, labels, _ in parts)
    count = summed(count).to(device)
    totals: dict[str, Tensor] = {}
    for i, (images, labels, _) in enumerate(parts):
        images = images.to(device) / 127.5 - 1  # uint8 travels to the device, a quarter of float32
        labels = labels.to(device).long()
        own = generators[i * len(images) : (i + 1) * len(images)]
        share = len(images) / (len(generators) * world)

        # The gradients of all processes are exchanged once a step, while the last part is computed.
        waits = world > 1 and i < len(parts) - 1
        with objective.no_sync() if waits else nullcontext():
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                loss, stats = objective(images, labels, own, count, share)
            (loss * world).backward()  # DDP takes the mean over processes, each has a part of the sum
        for name, value in stats.items():
            totals[name] = totals.get(name, 0) + value
    return totals


# Training ------------------------------------------------------------------------------------------------


class Run:
    """One training run: what it works on, and how far it is."""

    def __init__(
        self, config: TrainConfig, network: ModelConfig, folder: Path, device: torch.device, console: Console,
        kind: type[FlowSeg], allow_changes: bool, stack: ExitStack,
    ):  # fmt: skip
        """Prepare a new run, or continue the one in `folder`; what is refused leaves no folder behind."""
        self.config = config
        self.folder = folder
        self.device = device
        self.console = console
        self.rank, self.world = process()
        self.bfloat16 = config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what CUDA needs to be deterministic
        torch.use_deterministic_algorithms(config.deterministic)
        self.data = open_dataset(config.dataset, "training", config.root)
        self.held_out = open_dataset(config.dataset, "validation", config.root)
        for part in (self.data, self.held_out):
            part.max_pixels = config.max_pixels
        loud = make_console(stderr=True, quiet=self.rank > 0).print  # what is wrong with data is never quiet
        before_training([self.data, self.held_out], loud)

        # The network, from random weights or from others; alignment is trained with it, but not exported.
        torch.manual_seed(config.seed)
        model = (DinoFlowSeg if network.vit_width else kind)(network)
        origin = "random weights"
        if config.encoder:
            load_encoder(model.network, config.encoder)
        elif network.vit_width and (not config.init or config.init.endswith(".ckpt")):
            raise RunError(f"preset {config.preset} needs --encoder FILE; `flowseg download` lists DINOv2")
        if config.init and not (folder / runs.STATE).exists():
            origin = runs.newest_checkpoint(Path(config.init), command_for(config.init))
            start_from(model, origin)
        self.model = model.to(device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.modules: dict[str, nn.Module] = {"model": self.model, "ema": self.ema}  # of the saved state
        alignment = None
        if config.teacher:
            torch.manual_seed(config.seed)  # whatever the weights were read from
            alignment = Alignment(model.network, config.teacher, config.repa_depth, config.repa_weight)
            self.modules["alignment"] = alignment
        self.objective: nn.Module = Objective(self.model, alignment)
        self.optimizers = make_optimizers(self.objective, config)

        # The run directory, in which one process at a time may train.
        labels = fingerprint([self.data, self.held_out])
        settings = {"train": asdict(config), "model": asdict(network), "labels": labels}
        if self.rank == 0:
            for change in runs.check(folder, settings, allow_changes):
                loud.print(f"warning: {folder}: {change}", style="yellow")
            stack.enter_context(runs.locked(folder))
        at = runs.load_state(folder, self.modules, self.optimizers, console, writes=self.rank == 0)
        self.step, self.validated, self.best = at  # steps done, step last validated, best mIoU
        if self.step > config.max_steps:
            raise RunError(f"{folder} is at step {self.step}; expected --max-steps {self.step} or more")
        if self.rank == 0:
            runs.claim(folder, settings)
            self.log = records.Log(folder, config.tensorboard, console)
            self.log.rewind(self.step, self.validated)
        self._speed_up()
        records.introduce(self, f"step {self.step} of the run" if self.step else origin)

    def _speed_up(self) -> None:
        """Change how a step is computed, but not its result."""
        network = self.model.network
        network.activation_checkpointing = self.config.activation_checkpointing
        if self.config.compile:  # in place, so that the weights keep their names
            network.compile()
            network.encode_image = torch.compile(network.encode_image)
        if self.world > 1:
            devices = [self.device.index] if self.device.type == "cuda" else None
            self.objective = DistributedDataParallel(
                self.objective, devices, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def due(self, period: int) -> bool:
        """Whether something that is done every `period` steps, and at the end, is to be done now."""
        return self.step > 0 and (self.step % period == 0 or self.step == self.config.max_steps)

    def report(self, values: dict[str, Tensor], norm: Tensor, seconds: float) -> str:
        """Log the diagnostics of the last step; returns the line for the terminal.

        seconds: for each of the steps since the last report.
        """
        means = summed(torch.stack([*values.values()]).cpu()).tolist()
        facts = dict(zip(values, means, strict=True))
        text = "  ".join(f"{name} {facts[name]:.3g}" for name in ("loss", "fm_error", "phi"))
        speed = self.config.batch_size / seconds
        facts |= {"grad_norm": float(norm), "lr": learning_rate(self.step - 1, self.config)}
        facts |= {"seconds_per_step": seconds, "images_per_second": speed}
        if self.rank == 0:
            self.log.write(self.step, **facts, **runs.peak_memory(self.device))
        return f"{text}  {speed:.3g} images/s"


def explain_failure(run: Run, parts: list) -> str:
    """Which step, time, parameter and files had no finite gradient, and what to do."""
    generators = noise_generators(run.config, run.step)
    t = draw_random(torch.rand, (len(generators),), generators)
    bad = [n for n, p in run.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    files = [run.data.read(i)[2] for *_, indices in parts for i in indices.tolist()]
    where = f"the last at step {run.step}, first in {[*bad, 'norm'][0]}, t {t.min():.2f} to {t.max():.2f}"
    fix = f"lower --lr {run.config.lr:g}, or look at {', '.join(files)}"
    return f"no finite gradient in {MOST_FAILURES} steps in a row, {where}; {fix}"


def train(
    config: TrainConfig, network: ModelConfig, folder: Path, device: str, console: Console,
    kind: type[FlowSeg] = FlowSeg, allow_changes: bool = False,
) -> int:  # fmt: skip
    """Train or continue the run in `folder`; returns 0, or 128 + the number of the signal that stopped it.

    kind: FlowSeg, or a baseline with its interface (experiments/baselines.py).
    """
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
    return 128 + stop if stop else 0


def loop(run: Run, signals: list[int], bar: Progress) -> int:
    """Train until the end, or until a signal; returns its number, or 0."""
    config = run.config
    task = bar.add_task("starting", total=config.max_steps, completed=run.step)
    loader = batches(run.data, config, run.step)
    failures = 0
    saved = (run.step, run.validated)
    started = run.step
    measured_from = run.step
    began = time.perf_counter()

    def until_stopped(indices: list[int]) -> Iterator[int]:
        for index in tracked(bar, indices, f"validating at step {run.step}"):
            if set(runs.STOPS) & set(signals):
                return
            yield index

    while True:
        # Validation. One that a signal interrupts is done again when the run continues.
        stop, wants_save = runs.agree(signals)
        if run.due(config.eval_every) and run.validated < run.step and not stop:
            steps = run.ema.config.steps
            metrics, protocol = evaluate(run.ema, run.held_out, config.crop_size, steps, until_stopped)
            stop, wants_save = runs.agree(signals)
            if not stop:
                score = metrics.scores["mIoU"]
                run.console.print(f"step {run.step}: validation mIoU {score:.1%}")
                if run.rank == 0:
                    records.write_weights(run, metrics, protocol)
                run.validated = run.step
                run.best = max(run.best, score)
            measured_from = run.step
            began = time.perf_counter()

        # Saving. While steps fail, the healthy state from before is kept.
        if stop or wants_save or (run.due(config.save_every) and not failures):
            if run.rank == 0 and saved != (run.step, run.validated):
                if run.validated < run.step:
                    records.write_weights(run)
                at = (run.step, run.validated, run.best)
                runs.save_state(run.folder, run.modules, run.optimizers, at)
            saved = (run.step, run.validated)
            signals[:] = [number for number in signals if number in runs.STOPS]
        if stop or run.step == config.max_steps:
            return stop

        # One training step: gradient, clipping, update. Without a finite gradient it is left out.
        parts = [next(loader) for _ in range(config.grad_accum_steps)]
        values = backward(run.objective, parts, noise_generators(config, run.step), run.bfloat16, run.device)
        parameters = [parameter for parameter in run.objective.parameters() if parameter.requires_grad]
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        failures = 0 if norm.isfinite() else failures + 1
        if failures == 0:
            nn.utils.clip_grads_with_norm_(parameters, config.grad_clip, norm)
            for optimizer in run.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(run.step, config) * group.get("lr_scale", 1.0)
                optimizer.step()
        elif failures == MOST_FAILURES:
            raise RunError(explain_failure(run, parts))
        run.objective.zero_grad()
        run.step += 1

        # The average follows the weights; at first it is an average of few steps.
        decay = min(config.ema_decay, run.step / (10 + run.step))
        torch._foreach_lerp_(list(run.ema.parameters()), list(run.model.parameters()), 1 - decay)

        # The report: a line of the log, and of the terminal unless a bar moves there.
        bar.update(task, completed=run.step)
        seconds = (time.perf_counter() - began) / (run.step - measured_from)
        if run.due(config.log_every):
            records.tell(run, bar, run.report(values, norm, seconds), seconds)
            measured_from = run.step
            began = time.perf_counter()
        elif run.step == started + 2:  # nobody has to wait for the first report
            records.tell(run, bar, f"{config.batch_size / seconds:.3g} images/s", seconds)
