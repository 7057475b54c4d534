"""Ready for GPUs, as far as a CPU can show it: processes, waiting, compiled parts, states.

What needs a GPU is marked `cuda` and skips without one.
"""

import copy
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import train as training
from data import ShapesDataset
from flowseg_tools import records, runs, speed, state
from flowseg_tools.dinov2 import Alignment, DinoFlowSeg
from flowseg_tools.state import save_state, share_state
from model import (
    CheckpointError,
    FlowSeg,
    ModelConfig,
    coded_centroids,
    least_spacing,
    potential_gradient,
    potential_of_chunk,
    write_tensors,
)
from tests.test_dinov2 import public
from train import Objective, resolve

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
TINY = ("hidden_size=16", "depth=2", "num_heads=2", "nerf_width=8", "conv_width=8", "encoding_dims=11")


# ---------------------------------------------------------------- several processes are one

VARIANTS = {
    "plain": (),
    "accumulating": ("grad_accum_steps=2",),
    "recomputed": ("activation_checkpointing=true",),
    "aligned": ("teacher=teacher.pth",),
    "an image without labels": (),
    "adamw": ("optimizer=adamw",),
    "compiled": ("compile=true",),
    "rounded": ("gradient_dtype=bfloat16",),
}
QUICK = [name for name in VARIANTS if name not in ("compiled", "rounded")]


def step_of(name: str, folder: Path) -> dict[str, torch.Tensor]:
    """Loss, gradients and the weights after one training step of this process's share of a batch."""
    given = {"batch_size": 8, "crop_size": 16, "warmup_steps": 0, "lr": 1e-4}
    config, network = resolve(given, [*TINY, *VARIANTS[name]])
    torch.manual_seed(0)
    model = FlowSeg(network)
    for parameter in model.parameters():  # what starts at zero would send no gradient back
        torch.nn.init.normal_(parameter, std=0.2)
    model.network.activation_checkpointing = config.activation_checkpointing
    alignment = None
    if config.teacher:
        alignment = Alignment(model.network, folder / Path(config.teacher).name, 8, 0.5)
    objective = Objective(model, alignment)
    names = {parameter: name for name, parameter in objective.named_parameters()}
    optimizers = training.make_optimizers(objective, config)
    rank, world = runs.process()
    if config.compile == "true":
        speed.compile_parts(model)
    if world > 1:
        objective = speed.distribute(objective, CPU, config.grad_accum_steps > 1, config.gradient_dtype)

    loader = training.batches(ShapesDataset("training"), config, 0)
    parts = [next(loader) for _ in range(config.grad_accum_steps)]
    if name == "an image without labels" and rank == 0:
        parts[0][1][0] = 255
    values = training.backward(objective, parts, training.noise_generators(config, 0), False, CPU)
    found = {"loss": runs.summed(values["loss"])[None]}
    found |= {f"gradient {name}": parameter.grad.clone() for parameter, name in names.items()}
    training.update(list(names), optimizers, config.lr, config.grad_clip)
    return found | {f"weight {name}": parameter.detach().clone() for parameter, name in names.items()}


def take_steps(folder: str, variants: list[str]) -> None:
    """What each of the processes does; the first one keeps the results."""
    torch.set_num_threads(1)
    with runs.process_group(CPU):
        rank, world = runs.process()
        for name in variants:
            found = step_of(name, Path(folder))
            if rank == 0:
                save_file(found, f"{folder}/{world} {name}.safetensors")


