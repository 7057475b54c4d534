"""Public weights of PixNerd (arXiv 2507.23268), and how training starts from them or from ours.

Nothing in a foreign file is executed: PyTorch's weights-only reader loads tensors and refuses all else. The
shapes tell the configuration, then every name, shape and value is checked. The weights stay memory-mapped in
the file until they are used, so an import needs no second copy of them.
"""

import math
import re
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mode
from zipfile import ZipFile

import torch
import torch.nn.functional as F
from torch import Tensor

from model import CheckpointError, CheckpointInfo, FlowSeg, ModelConfig, Network, tensor_faults

PUBLIC_NAMES = tomllib.loads((Path(__file__).parent / "tables/pixnerd.toml").read_text(encoding="utf-8"))
EMA = "ema_denoiser."
# What else a public checkpoint holds: the raw weights that the EMA follows, and what trained them.
IMAGE_PATH = ("image_", "token_to_velocity", "vit.")  # what PixNerd does not have
SKIPPED = ("denoiser.", "diffusion_trainer.")
# A valid size where no tensor tells one: the comparison of names then says which tensors are missing.
UNKNOWN_SIZE = 4
# Columns of the pixel embedding that read the position (8 x 8 cosines); those before read the state.
POSITION_COLUMNS = 64
# Layers with a column or a row for every channel of the state, and so of the encoding.
STATE_LAYERS = ("pixel_embed", "head.", "image_to_velocity", "token_to_velocity")
NAMES_SHOWN = 5  # of the classes that are new to the weights


@contextmanager
def public_file(path: str | Path, kind: str) -> Iterator[dict]:
    """Yield what a public `.pth` or `.ckpt` holds; every error inside becomes a CheckpointError.

    kind: what the file should be, for the message.
    """
    if not Path(path).is_file():  # a pipe or a device is not opened
        raise CheckpointError(f"{path} is no regular file; expected a {kind}: see `flowseg download`")
    try:
        # Both are zip archives of uncompressed records. Others could be unpacked to any size.
        with ZipFile(path) as archive:
            require_bytes("records", sum(record.file_size for record in archive.infolist()), path)
        yield torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # foreign bytes make torch.load raise anything at all
        # PyTorch puts the reason behind this label, and behind the reason advice to switch the safety off.
        text = str(error).partition("WeightsUnpickler error:")[2] or str(error) or repr(error)
        reason = text.strip().splitlines()[0].split(". ")[0]
        message = f"{path} is no {kind}, or damaged ({reason}); download it again"
        raise CheckpointError(message) from error


def stored_tensors(state: dict, path: str | Path) -> dict[str, Tensor]:
    """Return `state` if it is what a small file can hold; ValueError names what is not.

    A file of a few bytes can describe tensors that repeat a number a billion times.
    """
    total = 0
    for name, value in state.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise ValueError(f"{name} is no tensor of floating-point numbers")
        if value.nbytes > value.untyped_storage().nbytes():
            raise ValueError(f"{name} has {tuple(value.shape)} numbers, more than are stored")
        total += value.nbytes
    require_bytes("tensors", total, path)
    return state


def require_bytes(kind: str, total: int, path: str | Path) -> None:
    """Raise ValueError if a file says that it holds more bytes than it has."""
    size = Path(path).stat().st_size
    if total > size:
        raise ValueError(f"its {kind} take {total:,} bytes, more than the file has")


def import_pixnerd(path: str | Path) -> FlowSeg:
    """Load the EMA network of a public PixNerd checkpoint as a backbone that does not use the image yet.

    It has two classes, the fewest there can be, because the file says nothing about classes.
    Raises CheckpointError if the file cannot be used.
    """
    network = read_pixnerd(path)
    return FlowSeg(network.config, network).eval()


def start_from(model: FlowSeg, path: str | Path, classes: Sequence[str] = ()) -> str:
    """Copy the network weights of a FlowSeg or a public PixNerd checkpoint into `model`.

    The classes and the encoding may differ. Returns what the weights know of `classes`, in one line. Raises
    CheckpointError if the networks do not fit.
    """
    path = Path(path)
    source = type(model).load(path) if path.suffix == ".safetensors" else import_pixnerd(path)
    weights, anew = fitted(source.network, model.network)
    if faults := tensor_faults(weights, model.network.state_dict()):
        raise CheckpointError(f"{path} has another network ({faults}); match --preset")
    model.network.load_state_dict(weights)

    # A centroid follows from the encoding, the number of classes, and the place of the class among them.
    theirs = list(source.info.classes)
    new = [name for name in classes if name not in theirs]
    same = []
    for label, name in enumerate(classes):
        if name in theirs and torch.equal(source.centroids[theirs.index(name)], model.centroids[label]):
            same.append(name)

    # Such a class is answered if their training has seen it, whether or not this one will.
    unseen = [name for name in classes if name not in same or name in source.info.unseen]
    if len(unseen) < len(classes):
        model.info = CheckpointInfo(classes, [*range(len(classes))], unseen=unseen)
    shown = ", ".join(new[:NAMES_SHOWN]) or "none"
    more = f" + {len(new) - NAMES_SHOWN} more" if len(new) > NAMES_SHOWN else ""
    known = f"{len(classes) - len(new)} of {len(classes)} classes are known by name"
    return f"{known}, {len(same)} with the same centroid; new: {shown}{more}{anew}"


