"""Runs that are left alone: killed, told to stop, spread over processes, compiled, in bfloat16."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import flowseg
import train as training
from data import DataError, ShapesDataset
from flowseg_tools import records, runs
from flowseg_tools.runs import RunError
from model import FlowSeg
from train import resolve

ROOT = Path(__file__).parent.parent
TINY = (
    "hidden_size=16", "depth=1", "num_heads=2", "nerf_width=8", "conv_width=8", "encoding_dims=11",
    "steps=2", "log_every=1",
)  # fmt: skip
SCENES = 5  # of validation: an odd number, so that two processes do not get equal shares


def few_scenes(monkeypatch):
    monkeypatch.setattr(
        ShapesDataset, "__len__", lambda self: SCENES if self.split != "training" else 1_000_000
    )


@pytest.fixture(autouse=True)
def _few_scenes(monkeypatch):
    few_scenes(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing stops, validated twice."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        few_scenes(patch)
        run(folder, eval_every=2)
    return folder


def run(folder, *settings, allow_changes=False, **given):
    given = {"batch_size": 4, "crop_size": 32, "max_steps": 4, "warmup_steps": 1} | given
    configs = resolve(given, [*TINY, *settings])
    return training.train(*configs, folder, "cpu", Console(quiet=True), allow_changes=allow_changes)


def same(one, other):
    """Whether two runs ended with the same weights, EMA, optimizer state, scores and log, bit for bit."""
    timing = {"seconds_per_step", "images_per_second", "peak_memory_gb"}
    for name in ("state", "last", "best"):
        a = load_file(one / f"{name}.safetensors")
        b = load_file(other / f"{name}.safetensors")
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name
    logs = []
    for folder in (one, other):
        log = lines(folder)
        for line in log:
            for key in timing & line.keys():
                del line[key]
        logs.append(log)
    assert logs[0] == logs[1]
    return True


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def on_call(monkeypatch, owner, name, number, act):
    """Have the `number`-th call of a method do `act` first."""
    real = getattr(owner, name)
    calls = []

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


TABLE = 'classes = ["left", "right"]\nids = [0, 7]\nignore = [255]\nsplits = ["training", "validation"]\n'


def data_folder(root):
    """A folder data set of one black pair in each split."""
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
            Image.new("L", (32, 32)).save(root / kind / split / "0.png")
    (root / "dataset.toml").write_text(TABLE)
    return root


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_in_training_finishes_the_step_and_saves(whole, tmp_path, monkeypatch, name):
    """SIGHUP, too: the terminal of a remote machine that was closed."""
    number = getattr(signal, name)
    with monkeypatch.context() as patch:
        on_call(patch, FlowSeg, "loss", 3, tell(number))
        assert run(tmp_path / "parts", eval_every=2) == 128 + number
    assert lines(tmp_path / "parts")[-1]["step"] == 3
    assert run(tmp_path / "parts", eval_every=2) == 0
    assert same(whole, tmp_path / "parts")


def test_a_signal_that_nohup_ignores_stays_ignored(tmp_path, monkeypatch):
    on_call(monkeypatch, FlowSeg, "loss", 2, tell(signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run(tmp_path / "run") == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert lines(tmp_path / "run")[-1]["step"] == 4


@pytest.mark.parametrize("scene", [2, SCENES + 4 + 2])  # of the first validation, and of the last one
def test_a_signal_in_validation_stops_it_and_it_is_done_again(whole, tmp_path, monkeypatch, scene):
    seen = []

    def scored(self, index):
        if self.split == "validation":
            seen.append(index)
            if len(seen) == scene:
                os.kill(os.getpid(), signal.SIGTERM)
        return self.read(index)[:2]

    with monkeypatch.context() as patch:
        patch.setattr(ShapesDataset, "__getitem__", scored)
        assert run(tmp_path / "parts", eval_every=2) == 143
    assert len(seen) == scene  # at once, not at the end of validation
    run(tmp_path / "parts", eval_every=2)
    assert same(whole, tmp_path / "parts")


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no SIGUSR1")
def test_usr1_saves_and_goes_on(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(records, "save_state", lambda *args: saved.append(args[3][0]))
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
from tests import test_runs
from data import ShapesDataset

torch.set_num_threads(1)  # before the fork: OpenMP's threads would not survive it
ShapesDataset.__len__ = lambda self: 3 if self.split != "training" else 1_000_000
folder, settings, kills = Path(sys.argv[1]), sys.argv[2].split(), int(sys.argv[3])

def start():
    child = os.fork()
    if not child:
        test_runs.run(folder, *settings)
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
@pytest.mark.parametrize(("kills", "steps", "workers"), [(20, 60, 0), (20, 30, 2)])
def test_kills_at_any_moment_change_nothing(tmp_path, kills, steps, workers):
    settings = f"max_steps={steps} save_every=1 eval_every=7 grad_accum_steps=2 num_workers={workers}"
    for name, count in (("whole", 0), ("parts", kills)):
        done = python("-c", KILL, tmp_path / name, settings, count)
        assert done.returncode == 0, done.stderr
    assert same(tmp_path / "whole", tmp_path / "parts")
    whole, parts = ({path.name for path in (tmp_path / name).iterdir()} for name in ("whole", "parts"))
    assert whole == parts  # nothing is left of saves that were cut short


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


@pytest.mark.parametrize("content", [
    b'{"step": 5, "lo', b"\xff\xfe\x00", b"null\n[]\n7\n", b'{"step": null, "loss": 1}\n', b"[" * 100_000,
], ids=["cut", "binary", "other JSON", "no step", "deep"])  # fmt: skip
def test_damaged_lines_of_the_log_are_dropped_and_the_run_continues(tmp_path, content):
    run(tmp_path / "run", max_steps=2)
    log = tmp_path / "run" / "metrics.jsonl"
    before = log.read_text()
    log.write_bytes(before.encode() + content)
    run(tmp_path / "run", max_steps=2)
    assert log.read_text() == before


def test_a_log_that_cannot_be_written_does_not_end_the_run(tmp_path, monkeypatch):
    real = open

    def full(path, *args, **options):
        if str(path).endswith("metrics.jsonl"):
            raise OSError(28, "No space left on device")
        return real(path, *args, **options)

    monkeypatch.setattr("builtins.open", full)
    monkeypatch.setattr("io.open", full)
    console = Console(soft_wrap=True)
    with console.capture() as said:
        given = {"batch_size": 2, "crop_size": 32, "max_steps": 3, "warmup_steps": 1}
        assert training.train(*resolve(given, TINY), tmp_path / "run", "cpu", console) == 0
    assert said.get().count("No space left") == 1  # one warning, not one for every line
    assert (tmp_path / "run" / "state.safetensors").exists()


def test_a_change_that_the_state_cannot_take_leaves_the_run_as_it_was(tmp_path):
    run(tmp_path / "run", max_steps=2)
    config = (tmp_path / "run" / "config.json").read_text()
    with pytest.raises(RunError, match="of another network, teacher or optimizer; use --out"):
        run(tmp_path / "run", "depth=2", max_steps=2, allow_changes=True)
    assert (tmp_path / "run" / "config.json").read_text() == config
    assert run(tmp_path / "run", max_steps=2) == 0


@pytest.mark.parametrize("setting", [
    "batch_size=0", "grad_accum_steps=0", "max_steps=0", "eval_every=0", "save_every=0", "log_every=0",
    "seed=-1", "num_workers=-2", "num_heads=0", "nerf_width=0", "conv_width=4",
])  # fmt: skip
def test_numbers_that_cannot_be_are_named(setting):
    name, _, value = setting.partition("=")
    with pytest.raises(RunError, match=f"{name} is {value}; expected a"):
        resolve({}, [setting])


def test_changed_options_need_permission(tmp_path):
    run(tmp_path / "run", max_steps=2)
    with pytest.raises(RunError, match=r"holds another run \(lr was [0-9.]+, now 0.002\).*--allow-changes"):
        run(tmp_path / "run", max_steps=2, lr=0.002)
    assert run(tmp_path / "run", max_steps=2, lr=0.002, allow_changes=True) == 0
    assert run(tmp_path / "run", max_steps=2, lr=0.002) == 0  # the new options are the run's own from then on


def test_more_steps_continue_a_run_and_need_no_permission(tmp_path, capsys):
    run(tmp_path / "run", max_steps=2)
    assert run(tmp_path / "run", max_steps=4) == 0
    assert "max_steps was 2, now 4" in capsys.readouterr().err  # and so is the schedule of the learning rate
    assert [line["step"] for line in lines(tmp_path / "run") if "loss" in line] == [1, 2, 3, 4]
    assert FlowSeg.load(tmp_path / "run" / "last.safetensors").info.step == 4
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["max_steps"] == 4


def test_fewer_steps_need_permission_and_never_fewer_than_are_done(tmp_path):
    run(tmp_path / "run", max_steps=2)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(RunError, match="max_steps was 2, now 1"):
        run(tmp_path / "run", max_steps=1)
    with pytest.raises(RunError, match=r"is at step 2; .*--max-steps") as error:
        run(tmp_path / "run", max_steps=1, allow_changes=True)
    assert len(str(error.value).splitlines()) == 1
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


@pytest.mark.parametrize(("before", "after", "name"), [
    ('classes = ["left", "right"]', 'classes = ["right", "left"]', "classes"),
    ("ids = [0, 7]", "ids = [7, 0]", "ids"),
    ("ignore = [255]", "ignore = [255, 9]", "ignore"),
])  # fmt: skip
def test_labels_that_were_changed_are_refused_by_name(tmp_path, before, after, name):
    """A run whose classes change their meaning halfway learns nonsense without any error."""
    toml = data_folder(tmp_path / "data") / "dataset.toml"
    run(tmp_path / "run", dataset=str(tmp_path / "data"), max_steps=1)
    toml.write_text(TABLE.replace(before, after))
    with pytest.raises(RunError, match=f"{name} was .*, now "):
        run(tmp_path / "run", dataset=str(tmp_path / "data"), max_steps=1)


def test_a_run_and_its_weights_find_their_data_from_any_folder(tmp_path, monkeypatch, capsys):
    data_folder(tmp_path / "here/data")
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run(tmp_path / "run", dataset="data", max_steps=1)
    monkeypatch.chdir(tmp_path / "there")
    run(tmp_path / "run", dataset="../here/data", max_steps=2)
    assert "dataset was" not in capsys.readouterr().err
    info = FlowSeg.load(tmp_path / "run/last.safetensors").info
    assert info.dataset == str(tmp_path / "here/data") and info.root == ""
    assert len(runs.open_dataset_of(info, None, "validation", None)) == 1

    # The same files in another place are said, and more or other files as well.
    (tmp_path / "here/data").rename(tmp_path / "moved")
    with pytest.raises(DataError, match=r"here/data, .* not there .*--dataset DIR"):
        runs.open_dataset_of(info, None, "validation", None)
    assert len(runs.open_dataset_of(info, "../moved", "validation", None)) == 1
    run(tmp_path / "run", dataset="../moved", max_steps=3)
    assert f"dataset was '{tmp_path}/here/data', now '{tmp_path}/moved'" in capsys.readouterr().err
    for kind in ("images", "annotations"):
        Image.new("L", (32, 32)).save(tmp_path / "moved" / kind / "training/1.png")
    run(tmp_path / "run", dataset="../moved", max_steps=4)
    said = capsys.readouterr().err
    assert (
        "training files was '1 images" in said and "now '2 images" in said and "validation files" not in said
    )
    data_folder(tmp_path / "here/other")
    with pytest.raises(
        RunError, match=r"another run .dataset was .*/moved', now .*here/other'; training files"
    ):
        run(tmp_path / "run", dataset="../here/other", max_steps=4)


def test_a_named_data_set_is_found_below_the_root_of_then_or_of_today(tmp_path, monkeypatch):
    """As --root, as a relative one, and as $FLOWSEG_DATA, which may be another one later."""
    data_folder(tmp_path / "a/pets")
    monkeypatch.chdir(tmp_path)
    run(tmp_path / "one", dataset="pets", root="a", max_steps=1)
    monkeypatch.setenv("FLOWSEG_DATA", "a")
    run(tmp_path / "two", dataset="pets", max_steps=1)
    monkeypatch.setenv("FLOWSEG_DATA", "nowhere")
    for name in ("one", "two"):
        info = FlowSeg.load(tmp_path / name / "last.safetensors").info
        assert (info.dataset, info.root) == ("pets", str(tmp_path / "a"))
        for given in (None, "pets"):
            assert runs.open_dataset_of(info, given, "training", None).root == tmp_path / "a/pets"
    (tmp_path / "a").rename(tmp_path / "b")
    with pytest.raises(DataError, match=r"a/pets, .*--dataset DIR"):
        runs.open_dataset_of(info, None, "training", None)
    assert len(runs.open_dataset_of(info, None, "training", Path("b"))) == 1
    monkeypatch.setenv("FLOWSEG_DATA", "b")
    assert len(runs.open_dataset_of(info, None, "training", None)) == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with a name")
@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "state.safetensors"])
def test_a_pipe_in_a_run_directory_is_named_and_never_opened(tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("{}")
    (tmp_path / "run" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "run" / name)
    with pytest.raises(RunError, match=f"{name} is no regular file.*--out"):
        runs.check(tmp_path / "run", {"labels": {}}, allow_changes=False)


@pytest.mark.parametrize(
    "name", [".config.json.part", ".metrics.jsonl.part", ".state.safetensors.part", ".lock"]
)
def test_a_link_in_a_run_directory_is_never_followed(tmp_path, name):
    victim = tmp_path / "precious"
    victim.write_bytes(b"precious")
    run(tmp_path / "run", max_steps=1)
    (tmp_path / "run" / name).unlink(missing_ok=True)
    (tmp_path / "run" / name).symlink_to(victim)
    with suppress(OSError):  # a link at the name of the lock is refused, the others are replaced
        run(tmp_path / "run", max_steps=2)
    assert victim.read_bytes() == b"precious"


# ---------------------------------------------------------------- one process for each directory

HOLD = """
import sys
from contextlib import suppress
from pathlib import Path
from flowseg_tools.runs import locked