def together(count: int, code: str) -> None:
    """Run Python code in processes that form a group, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(count):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1",
            "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        command = [sys.executable, "-c", code]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        processes.append(process)
    for process in processes:
        _, errors = process.communicate(timeout=500)
        assert process.returncode == 0, errors


def assert_equal_steps(one: dict, several: dict, close: float) -> None:
    """Losses and weights to `close` of their norms, gradients to that of the norm of the whole gradient."""
    assert one.keys() == several.keys()
    gradients = [value.norm() for name, value in one.items() if name.startswith("gradient")]
    whole = torch.stack(gradients).norm()
    for name, value in one.items():
        size = whole if name.startswith("gradient") else value.norm()
        assert (value - several[name]).norm() <= close * size, name


def compare(folder: Path, count: int, variants: list[str], close: float = 1e-6) -> None:
    """The steps of several processes against those of one."""
    torch.save(public(), folder / "teacher.pth")
    together(count, f"from tests.test_gpu import take_steps; take_steps({str(folder)!r}, {variants})")
    take_steps(str(folder), variants)
    for name in variants:
        one, several = (load_file(folder / f"{world} {name}.safetensors") for world in (1, count))
        assert_equal_steps(one, several, close)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_take_the_step_of_one(tmp_path, count):
    compare(tmp_path, count, QUICK)


@pytest.mark.slow
def test_gradients_may_travel_in_bfloat16(tmp_path):
    together(2, f"from tests.test_gpu import take_steps; take_steps({str(tmp_path)!r}, ['plain', 'rounded'])")
    exact, rounded = (load_file(tmp_path / f"2 {name}.safetensors") for name in ("plain", "rounded"))
    gradients = [name for name in exact if name.startswith("gradient")]
    differences = torch.stack([(exact[name] - rounded[name]).norm() for name in gradients])
    share = differences.norm() / torch.stack([exact[name].norm() for name in gradients]).norm()
    assert 1e-4 < share < 1e-2


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler here")
@pytest.mark.parametrize("count", [2, 4])
def test_several_compiled_processes_take_the_step_of_one(tmp_path, count):
    compare(tmp_path, count, ["compiled"], close=1e-5)


RESUME = """
from pathlib import Path
from data import ShapesDataset
from tests import test_runs

ShapesDataset.__len__ = lambda self: 5 if self.split != "training" else 1_000_000
test_runs.run(Path({folder!r}), "save_every=2", eval_every=4)
"""


@pytest.mark.slow
def test_a_run_goes_on_with_more_or_fewer_processes(tmp_path):
    """From step 2 of 4; the others need no state: they see an empty folder, as on another machine."""
    together(1, RESUME.format(folder=str(tmp_path / "one")))
    together(2, RESUME.format(folder=str(tmp_path / "two")))
    states = {name: load_file(tmp_path / name / "state.safetensors") for name in ("one", "two")}
    for before, count in (("one", 2), ("two", 1)):
        folder = tmp_path / f"{before} then {count}"
        folder.mkdir()
        shutil.copy(tmp_path / before / "config.json", folder)
        shutil.copy(tmp_path / before / "previous.safetensors", folder / "state.safetensors")
        together(count, RESUME.format(folder=str(folder)))
        states[folder.name] = load_file(folder / "state.safetensors")
    for name, found in states.items():
        assert found.keys() == states["one"].keys()
        for key, value in states["one"].items():
            assert torch.allclose(value, found[key], rtol=1e-3, atol=2e-5), (name, key)


def state_of(seed: int, steps: int) -> tuple[FlowSeg, list[torch.optim.Optimizer]]:
    """A small model with its optimizers, after some training steps."""
    config, network = resolve({"batch_size": 2, "crop_size": 16}, TINY)
    torch.manual_seed(seed)
    model = FlowSeg(network)
    objective = Objective(model, None)
    optimizers = training.make_optimizers(objective, config)
    loader = training.batches(ShapesDataset("training"), config, 0)
    for step in range(steps):
        generators = training.noise_generators(config, step)
        training.backward(objective, [next(loader)], generators, False, CPU)
        training.update(list(model.parameters()), optimizers, 1e-3, 1.0)
    return model, optimizers


def share_and_keep(folder: str) -> None:
    """Begin with other weights in every process, and only the first with moments; keep what all have then."""
    rank = int(os.environ["RANK"])
    model, optimizers = state_of(seed=rank, steps=1 if rank == 0 else 0)  # alone: a step is not shared
    with runs.process_group(CPU):
        at = share_state({"model": model}, optimizers, (7, 5, 0.5) if rank == 0 else (0, 0, -1.0))
        assert at == (7, 5, 0.5)
        save_state(Path(folder) / str(rank), {"model": model}, optimizers, at)


@pytest.mark.slow
def test_every_process_begins_with_what_the_first_one_has(tmp_path):
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    together(2, f"from tests.test_gpu import share_and_keep; share_and_keep({str(tmp_path)!r})")
    first, second = (load_file(tmp_path / str(rank) / "state.safetensors") for rank in range(2))
    assert first.keys() == second.keys()
    assert any(key.endswith(".momentum") for key in first)
    assert all(torch.equal(first[key], second[key]) for key in first)


# ---------------------------------------------------------------- the host does not wait


class Reads(TorchDispatchMode):
    """Counts how often the value of a tensor is read: item, bool, float, int, as an index."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **(options or {}))


