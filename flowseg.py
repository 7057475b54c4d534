"""The `flowseg` command: train, eval, segment, info, download.

Results go to stdout, progress and logs to stderr. Exit codes: 0 ok, 1 some inputs failed, 2 usage, 3 data,
4 download, 5 checkpoint, 130 and 143 signals. An error is one line; --debug adds the traceback. What needs
PyTorch is imported inside the command that needs it, so that --help is instant.
"""

import csv
import json
import os
import sys
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Column, Table
from typer import Argument, BadParameter, Option

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
out = Console(soft_wrap=True, highlight=False, markup=False)
err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)

HINTS = {  # to what others raise
    "Errno": "check the path and the space left there",
    "memory": "lower --batch or --size, or split every batch: --set accumulate=2",
    "DataLoader": "check the storage, or try --workers 0",
    "onnection closed": "another process has failed: see its error",
    "": "this may be a bug: flowseg --debug COMMAND shows where",
}
NEWEST = "the newest run under runs/ if not given"
Dataset = Annotated[str | None, Option(help="shapes (built in), a name under the data root, or a folder.")]
Root = Annotated[Path | None, Option(help="Data root; else $FLOWSEG_DATA, else ~/.cache/flowseg.")]
Device = Annotated[str, Option(help="auto, cpu, cuda, cuda:1 or mps.")]
Steps = Annotated[int | None, Option(min=1, help="Euler steps; what the weights were made for if not given.")]
Size = Annotated[int | None, Option(min=8, help="Short side images are resized to; else the training size.")]
Limit = Annotated[int | None, Option(min=1, help="Most images of a split, evenly spaced.")]
Settings = Annotated[list[str] | None, Option("--set", metavar="FIELD=VALUE", help="Any other field.")]
Quiet = Annotated[bool, Option("--quiet", "-q", help="No progress: results and errors only.")]


def _report(file: Path | None) -> Path | None:
    """Refuse before the work a file that cannot be written after it, or of another kind, say a photo."""
    if file and (file.suffix.lower() not in (".json", ".csv") or not file.parent.is_dir()):
        raise BadParameter(f"{file}; expected NAME.json or NAME.csv in a folder that exists")
    return file