with locked(Path(sys.argv[1])):
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path / "run"."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_ends_at_once_and_names_the_first(tmp_path, holder):
    with pytest.raises(RunError, match=rf"run .*process {holder.pid}\b.*--out") as error:
        run(tmp_path / "run", max_steps=1)
    assert len(str(error.value).splitlines()) == 1
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / ".lock").exists()
    assert run(tmp_path / "run", max_steps=1) == 0


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_share_without_locks_is_said_and_training_goes_on(tmp_path, monkeypatch, capsys, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(ShapesDataset, "__len__", lambda self: 1)
    assert run(tmp_path / "run", max_steps=1) == 0
    said = capsys.readouterr().err.splitlines()
    assert len([line for line in said if "cannot be locked" in line]) == 1


def test_the_lock_is_given_back(tmp_path):
    run(tmp_path / "run", max_steps=1)
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True)
    assert done.stdout == b"ready\n", done.stderr


# ---------------------------------------------------------------- classes without labels


def two_classes(root):
    """A folder of two training pairs, one wholly "left", the other wholly "right"; "third" has no label."""
    data_folder(root)
    for kind in ("images", "annotations"):
        Image.new("L", (32, 32), 7).save(root / kind / "training" / "1.png")
    table = TABLE.replace('"right"]', '"right", "third"]').replace("7]", "7, 9]")
    (root / "dataset.toml").write_text(table)
    return root


