"""Measure speed and memory.

    python -m experiments.bench [SECTION ..] [--report FILE] [--repeats N] [--compile]

Sections: network, training, potential, sampling, shares, startup, limits, scaling; all if none is named.
What is compared runs in turn in one process and the median counts, so a machine that slows down slows both
sides. --compile adds torch.compile, which takes a minute or more. --tiny shrinks everything to seconds.

Peak memory is taken on Linux in a fresh process per setting: one warm-up step, free memory given back, the
high-water mark of the resident memory reset, one step. The mark minus what was resident before is what the
step needed (gradients included, parameters not). What the allocator keeps counts, as it does in a real run.
"""

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import model as method
from data import Stream, open_dataset
from experiments.reference import Reference
from flowseg_tools import estimate
from flowseg_tools.estimate import H100_TFLOPS, SHARE_IN_BFLOAT16, UTILISATION
from model import FlowSeg, ModelConfig, Network
from train import Objective, TrainConfig, make_optimizers, resolve

ROOT = Path(__file__).parent.parent


def medium(tiny: bool, **changes) -> ModelConfig:
    """D 384, 12 + 2 blocks and a narrow image path, so that PixNerd's own parts take nearly all the time."""
    if tiny:
        config = ModelConfig(num_classes=5, hidden_size=32, num_heads=2, conv_width=8)
    else:
        config = ModelConfig(
            num_classes=171, patch_size=16, hidden_size=384, depth=12, num_heads=6, nerf_depth=2,
            nerf_width=64, nerf_mlp_ratio=2, conv_width=8,
        )  # fmt: skip
    return replace(config, **changes)


def interleaved(runs: dict[str, Callable], repeats: int) -> dict[str, float]:
    """The median seconds of every run, after one that does not count; they run in turn."""
    seconds = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if turn > 0:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def compiled(network: nn.Module) -> nn.Module:
    """The network with its parts compiled: one transformer block serves all, one neural field all tokens."""
    for block in network.blocks:
        block.compile()
    network.render_patches = torch.compile(network.render_patches)
    return network


# Memory --------------------------------------------------------------------------------------------------


def peak_megabytes(run: Callable) -> float:
    """What one call needs at its peak beyond what is resident before it (Linux)."""
    run()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = kilobytes("VmRSS")
    run()
    return (kilobytes("VmHWM") - before) / 1024