@pytest.fixture
def reads(monkeypatch):
    """The reads since the fixture was made; `tolist`, `numpy` and `cpu` pass by the dispatcher."""
    with Reads() as counter:
        for name in ("tolist", "numpy", "cpu"):
            real = getattr(torch.Tensor, name)

            def method(self, *rest, real=real, **options):
                counter.count += 1
                return real(self, *rest, **options)

            monkeypatch.setattr(torch.Tensor, name, method)
        yield counter


@pytest.mark.parametrize("settings", [(), ("grad_accum_steps=2", "optimizer=adamw")], ids=str)
def test_values_are_read_once_in_log_every_steps(tmp_path, monkeypatch, reads, settings):
    """At the report alone. Labels are checked on a CPU only."""
    monkeypatch.setattr(FlowSeg, "_check", lambda *rest: None)
    monkeypatch.setattr(ShapesDataset, "__len__", lambda self: 2 if self.split != "training" else 10**6)
    after = []
    real = training.update

    def update(*rest):
        after.append(reads.count)
        return real(*rest)

    monkeypatch.setattr(training, "update", update)
    given = {"batch_size": 4, "crop_size": 16, "max_steps": 9, "save_every": 9, "eval_every": 9}
    configs = resolve(given, [*TINY, "log_every=4", "steps=1", *settings])
    assert training.train(*configs, tmp_path / "run", "cpu", Console(quiet=True)) == 0
    assert len(after) == 9
    assert [b - a for a, b in pairwise(after)] == [0, 0, 0, 1, 0, 0, 0, 1]


