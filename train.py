"""Training and evaluation; run.py has what surrounds a run: its directory, processes and signals.

One loop: draw a batch, take `FlowSeg.loss`, step AdamW, follow with an exponential moving average (EMA), now
and then score the EMA with the function behind `flowseg eval`, and save. All randomness is a function of
(seed, step, place in the batch) or of (seed, epoch, index): a run that was stopped and continued is the same
run. Under torchrun every process takes its share of each batch and of the validation images; losses,
gradients and counts are sums over all processes, so their number changes nothing but rounding. The first one
writes.
"""

import copy
import math
import os
import shlex
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from functools import partial
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.data import DataLoader

import picture
import run
from data import IGNORE, Folder, Shapes, Stream, evenly_spaced, nearest, open_dataset
from model import FlowSeg, draw, segment_photo, start_from, weights_hash
from network import Config
from public import Alignment
from run import RunError, process, summed

Dataset = Folder | Shapes
MOST_FAILURES = 10  # steps in a row without a finite gradient
H100 = 989  # TFLOP/s in bfloat16, dense, by its data sheet
UTILISATION = 0.4  # share of it that training is taken to reach
KEPT = 0.6  # share of the bytes for the backward pass that bfloat16 keeps: some stay float32; measured


@dataclass(frozen=True)
class TrainConfig:
    """Everything besides the network that determines a run; the defaults of the command line."""

    recipe: str = ""  # a table of recipes.toml
    stage: int = 1  # of the recipe
    dataset: str = "shapes"
    root: str = ""  # folder of the named data sets
    preset: str = "tiny"
    init: str = ""  # weights or run directory to start from
    seed: int = 0
    max_steps: int = 800
    batch: int = 8  # images per optimizer step
    accumulate: int = 1  # micro-batches that a batch is split into
    size: int = 96  # side of the training crop; evaluation resizes the short side to it
    lr: float = 4e-3
    warmup: int = 100  # steps of linear warm-up, then cosine to zero
    weight_decay: float = 0.01
    clip: float = 1.0  # largest gradient norm
    ema: float = 0.995
    teacher: str = ""  # DINOv2 weights to align the tokens with (REPA, public.py); none: no alignment
    repa_depth: int = 8  # blocks before these tokens; all of them in a shallower network
    repa_weight: float = 0.5
    eval_every: int = 800
    save_every: int = 200
    log_every: int = 25
    workers: int = 0
    dtype: str = "auto"  # float32 | bfloat16; auto: bfloat16 on CUDA, float32 elsewhere
    compile: bool = False  # torch.compile the network
    recompute: bool = False  # blocks and neural field again in the backward pass: far less memory, slower
    deterministic: bool = False  # refuse operations whose result may vary, on a GPU


TABLES = Path(__file__).parent / "flowseg_data"
PRESETS, RECIPES = (tomllib.loads((TABLES / f"{kind}.toml").read_text()) for kind in ("presets", "recipes"))


def choose(option: str, name: str, tables: dict) -> dict:
    if name not in tables:
        raise RunError(f"{option} {name}: expected {', '.join(tables)}{nearest(name, tables)}")
    return tables[name]


