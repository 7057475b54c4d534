"""The `flowseg` command: train, eval, segment, init, info, download.

Results go to stdout, progress and logs to stderr. Exit codes: 0 ok, 1 some inputs failed, 2 usage, 3 data,
4 download, 5 checkpoint, 128 + the number of the signal that ended it. An error is one line; --debug adds the
traceback. Whatever needs PyTorch is imported inside the command that needs it, so that help is instant.
"""

import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Column, Table
from typer import Argument, BadParameter, Option

app = typer.Typer(
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console(soft_wrap=True, highlight=False, markup=False)
err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)

DOWNLOADS = (
    "ade20k, coco-stuff, camvid, pixnerd-xl-256, pixnerd-xl-512, dinov2-s14, dinov2-s14-reg, "
    "dinov2-b14, dinov2-b14-reg, dinov2-l14, dinov2-l14-reg"
)
RECIPES = ("ade20k-256", "ade20k-512", "coco-stuff-256", "coco-stuff-512")
NEWEST = "Weights or run directory; by default of the newest run under runs/."
DATA, MODEL, METHOD, TRAINING = "Data", "Model", "Method", "Training"  # panels of the help
RUN, OUTPUT = "Run", "Output"


def flag(panel: str, name: str, text: str, *more: str):
    """An option that is on or off."""
    return Option(name, *more, rich_help_panel=panel, help=text)


def value(panel: str, metavar: str, text: str, default: str = "", *names: str, least: int | None = None):
    """An option with a value. `default` is only shown here; it is written in a configuration or a file."""
    shown = rf"{text} \[default: {default}]" if default else text
    return Option(*names, metavar=metavar, rich_help_panel=panel, help=shown, show_default=False, min=least)


def _check_report(file: Path | None) -> Path | None:
    """Refuse before the work what cannot be written after it."""
    if file and (file.suffix.lower() != ".json" or not file.parent.is_dir() or file.is_dir()):
        raise BadParameter(f"{file}; expected NAME.json in a folder that exists")
    return file


Number = int | None
Text = str | None
File = Path | None
Checkpoint = Annotated[File, Argument(metavar="[CHECKPOINT]", help=NEWEST, show_default=False)]
Weights = Annotated[File, value(MODEL, "FILE|DIR", NEWEST, "", "--checkpoint", "-c")]
Dataset = Annotated[
    Text, value(DATA, "NAME|DIR", "shapes (built in), a data set's name, or a folder.", "shapes")
]
DatasetOf = Annotated[Text, value(DATA, "NAME|DIR", "A data set's name, or a folder.", "the checkpoint's")]
ROOT = "$FLOWSEG_DATA, else ~/.cache/flowseg"
Root = Annotated[File, value(DATA, "DIR", "Folder of named data sets and weights.", ROOT)]
Limit = Annotated[Number, value(DATA, "N", "Most images of a split, evenly spaced.", "all", least=1)]
MaxPixels = Annotated[Number, value(DATA, "N", "Largest picture that is opened.", "250,000,000", least=1)]
Steps = Annotated[Number, value(METHOD, "N", "Euler steps.", "the checkpoint's", least=1)]
SIDE = "Pixels that the short side of an image is resized to."
ShortSide = Annotated[
    Number, value(METHOD, "N", SIDE, "the training crop's", "--short-side", "--size", least=8)
]
WINDOWS = "The whole image at once, or square windows that overlap by a third."
Mode = Annotated[Literal["whole", "slide"], Option(rich_help_panel=METHOD, help=WINDOWS)]
Flip = Annotated[bool, flag(METHOD, "--flip", "Average with the mirror image.")]
Device = Annotated[str, Option(metavar="NAME", rich_help_panel=RUN, help="auto, cpu, cuda, cuda:1 or mps.")]
Quiet = Annotated[bool, flag(RUN, "--quiet", "Print results, warnings and errors only.", "-q")]
Json = Annotated[bool, flag(OUTPUT, "--json", "Print the result as JSON.")]
PHOTOS = "Photos, folders or globs; - reads a photo from stdin."
WHERE = "Mask of one photo (.png), or a folder."
WRITE = "Write the result as .json."
Report = Annotated[
    File,
    Option(metavar="FILE", callback=_check_report, rich_help_panel=OUTPUT, help=WRITE, show_default=False),
]


