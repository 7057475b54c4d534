"""The options of the command line: for each one its names, its help sentence, its panel and what it accepts.

Defaults of configurations are written there and only shown here. They are read from the text of those files,
because importing them would import PyTorch, and help has to be instant.
"""

import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, BadParameter, Option

HERE = Path(__file__).parent
DATA, MODEL, METHOD, TRAINING = "Data", "Model", "Method", "Training"  # panels of the help
RUN, OUTPUT = "Run", "Output"


@cache
def written_fields() -> dict[str, tuple[str, str]]:
    """Default and comment of every field of TrainConfig and ModelConfig, as they are written there."""
    found = {}
    for file, name in (("train.py", "TrainConfig"), ("model.py", "ModelConfig")):
        source = (HERE.parent / file).read_text(encoding="utf-8")
        body = source.partition(f"class {name}:")[2].partition("def ")[0]
        for line in re.findall(r"^    (\w+): \w+ = ([^#\n]+)(?:# (.*))?$", body, re.MULTILINE):
            field, default, comment = line
            found[field] = (default.strip().strip('"'), comment)
    limit = re.search(r"^MAX_PIXELS = (\w+)", (HERE.parent / "data.py").read_text(encoding="utf-8"), re.M)
    found["max_pixels"] = (limit[1], found["max_pixels"][1])
    return found


def field_lines() -> list[str]:
    """A line for every field that --set takes: its default, and what its configuration says of it."""
    return [
        f"{f'{name}={default}':34} {comment}".rstrip()
        for name, (default, comment) in written_fields().items()
    ]


def names_in(table: str) -> str:
    """The names that a table of ours has, as a list in words."""
    return ", ".join(tomllib.loads((HERE / f"tables/{table}.toml").read_text(encoding="utf-8")))


# Kinds of options ----------------------------------------------------------------------------------------


def flag(panel: str, text: str, *names: str):
    """An option that is on or off."""
    return Option(*names, metavar="", rich_help_panel=panel, help=text)


def value(panel: str, metavar: str, text: str, *names: str, default: str = "", least: int | None = None):
    """An option with a value. `default` is only shown here."""
    shown = rf"{text} \[default: {default}]" if default else text
    return Option(*names, metavar=metavar, rich_help_panel=panel, help=shown, show_default=False, min=least)


def field(panel: str, metavar: str, text: str, name: str, *names: str, least: int | None = None):
    """An option that sets the field `name` of a configuration, whose default it shows."""
    default = written_fields()[name][0] or "none"
    return value(panel, metavar, text, *names, default=default.replace("_", ","), least=least)


def file_option(text: str, check, metavar: str = "FILE"):
    """An option that names a file of the output, and is looked at before the work."""
    return Option(metavar=metavar, callback=check, rich_help_panel=OUTPUT, help=text, show_default=False)


def check_report(file: Path | None) -> Path | None:
    """Refuse before the work what cannot be written after it."""
    if file and (file.suffix.lower() != ".json" or not file.parent.is_dir() or file.is_dir()):
        raise BadParameter(f"{file}; expected NAME.json in a folder that exists")
    return file


def check_report_place(place: Path | None) -> Path | None:
    """Refuse a report that is neither NAME.json nor a folder."""
    if place and (place.suffix == ".json" or (place.suffix and not place.is_dir()) or place.is_file()):
        return check_report(place)
    return place


def use_font(file: Path | None) -> None:
    """Write the text of pictures in another font."""
    if file:
        from flowseg_tools import draw

        try:
            draw.use_font(file)
        except ValueError as error:
            raise BadParameter(str(error)) from None


Text = str | None
Number = int | None
Real = float | None
File = Path | None
Files = list[str] | None

# Of several commands -------------------------------------------------------------------------------------

NEWEST = "Weights or run directory; by default of the newest run under runs/."
Checkpoint = Annotated[File, Argument(metavar="CHECKPOINT", help=NEWEST, show_default=False)]
Weights = Annotated[File, value(MODEL, "FILE|DIR", NEWEST, "--checkpoint", "-c")]
ROOT = "$FLOWSEG_DATA, else ~/.cache/flowseg"
Root = Annotated[File, value(DATA, "DIR", "Folder of named data sets and weights.", default=ROOT)]
Limit = Annotated[Number, value(DATA, "N", "Most images of a split, evenly spaced.", default="all", least=1)]
MaxPixels = Annotated[Number, field(DATA, "N", "Largest picture that is opened.", "max_pixels", least=1)]
Steps = Annotated[Number, value(METHOD, "N", "Euler steps.", default="the checkpoint's", least=1)]
SIDE = "Pixels that the short side of an image is resized to."
ShortSide = Annotated[
    Number, value(METHOD, "N", SIDE, "--short-side", "--size", default="the training crop's", least=8)
]
WINDOWS = "The whole image at once, or square windows that overlap by a third."
Mode = Annotated[Literal["whole", "slide"], Option(rich_help_panel=METHOD, help=WINDOWS)]
Flip = Annotated[bool, flag(METHOD, "Average with the mirror image.", "--flip")]
Device = Annotated[str, Option(metavar="NAME", rich_help_panel=RUN, help="auto, cpu, cuda, cuda:1 or mps.")]
Quiet = Annotated[bool, flag(RUN, "Print results, warnings and errors only.", "--quiet", "-q")]
Json = Annotated[bool, flag(OUTPUT, "Print the result as JSON.", "--json")]
FONT = "Font (.ttf, .otf) of text in pictures; the built-in one has plain Latin letters."
Font = Annotated[File, file_option(FONT, use_font)]
Force = Annotated[bool, flag(OUTPUT, "Overwrite outputs that exist.", "--force")]

