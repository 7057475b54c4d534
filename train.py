"""Training, evaluation and run directories.

One loop: draw a batch, take `FlowSeg.loss`, step AdamW, follow with an exponential moving average (EMA), now
and then score the EMA with the function behind `flowseg eval`, and save. All randomness is a function of
(seed, step) or of (seed, epoch, index), so a run that was stopped and continued is the same run.

A run directory holds config.json, metrics.jsonl, last.safetensors and best.safetensors (EMA weights: what
other commands read), state.safetensors (weights, EMA, optimizer, step: what resuming reads), the state saved
before that one as previous.safetensors, and preview.png.
"""

import copy
import json
import math
import platform
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.data import DataLoader

import picture
from data import IGNORE, Folder, Shapes, Stream, nearest, open_dataset
from model import CheckpointError, FlowSeg, segment_photo, start_from, weights_hash, write_tensors
from network import PRESETS, Config

Dataset = Folder | Shapes
MOST_FAILURES = 10  # steps in a row without a finite gradient
STATE, PREVIOUS = "state.safetensors", "previous.safetensors"


class RunError(Exception):
    """A run that cannot start or continue as asked; the message is one line and says what to do."""

    exit_code = 2


@dataclass(frozen=True)
class TrainConfig:
    """Everything besides the network that determines a run; the defaults of the command line."""

    dataset: str = "shapes"
    root: str = ""  # folder of the named data sets
    preset: str = "tiny"
    init: str = ""  # weights to start from
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
    eval_every: int = 800
    save_every: int = 200
    log_every: int = 25
    workers: int = 0
    dtype: str = "auto"  # float32 | bfloat16; auto: bfloat16 on CUDA, float32 elsewhere


SETUPS: dict[str, dict] = {  # what training a preset starts from
    "tiny": {},
    "small": {"size": 144, "max_steps": 4000, "eval_every": 1000, "lr": 2e-3, "ema": 0.998},
    "base": {"size": 256, "batch": 64, "max_steps": 160_000, "eval_every": 8000, "lr": 1e-4, "ema": 0.9999},
    "large": {"size": 512, "batch": 16, "max_steps": 160_000, "eval_every": 8000, "lr": 1e-4, "ema": 0.9999},
    "xl": {"size": 512, "batch": 16, "max_steps": 160_000, "eval_every": 8000, "lr": 1e-4, "ema": 0.9999},
}


def resolve(given: dict, settings: list[str]) -> tuple[TrainConfig, Config]:
    """Configs from the options given and NAME=VALUE settings, then the preset, then the defaults."""
    kinds = {field.name: type(field.default) for field in (*fields(Config), *fields(TrainConfig))}
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in kinds or name == "num_classes":
            raise RunError(f"--set {setting}: expected FIELD=VALUE of the config{nearest(name, kinds)}")
        try:
            given[name] = {"true": True, "false": False}[value] if kinds[name] is bool else kinds[name](value)
        except (KeyError, ValueError) as error:
            raise RunError(f"--set {setting}: expected a {kinds[name].__name__} after {name}=") from error
    preset = given.get("preset", TrainConfig.preset)
    if preset not in PRESETS:
        raise RunError(f"--preset {preset}: expected {', '.join(PRESETS)}{nearest(preset, PRESETS)}")
    values = PRESETS[preset] | SETUPS[preset] | given
    config = TrainConfig(**_only(TrainConfig, values))
    if config.dtype not in ("auto", "float32", "bfloat16"):
        raise RunError(f"dtype is {config.dtype!r}; expected auto, float32 or bfloat16")
    values["num_classes"] = len(open_dataset(config.dataset, "training", config.root).labels.classes)
    if values["num_classes"] > 32:  # measured at 11, 14 and 112 classes: README, Ablations
        values = {"encoding": "coded", "dims": 19} | values
    try:
        model_config = Config(**_only(Config, values))
    except ValueError as error:
        raise RunError(str(error)) from error
    for name, divisor in (("size", model_config.patch_size), ("batch", config.accumulate)):
        if getattr(config, name) % divisor:
            raise RunError(f"{name} is {getattr(config, name)}; expected a multiple of {divisor}")
    return config, model_config