def read_pixnerd(path: str | Path) -> Network:
    """Read the EMA network of a public checkpoint, with an image path of zeros.

    Of the class table only the last row is kept, which stands for "no class".
    """
    with public_file(path, "PixNerd checkpoint") as file:
        state = file["state_dict"]
        found = {name: value for name, value in state.items() if not name.startswith(SKIPPED)}
        stored_tensors(found, path)
        config = pixnerd_config({name: value.shape for name, value in found.items()})
        with torch.device("meta"):  # shapes without values
            network = Network(config)
        ours = network.state_dict()

        # Every tensor of the file must be one of ours, and every one of ours but the image path in the file.
        public = {}
        for name in ours:
            if not name.startswith(IMAGE_PATH):
                public[name] = pixnerd_name(name, config.depth)
        expected = {public[name]: ours[name] for name in public}
        table = public["null_class"]
        num_rows = len(found[table]) if table in found else 1  # any number of classes will do
        expected[table] = ours["null_class"].expand(num_rows, -1)
        if faults := tensor_faults(found, expected):
            raise ValueError(faults)

        # Float32 tensors are used where they lie in the file; other precisions are converted.
        weights = {name: torch.zeros(value.shape) for name, value in ours.items() if name not in public}
        for name, public_name in public.items():
            weights[name] = found[public_name].float()
        weights["null_class"] = weights["null_class"][-1].clone()
        network.load_state_dict(weights, assign=True)
    return network


def pixnerd_name(name: str, depth: int) -> str:
    """Return what a public checkpoint with `depth` transformer blocks calls a parameter of ours."""
    parts = name.split(".")
    if parts[0] == "nerf_blocks":  # there they continue the list of transformer blocks
        parts[0] = "blocks"
        parts[1] = str(depth + int(parts[1]))
    return EMA + ".".join(PUBLIC_NAMES.get(part, part) for part in parts)


def pixnerd_config(shapes: dict[str, torch.Size]) -> ModelConfig:
    """Return the configuration that the shapes in a public checkpoint imply.

    Several tensors tell most sizes, and the most frequent value counts. A single missing or wrong tensor
    therefore changes nothing here, and the comparison that follows names it.
    """
    hidden_size = most_frequent(shapes, r"(qkv|w1|w3)\.weight", axis=1)
    nerf_width = most_frequent(shapes, r"x_embedder|final_layer\.norm")
    return ModelConfig(
        num_classes=2,
        tokens_of="state",
        encoding="kronecker",
        encoding_dims=3,
        patch_size=math.isqrt(most_frequent(shapes, r"s_embedder\.proj\.weight", axis=1) // 3),
        hidden_size=hidden_size,
        depth=count_blocks(shapes, "attn"),
        num_heads=hidden_size // most_frequent(shapes, "[qk]_norm"),
        nerf_depth=count_blocks(shapes, "param_generator"),
        nerf_width=nerf_width,
        nerf_mlp_ratio=most_frequent(shapes, "param_generator") // (2 * nerf_width**2),
    )


def most_frequent(shapes: dict[str, torch.Size], pattern: str, axis: int = 0) -> int:
    """Return the size along `axis` that most tensors have whose name contains the pattern."""
    matching = [shape for name, shape in shapes.items() if re.search(pattern, name)]
    sizes = [shape[axis] for shape in matching if len(shape) > axis]
    return mode(sizes or [UNKNOWN_SIZE])


def count_blocks(shapes: dict[str, torch.Size], part: str) -> int:
    """Return how many different blocks have a tensor whose name begins with `part`."""
    matches = [re.search(rf"\bblocks\.(\d+)\.{part}", name) for name in shapes]
    return len({match[1] for match in matches if match})


def fitted(source: Network, target: Network) -> tuple[dict[str, Tensor], str]:
    """Return the weights of `source` with the state channels and image path of `target`, and what is new.

    Of a source that does not use the image yet, whatever is new starts at zero, so the velocity stays the
    same. Otherwise, if the encoding differs, the layers that read or write the state are those of `target`.
    """
    weights = source.state_dict()
    own = target.state_dict()
    before = source.config
    now = target.config
    more = now.encoding_dims - before.encoding_dims
    blind = not any(value.any() for name, value in weights.items() if name.startswith(IMAGE_PATH))
    new = ""

    # State channels are the first columns of what reads the state, and the rows of what writes it.
    if blind and more >= 0:
        new = "new channels start at zero" if more else ""
        state, position = weights["pixel_embed.weight"].split([before.encoding_dims, POSITION_COLUMNS], dim=1)
        weights["pixel_embed.weight"] = torch.cat([F.pad(state, (0, more)), position], dim=1)
        if now.tokens_of == "state":
            area = now.patch_size**2
            weights["patch_embed.weight"] = F.pad(weights["patch_embed.weight"], (0, more * area))
        weights["head.weight"] = F.pad(weights["head.weight"], (0, 0, 0, more))
        weights["head.bias"] = F.pad(weights["head.bias"], (0, more))
    elif more or before.encoding != now.encoding:
        new = "the layers that read or write the state start anew"
        both_read = before.tokens_of == now.tokens_of == "state"
        names = (*STATE_LAYERS, "patch_embed") if both_read else STATE_LAYERS
        weights |= {name: value for name, value in own.items() if name.startswith(names)}
    if new:
        encodings = f"{before.encoding} in {before.encoding_dims} channels, now {now.encoding} in"
        new = f"; the source is {encodings} {now.encoding_dims}: {new}"

    # The image encoder keeps its random start; the maps that let it act are zero.
    for name, value in own.items() if blind else ():
        if name.startswith(("image_encoder", "vit.")):
            weights[name] = value
        elif name.startswith(IMAGE_PATH):
            weights[name] = torch.zeros_like(value)
    return weights, new