def resolve(given: dict, settings: list[str]) -> tuple[TrainConfig, Config]:
    """Configs from the options given and NAME=VALUE settings, then recipe, preset and defaults."""
    kinds = {field.name: type(field.default) for field in (*fields(Config), *fields(TrainConfig))}
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in kinds or name == "num_classes":
            raise RunError(f"--set {setting}: expected FIELD=VALUE of the config{nearest(name, kinds)}")
        try:
            given[name] = {"true": True, "false": False}[value] if kinds[name] is bool else kinds[name](value)
        except (KeyError, ValueError) as error:
            raise RunError(f"--set {setting}: expected a {kinds[name].__name__} after {name}=") from error
    if {"recipe", "stage"} & given.keys():
        stages = choose("--recipe", given.get("recipe", "(none)"), RECIPES)
        given = choose("--stage", str(given.get("stage", 1)), stages) | given
    values = choose("--preset", given.get("preset", TrainConfig.preset), PRESETS) | given
    config = TrainConfig(**{k: v for k, v in values.items() if k in TrainConfig.__dataclass_fields__})
    counts = "batch", "accumulate", "max_steps", "eval_every", "save_every", "log_every", "repa_depth"
    for name, least in (dict.fromkeys(counts, 1) | {"seed": 0, "workers": 0}).items():
        if getattr(config, name) < least:
            raise RunError(f"{name} is {getattr(config, name)}; expected at least {least}")
    if config.dtype not in ("auto", "float32", "bfloat16"):
        raise RunError(f"dtype is {config.dtype!r}; expected auto, float32 or bfloat16")
    data = open_dataset(config.dataset, "training", config.root, strict=False)  # the label table is enough
    values["num_classes"] = len(data.labels.classes)
    if values["num_classes"] > 32:  # measured at 11, 14 and 112 classes: README, Ablations
        values = {"encoding": "coded", "dims": 19} | values
    try:
        model_config = Config(**{k: v for k, v in values.items() if k in Config.__dataclass_fields__})
    except ValueError as error:
        raise RunError(str(error)) from error
    parts, patch = int(os.environ.get("WORLD_SIZE", 1)) * config.accumulate, model_config.patch_size
    if config.size % patch:
        raise RunError(f"size is {config.size}; expected a multiple of the patch size {patch}")
    if config.batch % parts:
        raise RunError(f"batch is {config.batch}; expected a multiple of {parts}, processes x accumulate")
    return config, model_config


def cost(config: TrainConfig, network: Config) -> dict:
    """The configs and what a run takes on H100 GPUs, by counting: needs neither its data nor a GPU.

    Memory: weights, gradients, two moments and EMA are 5 float32 numbers a parameter, and bfloat16 adds a
    copy of the weights; what is kept for the backward pass grows with the images.
    """
    parameters, flops, kept = run.counted(network, config.size, config.recompute)
    images = config.batch // int(os.environ.get("WORLD_SIZE", 1)) // config.accumulate
    bytes_each, share = (20, 1) if config.dtype == "float32" else (22, KEPT)
    fixed, grows = bytes_each * parameters / 1e9, images * share * kept / 1e9
    tera = config.batch * flops / 1e12
    facts = {
        "parameters": parameters,
        "TFLOP a step (products and convolutions, forward and backward)": tera,
        "images at a time on each GPU": images,
        "GB of weights, gradients, moments and EMA": fixed,
        "GB kept for the backward pass": grows,
        "GB of GPU memory": fixed + grows,
        f"hours on one H100 at {UTILISATION:.0%} of {H100} TFLOP/s":
            config.max_steps * tera / (UTILISATION * H100) / 3600,
    }  # fmt: skip
    return asdict(config) | asdict(network) | {name: round(value, 3) for name, value in facts.items()}


@dataclass(frozen=True)
class Metrics:
    """Scores, in [0, 1], of a confusion matrix: int64 (N, N), rows are labels, columns are predictions."""

    confusion: np.ndarray

    @property
    def iou(self) -> Tensor:
        """Intersection over union (N,), nan for a class that occurs in neither labels nor predictions."""
        c = torch.from_numpy(self.confusion).double()
        return c.diag() / (c.sum(0) + c.sum(1) - c.diag())

    @property
    def scores(self) -> dict[str, float]:
        """mIoU over the classes that occur; aAcc, the share of right pixels; mAcc, its mean over classes."""
        c = torch.from_numpy(self.confusion).double()
        accuracy, recall = c.trace() / c.sum(), c.diag() / c.sum(1)
        return {"mIoU": float(self.iou.nanmean()), "aAcc": float(accuracy), "mAcc": float(recall.nanmean())}