class Made(TorchDispatchMode):
    """Counts the tensors that are made of numbers of Python: a GPU would be waited for to send them there."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += function is torch.ops.aten.lift_fresh.default
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("pretrained", [(), ("encoder",), ("encoder", "teacher")], ids=str)
def test_the_loss_and_the_masks_make_no_tensor_of_numbers(tmp_path, pretrained):
    torch.save(public(), tmp_path / "vit.pth")
    paths = {name: str(tmp_path / "vit.pth") for name in pretrained}
    _, network = resolve({"batch_size": 2, "crop_size": 16, **paths}, TINY)
    model = DinoFlowSeg(network)
    alignment = Alignment(model.network, paths["teacher"], 8, 0.5) if "teacher" in paths else None
    image = torch.zeros(2, 3, 16, 16)
    labels = torch.zeros(2, 16, 16, dtype=torch.int64)
    with Made() as made:
        loss, _ = Objective(model, alignment)(image, labels, None, labels.numel() - labels.sum(), 1.0)
        loss.backward()
        model.segment(image)
    assert made.count == 0


def test_the_average_keeps_no_graph(tmp_path, monkeypatch):
    """It would grow with every step."""
    kept = []
    real = records.report

    def report(run, *rest):
        kept.extend(parameter.requires_grad for parameter in run.ema.parameters())
        return real(run, *rest)

    monkeypatch.setattr(records, "report", report)
    monkeypatch.setattr(ShapesDataset, "__len__", lambda self: 1 if self.split != "training" else 10**6)
    given = {"batch_size": 2, "crop_size": 16, "max_steps": 2}
    training.train(*resolve(given, [*TINY, "steps=1"]), tmp_path / "run", "cpu", Console(quiet=True))
    assert kept
    assert not any(kept)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_gradient_that_is_not_finite_changes_nothing(optimizer):
    model, optimizers = state_of(seed=0, steps=2)
    if optimizer == "adamw":
        optimizers = optimizers[:1]
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    parameters[3].grad.view(-1)[0] = float("inf")
    before = copy.deepcopy([[*optimizer.state.values()] for optimizer in optimizers])
    weights = copy.deepcopy(parameters)
    _, finite = training.update(parameters, optimizers, 0.1, 1.0)
    assert not finite
    assert all(torch.equal(a, b) for a, b in zip(weights, parameters, strict=True))
    for states, optimizer in zip(before, optimizers, strict=True):
        for moments, now in zip(states, optimizer.state.values(), strict=True):
            assert all(torch.equal(moments[kind], now[kind]) for kind in moments)


# ---------------------------------------------------------------- compiled parts


def test_photos_of_many_sizes_compile_blocks_and_field_once():
    """By the backend that only traces. The convolutions of a CPU have other kernels for small images."""
    config = ModelConfig(5, hidden_size=16, num_heads=2, nerf_width=8, conv_width=8, encoding_dims=11)
    model = FlowSeg(config).eval()
    graphs = []

    def trace(graph, inputs):
        graphs.append(graph)
        return graph

    speed.compile_parts(model, backend=trace)
    model.network.image_encoder._compiled_call_impl = None  # see above
    counts = []
    for i in range(12):
        model.segment(torch.zeros(1, 3, 33 + 8 * i, 90 - 5 * i), 1)
        counts.append(len(graphs))
    assert counts == [2] * 12  # one for all blocks, one for the field


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler here")
def test_the_compiled_potential_is_the_eager_one():
    mu = coded_centroids(150, 19)
    eps = ModelConfig.eps * least_spacing(mu)
    compiled = torch.compile(potential_of_chunk, dynamic=True, fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    for count in (1000, 777):
        y = torch.randint(0, 150, (count,), generator=generator)
        x = mu[y.roll(1)] + torch.randn(count, 19, generator=generator) / 4
        expected = potential_gradient(x, y, mu, eps, ModelConfig.tau)
        found = potential_gradient(x, y, mu, eps, ModelConfig.tau, compiled)
        for a, b in zip(expected, found, strict=True):
            assert (a - b).norm() < 1e-6 * a.norm()


# ---------------------------------------------------------------- states written beside training


def test_a_writer_takes_the_tensors_as_they_are_and_trains_on(tmp_path, monkeypatch):
    """Training goes on while the disk is slow, and changes the weights."""
    gate = threading.Event()
    monkeypatch.setattr(state, "write_tensors", lambda *rest: gate.wait(60) and write_tensors(*rest))
    weight = torch.ones(3)
    with state.Writer() as writer:
        writer.write({"weight": weight}, tmp_path / "a.safetensors", {})
        weight.zero_()  # before anything is written
        assert not list(tmp_path.iterdir())
        gate.set()
        writer.write({"weight": weight}, tmp_path / "a.safetensors", {}, "before.safetensors")
    assert load_file(tmp_path / "before.safetensors")["weight"].tolist() == [1, 1, 1]
    assert load_file(tmp_path / "a.safetensors")["weight"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), MemoryError()], ids=repr)
def test_a_thread_that_dies_while_it_writes_leaves_a_state_that_loads(tmp_path, monkeypatch, error):
    """The run ends with the error, no later than its next state; what it had written continues."""
    from tests.test_runs import run, same

    monkeypatch.setattr(ShapesDataset, "__len__", lambda self: 3 if self.split != "training" else 10**6)
    run(tmp_path / "whole", "save_every=1")
    real = os.fsync
    calls = []

    def fsync(number):
        calls.append(1)
        if len(calls) == 7:  # in the second state, after its weights; each has a call more for its folder
            raise error
        real(number)

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fsync)
        with pytest.raises((CheckpointError, MemoryError)):
            run(tmp_path / "parts", "save_every=1")
    assert state.read_state(tmp_path / "parts" / "state.safetensors")[1][0] >= 1
    run(tmp_path / "parts", "save_every=1")
    assert same(tmp_path / "whole", tmp_path / "parts")


def test_a_state_is_also_saved_by_the_clock(tmp_path, monkeypatch):
    from tests.test_runs import run

    monkeypatch.setattr(ShapesDataset, "__len__", lambda self: 3 if self.split != "training" else 10**6)
    clock = iter(range(0, 10_000, 40))  # it is looked at once or twice a step
    monkeypatch.setattr(training.time, "monotonic", lambda: next(clock))
    saved = []
    monkeypatch.setattr(records, "save_state", lambda *rest: saved.append(rest[3][0]))
    run(tmp_path / "run", "save_minutes=1", max_steps=6)
    assert saved[-1] == 6
    assert len(saved) > 2


# ---------------------------------------------------------------- which GPU


@pytest.fixture
def two_gpus(monkeypatch):
    """Two GPUs, as far as their choice goes; the list has the one that was made the current one."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