def unseen(folder):
    return FlowSeg.load(folder / "last.safetensors").info.unseen


def test_a_class_that_no_label_has_is_never_answered(tmp_path, capsys):
    given = {"dataset": str(two_classes(tmp_path / "data")), "batch_size": 1}
    run(tmp_path / "run", max_steps=1, **given)
    (other,) = set(unseen(tmp_path / "run")) - {"third"}  # one step shows one class
    assert other in ("left", "right")
    run(tmp_path / "run", max_steps=2, **given)
    assert unseen(tmp_path / "run") == ("third",)
    run(tmp_path / "run", max_steps=3, **given)  # the labels of both earlier steps are remembered
    assert unseen(tmp_path / "run") == ("third",)
    model = FlowSeg.load(tmp_path / "run" / "best.safetensors")
    metrics, _ = training.evaluate(model, ShapesDataset("validation"), 32, 1)
    assert not metrics.confusion[:, 2].any()
    flowseg.conclude(tmp_path / "run", 0)
    assert "third" in capsys.readouterr().out

    # A run that starts from these weights can answer what they can, although its own step shows less.
    run(tmp_path / "next", max_steps=1, init=str(tmp_path / "run" / "last.safetensors"), **given)
    assert unseen(tmp_path / "next") == ("third",)


def test_a_state_that_does_not_know_its_labels_excludes_none(tmp_path):
    given = {"dataset": str(two_classes(tmp_path / "data"))}
    run(tmp_path / "run", max_steps=1, **given)
    state = tmp_path / "run" / "state.safetensors"
    with safe_open(state, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(state)
    del tensors["seen.labels"]
    save_file(tensors, state, metadata)
    run(tmp_path / "run", max_steps=2, **given)
    assert unseen(tmp_path / "run") == ()


@pytest.mark.slow
def test_processes_tell_each_other_which_labels_they_saw(tmp_path):
    data = two_classes(tmp_path / "data")
    settings = (f"dataset={data}", "batch_size=2", "max_steps=1")  # one image, of one class, each
    done = torchrun(tmp_path / "run", *settings, script=ALONE)
    assert done.returncode == 0, done.stderr
    assert unseen(tmp_path / "run") == ("third",)


# ---------------------------------------------------------------- processes

ALONE = """
import sys
from pathlib import Path
from tests import test_runs

test_runs.run(Path(sys.argv[1]), *sys.argv[2].split())
"""

SPREAD = """
import json, sys
from pathlib import Path
from rich.console import Console
import train as training
from data import ShapesDataset
from flowseg_tools import runs
from flowseg_tools.dinov2 import DinoFlowSeg
from tests import test_runs

ShapesDataset.__len__ = lambda self: test_runs.SCENES if self.split != "training" else 1_000_000
folder, settings = Path(sys.argv[1]), sys.argv[2].split()
real = runs.dist.destroy_process_group

def score_first():  # the weights of the other run, while the processes still know each other
    model = DinoFlowSeg.load(folder.parent / "one" / "last.safetensors")
    metrics, _ = training.evaluate(model, ShapesDataset("validation"), 32, 2)
    if runs.process()[0] == 0:
        (folder / "confusion.json").write_text(json.dumps(metrics.confusion.tolist()))
    real()

runs.dist.destroy_process_group = score_first
test_runs.run(folder, *settings)

# No thread of the group outlives it: it could abort the process when Python ends.
left = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
assert not any("gloo" in name for name in left), left
"""


def torchrun(folder, *settings, count=2, script=SPREAD):
    path = folder.parent / "spread.py"
    path.write_text(script)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count)
    return python(*launch, path, folder, " ".join(settings))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [(), ("grad_accum_steps=2", "encoding=kronecker", "encoding_dims=3", "later_share=1")],
    ids=str,
)
def test_two_processes_are_one(tmp_path, monkeypatch, settings):
    run(tmp_path / "one", *settings, "eval_every=2")
    done = torchrun(tmp_path / "two", *settings, "eval_every=2")
    assert done.returncode == 0, done.stderr
    one = load_file(tmp_path / "one" / "state.safetensors")
    two = load_file(tmp_path / "two" / "state.safetensors")
    assert one.keys() == two.keys()
    for key in one:
        assert torch.allclose(one[key], two[key], rtol=1e-3, atol=2e-5), key
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):  # written by one process
        keys = {"loss", "fm_error", "phi", "grad_phi", "grad_norm"} & a.keys()
        assert [a[key] for key in keys] == pytest.approx([b[key] for key in keys], rel=1e-3)
    model = FlowSeg.load(tmp_path / "one" / "last.safetensors")
    confusion = training.evaluate(model, ShapesDataset("validation"), 32, 2)[0].confusion
    assert json.loads((tmp_path / "two" / "confusion.json").read_text()) == confusion.tolist()