def confusion_matrix(labels: np.ndarray, prediction: np.ndarray, num_classes: int) -> np.ndarray:
    """int64 (N, N) counts of (label, prediction) pairs; pixels labelled 255 do not count."""
    valid = labels != IGNORE
    pairs = labels[valid].astype(np.int64) * num_classes + prediction[valid]
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def evaluate(
    model: FlowSeg, dataset: Dataset, size: int, steps: int, track: Callable = iter,
    limit: int | None = None, flip: bool = False, mode: str = "whole",
) -> tuple[Metrics, dict]:  # fmt: skip
    """Segment every image and compare at its original size; returns the metrics and their protocol.

    track: wraps the iterable of indices, for a progress bar. limit: most images, evenly spaced.
    """
    num_classes, indices = len(dataset.labels.classes), evenly_spaced(len(dataset), limit)
    confusion = np.zeros((num_classes, num_classes), np.int64)
    rank, world = process()
    for i in track(indices[rank::world]):
        photo, labels = dataset[i]
        prediction = segment_photo(model, photo, size, steps, flip, mode)[0]
        confusion += confusion_matrix(labels, prediction, num_classes)
    summed(torch.from_numpy(confusion))  # in place
    protocol = {"dataset": dataset.name, "split": dataset.split, "images": len(indices),
                "evenly_spaced_of": len(dataset), "mode": mode, "flip": flip, "short_side": size,
                "compared_at": "original size", "steps": steps, "weights": weights_hash(model)}  # fmt: skip
    return Metrics(confusion), protocol


def record(
    folder: Path, ema: FlowSeg, data: Dataset, config: TrainConfig, step: int, scored: tuple, best: float
) -> None:
    """Write what was scored: the EMA weights as `last` (and `best`), a preview, a line of the log."""
    scores, labels = scored[0].scores, data.labels
    facts = dict(classes=labels.classes, ids=labels.ids, ignore=labels.ignore, dataset=config.dataset,
                 size=config.size, step=step, protocol=scored[1], **scores, **run.environment())  # fmt: skip
    for name in ("last", "best") if scores["mIoU"] > best else ("last",):
        ema.save(folder / f"{name}.safetensors", **facts)
    samples = [data[i] for i in evenly_spaced(len(data), 4)]
    rows = [(photo, y, segment_photo(ema, photo, config.size, ema.config.steps)[0]) for photo, y in samples]
    sheet = picture.preview(rows, labels.classes, picture.palette(ema.centroids.cpu().numpy()))
    picture.save(folder / "preview.png", sheet)
    run.log(folder, step=step, **scores)


