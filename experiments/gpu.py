"""Prove in 25 minutes on one GPU what was only tested on CPUs, and measure it.

    python -m experiments.gpu [PART ..] [--report FILE] [--tiny]

Each part runs in its own try and then prints a line of JSON, which --report also appends to a file: a failure
costs that part alone. --tiny shrinks everything, so that the script itself can be tried on a CPU; parts that
need CUDA then say so. Nothing is downloaded.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import model as method
import train as training
from data import FolderDataset, ShapesDataset, Stream, open_dataset
from flowseg_tools import predict, records, speed, state
from flowseg_tools.predict import segment_photo
from model import FlowSeg, ModelConfig, coded_centroids, least_spacing, potential_gradient
from train import Objective, TrainConfig, make_optimizers, resolve

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def wait() -> None:
    """Until the device has done all that it was told."""
    if CUDA:
        torch.cuda.synchronize()


def seconds(run: Callable, repeats: int = 5) -> float:
    """The median time of a call, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        wait()
        began = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


class Counter(TorchDispatchMode):
    """Counts the operations that are called; views compute nothing and do not count."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += not function.is_view
        return function(*arguments, **(options or {}))


def launches(run: Callable) -> int:
    """Kernels that a call starts on a GPU; on a CPU the operations that are no views."""
    if not CUDA:
        with Counter() as counter:
            run()
        return counter.count
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        wait()
    events = [event for event in seen.key_averages() if event.device_type == DeviceType.CUDA]
    return sum(event.count for event in events if not event.is_user_annotation)  # not what the host calls


# Parts ---------------------------------------------------------------------------------------------------


def part_ceilings(tiny: bool) -> dict:
    """What the device can do: copies of memory, and matrix products in bfloat16."""
    n = 256 if tiny else 8192
    a = torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16)
    big = torch.empty(n * n * (1 if tiny else 8), device=DEVICE)
    copy = torch.empty_like(big)
    return {
        "GB/s, copy": 8 * big.numel() / 1e9 / seconds(lambda: copy.copy_(big)),
        "TFLOP/s, bfloat16 product": 2 * n**3 / 1e12 / seconds(lambda: a @ a),
    }


def part_equality(tiny: bool) -> dict:
    """Loss, gradient and velocity of preset tiny on this device against a CPU, in float32."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    chosen = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    image = torch.rand(2, 3, 64, 64) * 2 - 1
    labels = torch.randint(0, 14, (2, 64, 64))
    found = {}
    for device in ("cpu", DEVICE):
        model = drawn(ModelConfig(14)).to(device)
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        loss, _ = model.loss(image.to(device), labels.to(device), generators)
        loss.backward()
        x = model.source(image.to(device))
        v = model.velocity(x, torch.full((2,), 0.5, device=device), image.to(device))
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found[str(device)] = [value.detach().cpu() for value in (loss, gradient, v)]
    for backend, before in zip(backends, chosen, strict=True):
        backend.fp32_precision = before
    here, there = found["cpu"], found[str(DEVICE)]
    names = ("loss", "gradient", "velocity")
    errors = zip(names, here, there, strict=True)
    return {f"relative error, {name}": float((a - b).norm() / a.norm()) for name, a, b in errors}


def part_deterministic(tiny: bool) -> dict:
    """Whether two steps with --deterministic give the same bits."""
    torch.use_deterministic_algorithms(True)
    try:
        weights = []
        for _ in range(2):
            model, step = training_step(ModelConfig(14), 2, 64, "eager")
            step()
            weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        return {"same bits": torch.equal(*weights)}
    finally:
        torch.use_deterministic_algorithms(False)


SETTINGS = (  # preset, crop, images, activation checkpointing
    ("base", 256, 64, False),
    ("xl", 512, 2, False),
    ("large", 512, 8, False),
    ("xl", 512, 16, True),
)