@pytest.mark.parametrize(("name", "rank", "number"), [("auto", "1", 1), ("cuda", "0", 0), ("cuda:1", "0", 1)])
def test_the_gpu_that_is_chosen_becomes_the_current_one(two_gpus, monkeypatch, name, rank, number):
    """Events note what is done on the current one, and loaders pin memory for it."""
    monkeypatch.setenv("LOCAL_RANK", rank)
    device = runs.pick_device(name)
    assert device == torch.device("cuda", number)
    with runs.process_group(device):
        assert two_gpus == [device]


@pytest.mark.parametrize(("name", "rank", "world", "said"), [
    ("cuda", "2", "3", "no GPU 2; expected 0 to 1"), ("auto", "5", "6", "no GPU 5"),
    ("cuda:2", "0", "1", "no GPU 2"), ("cuda:1", "0", "2", "pass --device cuda"),
    ("cuda:", "7", "8", "no GPU 7"), ("cuda:x", "0", "1", "not available"),
])  # fmt: skip
def test_a_gpu_that_is_not_there_is_named(two_gpus, monkeypatch, name, rank, world, said):
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(runs.RunError, match=said):
        runs.pick_device(name)


# ---------------------------------------------------------------- with a GPU


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_computes_what_the_cpu_computes():
    model, _ = state_of(seed=0, steps=2)
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    labels = torch.randint(0, model.config.num_classes, (2, 32, 32))
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    here, _ = model.loss(image, labels, generators[:2])
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    there, _ = model.cuda().loss(image.cuda(), labels.cuda(), generators[:2])
    assert torch.allclose(here, there.cpu(), rtol=1e-4)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_no_step_on_a_gpu_waits_for_it(tmp_path, monkeypatch):
    """PyTorch itself raises where a step would wait; only reports, saving and validation may."""
    real = training.update

    def update(*rest):
        torch.cuda.set_sync_debug_mode("error")
        found = real(*rest)
        torch.cuda.set_sync_debug_mode("default")
        return found

    monkeypatch.setattr(training, "update", update)
    given = {"batch_size": 4, "crop_size": 32, "max_steps": 4}
    configs = resolve(given, [*TINY, "steps=1", "compile=false"])
    assert training.train(*configs, tmp_path / "run", "cuda", Console(quiet=True)) == 0


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_on_a_cpu(tmp_path):
    """At toy sizes; every part leaves a line, and none fails."""
    from experiments import gpu

    lines = gpu.main(["--tiny", "--report", str(tmp_path / "gpu.jsonl")])
    assert [line["part"] for line in lines] == list(gpu.PARTS)
    assert not [line for line in lines if "error" in line]
    assert [json.loads(text) for text in (tmp_path / "gpu.jsonl").read_text().splitlines()] == lines