def _only(kind: type, values: dict) -> dict:
    return {field.name: values[field.name] for field in fields(kind) if field.name in values}


@dataclass(frozen=True)
class Metrics:
    """Scores, in [0, 1], of a confusion matrix: int64 (N, N), rows are labels, columns are predictions."""

    confusion: np.ndarray

    @property
    def iou(self) -> np.ndarray:
        """Intersection over union (N,), nan for a class that occurs in neither labels nor predictions."""
        hit = np.diag(self.confusion)
        union = self.confusion.sum(0) + self.confusion.sum(1) - hit
        return np.divide(hit, union, out=np.full(len(hit), np.nan), where=union > 0)

    @property
    def scores(self) -> dict[str, float]:
        """mIoU over the classes that occur; aAcc, the share of right pixels; mAcc, its mean over classes."""
        if not self.confusion.any():
            return dict.fromkeys(("mIoU", "aAcc", "mAcc"), math.nan)
        hit, labelled = np.diag(self.confusion), self.confusion.sum(1)
        recall = hit[labelled > 0] / labelled[labelled > 0]
        accuracy = float(hit.sum() / labelled.sum())
        return {"mIoU": float(np.nanmean(self.iou)), "aAcc": accuracy, "mAcc": float(recall.mean())}


def confusion_matrix(labels: np.ndarray, prediction: np.ndarray, num_classes: int) -> np.ndarray:
    """int64 (N, N) counts of (label, prediction) pairs; pixels labelled 255 do not count."""
    valid = labels != IGNORE
    pairs = labels[valid].astype(np.int64) * num_classes + prediction[valid]
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def evaluate(
    model: FlowSeg, dataset: Dataset, size: int, steps: int, track: Callable = iter
) -> tuple[Metrics, dict]:
    """Segment every image and compare at its original size; returns the metrics and their protocol.

    track: wraps the iterable of indices, for a progress bar.
    """
    num_classes = len(dataset.labels.classes)
    confusion = np.zeros((num_classes, num_classes), np.int64)
    for i in track(range(len(dataset))):
        photo, labels = dataset[i]
        confusion += confusion_matrix(labels, segment_photo(model, photo, size, steps)[0], num_classes)
    protocol = {"dataset": dataset.name, "split": dataset.split, "images": len(dataset), "mode": "whole",
                "short_side": size, "compared_at": "original size", "steps": steps,
                "weights": weights_hash(model)}  # fmt: skip
    return Metrics(confusion), protocol


def claim(folder: Path, config: dict) -> None:
    """Make the folder this run's own, or check that it is: RunError for another run or foreign content."""
    path = folder / "config.json"
    try:
        if not path.exists():
            if folder.exists() and any(folder.iterdir()):
                raise RunError(f"{folder} exists and is not a run directory; choose another with --out")
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(config, indent=2) + "\n")
        stored = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"cannot use {folder} ({error}); choose another with --out") from error
    old, new = ({**whole.get("train", {}), **whole.get("model", {})} for whole in (stored, config))
    changed = [f"{k} was {old.get(k)!r}, now {new[k]!r}" for k in new if old.get(k) != new[k]]
    if changed:
        raise RunError(f"{folder} holds another run ({'; '.join(changed)}): repeat its options, or use --out")


def log(folder: Path, **values: float) -> None:
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(values) + "\n")