def kilobytes(name: str) -> int:
    """An entry of /proc/self/status."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])


def peak_of(job: str, tiny: bool) -> float:
    """`peak_megabytes` of a job, measured in a process of its own."""
    command = [sys.executable, "-m", "experiments.bench", "--peak", job]
    if tiny:
        command.append("--tiny")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def job(name: str, tiny: bool) -> Callable:
    """What `peak_of` measures: the potential, or a step of the network in one setting."""
    if name == "potential":
        return potential_call(tiny)
    return network_step(*network_of(name, tiny), tiny)


# Sections ------------------------------------------------------------------------------------------------


def network_of(setting: str, tiny: bool) -> tuple[nn.Module, nn.Module]:
    """The network of a setting such as `compiled checkpointing`, and the one that encodes the image."""
    torch.manual_seed(0)
    kind = Reference if setting == "reference" else Network
    network = kind(medium(tiny))
    nn.init.normal_(network.head.weight, std=0.1)  # zero would send no gradient back
    network.activation_checkpointing = "checkpointing" in setting
    if "compiled" in setting:
        return compiled(network), network
    return network, network


def network_step(network: nn.Module, encoder: nn.Module, tiny: bool) -> Callable:
    """Forward and backward of 4 images of 256 x 256, given what the image adds."""
    B, side = (1, 32) if tiny else (4, 256)
    dims = encoder.config.encoding_dims
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(B, 3, side, side, generator=generator) * 2 - 1
    x = torch.randn(B, dims, side, side, generator=generator)
    t = torch.rand(B, generator=generator)
    with torch.no_grad():
        features = encoder.encode_image(image)

    def step() -> None:
        network.zero_grad()
        leaves = method.Features(*(values.detach().requires_grad_() for values in features))
        network(x, t, leaves).square().mean().backward()

    return step


def bench_network(tiny: bool, repeats: int, compiling: bool) -> dict:
    """Forward and backward against the plain transcription: ratios of time and of peak memory."""
    settings = ["reference", "eager", "eager checkpointing"]
    if compiling:
        settings += ["compiled", "compiled checkpointing"]
    steps = {setting: network_step(*network_of(setting, tiny), tiny) for setting in settings}
    seconds = interleaved(steps, repeats)
    memory = {setting: peak_of(setting, tiny) for setting in settings}
    facts = {}
    for setting in settings:
        facts[setting] = {
            "seconds": seconds[setting],
            "speed-up": seconds["reference"] / seconds[setting],
            "peak MB": memory[setting],
            "memory ratio": memory[setting] / memory["reference"],
        }
    return facts


def potential_call(tiny: bool) -> Callable:
    """One call of `potential_gradient` for one image of 512 x 512 and 171 classes."""
    M, N, dims = (1000, 5, 6) if tiny else (512 * 512, 171, 19)
    generator = torch.Generator().manual_seed(0)
    mu = method.coded_centroids(N, dims)
    y = torch.randint(0, N, (M,), generator=generator)
    nearby = mu[torch.randint(0, N, (M,), generator=generator)]
    x = nearby + torch.randn(M, dims, generator=generator) / 4
    eps = ModelConfig.eps * method.least_spacing(mu)
    return partial(method.potential_gradient, x, y, mu, eps, ModelConfig.tau)


@contextmanager
def without_potential() -> Iterator[None]:
    """Phi and its gradient cost nothing and are zero."""

    def nothing(x: Tensor, *rest) -> tuple[Tensor, Tensor]:
        return x.new_zeros(len(x)), torch.zeros_like(x)

    whole = method.potential_gradient
    method.potential_gradient = nothing
    try:
        yield
    finally:
        method.potential_gradient = whole


def training_step(
    config: ModelConfig, batch: int, side: int, checkpointing: bool = True, bfloat16: bool = False
) -> tuple[FlowSeg, Callable]:
    """A model and one whole optimizer step of it on random images, as `train` takes it, without the data."""
    torch.manual_seed(0)
    model = FlowSeg(config)
    model.network.activation_checkpointing = checkpointing
    parameters = list(model.parameters())
    ema = [parameter.detach().clone() for parameter in parameters]
    optimizers = make_optimizers(Objective(model, None), TrainConfig())
    image = torch.rand(batch, 3, side, side) * 2 - 1
    labels = torch.randint(0, config.num_classes, (batch, side, side))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss, _ = model.loss(image, labels, torch.Generator().manual_seed(0))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(ema, parameters, 0.005)

    return model, step


def bench_training(tiny: bool, repeats: int, compiling: bool) -> dict:
    """Seconds of a training step of 8 images, without the data, at the size of the preset."""
    settings = ["eager", "eager checkpointing", "eager bfloat16"]
    if compiling:
        settings += ["compiled", "compiled bfloat16"]
    facts = {}
    for preset in ("tiny",) if tiny else ("tiny", "small"):
        setup, config = resolve({"preset": preset})
        batch, side = (1, 32) if tiny else (setup.batch_size, setup.crop_size)
        runs = {}
        for name in settings:
            model, step = training_step(config, batch, side, "checkpointing" in name, "bfloat16" in name)
            if "compiled" in name:  # as `flowseg train --compile` does it
                model.network.compile()
                model.network.encode_image = torch.compile(model.network.encode_image)
            runs[name] = step
        facts[f"{preset}, {batch} images of {side} px"] = interleaved(runs, repeats)
    return facts


def bench_potential(tiny: bool, repeats: int, compiling: bool) -> dict:
    """A D 384 step at 512 x 512 with 171 classes: reshaped, vanilla, vanilla without diagnostics."""
    side = 32 if tiny else 512
    config = medium(tiny, conv_width=ModelConfig.conv_width)
    _, reshaped = training_step(config, 1, side)
    _, vanilla = training_step(replace(config, objective="vanilla"), 1, side)

    def bare() -> None:
        with without_potential():
            vanilla()

    seconds = interleaved(
        {
            "reshaped": reshaped,
            "vanilla": vanilla,
            "vanilla, not even diagnosed": bare,
            "potential": potential_call(tiny),
        },
        repeats,
    )
    facts = {f"{name}, seconds": value for name, value in seconds.items()}
    ratio = seconds["reshaped"] / seconds["vanilla, not even diagnosed"]
    facts["reshaped / vanilla, not even diagnosed"] = ratio
    states = 1 + config.later_share  # of each image in a step
    facts["share of a step"] = states * seconds["potential"] / seconds["reshaped"]
    facts["extra memory MB"] = peak_of("potential", tiny)
    return facts


def bench_sampling(tiny: bool, repeats: int, compiling: bool) -> dict:
    """Images per second of `segment`, and the cost of S steps of `sample` over that of one."""
    styles = ["eager"]
    if compiling:
        styles.append("compiled")
    facts = {}
    for preset in ("tiny",) if tiny else ("tiny", "small"):
        setup, config = resolve({"preset": preset})
        side = 32 if tiny else setup.crop_size
        image = torch.rand(1, 3, side, side) * 2 - 1
        for style in styles:
            model = FlowSeg(config).eval()
            if style == "compiled":
                compiled(model.network)
            for name, bfloat16 in (("float32", False), ("bfloat16", True)):
                costs = sampling_costs(model, image, bfloat16, 5 * repeats)
                facts[f"{preset} {side} px, {style}, {name}"] = costs
    return facts


def sampling_costs(model: FlowSeg, image: Tensor, bfloat16: bool, repeats: int) -> dict:
    """Images per second of `segment`, with 1 step and as many as usual, and the cost of more steps."""

    def run(function: Callable, steps: int) -> None:
        with torch.autocast("cpu", torch.bfloat16) if bfloat16 else nullcontext():
            function(image, steps)

    usual = (1, ModelConfig.steps)
    more = (2, 5, 10)
    runs = {f"sample {steps}": partial(run, model.sample, steps) for steps in (1, *more)}
    runs |= {f"segment {steps}": partial(run, model.segment, steps) for steps in usual}
    seconds = interleaved(runs, repeats)
    facts = {f"images/s, {steps} steps": 1 / seconds[f"segment {steps}"] for steps in usual}
    facts |= {f"{steps} steps / 1": seconds[f"sample {steps}"] / seconds["sample 1"] for steps in more}
    return facts


class Shift(nn.Module):
    """Takes the place of the neural field at next to no cost; the tokens still get a gradient through it."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.param_generator = nn.Linear(config.hidden_size, config.nerf_width)

    def forward(self, q: Tensor, s: Tensor) -> Tensor:
        """q: (B, L, P P, Dx); s: (B, L, D)."""
        return q + self.param_generator(s)[:, :, None]