def part_steps(tiny: bool) -> dict:
    """A training step without its data: time, memory and launches, eager and compiled."""
    facts = {}
    for preset, size, batch, checkpointing in [("tiny", 32, 2, False)] if tiny else SETTINGS:
        _, config = resolve({"preset": preset})
        config = replace(config, num_classes=150)
        for style in ("eager",) if tiny else ("eager", "compiled"):
            name = f"{preset}, {batch} images of {size} px, {style}"
            try:
                facts[name] = measure_step(config, batch, size, style, checkpointing)
            except Exception as error:  # the next setting may fit
                facts[name] = {"error": describe(error)}
    return facts


def measure_step(config: ModelConfig, batch: int, size: int, style: str, checkpointing: bool) -> dict:
    """Time, memory and launches of a training step."""
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    _, step = training_step(config, batch, size, style, checkpointing)
    step()
    wait()
    facts = {"seconds of the first step": time.perf_counter() - began, "seconds": seconds(step)}
    facts["launches"] = launches(step)
    if CUDA:
        facts["GB"] = torch.cuda.max_memory_allocated() / 1e9
    return facts


def part_potential(tiny: bool) -> dict:
    """The potential of 4.2 million pixels with 150 classes, eager and compiled."""
    count = 1000 if tiny else 64 * 256 * 256
    mu = coded_centroids(150, 19).to(DEVICE)
    y = torch.randint(0, 150, (count,), device=DEVICE)
    x = mu[y.roll(1)] + torch.randn(count, 19, device=DEVICE) / 4
    constants = (mu, ModelConfig.eps * least_spacing(mu.cpu()), ModelConfig.tau)
    compiled = None
    if not tiny:
        compiled = torch.compile(method.potential_of_chunk, dynamic=True)
    chunks = -(-count // max(1, (method.CHUNK_GPU if CUDA else method.CHUNK_CPU) // 150))
    facts: dict = {"chunks": chunks}
    for name, of_chunk in (("eager", None), ("compiled", compiled)):
        if name == "compiled" and tiny:
            continue

        def run(of_chunk: Callable | None = of_chunk) -> tuple[Tensor, Tensor]:
            return potential_gradient(x, y, *constants, of_chunk)

        facts[f"seconds, {name}"] = seconds(run)
        facts[f"launches per chunk, {name}"] = launches(run) / chunks
    return facts


def part_tail(tiny: bool) -> dict:
    """What follows the gradient in a step: clipping, the optimizers and the EMA, of AdamW and of Muon."""
    _, config = resolve({"preset": "tiny" if tiny else "xl"})
    facts = {}
    for optimizer in ("adamw", "muon"):
        objective = Objective(FlowSeg(config).to(DEVICE), None)
        optimizers = make_optimizers(objective, TrainConfig(optimizer=optimizer))
        parameters = list(objective.parameters())
        ema = [parameter.detach().clone() for parameter in parameters]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)

        def run(parameters=parameters, optimizers=optimizers, ema=ema) -> None:
            training.update(parameters, optimizers, 1e-4, 1.0)
            with torch.no_grad():
                torch._foreach_lerp_(ema, parameters, 0.001)

        facts[f"seconds, {optimizer}"] = seconds(run)
    return facts


def part_waiting(tiny: bool) -> dict:
    """How often PyTorch warns that the host waits for the GPU, in three real steps and their report."""
    if not CUDA:
        return {"skipped": "needs CUDA"}
    import warnings

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        given = {"batch_size": 4, "crop_size": 64, "max_steps": 3}
        configs = resolve(given, ["log_every=3", "eval_every=1000", "compile=false"])
        real = training.backward

        def backward(*rest) -> dict:
            torch.cuda.set_sync_debug_mode("warn")
            return real(*rest)

        training.backward = backward
        try:
            training.train(*configs, Path(folder, "run"), "cuda", Console(quiet=True))
        finally:
            training.backward = real
            torch.cuda.set_sync_debug_mode("default")
    texts = [f"{Path(one.filename).name}:{one.lineno}" for one in seen if "synchroniz" in str(one.message)]
    return {"warnings": len(texts), "where": sorted(set(texts))}