def test_every_image_of_a_batch_has_its_own_noise_wherever_it_is(monkeypatch):
    config, _ = resolve({"batch_size": 8})
    drawn = [g.initial_seed() for g in training.noise_generators(config, 5)]
    assert len(set(drawn)) == 8
    assert not set(drawn) & {g.initial_seed() for g in training.noise_generators(config, 6)}
    shares = []
    for rank in range(4):
        monkeypatch.setattr(training, "process", lambda rank=rank: (rank, 4))
        shares += [g.initial_seed() for g in training.noise_generators(config, 5)]
    assert shares == drawn


def test_processes_share_every_batch_without_overlap(monkeypatch):
    config, _ = resolve({"batch_size": 8, "max_steps": 3, "crop_size": 32})
    data = ShapesDataset("training")
    whole = [indices.tolist() for *_, indices in training.batches(data, config, 1)]
    monkeypatch.setattr(training, "process", lambda: (0, 2))
    first = [indices.tolist() for *_, indices in training.batches(data, config, 1)]
    monkeypatch.setattr(training, "process", lambda: (1, 2))
    second = [indices.tolist() for *_, indices in training.batches(data, config, 1)]
    assert [a + b for a, b in zip(first, second, strict=True)] == whole
    assert len(whole) == 2


def test_a_batch_that_does_not_divide_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(RunError, match="batch_size is 4; expected a multiple of 6"):
        run(tmp_path / "run", "grad_accum_steps=2")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "text"), [("WORLD_SIZE", "0"), ("WORLD_SIZE", "abc"), ("WORLD_SIZE", ""), ("RANK", "x")]
)
def test_numbers_that_torchrun_never_sets_are_one_line(monkeypatch, name, text):
    for variable, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv(name, text)
    with pytest.raises(RunError, match=rf"{name} is '{text}'; expected a number"):
        runs.process_group(torch.device("cpu")).__enter__()