def save_state(folder: Path, model: FlowSeg, ema: FlowSeg, optimizer: torch.optim.AdamW, **progress) -> None:
    """Write everything that the next step depends on into one file, and keep the one before it."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in ema.state_dict().items()}
    for parameter, moments in optimizer.state.items():
        tensors |= {f"optimizer.{names[parameter]}.{k}": v for k, v in moments.items()}
    write_tensors(tensors, folder / STATE, progress, keep=PREVIOUS)


def load_state(
    folder: Path, model: FlowSeg, ema: FlowSeg, optimizer: torch.optim.AdamW, say: Callable
) -> tuple[int, float]:
    """Continue from the newest state that can be read: (step, best mIoU so far), (0, -1) if there is none."""
    damage = []
    for path in filter(Path.exists, (folder / STATE, folder / PREVIOUS)):
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                step, best = (json.loads(file.metadata()[key]) for key in ("step", "best"))
            break
        except (SafetensorError, OSError, KeyError, TypeError) as error:
            damage.append(f"{path} is damaged ({error})")
    else:
        if damage:
            raise CheckpointError(f"{'; '.join(damage)}; choose another folder with --out")
        return 0, -1.0
    if damage:  # set aside, so that the next save does not take it for the state to keep
        say(f"warning: {damage[0]}: going on from the state saved before it, at step {step}", style="yellow")
        (folder / STATE).replace(folder / "damaged.safetensors")

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    model.load_state_dict(part("model."))
    ema.load_state_dict(part("ema."))
    for name, p in model.named_parameters():
        moments = part(f"optimizer.{name}.").items()
        optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in moments}
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    metrics.write_text("".join(line + "\n" for line in kept))
    return step, best


def validate(folder: Path, ema: FlowSeg, data: Dataset, config: TrainConfig, step: int, best: float) -> float:
    """Score the EMA weights, write them as `last` (and `best`) with a preview; returns the mIoU."""
    steps = ema.config.steps
    metrics, protocol = evaluate(ema, data, config.size, steps)
    scores, labels = metrics.scores, data.labels
    log(folder, step=step, **scores)
    facts = dict(classes=labels.classes, ids=labels.ids, ignore=labels.ignore, dataset=config.dataset,
                 size=config.size, step=step, protocol=protocol, **scores, **environment())  # fmt: skip
    for name in ("last", "best") if scores["mIoU"] > best else ("last",):
        ema.save(folder / f"{name}.safetensors", **facts)
    samples = [data[i] for i in np.unique(np.linspace(0, len(data) - 1, 4).astype(int)).tolist()]
    rows = [(photo, truth, segment_photo(ema, photo, config.size, steps)[0]) for photo, truth in samples]
    sheet = picture.preview(rows, labels.classes, picture.palette(ema.centroids.cpu().numpy()))
    picture.save(folder / "preview.png", sheet)
    return scores["mIoU"]


def environment() -> dict[str, str]:
    """Versions and commit that weights were made with."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    return versions | {"commit": commit or "unknown"}


def newest_checkpoint(folder: Path | None = None) -> Path:
    """The best weights of a run directory, by default of the run under runs/ that was written to last."""
    found = list(folder.glob("last.safetensors") if folder else Path("runs").glob("*/last.safetensors"))
    if not found:
        raise RunError(f"no weights in {folder or 'runs'}/: run `flowseg train`, or pass a checkpoint")
    newest = max(found, key=lambda path: path.stat().st_mtime)
    best = newest.with_name("best.safetensors")
    return best if best.exists() else newest