# train ---------------------------------------------------------------------------------------------------

SETS = "shapes (built in), a data set's name, or a folder."
Dataset = Annotated[Text, field(DATA, "NAME|DIR", SETS, "dataset")]
LOADERS = "Processes that load images; -1: up to 8 on CUDA, else none."
Workers = Annotated[Number, field(DATA, "N", LOADERS, "num_workers", "--workers", least=-1)]
PRESETS = f"{names_in('presets')}; the defaults shown here are tiny's."
Preset = Annotated[Text, field(MODEL, "NAME", PRESETS, "preset")]
Init = Annotated[File, value(MODEL, "FILE|DIR", "Weights to start from.", default="random weights")]
Encoder = Annotated[File, field(MODEL, "FILE", "DINOv2 weights for the image path.", "encoder")]
FinetuneEncoder = Annotated[
    bool, flag(MODEL, "Train them, too, at a tenth of the learning rate.", "--finetune-encoder")
]
Teacher = Annotated[File, field(MODEL, "FILE", "DINOv2 weights to align the tokens with (REPA).", "teacher")]

Objective = Annotated[Text, field(METHOD, "NAME", "reshaped or vanilla.", "objective")]
Encoding = Annotated[Text, field(METHOD, "NAME", "Centroids: coded or kronecker.", "encoding")]
DIMS = "Channels of the state; 0: 19, or 3 if kronecker."
Dims = Annotated[Number, field(METHOD, "N", DIMS, "encoding_dims", "--dims", least=0)]
Tau = Annotated[Real, field(METHOD, "X", "Temperature of the potential.", "tau")]
EPS = "Softening of the potential, in squared distances of the nearest two centroids."
Eps = Annotated[Real, field(METHOD, "X", EPS, "eps")]

Recipe = Annotated[Text, value(TRAINING, "NAME", f"{names_in('recipes')}.", default="none")]
MaxSteps = Annotated[Number, field(TRAINING, "N", "Training steps.", "max_steps", least=1)]
BATCH = ("--batch-size", "--batch")
IMAGES = "Images per step, over all processes."
BatchSize = Annotated[Number, field(TRAINING, "N", IMAGES, "batch_size", *BATCH, least=1)]
PARTS = "Parts that a process splits its share of the batch into, to save memory."
Accumulate = Annotated[Number, field(TRAINING, "N", PARTS, "grad_accum_steps", "--accumulate", least=1)]
CropSize = Annotated[
    Number, field(TRAINING, "N", "Side of the training crop.", "crop_size", "--crop-size", "--size", least=8)
]
Optimizer = Annotated[Text, field(TRAINING, "NAME", "muon or adamw.", "optimizer")]
LearningRate = Annotated[Real, field(TRAINING, "X", "Learning rate after the warm-up.", "lr", "--lr")]
WarmupSteps = Annotated[
    Number, field(TRAINING, "N", "Steps in which the learning rate grows.", "warmup_steps", least=0)
]
SEED = "Seed of weights, order, augmentation and noise."
Seed = Annotated[Number, field(TRAINING, "N", SEED, "seed", least=0)]

OutDir = Annotated[File, value(RUN, "DIR", "Run directory.", "--out", "-o", default="runs/DATASET-PRESET")]
CONFIG = "Settings of a run (its config.json or directory); options win."
ConfigFile = Annotated[File, value(RUN, "FILE|DIR", CONFIG, "--config", default="none")]
EvalEvery = Annotated[Number, field(RUN, "N", "Steps between validations.", "eval_every", least=1)]
SaveEvery = Annotated[Number, field(RUN, "N", "Steps between saved states.", "save_every", least=1)]
Dtype = Annotated[Text, value(RUN, "NAME", "float32 or bfloat16.", default="bfloat16 on CUDA")]
COMPILE = "Compile the network first (a minute or two); on by default on CUDA."
Compile = Annotated[bool | None, flag(RUN, COMPILE, "--compile/--no-compile")]
ActivationCheckpointing = Annotated[
    bool, flag(TRAINING, "Recompute activations: slower, far less memory.", "--activation-checkpointing")
]
Deterministic = Annotated[bool, flag(RUN, "Give the same bits again on a GPU.", "--deterministic")]
Tensorboard = Annotated[bool, flag(RUN, "Also write a log for TensorBoard.", "--tensorboard")]
AllowChanges = Annotated[bool, flag(RUN, "Continue with other options.", "--allow-changes")]
Cost = Annotated[bool, flag(RUN, "Only say what it takes; needs no data.", "--dry-run")]
SET = "Set any other field; `--set help` lists them."
Settings = Annotated[Files, value(RUN, "FIELD=VALUE", SET, "--set", default="none")]