JsonFile = Annotated[Path | None, Option("--json", callback=_report, help="Also write the result, a .json.")]


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"flowseg {version('flowseg')}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[bool, Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
    debug: Annotated[bool, Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Semantic segmentation as a flow from the photo to a mask painted in category centroids."""


@app.command()
def train(
    recipe: Annotated[str | None, Option(help="The two-stage recipe: ade20k or coco-stuff.")] = None,
    stage: Annotated[int | None, Option(help="Of the recipe: 1 (default) or 2, which starts from 1.")] = None,
    dataset: Dataset = None,
    root: Root = None,
    preset: Annotated[str | None, Option(help="Network: tiny (default), small, base, large or xl.")] = None,
    objective: Annotated[str | None, Option(help="reshaped (default) or vanilla flow matching.")] = None,
    max_steps: Annotated[int | None, Option(min=1, help="Optimizer steps.")] = None,
    save_every: Annotated[int | None, Option(min=1, help="Steps between saved states.")] = None,
    batch: Annotated[int | None, Option(min=1, help="Images per optimizer step.")] = None,
    size: Annotated[int | None, Option(min=8, help="Side of the training crop.")] = None,
    init: Annotated[Path | None, Option(help="Weights, or the run directory, to start from.")] = None,
    out_dir: Annotated[Path | None, Option("--out", help="Run directory; else runs/DATASET-PRESET.")] = None,
    seed: Annotated[int | None, Option(help="Seed of weights, order, augmentation and noise.")] = None,
    workers: Annotated[int | None, Option(min=0, help="Processes that load images.")] = None,
    dtype: Annotated[str | None, Option(help="auto, float32 or bfloat16; auto: bfloat16 on CUDA.")] = None,
    compile: Annotated[bool, Option("--compile", help="Compile the network first (minutes).")] = False,
    deterministic: Annotated[bool, Option("--deterministic", help="The same bits again on a GPU.")] = False,
    allow_changes: Annotated[bool, Option("--allow-changes", help="Go on with other options.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Only say what it would take; needs no data.")] = False,
    device: Device = "auto",
    settings: Settings = None,
    quiet: Quiet = False,
) -> None:
    """Train, or continue a run: the same command goes on where it stopped."""
    given = {k: str(v) if isinstance(v, Path) else v for k, v in locals().items() if v is not None}
    import train as training

    config, model_config = training.resolve(given, settings or [])  # takes the fields that it knows
    if dry_run:
        return print(*(f"{k}: {v}" for k, v in training.cost(config, model_config).items()), sep="\n")
    name = f"{config.recipe}-stage-{config.stage}" if config.recipe else ""
    folder = out_dir or Path("runs") / (name or f"{Path(config.dataset).resolve().name}-{config.preset}")
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, quiet=quiet)
    code = training.train(config, model_config, folder, device, console, allow_changes=allow_changes)
    if os.environ.get("RANK", "0") != "0":  # torchrun: the first process speaks
        raise typer.Exit(code)
    if code:
        err.print(f"stopped; the state is saved in {folder}: the same command continues", style="yellow")
        raise typer.Exit(code)
    best = folder / "best.safetensors"
    scores = _load(best).metadata
    out.print(f"validation mIoU {scores['mIoU']:.1%} at step {scores['step']}: {best}, preview.png")
    out.print(f"next: flowseg segment photo.jpg -o mask.png --checkpoint {best}")


@app.command(name="eval")
def evaluate(
    checkpoint: Annotated[Path | None, Argument(help=f"Weights or run directory; {NEWEST}.")] = None,
    dataset: Dataset = None,
    root: Root = None,
    split: Annotated[str, Option(help="training, validation or test.")] = "validation",
    steps: Steps = None,
    size: Size = None,
    limit: Limit = None,
    flip: Annotated[bool, Option("--flip", help="Average with the mirror image.")] = False,
    mode: Annotated[Literal["whole", "slide", "tiles"], Option(help="slide, tiles: in windows.")] = "whole",
    device: Device = "auto",
    json_file: JsonFile = None,
    csv_file: Annotated[Path | None, Option("--csv", callback=_report, help="Also write the table.")] = None,
    quiet: Quiet = False,
) -> None:
    """Score weights on a data set: mIoU, aAcc, mAcc and a table per class."""
    from rich.progress import track

    from data import open_dataset
    from train import evaluate

    model = _load(checkpoint, device)
    data = open_dataset(dataset or model.metadata["dataset"], split, root)
    if list(data.labels.classes) != model.metadata["classes"]:
        raise BadParameter(f"{data.name} has other classes than the weights; pass theirs with --dataset")
    console = Console(stderr=True, quiet=quiet or not err.is_terminal)
    progress = partial(track, description="evaluating", console=console, transient=True)
    size, steps = size or model.metadata["size"], steps or model.config.steps
    metrics, protocol = evaluate(model, data, size, steps, progress, limit, flip, mode)
    pixels = metrics.confusion.sum(1).tolist()
    table = [*zip(data.labels.classes, metrics.iou.tolist(), pixels, strict=True)]
    classes = [{"name": name, "IoU": None if iou != iou else iou, "pixels": n} for name, iou, n in table]
    rows = [(name, "absent" if iou != iou else f"{iou:.1%}", f"{n:,}") for name, iou, n in table]
    _print_table(("class", "IoU", "labelled pixels"), rows)
    out.print("  ".join(f"{name} {value:.2%}" for name, value in metrics.scores.items()), style="bold")
    out.print("protocol: " + ", ".join(f"{key} {value}" for key, value in protocol.items()))
    if json_file:
        facts = metrics.scores | {"classes": classes, "protocol": protocol}
        json_file.write_text(json.dumps(facts, indent=2))
    if csv_file:
        with open(csv_file, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([classes[0], *(c.values() for c in classes)])


@app.command()
def segment(
    paths: Annotated[list[str], Argument(help="Photos, folders or globs; - reads one photo from stdin.")],
    output: Annotated[Path, Option("--output", "-o", help="Mask (.png) of one photo, or a folder for many.")],
    checkpoint: Annotated[Path | None, Option(help=f"Weights or run directory; {NEWEST}.")] = None,
    steps: Steps = None,
    size: Size = None,
    tiles: Annotated[bool, Option("--tiles", help="In blended windows of the training size.")] = False,
    overlay: Annotated[bool, Option("--overlay", help="Also draw the mask over the photo.")] = False,
    side_by_side: Annotated[bool, Option("--side-by-side", help="Also draw photo and mask.")] = False,
    confidence: Annotated[bool, Option("--confidence", help="Also write the probability, 0..255.")] = False,
    entropy: Annotated[bool, Option("--entropy", help="Also write how undecided it is, 0..255.")] = False,
    trajectory: Annotated[bool, Option("--trajectory", help="Also draw the flow: sheet and GIF.")] = False,
    ids: Annotated[Literal["train", "raw"], Option(help="raw: the mask values of the data set.")] = "train",
    json_file: JsonFile = None,
    max_pixels: Annotated[int | None, Option(min=1, help="Largest photo that is opened.")] = None,
    force: Annotated[bool, Option("--force", help="Overwrite outputs that exist.")] = False,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Segment photos: a PNG of ids, the size of the upright photo, coloured by the class centroids."""
    from picture import MAX_PIXELS, find_photos

    photos, one = find_photos(paths, output), output.suffix and not output.is_dir()
    if (one and (output.suffix.lower() != ".png" or len(photos) > 1)) or ("-" in paths and not one):
        raise BadParameter(f"-o {output} for {len(photos)} photos; expected a .png for one, else a folder")
    model = _load(checkpoint, device)
    from segment import plan, report, segment_all, segment_one, tell

    wishes = {"overlay.png": overlay, "side-by-side.png": side_by_side, "confidence.png": confidence,
              "entropy.png": entropy, "trajectory.png": trajectory, "trajectory.gif": trajectory}  # fmt: skip
    planned = plan(photos, output, [kind for kind, wish in wishes.items() if wish], force)
    work = partial(segment_one, model, size or model.metadata["size"], steps or model.config.steps,
                   "tiles" if tiles else "whole", ids == "raw", max_pixels or MAX_PIXELS)  # fmt: skip
    records = tell(segment_all(planned, work), len(photos), out, err, quiet)
    if json_file:
        report(json_file, records)
    raise typer.Exit(int(any(record["state"] == "failed" for record in records)))


@app.command()
def info(
    what: Annotated[str | None, Argument(help="A data set or a checkpoint; nothing: this machine.")] = None,
    root: Root = None,
    limit: Limit = None,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what is here: the machine; a data set, with every problem found; or what a checkpoint holds."""
    if what is None:
        from run import environment
        from train import pick_device

        data_root = os.environ.get("FLOWSEG_DATA", "~/.cache/flowseg")
        facts = environment() | {"device": str(pick_device()), "data root": data_root}
    elif what.endswith(".safetensors"):
        from model import FlowSeg

        model = FlowSeg.load(what)
        facts = {"config": asdict(model.config), **model.metadata}
    else:
        facts = _describe(what, root, limit)
    if as_json:
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
    elif "splits" in facts:
        _print_dataset(facts)
    else:
        for name, value in facts.items():
            out.print(f"{name}: {value if isinstance(value, str) else json.dumps(value)}")
    raise typer.Exit(3 if facts.get("problems") else 0)


def _describe(dataset: str, root: Path | None, limit: int | None) -> dict:
    """Label table and, per split, counts and problems of a data set; needs no PyTorch."""
    from data import open_dataset, problems

    data = open_dataset(dataset, "training", root, strict=False)
    classes = [{"id": i, "raw": raw, "name": data.labels.classes[i]} for i, raw in enumerate(data.labels.ids)]
    facts = {"name": dataset, "classes": classes, "ignore": data.labels.ignore, "splits": {}, "problems": []}
    limit = limit or (None if data.augment else 200)  # scenes are made: a sample is enough
    for split in data.splits:
        facts["splits"][split], found = problems(open_dataset(dataset, split, root, strict=False), limit)
        facts["problems"] += [f"{split}: {problem}" for problem in found]
    return facts


def _print_dataset(facts: dict) -> None:
    parts = facts["splits"]
    shares = [[n / max(1, sum(part["pixels"])) for n in part["pixels"]] for part in parts.values()]
    rows = [(c["name"], str(c["id"]), str(c["raw"]), *(f"{share[c['id']]:.2%}" for share in shares))
            for c in facts["classes"]]  # fmt: skip
    _print_table(("class", "id", "raw value", *parts), rows)
    for split, part in parts.items():
        ignored = part["ignored"] / max(1, part["ignored"] + sum(part["pixels"]))
        out.print(f"{split}: {part['images']:,} images, {part['checked']:,} checked, {ignored:.1%} ignored")
    for problem in facts["problems"]:
        out.print(f"problem: {problem}", style="red")
    out.print(f"problems: {len(facts['problems']) or 'none'}")


@app.command()
def download(
    name: Literal["ade20k", "coco-stuff", "camvid", "pixnerd-xl-256", "pixnerd-xl-512", "dinov2-b14"],
    root: Root = None,
    url: Annotated[list[str] | None, Option(help="A mirror of a file; may be repeated.")] = None,
    from_file: Annotated[list[str] | None, Option(help="A file on disk; may be repeated.")] = None,
    sha256: Annotated[str | None, Option(help="Pin a file for which none is published.")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Say what, from where and how much.")] = False,
    keep_archive: Annotated[bool, Option("--keep-archive", help="Keep what was unpacked.")] = False,
    quiet: Quiet = False,
) -> None:
    """Fetch a data set or public weights; the same command continues after a stop."""
    from download import download

    download(name, root, [*(url or []), *(from_file or [])], sha256, dry_run, keep_archive, quiet)


def _print_table(columns: tuple, rows: list[tuple]) -> None:
    """Names to the left, numbers to the right; as wide as it needs to be when piped."""
    table = Table(columns[0], *(Column(name, justify="right") for name in columns[1:]), box=None)
    for row in rows:
        table.add_row(*row)
    out.print(table)


def _load(checkpoint: Path | None, device: str = "auto"):
    """The model of a checkpoint or run directory, by default of the newest run, which is then named."""
    from model import CheckpointError, FlowSeg
    from run import newest_checkpoint
    from train import pick_device

    if checkpoint is None or checkpoint.is_dir():
        checkpoint = newest_checkpoint(checkpoint)
        err.print(f"weights: {checkpoint}")
    model = FlowSeg.load(checkpoint, pick_device(device))
    if "classes" not in model.metadata:
        raise CheckpointError(f"{checkpoint} is a backbone without classes: train --init {checkpoint}")
    return model


def main() -> None:
    """Run the command line; turn an error into one line and its exit code."""
    try:
        code = app(standalone_mode=False)
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        code = getattr(error, "exit_code", 2 if isinstance(error, OSError) else 1)
        text = error.format_message() if hasattr(error, "format_message") else str(error)
        if not hasattr(error, "exit_code"):
            hint = next(hint for word, hint in HINTS.items() if word in text)
            text = f"{type(error).__name__}: {text}; {hint}"
        process = f"process {os.environ['RANK']}: " if "RANK" in os.environ else ""  # of torchrun
        err.print(f"error: {process}{' '.join(text.split())}", style="red")
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