def _check_report_place(place: Path | None) -> Path | None:
    """Refuse a report that is neither NAME.json nor a folder."""
    if place and (place.suffix == ".json" or (place.suffix and not place.is_dir()) or place.is_file()):
        return _check_report(place)
    return place


def _use_font(file: Path | None) -> None:
    """Write the text of pictures in another font."""
    from flowseg_tools import draw

    if file:
        draw.use_font(file)


ReportPlace = Annotated[
    File,
    Option(metavar="FILE|DIR", callback=_check_report_place, rich_help_panel=OUTPUT, show_default=False,
           help="Write the result as .json, or into a folder with pictures."),
]  # fmt: skip
COLUMNS = {"name": "name", "iou": "IoU", "acc": "Acc", "pixels": "pixels"}
SortBy = Literal["id", "name", "iou", "acc", "pixels"]
Font = Annotated[
    File,
    Option(metavar="FILE", callback=_use_font, rich_help_panel=OUTPUT, show_default=False,
           help="Font (.ttf, .otf) of text in pictures; the built-in one has plain Latin letters."),
]  # fmt: skip


def note_missing_letters(names: Iterable[str]) -> None:
    """Say which letters of the names the pictures cannot show."""
    from flowseg_tools import draw

    if missing := draw.missing_letters(names):
        err.print(f"note: the font of the pictures lacks {missing}: pass --font FILE", style="yellow")


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(f"flowseg {version('flowseg')}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool, Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Semantic segmentation as a flow from the photo to a mask painted in category centroids."""
    if context.invoked_subcommand is None:
        out.print(context.get_help())


@app.command()
def train(
    dataset: Dataset = None,
    root: Root = None,
    workers: Annotated[
        Number, value(DATA, "N", "Processes that load images.", "8 or less on CUDA, else 0", least=0)
    ] = None,
    max_pixels: MaxPixels = None,
    preset: Annotated[
        Text, value(MODEL, "NAME", "tiny, small, base, large, xl, vit-s or vit-b.", "tiny")
    ] = None,
    init: Annotated[File, value(MODEL, "FILE|DIR", "Weights to start from.", "random weights")] = None,
    encoder: Annotated[File, value(MODEL, "FILE", "DINOv2 weights for the image path.", "none")] = None,
    finetune_encoder: Annotated[
        bool, flag(MODEL, "--finetune-encoder", "Train them, too, at a tenth of the learning rate.")
    ] = False,
    objective: Annotated[Text, value(METHOD, "NAME", "reshaped or vanilla.", "reshaped")] = None,
    recipe: Annotated[Text, value(TRAINING, "NAME", f"{', '.join(RECIPES)}.", "none")] = None,
    max_steps: Annotated[Number, value(TRAINING, "N", "Training steps.", "480", least=1)] = None,
    batch_size: Annotated[
        Number, value(TRAINING, "N", "Images per step.", "8", "--batch-size", "--batch", least=1)
    ] = None,
    crop_size: Annotated[
        Number, value(TRAINING, "N", "Side of the training crop.", "96", "--crop-size", "--size", least=8)
    ] = None,
    seed: Annotated[
        Number, value(TRAINING, "N", "Seed of weights, order, augmentation and noise.", "0", least=0)
    ] = None,
    out_dir: Annotated[
        File, value(RUN, "DIR", "Run directory.", "runs/DATASET-PRESET", "--out", "-o")
    ] = None,
    save_every: Annotated[Number, value(RUN, "N", "Steps between saved states.", "160", least=1)] = None,
    dtype: Annotated[Text, value(RUN, "NAME", "float32 or bfloat16.", "bfloat16 on CUDA")] = None,
    compile: Annotated[
        bool | None, flag(RUN, "--compile/--no-compile", "Compile the network first; on by default on CUDA.")
    ] = None,
    deterministic: Annotated[
        bool, flag(RUN, "--deterministic", "Give the same bits again on a GPU.")
    ] = False,
    tensorboard: Annotated[bool, flag(RUN, "--tensorboard", "Also write a log for TensorBoard.")] = False,
    allow_changes: Annotated[bool, flag(RUN, "--allow-changes", "Continue with other options.")] = False,
    dry_run: Annotated[bool, flag(RUN, "--dry-run", "Only say what it takes; needs no data.")] = False,
    device: Device = "auto",
    settings: Annotated[
        list[str] | None, value(RUN, "FIELD=VALUE", "Set any other field; may be repeated.", "none", "--set")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Train, or continue a run: the same command goes on where it stopped."""
    import train as training
    from flowseg_tools.estimate import cost

    options = {
        "dataset": dataset, "root": root, "num_workers": workers, "max_pixels": max_pixels,
        "preset": preset, "init": init,
        "objective": objective, "recipe": recipe, "max_steps": max_steps, "batch_size": batch_size,
        "crop_size": crop_size, "seed": seed, "save_every": save_every, "dtype": dtype,
        "compile": {True: "true", False: "false"}.get(compile), "deterministic": deterministic or None,
        "tensorboard": tensorboard or None, "encoder": encoder, "finetune_encoder": finetune_encoder or None,
    }  # fmt: skip
    given = {}
    for name, value in options.items():
        if value is not None:
            given[name] = str(value) if isinstance(value, Path) else value
    config, network = training.resolve(given, settings or [])
    if dry_run:
        for group, facts in cost(config, network, int(os.environ.get("WORLD_SIZE", 1))).items():
            out.print(f"{group}:", style="bold")
            for name, value in facts.items():
                out.print(f"  {name}: {value}")
        return
    name = config.recipe or f"{Path(config.dataset).resolve().name}-{config.preset}"
    folder = out_dir or Path("runs") / name
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, quiet=quiet)
    code = training.train(config, network, folder, device, console, allow_changes=allow_changes)
    if not speaks():
        raise typer.Exit(code)
    if code:
        err.print(f"stopped; the state is saved in {folder}: the same command continues", style="yellow")
        raise typer.Exit(code)
    best = folder / "best.safetensors"
    info = load(best).info
    out.print(f"validation mIoU {info.mIoU:.1%} at step {info.step}: {best}, preview.png")
    out.print(f"next: flowseg segment photo.jpg -o mask.png --checkpoint {best}")


@app.command(name="eval")
def evaluate(
    checkpoint: Checkpoint = None,
    weights: Weights = None,
    dataset: DatasetOf = None,
    root: Root = None,
    split: Annotated[str, value(DATA, "NAME", "training, validation or test.", "validation")] = "validation",
    limit: Limit = None,
    max_pixels: MaxPixels = None,
    steps: Steps = None,
    short_side: ShortSide = None,
    mode: Mode = "whole",
    flip: Flip = False,
    device: Device = "auto",
    as_json: Json = False,
    report: ReportPlace = None,
    worst: Annotated[
        int,
        Option(
            metavar="N", min=0, rich_help_panel=OUTPUT, help="Sheets of the worst images in a --report DIR."
        ),
    ] = 8,
    sort: Annotated[SortBy, Option(rich_help_panel=OUTPUT, help="Order of the printed classes.")] = "id",
    font: Font = None,
    quiet: Quiet = False,
) -> None:
    """Score weights on a data set: mIoU, aAcc, mAcc and a table per class."""
    from rich.progress import track

    from data import MAX_PIXELS, open_dataset
    from flowseg_tools import draw
    from flowseg_tools.predict import segment_photo
    from flowseg_tools.records import scores_of
    from flowseg_tools.report import check_writable, sort_classes, write_report
    from flowseg_tools.runs import process_group
    from flowseg_tools.speed import compile_for
    from train import evaluate

    if report:
        check_writable(report.parent if report.suffix else report)
    model = load(checkpoint or weights, device)
    data = open_dataset(dataset or model.info.dataset, split, root or model.info.root or None)
    data.max_pixels = max_pixels or MAX_PIXELS
    if data.labels.classes != model.info.classes:
        raise BadParameter(f"{data.name} has other classes than the weights; pass theirs with --dataset")
    console = Console(stderr=True, quiet=quiet or not err.is_terminal or not speaks())
    progress = partial(track, description="evaluating", console=console, transient=True)
    short_side = short_side or model.info.crop_size
    steps = steps or model.config.steps
    compile_for(model, min(limit or len(data), len(data)))
    with process_group(model.centroids.device):  # of torchrun: all share the images, the first one speaks
        metrics, protocol = evaluate(model, data, short_side, steps, progress, limit, flip, mode)
    if not speaks():
        return

    facts = scores_of(metrics, data.labels.classes) | {"protocol": protocol}
    if report:
        palette = draw.palette(model.centroids.cpu().numpy(), data.labels.colors)
        predict = partial(segment_photo, model, short_side=short_side, steps=steps, mode=mode, flip=flip)
        write_report(report, facts, metrics, data, palette, predict, worst)
        note_missing_letters(data.labels.classes)
    if as_json:
        sys.stdout.write(json.dumps(facts, indent=2, allow_nan=False) + "\n")
        return
    classes = facts["classes"] if sort == "id" else sort_classes(facts["classes"], COLUMNS[sort])
    rows = [(c["name"], percent(c["IoU"]), percent(c["Acc"]), f"{c['pixels']:,}") for c in classes]
    print_table(("class", "IoU", "accuracy", "labelled pixels"), rows)
    out.print("  ".join(f"{name} {percent(facts[name], 2)}" for name in metrics.scores), style="bold")
    out.print("protocol: " + ", ".join(f"{key} {value}" for key, value in protocol.items()))


@app.command()
def segment(
    paths: Annotated[list[str], Argument(metavar="PATH...", help=PHOTOS, show_default=False)],
    output: Annotated[
        File, value(OUTPUT, "FILE|DIR", WHERE, "PHOTO-mask.png beside a single photo", "--out", "-o")
    ] = None,
    weights: Weights = None,
    steps: Steps = None,
    short_side: ShortSide = None,
    mode: Mode = "whole",
    flip: Flip = False,
    overlay: Annotated[bool, flag(OUTPUT, "--overlay", "Also draw the mask over the photo.")] = False,
    confidence: Annotated[bool, flag(OUTPUT, "--confidence", "Also write the probability, 0..255.")] = False,
    entropy: Annotated[bool, flag(OUTPUT, "--entropy", "Also write how undecided it is, 0..255.")] = False,
    trajectory: Annotated[bool, flag(OUTPUT, "--trajectory", "Also draw the flow: sheet and GIF.")] = False,
    ids: Annotated[
        Literal["train", "raw"], Option(rich_help_panel=OUTPUT, help="Values of the mask.")
    ] = "train",
    labelmap: Annotated[
        bool, flag(OUTPUT, "--labelmap", "Also write labelmap.txt for annotation tools.")
    ] = False,
    as_json: Json = False,
    report: Report = None,
    max_pixels: Annotated[
        Number, value(RUN, "N", "Largest photo that is opened.", "250,000,000", least=1)
    ] = None,
    font: Font = None,
    force: Annotated[bool, flag(OUTPUT, "--force", "Overwrite outputs that exist.")] = False,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Segment photos: a PNG of ids, the size of the upright photo, coloured by the class centroids."""
    from data import MAX_PIXELS
    from flowseg_tools import segment as tool

    photos, refused = tool.find_photos(paths, output)
    output, single = tool.choose_output(paths, len(photos), output, labelmap)
    wishes = {
        "overlay.png": overlay, "confidence.png": confidence, "confidence-map.png": confidence,
        "entropy.png": entropy, "entropy-map.png": entropy,
        "trajectory.png": trajectory, "trajectory.gif": trajectory,
    }  # fmt: skip
    kinds = [kind for kind, wish in wishes.items() if wish]
    tasks = [*tool.plan(photos, output, single, kinds, force, by_stem=labelmap), *refused]
    tool.check_outputs(tasks, report)
    model = load(weights, device)
    if overlay:
        note_missing_letters(model.info.classes)
    if labelmap:
        tool.write_labelmap(output, model, ids == "raw", force)
    work = partial(
        tool.segment_one, model, short_side=short_side, steps=steps, mode=mode, flip=flip,
        raw_ids=ids == "raw", max_pixels=max_pixels or MAX_PIXELS,
    )  # fmt: skip
    records = []
    try:
        # With --json stdout holds nothing else.
        for record in tool.tell(
            tool.segment_all(tasks, work), len(tasks), err if as_json else out, err, quiet
        ):
            records.append(record)
    finally:  # of what was done before Ctrl-C, too
        if report:
            tool.report(report, records)
    if as_json:
        sys.stdout.write(json.dumps(records, indent=2, allow_nan=False) + "\n")
    raise typer.Exit(int(any(record["state"] == "failed" for record in records)))


@app.command()
def info(
    what: Annotated[
        Text, Argument(metavar="[WHAT]", help="A data set, checkpoint or run directory.", show_default=False)
    ] = None,
    root: Root = None,
    limit: Limit = None,
    max_pixels: MaxPixels = None,
    preview: Annotated[
        File, value(OUTPUT, "FILE", "Draw images, masks and training crops of a data set.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what is here: this machine; a data set, with every problem; what a checkpoint or run holds."""
    from data import data_root

    if what is None:
        from flowseg_tools.runs import environment, pick_device

        facts = environment() | {"device": str(pick_device()), "data root": str(data_root())}
    elif what.endswith(".safetensors") or (Path(what) / "config.json").is_file():
        from dataclasses import asdict

        from flowseg_tools.dinov2 import DinoFlowSeg
        from flowseg_tools.runs import newest_checkpoint

        model = DinoFlowSeg.load(newest_checkpoint(Path(what)))
        facts = {"config": asdict(model.config), **asdict(model.info)}
    else:
        from flowseg_tools.check import describe, draw_preview

        facts = describe(what, root, limit, progress, max_pixels)
        if preview:
            draw_preview(what, root, preview)
            err.print(f"preview: {preview}")
    if as_json:
        sys.stdout.write(json.dumps(facts, indent=2, allow_nan=False) + "\n")
    elif "splits" in facts:
        print_dataset(facts)
    else:
        from flowseg_tools.terminal import printable

        for name, value in facts.items():
            out.print(printable(f"{name}: {value if isinstance(value, str) else json.dumps(value)}"))
    raise typer.Exit(3 if facts.get("problems") else 0)


def print_dataset(facts: dict) -> None:
    """Print what `describe` found: the label table with the share of every class, counts and problems."""
    from flowseg_tools.terminal import printable

    parts = facts["splits"]
    rows = []
    for entry in facts["classes"]:
        row = [entry["name"], str(entry["id"]), str(entry["raw"])]
        for part in parts.values():
            total = sum(part["pixels"])
            row.append(f"{part['pixels'][entry['id']] / total:.2%}" if total else "-")
        rows.append(row)
    print_table(("class", "id", "raw value", *parts), rows)
    for split, part in parts.items():
        total = part["ignored"] + sum(part["pixels"])
        ignored = part["ignored"] / max(1, total)
        out.print(f"{split}: {part['images']:,} images, {part['checked']:,} checked, {ignored:.1%} ignored")
    for note in facts["notes"]:
        out.print(printable(f"note: {note}"), style="yellow")
    for problem in facts["problems"]:
        out.print(printable(f"problem: {problem}"), style="red")
    out.print(f"problems: {len(facts['problems']) or 'none'}")


@app.command()
def init(
    folder: Annotated[
        Path, Argument(metavar="DIR", help="A folder of photos and masks.", show_default=False)
    ],
) -> None:
    """Look at a folder of photos and masks, and draft its dataset.toml."""
    from flowseg_tools.init import write_draft

    for line in write_draft(folder, progress):
        out.print(line)


@app.command()
def download(
    name: Annotated[
        Text, Argument(metavar="[NAME]", help=f"{DOWNLOADS}; without a name: a table.", show_default=False)
    ] = None,
    root: Root = None,
    sources: Annotated[
        list[str] | None,
        value(DATA, "PATH|URL", "A file on disk, or a mirror; may be repeated.", "", "--from"),
    ] = None,
    sha256: Annotated[Text, value(DATA, "DIGEST", "Pin a file for which none is published.")] = None,
    max_bytes: Annotated[
        Number, value(DATA, "N", "Largest file that is accepted.", "a tenth more than published", least=1)
    ] = None,
    dry_run: Annotated[bool, flag(RUN, "--dry-run", "Say what, from where and how much.")] = False,
    keep_archive: Annotated[
        bool, flag(RUN, "--keep-archive", "Keep the archive after unpacking it.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Fetch a data set or public weights; the same command continues after a stop."""
    from flowseg_tools import download as downloads

    if name:
        downloads.download(name, root, sources or [], sha256, max_bytes, dry_run, keep_archive, quiet)
        return
    rows = downloads.listing(root)
    table = Table("name", Column("size", justify="right"), "here", "what it is", box=None)
    licences: dict[str, list[str]] = {}
    for row in rows:
        table.add_row(row["name"], row["size"], row["here"], row["about"])
        licences.setdefault(f"{row['licence']}, {row['terms']}", []).append(row["name"])
    out.print(table)
    for licence, names in licences.items():
        out.print(f"{', '.join(names)}: {licence}")


def progress(indices: Iterable[int], title: str) -> Iterable[int]:
    """Show a bar with a title while somebody watches."""
    from rich.progress import track

    console = Console(stderr=True, quiet=not err.is_terminal)
    return track(indices, title, console=console, transient=True)


def speaks() -> bool:
    """Whether this process prints and writes: of those of torchrun only the first one does."""
    return os.environ.get("RANK", "0") == "0"


def percent(share: float | None, digits: int = 1) -> str:
    """A share as text; None is the score of a class that does not occur."""
    return "absent" if share is None else f"{share:.{digits}%}"


def print_table(columns: tuple, rows: list) -> None:
    """Print names to the left and numbers to the right; as wide as needed when piped."""
    from flowseg_tools.terminal import printable

    table = Table(columns[0], *(Column(name, justify="right") for name in columns[1:]), box=None)
    for row in rows:
        table.add_row(*(printable(cell) for cell in row))
    out.print(table)


def load(checkpoint: Path | None, device: str = "auto"):
    """The model of a checkpoint or run directory, by default of the newest run, which is then named."""
    from flowseg_tools.dinov2 import DinoFlowSeg
    from flowseg_tools.runs import newest_checkpoint, pick_device
    from model import CheckpointError

    if checkpoint is None or checkpoint.is_dir():
        checkpoint = newest_checkpoint(checkpoint)
        if speaks():
            err.print(f"weights: {checkpoint}")
    model = DinoFlowSeg.load(checkpoint, pick_device(device))
    if not model.info.classes:
        raise CheckpointError(f"{checkpoint} is a backbone without classes: train --init {checkpoint}")
    return model


def main() -> None:
    """Run the command line; turn an error into one line and its exit code."""
    # Modules of the user in the current folder must not be taken for ours: torchrun -m puts it first.
    own = str(Path(__file__).resolve().parent)
    sys.path[:] = [own, *(place for place in sys.path if place != own)]
    from flowseg_tools.terminal import Steady, describe_error

    # What Pillow says of a damaged file is said in our own line, which names the file.
    warnings.filterwarnings("ignore", module="PIL")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    for name in ("stdout", "stderr"):
        setattr(sys, name, Steady(getattr(sys, name)))
    for i, word in enumerate(sys.argv[:-1]):
        if word == "--json" and sys.argv[i + 1].endswith(".json"):
            sys.argv[i] = "--report"  # its earlier name, which scripts may still use
    try:
        code = app(prog_name="flowseg", standalone_mode=False)
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        line, code = describe_error(error)
        traceback.clear_frames(error.__traceback__)  # they hold loaders, which would live on for a while
        err.print(line, style="red")
    if sys.stdout.close_quietly():
        err.print("error: the results could not be written to stdout", style="red")
        code = code or 1
    sys.stderr.close_quietly()
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