def pick_device(name: str = "auto") -> torch.device:
    """auto: CUDA, then MPS, then CPU; RunError when the one asked for is not there."""
    there = [kind for kind in ("cuda", "mps") if getattr(torch, kind).is_available()] + ["cpu"]
    if name == "auto":
        return torch.device(there[0])
    if name.partition(":")[0] not in there:
        raise RunError(f"--device {name} is not available; expected auto, {', '.join(there)}")
    return torch.device(name)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices and convolutions, not biases, norms and embeddings."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    free = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.99))


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then cosine to zero at max_steps."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    return config.lr * warm * 0.5 * (1 + math.cos(math.pi * step / config.max_steps))


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying; a second SIGINT interrupts at once."""
    received: list[int] = []

    def note(number, frame):
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def report(console: Console, bar: Progress, step: int, total: int, means: dict[str, float]) -> None:
    """Move the bar on a terminal; elsewhere print a plain line."""
    text = (f"step {step}/{total}  loss {means['loss']:.3f}  FM {means['fm']:.3f}  Phi {means['phi']:.3f}"
            f"  |grad Phi| {means['grad']:.2f}  {means['images_per_second']:.1f} img/s")  # fmt: skip
    bar.update(bar.task_ids[0], completed=step, description=text)
    if not console.is_terminal:
        left = timedelta(seconds=round((total - step) * means["seconds_per_step"]))
        console.print(f"{text}  {left} left", soft_wrap=True, highlight=False)


def train(
    config: TrainConfig, network: Config, folder: Path, device: str, console: Console, kind: type = FlowSeg
) -> int:
    """Train or continue the run in `folder`; returns 0, or 128 + the number of the signal that stopped it.

    kind: FlowSeg, or a comparison that keeps its interface (ablate.py).
    """
    device = pick_device(device)
    data = open_dataset(config.dataset, "training", config.root)
    held_out = open_dataset(config.dataset, "validation", config.root)
    claim(folder, {"train": asdict(config), "model": asdict(network)})
    torch.manual_seed(config.seed)
    model = kind(network)
    if config.init:
        start_from(model, config.init)
    model = model.to(device)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = make_optimizer(model, config)
    say = partial(console.print, soft_wrap=True, highlight=False)
    step, best = load_state(folder, model, ema, optimizer, say)
    say(f"{folder} on {device} from step {step}: {data.name}, {len(data):,} images; preset {config.preset}, "
        f"{network.num_classes} classes, {network.encoding} in {network.dims} dimensions; "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")  # fmt: skip

    stream = Stream(data, config.size, config.seed)
    positions = range(step * config.batch, config.max_steps * config.batch)
    micro_batch = config.batch // config.accumulate
    loader = iter(DataLoader(stream, micro_batch, sampler=positions, num_workers=config.workers))
    bfloat16 = config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda")
    history, failures, began = [], 0, time.perf_counter()
    columns = TextColumn("{task.description}"), BarColumn(bar_width=None), TimeRemainingColumn()
    bar = Progress(*columns, console=console, disable=not console.is_terminal, expand=True)
    bar.add_task("starting", total=config.max_steps, completed=step)
    with stop_signals() as signals, bar:
        while step < config.max_steps and not signals:
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            for _ in range(config.accumulate):
                images, labels, indices = next(loader)
                images, labels = images.to(device) / 127.5 - 1, labels.to(device, torch.int64)
                with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                    loss, stats = model.loss(images, labels, generator)
                (loss / config.accumulate).backward()
                history.append({"loss": loss.detach(), **stats})
            history[-1]["grad_norm"] = norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            failures = 0 if norm.isfinite() else failures + 1
            if failures == 0:  # a step without a finite gradient is left out
                optimizer.step()
            elif failures == MOST_FAILURES:
                files = ", ".join(data.read(i)[2] for i in indices.tolist())
                what = f"no finite gradient in {failures} steps in a row, the last at step {step} of {files}"
                raise RunError(f"{what}; lower --lr, or look at these files")
            optimizer.zero_grad()
            step += 1
            decay = min(config.ema, step / (10 + step))
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)

            last = step == config.max_steps
            if last or step % config.log_every == 0:
                means = {k: [h[k] for h in history if k in h] for k in history[-1]}
                means = {k: float(torch.stack(values).nanmean()) for k, values in means.items()}
                seconds = (time.perf_counter() - began) * config.accumulate / len(history)
                means |= {"seconds_per_step": seconds, "images_per_second": config.batch / seconds}
                log(folder, step=step, lr=group["lr"], **means)
                report(console, bar, step, config.max_steps, means)
                history, began = [], time.perf_counter()
            if last or step % config.eval_every == 0:
                score = validate(folder, ema, held_out, config, step, best)
                say(f"step {step}: validation mIoU {score:.1%}")
                best, history, began = max(best, score), [], time.perf_counter()
            if last or signals or (step % config.save_every == 0 and not failures):  # keep the healthy state
                save_state(folder, model, ema, optimizer, step=step, best=best)
    return 128 + signals[0] if signals else 0