def part_loader(tiny: bool) -> dict:
    """Images per second of the loader on JPEGs of 683 x 512, cropped to 512, by number of processes."""
    count, size = (8, 32) if tiny else (256, 512)
    with tempfile.TemporaryDirectory() as folder:
        data = photos(Path(folder), [(683, 512)] * count)
        facts = {}
        for workers in (0, 1) if tiny else (0, 4, 8, 16):
            options = speed.loader_options(workers, DEVICE)
            loader = torch.utils.data.DataLoader(Stream(data, size, 0), 8, sampler=range(count), **options)
            began = time.perf_counter()
            for images, _, _ in loader:
                images.to(DEVICE, non_blocking=True)
            wait()
            facts[f"images/s, {workers} workers"] = count / (time.perf_counter() - began)
        return facts


def part_evaluation(tiny: bool) -> dict:
    """40 photos of 20 sizes in bfloat16, eager and compiled: time, launches, agreement."""
    sizes = [(40 + i, 60 - i) for i in range(2)] if tiny else [(512 + 16 * i, 683 - 8 * i) for i in range(20)]
    side = 32 if tiny else 512
    _, config = resolve({"preset": "tiny" if tiny else "base"})
    model = drawn(replace(config, num_classes=150)).to(DEVICE).eval()
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for w, h in sizes * 2]
    facts = {"launches a photo": launches(lambda: segment_photo(model, pictures[0], side, 1))}
    masks = {}
    for style in ("eager",) if tiny else ("eager", "compiled"):
        if style == "compiled":
            speed.compile_parts(model)
        segment_photo(model, pictures[0], side, 1)
        began = time.perf_counter()
        masks[style] = [segment_photo(model, picture, side, 4)[0] for picture in pictures]
        facts[f"photos/s, {style}"] = len(pictures) / (time.perf_counter() - began)
    if "compiled" in masks:
        pairs = zip(masks["eager"], masks["compiled"], strict=True)
        facts["equal pixels"] = float(np.mean([(a == b).mean() for a, b in pairs]))
    return facts


def part_saving(tiny: bool) -> dict:
    """A state of preset xl: seconds that training waits for it, and seconds until it is written."""
    _, config = resolve({"preset": "tiny" if tiny else "xl"})
    model = FlowSeg(config).to(DEVICE)
    optimizers = make_optimizers(Objective(model, None), TrainConfig(optimizer="adamw"))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    training.update(list(model.parameters()), optimizers, 0.0, 1.0)
    facts = {}
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        with state.Writer() as writer:
            for name in ("first", "next"):  # the next one finds its memory ready
                wait()
                asked = time.perf_counter()
                state.save_state(Path(folder), {"model": model}, optimizers, (1, 0, -1.0), writer.write)
                facts[f"seconds that training waits, {name}"] = time.perf_counter() - asked
                for pending in writer.pending.values():
                    pending.result()
        facts["seconds until both are written"] = time.perf_counter() - began
        facts["GB"] = Path(folder, state.STATE).stat().st_size / 1e9
    return facts


def part_training(tiny: bool) -> dict:
    """60 seconds of real training of preset small on the built-in scenes: steps, loss, mIoU in both types."""
    given = {"preset": "small", "max_steps": 2 if tiny else 400}
    settings = ["eval_every=10000", f"log_every={1 if tiny else 100}"]
    if tiny:
        given |= {"preset": "tiny", "batch_size": 2, "crop_size": 32}
    configs = resolve(given, settings)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        began = time.perf_counter()
        real_length = ShapesDataset.__len__
        chosen = predict.in_bfloat16
        if tiny:
            ShapesDataset.__len__ = lambda self: 2 if self.split != "training" else 1_000_000
        try:
            training.train(*configs, run, str(DEVICE.type), Console(quiet=True))
            took = time.perf_counter() - began
            model = FlowSeg.load(run / "last.safetensors", DEVICE)
            scores = {}
            for bfloat16 in (True, False):
                predict.in_bfloat16 = lambda device, on=bfloat16: on
                metrics, _ = training.evaluate(model, open_dataset("shapes", "validation"), 96, 4, limit=50)
                scores[f"mIoU, {'bfloat16' if bfloat16 else 'float32'}"] = metrics.scores["mIoU"]
        finally:
            ShapesDataset.__len__ = real_length
            predict.in_bfloat16 = chosen
        lines = records.read_log(run)
        losses = [line["loss"] for line in lines if "loss" in line]
        return {"seconds": took, "first loss": losses[0], "last loss": losses[-1], **scores}


