"""A program of a model for other runtimes: photo -> class ids, at a fixed size and number of steps."""

import json
import logging
import os
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from flowseg_tools.report import check_writable
from flowseg_tools.runs import RunError
from model import FlowSeg

ONNX = ("onnx", "onnxscript", "onnxruntime")  # what writes and checks a program in ONNX
MOST_DIFFERENT = 1e-3  # share of pixels: rounding may decide for another class where two are equally near


class PhotoToIds(nn.Module):
    """photo (H, W, 3) uint8 RGB -> train ids (H, W) uint8."""

    def __init__(self, model: FlowSeg, steps: int):
        super().__init__()
        self.model = model
        self.steps = steps

    def forward(self, photo: Tensor) -> Tensor:
        image = photo.movedim(-1, 0)[None].float() / 127.5 - 1  # (1, 3, H, W)
        return self.model.segment(image, self.steps)[0].byte()


def parse_size(text: str) -> tuple[int, int]:
    """Width and height of "WxH", or of "N" for a square. RunError: it is neither."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and 8 <= int(side) <= 16_384 for side in sides):
        raise RunError(f"--size {text}: expected WIDTHxHEIGHT, or a number for a square, from 8 to 16,384")
    return int(sides[0]), int(sides[-1])


def check_output(file: Path, force: bool) -> None:
    """RunError, before the work, if the program cannot be written as that file."""
    if file.suffix not in (".pt2", ".onnx"):
        raise RunError(f"-o {file}: expected NAME.pt2 (PyTorch) or NAME.onnx")
    if file.exists() and not force:
        raise RunError(f"-o {file} exists; choose another name, or --force to write it again")
    for package in ONNX if file.suffix == ".onnx" else ():
        if not find_spec(package):
            raise RunError(f"-o {file} needs {package}: pip install {' '.join(ONNX)}, or name a .pt2 file")
    check_writable(file.parent)


@torch.no_grad()
def export(model: FlowSeg, file: Path, width: int, height: int, steps: int) -> float:
    """Write the program as .pt2 or .onnx; returns the share of pixels that it has like the model.

    RunError: it does not do what the model does.
    """
    module = PhotoToIds(model, steps).eval()
    generator = torch.Generator().manual_seed(0)
    photo = torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=generator)
    program = torch.export.export(module, (photo,))

    # The program is written under another name, read again and tried before it gets its own.
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.stem}.{os.getpid()}{file.suffix}")
    try:
        if file.suffix == ".onnx":
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses packages that nobody needs
            torch.onnx.export(program, dynamo=True, verbose=False).save(part)
            session = import_module("onnxruntime").InferenceSession(part)
            found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: photo.numpy()})[0])
        else:
            torch.export.save(program, part, extra_files={"classes.json": json.dumps(model.info.classes)})
            found = torch.export.load(part).module()(photo)
        differ = float((found != module(photo)).float().mean())
        if differ > MOST_DIFFERENT:
            raise RunError(f"the program gives {differ:.2%} of the pixels otherwise; it is not kept")
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
    return 1 - differ