# eval ----------------------------------------------------------------------------------------------------

DatasetOf = Annotated[
    Text, value(DATA, "NAME|DIR", "A data set's name, or a folder.", default="the checkpoint's")
]
Split = Annotated[str, Option(metavar="NAME", rich_help_panel=DATA, help="training, validation or test.")]
PLACE = "Write the result as .json, or into a folder with pictures."
ReportPlace = Annotated[File, file_option(PLACE, check_report_place, "FILE|DIR")]
SHEETS = "Sheets of the worst images in a --report DIR."
Worst = Annotated[int, Option(metavar="N", min=0, rich_help_panel=OUTPUT, help=SHEETS)]
COLUMNS = {"name": "name", "iou": "IoU", "acc": "Acc", "pixels": "pixels"}
SortBy = Annotated[
    Literal["id", "name", "iou", "acc", "pixels"],
    Option(rich_help_panel=OUTPUT, help="Order of the printed classes."),
]

# segment -------------------------------------------------------------------------------------------------

PHOTOS = "Photos, folders or globs; - reads a photo from stdin."
Photos = Annotated[list[str], Argument(metavar="PATH...", help=PHOTOS, show_default=False)]
WHERE = "Mask of one photo (.png), or a folder."
BESIDE = "PHOTO-mask.png beside a single photo"
Output = Annotated[File, value(OUTPUT, "FILE|DIR", WHERE, "--out", "-o", default=BESIDE)]
Overlay = Annotated[bool, flag(OUTPUT, "Also draw the mask over the photo.", "--overlay")]
Confidence = Annotated[bool, flag(OUTPUT, "Also write the probability, 0..255.", "--confidence")]
Entropy = Annotated[bool, flag(OUTPUT, "Also write how undecided it is, 0..255.", "--entropy")]
Trajectory = Annotated[bool, flag(OUTPUT, "Also draw the flow: sheet and GIF.", "--trajectory")]
Ids = Annotated[Literal["train", "raw"], Option(rich_help_panel=OUTPUT, help="Values of the mask.")]
Labelmap = Annotated[bool, flag(OUTPUT, "Also write labelmap.txt for annotation tools.", "--labelmap")]
Report = Annotated[File, file_option("Write the result as .json.", check_report)]

# info, init, download, export ----------------------------------------------------------------------------

What = Annotated[
    Text, Argument(metavar="WHAT", help="A data set, checkpoint or run directory.", show_default=False)
]
Preview = Annotated[File, value(OUTPUT, "FILE", "Draw images, masks and training crops of a data set.")]
Folder = Annotated[Path, Argument(metavar="DIR", help="A folder of photos and masks.", show_default=False)]
THINGS = f"{names_in('downloads')}; without a name: a table."
Download = Annotated[Text, Argument(metavar="NAME", help=THINGS, show_default=False)]
Sources = Annotated[Files, value(DATA, "PATH|URL", "A file on disk, or a mirror; may be repeated.", "--from")]
Sha256 = Annotated[Text, value(DATA, "DIGEST", "Pin a file for which none is published.")]
MaxBytes = Annotated[
    Number, value(DATA, "N", "Largest file that is accepted.", default="a tenth more than published", least=1)
]
Plan = Annotated[bool, flag(RUN, "Say what, from where and how much.", "--dry-run")]
KeepArchive = Annotated[bool, flag(RUN, "Keep the archive after unpacking it.", "--keep-archive")]
KIND = "Program: .pt2 for PyTorch, .onnx for other runtimes."
Program = Annotated[File, value(OUTPUT, "FILE", KIND, "--out", "-o", default="flowseg.pt2")]
PhotoSize = Annotated[
    Text, value(METHOD, "WxH", "Pixels of the photos that it takes.", "--size", default="the training crop")
]

# Examples, which end the help of a command; a test parses them.
EXAMPLES = {
    "train": [
        "flowseg train --dataset my-data --preset small",
        "flowseg train --config runs/my-data-small --lr 1e-3 -o runs/slower",
    ],
    "eval": ["flowseg eval --sort iou", "flowseg eval runs/my-data-small --split test --report scores/"],
    "segment": [
        "flowseg segment photo.jpg --overlay",
        "flowseg segment holiday/ -o masks/ -c runs/my-data-small",
    ],
    "info": ["flowseg info my-data --preview check.png", "flowseg info runs/my-data-small"],
    "init": ["flowseg init my-data", "flowseg init ~/exports/project-7"],
    "download": ["flowseg download", "flowseg download ade20k --root /data"],
    "export": [
        "flowseg export -o road.pt2",
        "flowseg export runs/my-data-small --size 512x384 --steps 1 -o road.onnx",
    ],
}


def examples(name: str) -> str:
    """The end of the help of a command."""
    return "Examples:\n" + "\n".join(f"  {line}" for line in EXAMPLES[name])
