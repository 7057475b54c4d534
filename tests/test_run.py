"""Runs that are left alone: killed, told to stop, spread over processes, compiled, in bfloat16."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import flowseg
import train as training
from data import Shapes
from model import FlowSeg
from run import RunError
from train import resolve

ROOT = Path(__file__).parent.parent
TINY = ("hidden=16", "depth=1", "heads=2", "field_width=8", "conv_width=8", "steps=2", "log_every=1")
SCENES = 5  # of validation: an odd number, so that two processes do not get equal shares


@pytest.fixture(autouse=True)
def _few_scenes(monkeypatch):
    monkeypatch.setattr(Shapes, "__len__", lambda self: SCENES if self.split != "training" else 1_000_000)


def run(folder, *settings, allow_changes=False, **given):
    given = {"batch": 4, "size": 32, "max_steps": 4, "warmup": 1} | given
    configs = resolve(given, [*TINY, *settings])
    return training.train(*configs, folder, "cpu", Console(quiet=True), allow_changes=allow_changes)


def same(one, other):
    """Whether two runs ended with the same weights, EMA, optimizer state, scores and log, bit for bit."""
    timing = {"seconds_per_step", "images_per_second", "peak_memory_gb"}
    for name in ("state", "last", "best"):
        a, b = (load_file(folder / f"{name}.safetensors") for folder in (one, other))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name
    logs = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (one, other)]
    logs = [[{k: v for k, v in json.loads(line).items() if k not in timing} for line in log] for log in logs]
    assert logs[0] == logs[1]
    return True


def on_call(monkeypatch, owner, name, number, act):
    """Have the `number`-th call of a method do `act` first."""
    real, calls = getattr(owner, name), []

    def method(self, *args):
        calls.append(1)
        if len(calls) == number:
            act()
        return real(self, *args)

    monkeypatch.setattr(owner, name, method)


def tell(number):
    return lambda: os.kill(os.getpid(), number)


def python(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, **options)


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_training_finishes_the_step_and_saves(tmp_path, monkeypatch, number):
    run(tmp_path / "whole", eval_every=2)
    with monkeypatch.context() as patch:
        on_call(patch, FlowSeg, "loss", 3, tell(number))
        assert run(tmp_path / "parts", eval_every=2) == 128 + number
    assert json.loads((tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 3
    assert run(tmp_path / "parts", eval_every=2) == 0
    assert same(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("scene", [2, SCENES + 4 + 2])  # of the first validation, and of the last one
def test_a_signal_in_validation_stops_it_and_it_is_done_again(tmp_path, monkeypatch, scene):
    run(tmp_path / "whole", eval_every=2)
    seen = []

    def scored(self, index):
        if self.split == "validation":
            seen.append(index)
            if len(seen) == scene:
                os.kill(os.getpid(), signal.SIGTERM)
        return self.read(index)[:2]

    with monkeypatch.context() as patch:
        patch.setattr(Shapes, "__getitem__", scored)
        assert run(tmp_path / "parts", eval_every=2) == 143
    assert len(seen) == scene  # at once, not at the end of validation
    run(tmp_path / "parts", eval_every=2)
    assert same(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no SIGUSR1")
def test_usr1_saves_and_goes_on(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(training.run, "save_state", lambda *args: saved.append(args[-1][0]))
    on_call(monkeypatch, FlowSeg, "loss", 2, tell(signal.SIGUSR1))
    assert run(tmp_path / "run") == 0
    assert saved == [2, 4]


def test_a_second_interrupt_does_not_wait(tmp_path, monkeypatch):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    on_call(monkeypatch, FlowSeg, "loss", 2, twice)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is before


# ---------------------------------------------------------------- kills

KILL = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from tests import test_run
from data import Shapes

torch.set_num_threads(1)  # before the fork: OpenMP's threads would not survive it
Shapes.__len__ = lambda self: 3 if self.split != "training" else 1_000_000
folder, settings, kills = Path(sys.argv[1]), sys.argv[2].split(), int(sys.argv[3])

def start():
    child = os.fork()
    if not child:
        test_run.run(folder, *settings)
        os._exit(0)
    return child

for i in range(kills):
    child = start()
    time.sleep(random.Random(i).uniform(0.01, 0.5))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(start(), 0)[1]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.parametrize(("kills", "steps", "workers"), [(20, 60, 0), (4, 8, 1)])
def test_kills_at_any_moment_change_nothing(tmp_path, kills, steps, workers):
    settings = f"max_steps={steps} save_every=1 eval_every=7 accumulate=2 workers={workers}"
    for name, count in (("whole", 0), ("parts", kills)):
        done = python("-c", KILL, tmp_path / name, settings, count)
        assert done.returncode == 0, done.stderr
    assert same(tmp_path / "whole", tmp_path / "parts")


def test_a_half_written_line_of_the_log_is_dropped(tmp_path):
    run(tmp_path / "run", max_steps=2)
    log = tmp_path / "run" / "metrics.jsonl"
    before = log.read_text()
    log.write_text(before + '{"step": 3, "lo')
    run(tmp_path / "run", max_steps=2)
    assert log.read_text() == before


def test_a_run_killed_before_its_first_save_begins_its_log_anew(tmp_path):
    run(tmp_path / "whole")
    run(tmp_path / "killed")
    for name in ("state", "last", "best"):
        (tmp_path / "killed" / f"{name}.safetensors").unlink()
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as log:
        log.write('{"step": 5, "lo')
    run(tmp_path / "killed")
    assert same(tmp_path / "whole", tmp_path / "killed")


def test_a_change_that_the_state_cannot_take_leaves_the_run_as_it_was(tmp_path):
    run(tmp_path / "run", max_steps=2)
    config = (tmp_path / "run" / "config.json").read_text()
    with pytest.raises(RunError, match="the state is of another network or teacher; use --out"):
        run(tmp_path / "run", "depth=2", max_steps=2, allow_changes=True)
    assert (tmp_path / "run" / "config.json").read_text() == config
    assert run(tmp_path / "run", max_steps=2) == 0


@pytest.mark.parametrize("setting", [
    "batch=0", "accumulate=0", "max_steps=0", "eval_every=0", "save_every=0", "log_every=0", "seed=-1",
    "workers=-1", "heads=0", "field_width=0", "conv_width=4",
])  # fmt: skip
def test_numbers_that_cannot_be_are_named(setting):
    name, _, value = setting.partition("=")
    with pytest.raises(RunError, match=f"{name} is {value}; expected a"):
        resolve({}, [setting])


def test_changed_options_need_permission(tmp_path):
    run(tmp_path / "run", max_steps=2)
    with pytest.raises(RunError, match=r"holds another run \(max_steps was 2, now 3\).*--allow-changes"):
        run(tmp_path / "run", max_steps=3)
    assert run(tmp_path / "run", max_steps=3, allow_changes=True) == 0
    assert run(tmp_path / "run", max_steps=3) == 0  # the new options are the run's own from then on


# ---------------------------------------------------------------- processes

SPREAD = """
import json, sys
from pathlib import Path
from rich.console import Console
import train as training
from tests import test_run
from data import Shapes
from model import FlowSeg