def test_processes_without_a_meeting_point_are_one_line(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(RunError, match=r"without \$MASTER_ADDR; use torchrun"):
        runs.process_group(torch.device("cpu")).__enter__()


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
sys.argv = ["flowseg", "train", "--batch-size", "4", "--crop-size", "32", "--out", sys.argv[1]]
sys.argv += [part for setting in {TINY} for part in ("--set", setting)]
flowseg.main()
"""
    done = torchrun(tmp_path / "run", script=script)
    assert done.returncode != 0
    assert "error: process 1: ValueError: this one is broken" in done.stderr


@pytest.mark.parametrize(("error", "hint"), [
    (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), "lower --batch-size or --crop-size"),
    (RuntimeError("DataLoader timed out after 300 seconds"), "check the storage, or try --workers 0"),
    (OSError(24, "Too many open files"), "ulimit -n"),
    (OSError(28, "No space left on device"), "check the path and the space left there"),
    (KeyError("mu"), "flowseg --debug"),
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
    assert all(np.isfinite(line["loss"]) for line in lines(tmp_path / "run") if "loss" in line)


def test_activation_checkpointing_changes_nothing(tmp_path):
    for value in ("false", "true"):
        run(tmp_path / value, f"activation_checkpointing={value}")
    assert same(tmp_path / "false", tmp_path / "true")


def test_deterministic_is_switched_on_and_off(tmp_path):
    run(tmp_path / "on", deterministic=True, max_steps=1)
    assert torch.are_deterministic_algorithms_enabled()
    run(tmp_path / "off", max_steps=1)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler here")
def test_compiled_training_is_eager_training(tmp_path):
    """To rounding, and with the same names of the weights."""
    for name, compile in (("eager", "false"), ("compiled", "true")):
        run(tmp_path / name, compile=compile, max_steps=2)
    eager = load_file(tmp_path / "eager" / "state.safetensors")
    compiled = load_file(tmp_path / "compiled" / "state.safetensors")
    assert eager.keys() == compiled.keys()

    # An update is large also where a gradient is all rounding, so weights may differ: the losses tell.
    logs = []
    for name in ("eager", "compiled"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        logs.append([json.loads(line)["loss"] for line in lines if "loss" in line])
    assert len(logs[0]) == 2
    assert logs[1][0] == pytest.approx(logs[0][0], rel=1e-4)
    assert logs[1] == pytest.approx(logs[0], rel=1e-2)
    FlowSeg.load(tmp_path / "compiled" / "last.safetensors")