def bench_shares(tiny: bool, repeats: int, compiling: bool) -> dict:
    """Share of each part of a training step, by leaving the part out; `data` by drawing the batch."""
    if tiny:
        _, config = resolve({"preset": "tiny"})
        return {"tiny, batch 1, 32 px": step_shares(config, 1, 32, repeats)}
    facts = {}
    for preset in ("tiny", "small"):
        setup, config = resolve({"preset": preset})
        batch, side = setup.batch_size, setup.crop_size
        facts[f"{preset}, batch {batch}, {side} px"] = step_shares(config, batch, side, repeats)
    config = medium(tiny, conv_width=ModelConfig.conv_width)
    facts["D 384, batch 1, 256 px"] = step_shares(config, 1, 256, repeats)
    return facts


def step_shares(config: ModelConfig, batch: int, side: int, repeats: int) -> dict:
    """Seconds of a training step with its data, and the share of each part."""
    model, whole = training_step(config, batch, side)
    _, one_patch = training_step(config, 1, config.patch_size)
    network = model.network
    blocks = network.blocks
    nerf_blocks = network.nerf_blocks
    shift = nn.ModuleList([Shift(config)])
    stream = Stream(open_dataset("shapes", "training"), side, 0)

    def without(part: str) -> None:
        network.blocks = nn.ModuleList() if part == "backbone" else blocks
        network.nerf_blocks = shift if part == "neural field" else nerf_blocks
        with without_potential() if part == "potential" else nullcontext():
            whole()

    def data() -> None:
        for i in range(batch):
            stream[i]

    # Of a step on one patch, what remains is mostly the optimizer, clipping and the EMA.
    rest = {"data": data, "a step on one patch: mostly optimizer, clipping, EMA": one_patch}
    parts = ("backbone", "neural field", "potential")
    runs = {part: partial(without, part) for part in ("nothing", *parts)}
    seconds = interleaved(runs | rest, repeats)
    step = seconds["nothing"] + seconds["data"]
    facts = {"seconds": step}
    facts |= {part: (seconds["nothing"] - seconds[part]) / step for part in parts}
    facts |= {name: seconds[name] / step for name in rest}
    return facts