Shapes.__len__ = lambda self: test_run.SCENES if self.split != "training" else 1_000_000
folder, settings = Path(sys.argv[1]), sys.argv[2].split()
real = training.dist.destroy_process_group

def score_first():  # the weights of the other run, while the processes still know each other
    model = FlowSeg.load(folder.parent / "one" / "last.safetensors")
    metrics, _ = training.evaluate(model, Shapes("validation"), 32, 2)
    if training.process()[0] == 0:
        (folder / "confusion.json").write_text(json.dumps(metrics.confusion.tolist()))
    real()

training.dist.destroy_process_group = score_first
test_run.run(folder, *settings)
"""


def torchrun(folder, *settings, count=2, script=SPREAD):
    path = folder.parent / "spread.py"
    path.write_text(script)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count)
    return python(*launch, path, folder, " ".join(settings))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [(), ("accumulate=2", "dims=3")], ids=str)
def test_two_processes_are_one(tmp_path, monkeypatch, settings):
    run(tmp_path / "one", *settings, "eval_every=2")
    done = torchrun(tmp_path / "two", *settings, "eval_every=2")
    assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / name / "state.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for key in one:
        assert torch.allclose(one[key], two[key], rtol=1e-3, atol=2e-5), key
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two")]
    for a, b in zip(*(map(json.loads, log) for log in logs), strict=True):  # written by one process
        keys = {"loss", "fm", "phi", "grad", "grad_norm"} & a.keys()
        assert [a[key] for key in keys] == pytest.approx([b[key] for key in keys], rel=1e-3)
    model = FlowSeg.load(tmp_path / "one" / "last.safetensors")
    confusion = training.evaluate(model, Shapes("validation"), 32, 2)[0].confusion
    assert json.loads((tmp_path / "two" / "confusion.json").read_text()) == confusion.tolist()


def test_every_image_of_a_batch_has_its_own_noise_wherever_it_is(monkeypatch):
    config = resolve({"batch": 8}, [])[0]
    drawn = [g.initial_seed() for g in training.generators(config, 5)]
    assert len(set(drawn)) == 8
    assert not set(drawn) & {g.initial_seed() for g in training.generators(config, 6)}
    shares = []
    for rank in range(4):
        monkeypatch.setattr(training, "process", lambda rank=rank: (rank, 4))
        shares += [g.initial_seed() for g in training.generators(config, 5)]
    assert shares == drawn


def test_processes_share_every_batch_without_overlap(monkeypatch):
    config, data = resolve({"batch": 8, "max_steps": 3, "size": 32}, [])[0], Shapes("training")
    whole = [indices.tolist() for *_, indices in training.batches(data, config, 1)]
    monkeypatch.setattr(training, "process", lambda: (0, 2))
    first = [indices.tolist() for *_, indices in training.batches(data, config, 1)]
    monkeypatch.setattr(training, "process", lambda: (1, 2))
    second = [indices.tolist() for *_, indices in training.batches(data, config, 1)]
    assert [a + b for a, b in zip(first, second, strict=True)] == whole
    assert len(whole) == 2


def test_a_batch_that_does_not_divide_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(RunError, match="batch is 4; expected a multiple of 6, processes x accumulate"):
        run(tmp_path / "run", "accumulate=2")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_process_that_fails_is_named_and_ends_the_others(tmp_path):
    """The second process meets a broken loss; neither hangs, and no traceback hides the one line."""
    script = f"""
