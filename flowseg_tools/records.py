"""What a training run writes and says: weights with their scores, a preview, logs, its first lines."""

import json
import math
import os
import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from data import PictureError, evenly_spaced
from flowseg_tools import draw
from flowseg_tools.predict import segment_photo, to_input
from flowseg_tools.runs import RunError, environment, peak_memory, replace_text, summed
from flowseg_tools.state import save_state
from model import CheckpointInfo, FlowSeg, draw_random, least_spacing, squared_distances

METRICS = "metrics.jsonl"
HISTORY = "history.txt"
BEGAN = "began at step"
NUM_PREVIEWS = 4  # validation images in preview.png


class Log:
    """The lines of metrics.jsonl and, if wanted, TensorBoard's file. A failure to log never ends the work."""

    def __init__(self, folder: Path, tensorboard: bool, console: Console):
        self.path = folder / METRICS
        self.console = console
        self.failed = False
        self.writer = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise RunError("--tensorboard: it is not installed; pip install tensorboard") from error
            self.writer = SummaryWriter(folder)

    def write(self, step: int, **values: float) -> None:
        """Add a line; a number that JSON does not know becomes null."""
        line = {"step": step}
        for name, value in values.items():
            line[name] = value if math.isfinite(value) else None
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            if self.writer:
                for name, value in values.items():
                    self.writer.add_scalar(name, value, step)
                self.writer.flush()
        except OSError as error:
            if not self.failed:
                self.console.print(f"warning: {self.path}: {error}; training goes on", style="yellow")
            self.failed = True

    def rewind(self, step: int, validated: int) -> None:
        """Drop what was logged after the state that a run continues from: it will be logged again."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                values = json.loads(line)
                last = validated if "mIoU" in values else step
                if values["step"] <= last:
                    kept.append(line + "\n")
            except (ValueError, TypeError, KeyError, RecursionError):
                continue  # a line cut short by a kill, or damaged
        replace_text(self.path, "".join(kept))


def read_log(folder: Path) -> list[dict]:
    """What a run logged until now: step and numbers, or None for a number that was not finite."""
    found = []
    with suppress(OSError):
        for line in (folder / METRICS).read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError, RecursionError, AttributeError):
                values = json.loads(line)
                known = all(type(value) in (int, float, type(None)) for value in values.values())
                if known and type(values.get("step")) is int:
                    found.append(values)
    return found


@contextmanager
def remembered(run) -> Iterator[None]:
    """Write into history.txt by which command a train.Run goes on, and how that ends."""
    if run.rank > 0:
        yield
        return

    def write(event: str) -> None:
        # A link of that name is never followed.
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
        with (
            suppress(OSError),
            open(os.open(run.folder / HISTORY, flags, 0o666), "a", encoding="utf-8") as file,
        ):
            file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {event}\n")

    write(f"{BEGAN} {run.step}: {shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}")
    try:
        yield
    except BaseException as error:
        write(f"failed at step {run.step}: {type(error).__name__} {' '.join(str(error).split())}")
        raise
    finished = run.validated == run.config.max_steps
    write(f"{'finished' if finished else 'stopped by a signal'} at step {run.step}")


def last_event(folder: Path) -> str:
    """How the last process in a run directory ended, as it wrote itself; nothing if it could not."""
    lines = [""]
    with suppress(OSError):
        lines += (folder / HISTORY).read_text(encoding="utf-8", errors="replace").splitlines()
    event = lines[-1][20:]  # without its time
    return "" if event.startswith(BEGAN) else event


def introduce(run, origin: str | Path) -> None:
    """Say what is trained on what, from what, to where; run is a train.Run."""
    config = run.config
    network = run.model.config
    millions = sum(parameter.numel() for parameter in run.ema.parameters()) / 1e6
    bits = "bfloat16" if run.bfloat16 else "float32"
    states = f"{network.encoding} centroids in {network.encoding_dims} dimensions"
    teacher = f", aligned with {config.teacher}" if config.teacher else ""
    for line in (
        f"data: {run.data.name}, {len(run.data):,} training images, {network.num_classes} classes",
        f"network: preset {config.preset}, {millions:.1f} M parameters, {bits}, from {origin}",
        f"flow: {network.objective}, {states}{teacher}",
        f"run: {run.folder}, {config.max_steps:,} steps of {config.batch_size} images on "
        f"{run.world} x {run.device}",
    ):
        run.console.print(line)
    draw.say_missing_letters(run.data.labels.classes, run.console)
    if run.validated == config.max_steps:
        more = f"--max-steps {2 * config.max_steps} goes on with it, --out DIR begins another"
        run.console.print(f"this run is finished: {more}", style="yellow")


def tell(run, bar: Progress, text: str, seconds: float) -> None:
    """Say how a train.Run goes, at its bar or in a plain line; seconds: for each step."""
    bar.update(bar.task_ids[0], description=text)
    if not run.console.is_terminal:
        left = timedelta(seconds=round((run.config.max_steps - run.step) * seconds))
        run.console.print(f"step {run.step}/{run.config.max_steps}  {text}  {left} left")


def read_values(values: dict[str, Tensor], norm: Tensor, failures: Tensor) -> dict[str, float]:
    """The diagnostics of a step, over all processes, and how many steps in a row had no finite gradient.

    All are read at once: this is where the host waits until the device has caught up.
    """
    sums = summed(torch.stack([*values.values()]))
    numbers = torch.cat([sums, torch.stack([norm, failures])]).tolist()
    return dict(zip([*values, "grad_norm", "failures"], numbers, strict=True))


def report(run, facts: dict[str, float], lr: float, seconds: float) -> str:
    """Log the diagnostics of the last step of a train.Run; returns the text for the terminal.

    seconds: for each of the steps since the last report.
    """
    del facts["failures"]
    text = "  ".join(f"{name} {facts[name]:.3g}" for name in ("loss", "fm_error", "phi"))
    speed = run.config.batch_size / seconds
    facts |= {"lr": lr, "seconds_per_step": seconds, "images_per_second": speed}
    if run.rank == 0:
        run.log.write(run.step, **facts, **peak_memory(run.device))
    return f"{text}  {speed:.3g} images/s"


def explain_failure(run, parts: list, generators: list[torch.Generator], failures: float) -> str:
    """Which step, time, parameter and files had no finite gradient, and what to do; run is a train.Run."""
    t = draw_random(torch.rand, (len(generators),), generators)
    bad = [n for n, p in run.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    files = [run.data.read(i)[2] for *_, indices in parts for i in indices.tolist()]
    where = f"the last at step {run.step}, first in {[*bad, 'norm'][0]}, t {t.min():.2f} to {t.max():.2f}"
    fix = f"lower --lr {run.config.lr:g}, or look at {', '.join(files)}"
    return f"no finite gradient in {failures:.0f} steps in a row, {where}; {fix}"


def save(run) -> None:
    """Write all that the next step of a train.Run depends on, and its EMA, unless both are there already."""
    note_unseen(run)
    is_lost = not (run.folder / "last.safetensors").exists()
    if run.rank == 0 and (is_lost or run.saved != (run.step, run.validated)):
        if is_lost or run.validated < run.step:
            write_weights(run)
        at = (run.step, run.validated, run.best)
        save_state(run.folder, run.modules, run.optimizers, at, run.writer.write)
    run.saved = (run.step, run.validated)


class Seen(nn.Module):
    """Which labels the training has had, as a part of its state: labels (256,), 1 or 0.

    info: of the weights that it starts from, what their training has seen.
    """

    def __init__(self, info: CheckpointInfo):
        super().__init__()
        self.register_buffer("labels", torch.zeros(256))
        for label, name in enumerate(info.classes):
            self.labels[label] = name not in info.unseen

    def add(self, parts: list) -> None:
        """Note the labels of one step, as the loader gives them, on the host."""
        for _, labels, _ in parts:
            self.labels.masked_fill_(labels.flatten().bincount(minlength=256) > 0, 1)


def note_unseen(run) -> None:
    """Let the EMA of a train.Run never answer a class that no label has had, in any of its processes."""
    table = run.data.labels
    seen = summed(run.seen.labels).clamp_(max=1).tolist()
    unseen = [name for k, name in enumerate(table.classes) if not seen[k]]
    if len(unseen) < len(table.classes):
        run.ema.info = CheckpointInfo(table.classes, table.ids, unseen=unseen)


def write_weights(run, metrics=None, protocol: dict | None = None) -> None:
    """Write the EMA weights of a train.Run as `last`, with metrics also pictures and, at its best, `best`."""
    config = run.config
    scores = metrics.scores if metrics else {}
    table = run.data.labels
    made_with = environment()
    if config.encoder:
        made_with["encoder"] = Path(config.encoder).name
    facts = {
        "classes": table.classes, "ids": table.ids, "ignore": table.ignore, "colors": table.colors,
        "clear": table.clear, "unseen": run.ema.info.unseen, "dataset": config.dataset, "root": config.root,
        "crop_size": config.crop_size, "step": run.step, "protocol": protocol or {},
        "environment": made_with, **scores,
    }  # fmt: skip
    run.ema.save(run.folder / "last.safetensors", run.writer.write, **facts)
    if metrics is None:
        return
    if scores["mIoU"] > run.best:
        run.ema.save(run.folder / "best.safetensors", run.writer.write, **facts)
    rows = []
    distances = []
    notes = []
    for i in evenly_spaced(len(run.held_out), NUM_PREVIEWS):
        photo, truth = run.held_out[i]
        prediction, _ = segment_photo(run.ema, photo, config.crop_size)
        rows.append((photo, truth, prediction))
        end = run.ema.sample(to_input(photo, config.crop_size).to(run.device))
        distances.append(crispness(run.ema, end))
        iou = metrics.images.get(i, math.nan)
        notes.append("" if math.isnan(iou) else f"IoU {iou:.0%}")
    run.log.write(run.step, **scores, crispness=sum(distances) / len(distances))
    title = f"step {run.step:,}: validation mIoU {scores['mIoU']:.1%}"
    palette = draw.palette(run.ema.centroids.cpu().numpy(), table.colors)
    try:
        draw.save(run.folder / "preview.png", draw.preview(rows, table.classes, palette, title, notes))
        if lines := read_log(run.folder):
            draw.save(run.folder / "curves.png", draw.training_curves(lines))
    except PictureError as error:
        run.console.print(f"warning: {error}; training goes on", style="yellow")


def crispness(model: FlowSeg, x: Tensor) -> float:
    """How far the states x (B, dims, H, W) are from a mask painted in centroids: the mean distance of a pixel
    to the nearest centroid, in units of the least distance between two centroids. 0 is a mask."""
    d, _ = squared_distances(x.movedim(1, -1).flatten(0, 2), model.centroids)
    return float((d.amin(0) / least_spacing(model.centroids)).sqrt().mean())


def scores_of(metrics, classes: Iterable[str]) -> dict:
    """The scores of train.Metrics, those of each class and the counts, as JSON has them: no nan but None."""

    def known(values: Iterable[float]) -> list[float | None]:
        return [None if math.isnan(value) else value for value in values]

    pixels = metrics.confusion.sum(1).tolist()
    iou = known(metrics.iou.tolist())
    accuracy = known(metrics.accuracy.tolist())
    rows = zip(classes, iou, accuracy, pixels, strict=True)
    facts: dict = dict(zip(metrics.scores, known(metrics.scores.values()), strict=True))
    facts["classes"] = [{"name": name, "IoU": i, "Acc": a, "pixels": n} for name, i, a, n in rows]
    facts["confusion"] = metrics.confusion.tolist()
    return facts