def pick_device(name: str = "auto") -> torch.device:
    """auto: CUDA, then MPS, then CPU; under torchrun each process its own GPU. RunError: it is not there."""
    there = [kind for kind in ("cuda", "mps") if getattr(torch, kind).is_available()] + ["cpu"]
    name = there[0] if name == "auto" else name
    if name.partition(":")[0] not in there:
        raise RunError(f"--device {name} is not available; expected auto, {', '.join(there)}")
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices and convolutions, not biases, norms and embeddings."""
    groups = [{"params": [p for p in model.parameters() if (p.ndim >= 2) == matrix],
               "weight_decay": config.weight_decay * matrix} for matrix in (True, False)]  # fmt: skip
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.99), fused=True)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then cosine to zero at max_steps."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    return config.lr * warm * 0.5 * (1 + math.cos(math.pi * step / config.max_steps))


def generators(config: TrainConfig, step: int) -> list[torch.Generator]:
    """The randomness of this process's images, one an image: keyed by seed, step and place in the batch."""
    rank, world = process()
    places = range(config.batch)[rank * config.batch // world :][: config.batch // world]
    keys = (np.random.SeedSequence([config.seed, step, place]) for place in places)
    return [torch.Generator().manual_seed(int(key.generate_state(1)[0])) for key in keys]


def batches(data: Dataset, config: TrainConfig, step: int) -> Iterator[list[Tensor]]:
    """Micro-batches of this process from `step` on: images, labels, indices."""
    rank, world = process()
    share, total = config.batch // world, config.max_steps * config.batch
    starts = range(step * config.batch + rank * share, total, config.batch)
    positions = (start + i for start in starts for i in range(share))
    return iter(DataLoader(
        Stream(data, config.size, config.seed), share // config.accumulate, sampler=positions,
        num_workers=config.workers, timeout=300 if config.workers else 0,  # seconds a batch
        worker_init_fn=run.outlive_signals,
    ))  # fmt: skip


def backward(model: FlowSeg, parts: list, own: list[torch.Generator], bfloat16: bool) -> dict[str, Tensor]:
    """Leave the gradient of the mean over all labelled pixels of the batch, whose micro-batches and processes
    each add their part; returns this process's part of the loss and its diagnostics."""
    device, totals = model.centroids.device, {}
    count = summed(sum((labels != IGNORE).sum() for _, labels, _ in parts)).to(device)
    for i, (images, labels, _) in enumerate(parts):
        images, labels = images.to(device) / 127.5 - 1, labels.to(device, torch.int64)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            loss, stats = model.loss(images, labels, own[i * len(images) :][: len(images)], count)
            if model.alignment:  # a mean over all tokens of the batch, so this part's share of it
                aligned = model.alignment(images) * len(images) / (len(own) * process()[1])
                loss, stats["align"] = loss + model.alignment.weight * aligned, aligned.detach()
        loss.backward()
        for name, value in ({"loss": loss.detach()} | stats).items():
            totals[name] = totals.get(name, 0) + value
    if dist.is_initialized():
        gradients = [parameter.grad for parameter in model.parameters()]
        vector_to_parameters(summed(parameters_to_vector(gradients)), gradients)  # one message
    return totals


def train(
    config: TrainConfig, network: Config, folder: Path, device: str, console: Console,
    kind: type = FlowSeg, allow_changes: bool = False,
) -> int:  # fmt: skip
    """Train or continue the run in `folder`; returns 0, or 128 + the number of the signal that stopped it.

    kind: FlowSeg, or a baseline that keeps its interface (tests/baselines.py).
    """
    device = pick_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in os.environ:  # torchrun, not a left-over
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    rank, world = process()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what CUDA needs to be deterministic
    torch.use_deterministic_algorithms(config.deterministic)
    data, held_out = (open_dataset(config.dataset, s, config.root) for s in ("training", "validation"))
    console = console if rank == 0 else Console(quiet=True)
    torch.manual_seed(config.seed)
    model, origin = kind(network), "random weights"
    if config.init and not (folder / run.STATE).exists():
        stage_1 = f" --recipe {config.recipe} --stage 1" if config.recipe else ""
        origin = run.newest_checkpoint(Path(config.init), f"flowseg train{stage_1}")
        start_from(model, str(origin))
    model = model.to(device)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    if config.teacher:  # not before: its projector is trained and resumed with the model, but not exported
        torch.manual_seed(config.seed)  # whatever the weights were read from
        model.alignment = Alignment(model.network, config.teacher, config.repa_depth, config.repa_weight)
    optimizer = make_optimizer(model, config)
    configs = {"train": asdict(config), "model": asdict(network)}
    if rank == 0:
        run.check(folder, configs, allow_changes)
    step, validated, best = run.load_state(folder, model, ema, optimizer, console)
    if rank == 0:  # not before: what is refused leaves no folder
        run.claim(folder, configs)
    model.network.recompute = config.recompute
    if config.compile:  # in place, so that the weights keep their names
        model.network.compile()
        model.network.encode = torch.compile(model.network.encode)
    bfloat16 = config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda")
    console.print(
        f"{folder} on {world} x {device} from {f'step {step}' if step else origin}: "
        f"{data.name}, {len(data):,} images; "
        f"preset {config.preset}, {'bfloat16' if bfloat16 else 'float32'}; "
        f"{network.num_classes} classes, {network.encoding} in {network.dims} dimensions; "
        f"{sum(p.numel() for p in ema.parameters()) / 1e6:.1f} M parameters; "
        f"alignment {'with ' + config.teacher if config.teacher else 'off: --set teacher=FILE'}")  # fmt: skip
    console.print(shlex.join(sys.argv), *(" ".join(fact) for fact in run.environment().items()), sep="; ")

    def due(period: int) -> bool:
        return step > 0 and (step % period == 0 or step == config.max_steps)

    failures, saved, since, began = 0, (step, validated), step, time.perf_counter()
    bar = Progress(console=console, disable=not console.is_terminal, expand=True)
    bar.add_task("starting", total=config.max_steps, completed=step)
    with run.caught_signals() as signals, bar:
        loader = batches(data, config, step)
        while True:
            stop, asked = run.agree(signals)
            if due(config.eval_every) and validated < step and not stop:
                unless_stopped = partial(takewhile, lambda _: not set(run.STOPS) & set(signals))
                scored = evaluate(ema, held_out, config.size, ema.config.steps, unless_stopped)
                stop, asked = run.agree(signals)
                if not stop:
                    score = scored[0].scores["mIoU"]
                    console.print(f"step {step}: validation mIoU {score:.1%}")
                    if rank == 0:
                        record(folder, ema, held_out, config, step, scored, best)
                    validated, best = step, max(best, score)
                since, began = step, time.perf_counter()
            if stop or asked or (due(config.save_every) and not failures):  # failing, keep the healthy state
                if rank == 0 and saved != (step, validated):
                    run.save_state(folder, model, ema, optimizer, (step, validated, best))
                saved = step, validated
                signals[:] = [number for number in signals if number in run.STOPS]
            if stop or step == config.max_steps:
                break

            parts, own = [next(loader) for _ in range(config.accumulate)], generators(config, step)
            values = backward(model, parts, own, bfloat16)
            norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
            failures = 0 if norm.isfinite() else failures + 1
            if failures == 0:  # a step without a finite gradient is left out
                nn.utils.clip_grads_with_norm_(model.parameters(), config.clip, norm)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, config)
                optimizer.step()
            elif failures == MOST_FAILURES:
                t = draw(torch.rand, (len(own),), generators(config, step))
                bad = next((n for n, p in model.named_parameters() if not p.grad.isfinite().all()), "norm")
                files = ", ".join(data.read(i)[2] for *_, indices in parts for i in indices.tolist())
                where = f"the last at step {step}, first in {bad}, t {t.min():.2f} to {t.max():.2f}"
                fix = f"lower --set lr={config.lr:g}, or look at {files}"
                raise RunError(f"no finite gradient in {failures} steps in a row, {where}; {fix}")
            optimizer.zero_grad()
            step += 1
            decay = min(config.ema, step / (10 + step))
            torch._foreach_lerp_(list(ema.network.parameters()), list(model.network.parameters()), 1 - decay)

            if due(config.log_every):
                means = summed(torch.stack([*values.values()]).cpu()).tolist()
                means = dict(zip(values, means, strict=True)) | {"grad_norm": float(norm)}
                seconds = (time.perf_counter() - began) / (step - since)
                means |= {"seconds_per_step": seconds, "images_per_second": config.batch / seconds}
                means |= {"lr": learning_rate(step - 1, config)} | run.peak_memory(device)
                if rank == 0:
                    run.log(folder, step=step, **means)
                text = "  ".join(f"{name} {means[name]:.3g}" for name in ("loss", "fm", "phi"))
                text = f"step {step}/{config.max_steps}  {text}  {config.batch / seconds:.3g} images/s"
                bar.update(bar.task_ids[0], completed=step, description=text)
                if not console.is_terminal:
                    left = timedelta(seconds=round((config.max_steps - step) * seconds))
                    console.print(f"{text}  {left} left")
                since, began = step, time.perf_counter()
    if world > 1:
        dist.destroy_process_group()
    return 128 + stop if stop else 0