# What they share -----------------------------------------------------------------------------------------


def drawn(config: ModelConfig) -> FlowSeg:
    """A model of which every part matters: what starts at zero is drawn at random."""
    torch.manual_seed(0)
    model = FlowSeg(config)
    for layer in (model.network.head, model.network.token_to_velocity):
        nn.init.normal_(layer.weight, std=0.05)
    return model


def training_step(
    config: ModelConfig, batch: int, size: int, style: str, checkpointing: bool = False
) -> tuple[FlowSeg, Callable]:
    """A model and one whole training step of it on random images, as train.py takes it."""
    model = drawn(config).to(DEVICE)
    model.network.activation_checkpointing = checkpointing
    if style == "compiled":
        speed.compile_parts(model)
    objective = Objective(model, None)
    setup = TrainConfig(batch_size=batch)
    optimizers = make_optimizers(objective, setup)
    parameters = list(objective.parameters())
    ema = [parameter.detach().clone() for parameter in parameters]
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
    labels = torch.randint(0, config.num_classes, (batch, size, size), dtype=torch.uint8)

    def step() -> None:
        generators = training.noise_generators(setup, 0)
        training.backward(objective, [(images, labels, None)], generators, CUDA, DEVICE)
        training.update(parameters, optimizers, 1e-4, 1.0)
        with torch.no_grad():
            torch._foreach_lerp_(ema, parameters, 0.001)

    return model, step


def photos(folder: Path, sizes: list[tuple[int, int]]) -> FolderDataset:
    """A data set of synthetic JPEGs with masks of two classes."""
    for kind in ("images", "annotations"):
        (folder / kind / "training").mkdir(parents=True)
    (folder / "dataset.toml").write_text('classes = ["left", "right"]\n')
    rng = np.random.default_rng(0)
    for i, (width, height) in enumerate(sizes):
        small = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8))
        small.resize((width, height)).save(folder / "images/training" / f"{i}.jpg")
        labels = np.zeros((height, width), np.uint8)
        labels[:, width // 2 :] = 1
        Image.fromarray(labels).save(folder / "annotations/training" / f"{i}.png")
    return open_dataset(str(folder), "training")


def describe(error: BaseException) -> str:
    """Kind and first line of an error."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


PARTS = {
    "ceilings": part_ceilings,
    "equality": part_equality,
    "deterministic": part_deterministic,
    "waiting": part_waiting,
    "steps": part_steps,
    "potential": part_potential,
    "tail": part_tail,
    "loader": part_loader,
    "evaluation": part_evaluation,
    "saving": part_saving,
    "training": part_training,
}


def main(arguments: list[str] | None = None) -> list[dict]:
    """Run the parts that are named, or all; returns what was printed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--report", type=Path, metavar="FILE", help="also append the lines to this file")
    parser.add_argument("--tiny", action="store_true", help="shrink everything, to see that it runs")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; expected {', '.join(PARTS)}")
    if not CUDA and not options.tiny:
        parser.error("there is no GPU; --tiny tries the script on a CPU")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for the deterministic step, as in train.py
    device = torch.cuda.get_device_name() if CUDA else "cpu"

    lines = []
    for name in options.parts or PARTS:
        began = time.perf_counter()
        line = {"part": name, "device": device, "torch": str(torch.__version__)}
        try:
            line |= PARTS[name](options.tiny)
        except Exception as error:  # the next part may work
            line["error"] = describe(error)
        line["took"] = round(time.perf_counter() - began, 1)
        text = json.dumps(line)
        print(text, flush=True)
        lines.append(line)
        if options.report:
            with open(options.report, "a", encoding="utf-8") as file:
                file.write(text + "\n")
    return lines


if __name__ == "__main__":
    main()