import os, sys
import flowseg
from model import FlowSeg
if os.environ["RANK"] == "1":
    def broken(self, *args):
        raise ValueError("this one is broken")
    FlowSeg.loss = broken
sys.argv = ["flowseg", "train", "--batch", "4", "--size", "32", "--out", sys.argv[1]]
sys.argv += [part for setting in {TINY} for part in ("--set", setting)]
flowseg.main()
"""
    done = torchrun(tmp_path / "run", script=script)
    assert done.returncode != 0
    assert "error: process 1: ValueError: this one is broken" in done.stderr


@pytest.mark.parametrize(("error", "hint"), [
    (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), "lower --batch or --size, or split"),
    (RuntimeError("DataLoader timed out after 300 seconds"), "check the storage, or try --workers 0"),
    (OSError(28, "No space left on device"), "check the path and the space left there"),
    (KeyError("mu"), "this may be a bug: flowseg --debug COMMAND shows where"),
])  # fmt: skip
def test_an_error_of_pytorch_says_which_option_to_turn(monkeypatch, capsys, error, hint):
    def fails(*args, **options):
        raise error

    monkeypatch.setattr(training, "resolve", fails)
    monkeypatch.setattr(sys, "argv", ["flowseg", "train"])
    with pytest.raises(SystemExit):
        flowseg.main()
    message = capsys.readouterr().err
    assert hint in message
    assert len(message.splitlines()) == 1


# ---------------------------------------------------------------- precision and compile


def test_bfloat16_keeps_weights_state_and_loss_in_float32(tmp_path):
    run(tmp_path / "run", dtype="bfloat16")
    for name in ("state", "last"):
        tensors = load_file(tmp_path / "run" / f"{name}.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    logs = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) for line in logs if "loss" in line)


def test_recomputing_the_neural_field_changes_nothing(tmp_path):
    for recompute in (False, True):
        run(tmp_path / str(recompute), f"recompute={str(recompute).lower()}")
    assert same(tmp_path / "False", tmp_path / "True")


def test_deterministic_is_switched_on_and_off(tmp_path):
    run(tmp_path / "on", deterministic=True, max_steps=1)
    assert torch.are_deterministic_algorithms_enabled()
    run(tmp_path / "off", max_steps=1)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler here")
def test_compiled_training_is_eager_training(tmp_path):
    """To rounding, and with the same names of the weights."""
    for name, compile in (("eager", False), ("compiled", True)):
        run(tmp_path / name, compile=compile, max_steps=2)
    eager, compiled = (load_file(tmp_path / name / "state.safetensors") for name in ("eager", "compiled"))
    assert eager.keys() == compiled.keys()
    assert all(torch.allclose(eager[key], compiled[key], rtol=1e-3, atol=1e-4) for key in eager)
    FlowSeg.load(tmp_path / "compiled" / "last.safetensors")