def bench_startup(tiny: bool, repeats: int, compiling: bool) -> dict:
    """Seconds of whole processes."""
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder, "weights.safetensors")
        photo = Path(folder, "photo.png")
        mask = Path(folder, "mask.png")
        classes = [str(i) for i in range(14)]
        FlowSeg(ModelConfig(14)).save(weights, crop_size=96, classes=classes, ids=list(range(14)))
        Image.new("RGB", (128, 96), (90, 120, 60)).save(photo)
        segment = ["segment", str(photo), "-o", str(mask), "--checkpoint", str(weights), "--force"]
        commands = {
            "python -c pass": ["-c", "pass"],
            "python -c 'import torch'": ["-c", "import torch"],
            "flowseg --help": ["-m", "flowseg", "--help"],
            "flowseg segment, one small photo": ["-m", "flowseg", *segment],
        }
        runs = {}
        for name, arguments in commands.items():
            command = [sys.executable, *arguments]
            runs[name] = partial(subprocess.run, command, cwd=ROOT, check=True, capture_output=True)
        return interleaved(runs, repeats)


def rate(run: Callable[[], Tensor], work: float, repeats: int) -> float:
    """10^9 units of work per second."""
    return work / 1e9 / interleaved({"": run}, 5 * repeats)[""]


def bench_limits(tiny: bool, repeats: int, compiling: bool) -> dict:
    """What this machine can do: matrix products at the network's shapes, copies; and what a step reaches."""
    # Matrix products: a large one, the param_generator of 1024 tokens, the pixels of 16 tokens.
    n = 64 if tiny else 2048
    a = torch.randn(n, n)
    b = torch.randn(n, n)
    out = torch.empty(n, n)
    s = torch.randn(n // 2, 384)
    w = torch.randn(8 * n, 384)
    q = torch.randn(16, 256, 64)
    w1 = torch.randn(16, 64, 128)
    generator = "GFLOP/s, param_generator (tokens x 384 x 16384)"
    facts = {
        f"GFLOP/s, matrix product of {n}": rate(lambda: torch.mm(a, b, out=out), 2 * n**3, repeats),
        generator: rate(lambda: s @ w.T, 2 * len(s) * w.numel(), repeats),
        "GFLOP/s, pixels x W1, 16 tokens": rate(lambda: q @ w1, 2 * 16 * 256 * 64 * 128, 10 * repeats),
    }

    # Copies: every byte is read and written.
    big = torch.randn(n * n * 8)
    copy = torch.empty(n * n * 8)
    small = big[: 2**17]
    same = copy[: 2**17]
    facts["GB/s, copy from and to memory"] = rate(lambda: copy.copy_(big), 8 * big.numel(), repeats)
    facts["GB/s, copy of 0.5 MB in the cache"] = rate(lambda: same.copy_(small), 8 * len(same), 20 * repeats)

    # What a step of the network reaches.
    for setting in ("reference", "eager", "eager checkpointing"):
        step = network_step(*network_of(setting, tiny), tiny)
        with FlopCounterMode(display=False) as counter:
            step()
        work = counter.get_total_flops()
        seconds = interleaved({"": step}, repeats)[""]
        facts[f"GFLOP, forward and backward, {setting}"] = work / 1e9
        facts[f"GFLOP/s, forward and backward, {setting}"] = work / 1e9 / seconds
    return facts


# Scaling on paper ----------------------------------------------------------------------------------------


def counted(config: ModelConfig, side: int, checkpointing: bool = False) -> dict:
    """What `flowseg train --dry-run` counts for an image, and the FLOPs of sampling; nothing is computed."""
    parameters, flops, kept = estimate.counted(config, side, checkpointing)
    with torch.device("meta"):
        network = Network(config)
        image = torch.zeros(1, 3, side, side)
        x = torch.zeros(1, config.encoding_dims, side, side)
        t = torch.zeros(1)
    with torch.no_grad(), FlopCounterMode(display=False) as encoding:
        features = network.encode_image(image)
    with torch.no_grad(), FlopCounterMode(display=False) as evaluation:
        network(x, t, features)
    return {
        "M parameters": parameters / 1e6,
        "TFLOP, training step": flops / 1e12,
        "TFLOP, encoding the image": encoding.get_total_flops() / 1e12,
        "TFLOP, one Euler step": evaluation.get_total_flops() / 1e12,
        "GB kept for the backward pass, float32": kept / 1e9,
    }


def bench_scaling(tiny: bool, repeats: int, compiling: bool) -> dict:
    """Cost of presets by counting, and GPU hours of xl: 160,000 steps of 16 images of 512 x 512."""
    facts = {}
    for preset in ("tiny",) if tiny else ("base", "large", "xl"):
        for side in (32,) if tiny else (256, 512, 1024):
            facts[f"{preset}, {side} px, an image"] = counted(many_classes(preset), side)
    config = many_classes("tiny" if tiny else "xl")
    side = 32 if tiny else 512
    for checkpointing in (False, True):
        name = "xl, 512 px, 16 images"
        if checkpointing:
            name += ", checkpointing"
        one = counted(config, side, checkpointing)
        work = 16 * one["TFLOP, training step"]
        seconds = work / (H100_TFLOPS * UTILISATION)
        hours = 160_000 * seconds / 3600
        facts[name] = {
            "TFLOP, training step": work,
            "H100 seconds a step": seconds,
            "H100 hours, 1 GPU": hours,
            "hours on 8 GPUs": hours / 8,
            "GB of weights, gradients, moments, EMA": one["M parameters"] * 20 / 1e3,
            "GB kept in bfloat16": 16 * one["GB kept for the backward pass, float32"] * SHARE_IN_BFLOAT16,
        }
    return facts


def many_classes(preset: str) -> ModelConfig:
    """A preset with the classes of COCO-Stuff."""
    _, config = resolve({"preset": preset})
    return replace(config, num_classes=171)


SECTIONS = {
    "network": bench_network,
    "training": bench_training,
    "potential": bench_potential,
    "sampling": bench_sampling,
    "shares": bench_shares,
    "startup": bench_startup,
    "limits": bench_limits,
    "scaling": bench_scaling,
}


def show(facts: dict, indent: str = "  ") -> None:
    """Print facts, nested ones indented."""
    for name, value in facts.items():
        if isinstance(value, dict):
            print(f"{indent}{name}")
            show(value, indent + "  ")
        else:
            print(f"{indent}{name}: {value:.4g}")


def main(arguments: list[str] | None = None) -> dict:
    """Measure the sections that are named and return what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="also write the numbers to this file as JSON"
    )
    parser.add_argument(
        "--repeats", type=int, metavar="N", default=5, help="measurements of each, whose median counts"
    )
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile")
    parser.add_argument("--tiny", action="store_true", help="shrink everything, to see that it runs")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    unknown = set(options.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"no section {', '.join(sorted(unknown))}; expected {', '.join(SECTIONS)}")
    if options.peak:
        print(peak_megabytes(job(options.peak, options.tiny)))
        return {}

    facts = {"threads": torch.get_num_threads(), "torch": str(torch.__version__)}
    for name in options.sections or SECTIONS:
        print(f"{name}: {SECTIONS[name].__doc__.splitlines()[0]}", flush=True)
        facts[name] = SECTIONS[name](options.tiny, options.repeats, options.compile)
        show(facts[name])
        if options.report:
            options.report.write_text(json.dumps(facts, indent=2) + "\n")
    return facts


if __name__ == "__main__":
    main()
