"""The `flowseg` command: train, eval, segment, init, info, download, export.

Results go to stdout, progress and logs to stderr. Exit codes: 0 ok, 1 some inputs failed, 2 usage, 3 data,
4 download, 5 checkpoint, 128 + the number of the signal that ended it. An error is one line; --debug adds the
traceback. Whatever needs PyTorch is imported inside the command that needs it, so that help is instant.
"""

import logging
import os
import sys
import traceback
import warnings
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from typer import BadParameter, Option


def own(name: str):
    """Our module of that name, also where the current folder, which torchrun -m puts first, has one."""
    before = list(sys.path)
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    try:
        return import_module(name)
    finally:
        sys.path[:] = before


options = own("flowseg_tools.options")
terminal = own("flowseg_tools.terminal")
app = typer.Typer(
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = terminal.make_console()
err = terminal.make_console(stderr=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(f"flowseg {version('flowseg')}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool,
        Option("--version", metavar="", callback=_print_version, is_eager=True, help="Print the version."),
    ] = False,
    debug: Annotated[bool, Option("--debug", metavar="", help="Show the traceback of an error.")] = False,
) -> None:
    """Semantic segmentation as a flow from the photo to a mask painted in category centroids."""
    if context.invoked_subcommand is None:
        out.print(context.get_help())


@app.command(epilog=options.examples("train"))
def train(
    context: typer.Context,
    dataset: options.Dataset = None,
    root: options.Root = None,
    num_workers: options.Workers = None,
    max_pixels: options.MaxPixels = None,
    preset: options.Preset = None,
    init: options.Init = None,
    encoder: options.Encoder = None,
    finetune_encoder: options.FinetuneEncoder = False,
    teacher: options.Teacher = None,
    objective: options.Objective = None,
    encoding: options.Encoding = None,
    encoding_dims: options.Dims = None,
    tau: options.Tau = None,
    eps: options.Eps = None,
    recipe: options.Recipe = None,
    max_steps: options.MaxSteps = None,
    batch_size: options.BatchSize = None,
    grad_accum_steps: options.Accumulate = None,
    crop_size: options.CropSize = None,
    optimizer: options.Optimizer = None,
    lr: options.LearningRate = None,
    warmup_steps: options.WarmupSteps = None,
    activation_checkpointing: options.ActivationCheckpointing = False,
    seed: options.Seed = None,
    out_dir: options.OutDir = None,
    config_file: options.ConfigFile = None,
    eval_every: options.EvalEvery = None,
    save_every: options.SaveEvery = None,
    dtype: options.Dtype = None,
    compile: options.Compile = None,
    deterministic: options.Deterministic = False,
    tensorboard: options.Tensorboard = False,
    allow_changes: options.AllowChanges = False,
    dry_run: options.Cost = False,
    device: options.Device = "auto",
    settings: options.Settings = None,
    font: options.Font = None,
    quiet: options.Quiet = False,
) -> None:
    """Train, or continue a run: the same command goes on."""
    if "help" in (settings or []):
        terminal.print_lines(out, options.field_lines())
        return
    import train as training
    from flowseg_tools.settings import given_fields, run_folder

    config, network = training.resolve(given_fields(context.params, config_file), settings or [])
    if dry_run:
        print_cost(config, network)
        return
    folder = out_dir or run_folder(config)
    console = terminal.make_console(stderr=True, quiet=quiet)
    code = training.train(config, network, folder, device, console, allow_changes=allow_changes)
    if speaks():
        conclude(folder, code)
    raise typer.Exit(code)


def print_cost(config, network) -> None:
    """Print every setting of a run, and what it takes."""
    from flowseg_tools.estimate import cost

    with terminal.waiting("counting what a step takes"):
        groups = cost(config, network, int(os.environ.get("WORLD_SIZE", 1)))
    for group, facts in groups.items():
        out.print(f"{group}:", style="bold")
        terminal.print_lines(out, [f"  {name}: {value}" for name, value in facts.items()])


def conclude(folder: Path, code: int) -> None:
    """Say what came of a run, and the next command."""
    if code:
        err.print(f"stopped; the state is saved in {folder}: the same command continues", style="yellow")
        return
    info = load(folder, quiet=True).info
    files = [name for name in ("best.safetensors", "preview.png", "curves.png") if (folder / name).exists()]
    out.print(f"{score_of(info)} at step {info.step}; in {folder}: {', '.join(files)}")
    if info.unseen:
        names = ", ".join(info.unseen[:5]) + (", .." if len(info.unseen) > 5 else "")
        count = f"{len(info.unseen)} of {len(info.classes)} classes"
        out.print(f"{count} had no label in training, so they are never answered: {names}")
    out.print(f"next: flowseg segment photo.jpg -o mask.png -c {folder}", soft_wrap=True)


@app.command(name="eval", epilog=options.examples("eval"))
def evaluate(
    checkpoint: options.Checkpoint = None,
    weights: options.Weights = None,
    dataset: options.DatasetOf = None,
    root: options.Root = None,
    split: options.Split = "validation",
    limit: options.Limit = None,
    max_pixels: options.MaxPixels = None,
    steps: options.Steps = None,
    short_side: options.ShortSide = None,
    mode: options.Mode = "whole",
    flip: options.Flip = False,
    device: options.Device = "auto",
    as_json: options.Json = False,
    report: options.ReportPlace = None,
    worst: options.Worst = 8,
    sort: options.SortBy = "id",
    font: options.Font = None,
    quiet: options.Quiet = False,
) -> None:
    """Score weights on a data set: mIoU, aAcc, mAcc, every class."""
    from data import MAX_PIXELS
    from flowseg_tools import draw
    from flowseg_tools.predict import segment_photo, short_side_of
    from flowseg_tools.records import scores_of
    from flowseg_tools.report import check_writable, sort_classes, write_report
    from flowseg_tools.runs import open_dataset_of, process_group
    from flowseg_tools.speed import compile_for
    from train import evaluate

    if report:
        check_writable(report.parent if report.suffix else report)
    quiet = quiet or not speaks()
    model = load(checkpoint or weights, device, quiet)
    data = open_dataset_of(model.info, dataset, split, root)
    data.max_pixels = max_pixels or MAX_PIXELS
    if data.labels.classes != model.info.classes:
        raise BadParameter(f"{data.name} has other classes than the weights; pass theirs with --dataset")
    short_side = short_side_of(model, short_side)
    steps = steps or model.config.steps
    progress = partial(terminal.track, title=f"evaluating {split}", quiet=quiet or not speaks())
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
        draw.say_missing_letters(data.labels.classes, err)
    if as_json:
        terminal.print_json(facts)
    else:
        classes = sort_classes(facts["classes"], options.COLUMNS[sort]) if sort != "id" else facts["classes"]
        terminal.print_scores(out, facts, classes)
    if report and not quiet:
        err.print(terminal.printable(f"report: {report}"))


@app.command(epilog=options.examples("segment"))
def segment(
    paths: options.Photos,
    output: options.Output = None,
    weights: options.Weights = None,
    steps: options.Steps = None,
    short_side: options.ShortSide = None,
    mode: options.Mode = "whole",
    flip: options.Flip = False,
    overlay: options.Overlay = False,
    confidence: options.Confidence = False,
    entropy: options.Entropy = False,
    trajectory: options.Trajectory = False,
    ids: options.Ids = "train",
    labelmap: options.Labelmap = False,
    as_json: options.Json = False,
    report: options.Report = None,
    max_pixels: options.MaxPixels = None,
    font: options.Font = None,
    force: options.Force = False,
    device: options.Device = "auto",
    quiet: options.Quiet = False,
) -> None:
    """Segment photos: a PNG of class ids, as large as the photo."""
    from data import MAX_PIXELS
    from flowseg_tools import draw
    from flowseg_tools import segment as tool
    from flowseg_tools.predict import short_side_of

    photos, refused = tool.find_photos(paths, output)
    output, single = tool.choose_output(paths, len(photos), output, labelmap)
    wishes = {"overlay": overlay, "confidence": confidence, "entropy": entropy, "trajectory": trajectory}
    kinds = [kind for kind, option in tool.KINDS.items() if wishes[option]]
    tasks = [*tool.plan(photos, output, single, kinds, force, by_stem=labelmap), *refused]
    tool.check_outputs(tasks, report)
    model = load(weights, device, quiet)
    short_side = short_side_of(model, short_side)
    if overlay:
        draw.say_missing_letters(model.info.classes, err)
    if labelmap:
        tool.write_labelmap(output, model, ids == "raw", force)
    work = partial(
        tool.segment_one, model, short_side=short_side, steps=steps, mode=mode, flip=flip,
        raw_ids=ids == "raw", max_pixels=max_pixels or MAX_PIXELS,
    )  # fmt: skip
    records = []
    screen = err if as_json else out  # with --json stdout holds nothing else
    try:
        for record in tool.tell(tool.segment_all(tasks, work), len(tasks), screen, err, quiet):
            records.append(record)
    finally:  # of what was done before Ctrl-C, too
        if report:
            tool.report(report, records)
    if as_json:
        terminal.print_json(records)
    raise typer.Exit(int(any(record["state"] == "failed" for record in records)))


@app.command(epilog=options.examples("info"))
def info(
    what: options.What = None,
    root: options.Root = None,
    limit: options.Limit = None,
    max_pixels: options.MaxPixels = None,
    preview: options.Preview = None,
    font: options.Font = None,
    as_json: options.Json = False,
) -> None:
    """Look at a data set, a run, a checkpoint or this machine."""
    from flowseg_tools import check, describe, draw

    if what is None:
        facts = describe.machine(root)
    elif what.endswith(".safetensors"):
        facts = describe.checkpoint(Path(what))
    elif (Path(what) / "config.json").is_file():
        facts = describe.run(Path(what))
    else:
        facts = check.describe(what, root, limit, terminal.track, max_pixels)
        if preview:
            check.draw_preview(what, root, preview)
            draw.say_missing_letters([entry["name"] for entry in facts["classes"]], err)
            err.print(f"preview: {preview}")
    if as_json:
        terminal.print_json(facts)
    elif "splits" in facts:
        terminal.print_dataset(out, facts)
    else:
        terminal.print_facts(out, facts)
    raise typer.Exit(3 if facts.get("problems") else 0)


@app.command(epilog=options.examples("init"))
def init(folder: options.Folder) -> None:
    """Look at a folder of photos and masks, draft dataset.toml."""
    from flowseg_tools.init import write_draft

    for line in write_draft(folder, terminal.track):
        out.print(line)


@app.command(epilog=options.examples("download"))
def download(
    name: options.Download = None,
    root: options.Root = None,
    sources: options.Sources = None,
    sha256: options.Sha256 = None,
    max_bytes: options.MaxBytes = None,
    dry_run: options.Plan = False,
    keep_archive: options.KeepArchive = False,
    quiet: options.Quiet = False,
) -> None:
    """Fetch a data set or public weights, or list what there is."""
    from flowseg_tools import download as downloads

    if name:
        downloads.download(name, root, sources or [], sha256, max_bytes, dry_run, keep_archive, quiet)
        return
    terminal.print_downloads(out, downloads.listing(root))


@app.command(epilog=options.examples("export"))
def export(
    checkpoint: options.Checkpoint = None,
    weights: options.Weights = None,
    output: options.Program = Path("flowseg.pt2"),
    size: options.PhotoSize = None,
    steps: options.Steps = None,
    force: options.Force = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a program, photo to class ids, for other runtimes."""
    from flowseg_tools.export import check_output, export, parse_size
    from flowseg_tools.predict import short_side_of

    check_output(output, force)
    model = load(checkpoint or weights, "cpu", quiet)
    width, height = parse_size(size or str(short_side_of(model)))
    steps = steps or model.config.steps
    with terminal.waiting("tracing and checking the network", quiet):
        same = export(model, output, width, height, steps)
    sizes = f"photo ({height}, {width}, 3) uint8 -> class ids ({height}, {width}) uint8"
    out.print(f"{output}: {sizes}, {steps} steps")
    out.print(f"checked on a photo of noise: {same:.2%} of the pixels are as the model has them")


def speaks() -> bool:
    """Whether this process prints and writes: of those of torchrun only the first one does."""
    return os.environ.get("RANK", "0") == "0"


def load(checkpoint: Path | None, device: str = "auto", quiet: bool = False):
    """The model of a checkpoint or run directory, by default of the newest run; which one is said."""
    from flowseg_tools.dinov2 import DinoFlowSeg
    from flowseg_tools.runs import newest_checkpoint, pick_device
    from model import CheckpointError

    checkpoint = newest_checkpoint(checkpoint)
    model = DinoFlowSeg.load(checkpoint, pick_device(device))
    if not model.info.classes:
        raise CheckpointError(f"{checkpoint} is a backbone without classes: train --init {checkpoint}")
    if not quiet and speaks():
        facts = f"{Path(model.info.dataset).name}, step {model.info.step}, {score_of(model.info)}"
        err.print(terminal.printable(f"weights: {checkpoint} ({facts})"))
    return model


def score_of(info) -> str:
    """The validation score of weights, in words."""
    return "not validated" if info.mIoU is None else f"validation mIoU {info.mIoU:.1%}"


def main() -> None:
    """Run the command line; turn an error into one line and its exit code."""
    # Modules of the user in the current folder must not be taken for ours: torchrun -m puts it first.
    ours = str(Path(__file__).resolve().parent)
    sys.path[:] = [ours, *(place for place in sys.path if place != ours)]

    # What Pillow says of a damaged file is said in our own line, which names the file.
    warnings.filterwarnings("ignore", module="PIL")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    for name in ("stdout", "stderr"):
        setattr(sys, name, terminal.Steady(getattr(sys, name)))
    if not sys.stdout.isatty():
        os.environ["COLUMNS"] = "100"  # not of a window that does not show this: the help is cut in fewer
    try:
        code = app(prog_name="flowseg", standalone_mode=False)
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        line, code = terminal.describe_error(error)
        traceback.clear_frames(error.__traceback__)  # they hold loaders, which would live on for a while
        err.print(line, style="red")
    if sys.stdout.close_quietly():
        err.print("error: the results could not be written to stdout", style="red")
        code = code or 1
    sys.stderr.close_quietly()
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
