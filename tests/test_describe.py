"""describe.py and records.py: what is said of runs and machines; export.py: programs for other runtimes."""

import errno
import fcntl
import json
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from flowseg_tools import describe, records
from flowseg_tools.export import check_output, export, parse_size
from flowseg_tools.runs import RunError
from flowseg_tools.terminal import in_words, print_facts
from model import CheckpointInfo, ModelConfig
from tests.conftest import untrained


@pytest.fixture
def folder(tmp_path):
    """A run of eight steps whose state was saved at step 4, after a validation."""
    folder = tmp_path / "a run"
    folder.mkdir()
    config = {"train": {"max_steps": 8, "dataset": "shapes", "preset": "tiny"}, "model": {}, "labels": {}}
    (folder / "config.json").write_text(json.dumps(config))
    lines = [
        {"step": 2, "mIoU": 0.25},
        {"step": 4, "mIoU": 0.5},
        {"step": 6, "loss": 3},
        {"step": 4, "mIoU": None},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"ste')
    save_at(folder, 4)
    return folder


def save_at(folder, step):
    save_file({"weight": torch.zeros(1)}, folder / "state.safetensors", {"at": json.dumps([step, step, 0.5])})


def work(folder, step, error=None, validated=0):
    """What a train.Run writes into history.txt."""
    run = SimpleNamespace(
        folder=folder, rank=0, step=0, validated=validated, config=SimpleNamespace(max_steps=8)
    )
    with records.remembered(run):
        run.step = step
        if error:
            raise error


def test_a_run_says_how_far_it_is_its_best_score_and_how_it_goes_on(folder):
    work(folder, 4)
    facts = describe.run(folder)
    assert (facts["step"], facts["max_steps"], facts["best_mIoU"], facts["best_step"]) == (4, 8, 0.5, 4)
    assert facts["state"] == "stopped by a signal at step 4"
    command = shlex.split(facts["continue"])
    assert command == ["flowseg", "train", "--config", str(folder / "config.json"), "-o", str(folder)]


def test_a_run_that_failed_was_killed_or_is_finished_says_so(folder):
    with pytest.raises(RunError):
        work(folder, 5, RunError("no finite\ngradient"))
    assert describe.run(folder)["state"] == "failed at step 5: RunError no finite gradient"
    (folder / "history.txt").write_text("2026-11-27 03:53:39 began at step 0: flowseg train\n")
    assert "killed" in describe.run(folder)["state"]
    (folder / "history.txt").unlink()
    assert "killed" in describe.run(folder)["state"]
    save_at(folder, 8)
    facts = describe.run(folder)
    assert facts["state"] == "finished" and facts["continue"].endswith("--max-steps 16")


def test_a_link_at_the_name_of_the_history_is_not_followed(folder, tmp_path):
    (tmp_path / "precious").write_text("precious")
    (folder / "history.txt").symlink_to(tmp_path / "precious")
    work(folder, 4)
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_run_that_another_process_works_on_is_running(folder):
    (folder / ".lock").touch()
    code = (
        "import fcntl, sys; f = open(sys.argv[1], 'r+'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True)"
    )
    command = [sys.executable, "-c", f"{code}; input()", folder / ".lock"]
    assert describe.run(folder)["state"] != "running"
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        facts = describe.run(folder)
        process.communicate(b"\n")
    assert facts["state"] == "running" and facts["step"] == 6
    assert describe.run(folder)["state"] != "running"


def test_a_share_without_locks_does_not_make_a_run_look_busy(folder, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    (folder / ".lock").touch()
    assert describe.run(folder)["state"] != "running"


@pytest.mark.parametrize("text", ["", "[]", '{"train": {}}', '{"train": {"max_steps": "many"}}'])
def test_a_config_that_cannot_be_read_is_named(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(RunError, match=r"config\.json cannot be read"):
        describe.run(folder)


def test_this_machine_names_data_sets_weights_and_the_newest_run(folder, tmp_path, monkeypatch):
    root = tmp_path / "root"
    for place in ("mine/images", "weights", ".ade20k.part"):
        (root / place).mkdir(parents=True)
    (root / "weights" / "w.pth").touch()
    (tmp_path / "runs").mkdir()
    folder.rename(tmp_path / "runs" / "b")
    monkeypatch.chdir(tmp_path)
    facts = describe.machine(root)
    assert (facts["data sets"], facts["weights"]) == (["mine"], ["w.pth"])
    assert facts["newest run"] == "runs/b" and facts["threads"] >= 1 and facts["torch"]


def test_facts_are_lines_that_people_read(capsys):
    assert in_words(list(range(20))).endswith("11 and 8 more")
    assert in_words({"a": [], "b": None, "c": 0.123456}) == "a none, b none, c 0.1235"
    print_facts(Console(soft_wrap=True), {"best_mIoU": 0.5, "gpus": [], "aAcc": None})
    assert capsys.readouterr().out.splitlines() == ["best mIoU: 50.0%", "gpus: none", "aAcc: none"]


# ---------------------------------------------------------------- export


def test_a_size_is_a_side_or_two():
    assert parse_size("96") == (96, 96) and parse_size("512x384") == (512, 384)
    for text in ("", "x", "96x", "0", "1x2x3", "-96", "9e9", "4000000"):
        with pytest.raises(RunError, match="--size"):
            parse_size(text)


def test_a_place_for_a_program_is_looked_at_before_the_work(tmp_path):
    (tmp_path / "there.pt2").touch()
    for name, word in (("a.onx", "expected"), ("there.pt2", "--force"), ("there.pt2/a.pt2", "cannot write")):
        with pytest.raises(RunError, match=word):
            check_output(tmp_path / name, force=False)
    check_output(tmp_path / "there.pt2", force=True)


@pytest.fixture
def small():
    return untrained(
        ModelConfig(3, encoding_dims=5, hidden_size=16, depth=1, num_heads=2, nerf_width=8, conv_width=8)
    )


@pytest.mark.slow
def test_a_program_gives_the_ids_of_the_model(small, tmp_path):
    small.info = CheckpointInfo([*"abc"], [0, 1, 2], unseen=["b"])
    file = tmp_path / "small.pt2"
    assert export(small, file, 40, 24, 2) > 0.999
    photo = torch.randint(256, (24, 40, 3), dtype=torch.uint8)
    image = photo.movedim(-1, 0)[None] / 127.5 - 1
    ids = torch.export.load(file).module()(photo)
    assert 1 not in ids
    assert ids.dtype == torch.uint8 and (ids == small.segment(image, 2)[0]).float().mean() > 0.999
    assert [path.name for path in tmp_path.iterdir()] == ["small.pt2"]


@pytest.mark.slow
def test_a_program_in_onnx_gives_the_ids_of_the_model(small, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    file = tmp_path / "small.onnx"
    check_output(file, force=False)
    assert export(small, file, 40, 24, 2) > 0.999
    photo = torch.randint(256, (24, 40, 3), dtype=torch.uint8)
    session = runtime.InferenceSession(file)
    ids = session.run(None, {session.get_inputs()[0].name: photo.numpy()})[0]
    image = photo.movedim(-1, 0)[None] / 127.5 - 1
    assert (torch.from_numpy(ids) == small.segment(image, 2)[0]).float().mean() > 0.999
    assert [path.name for path in tmp_path.iterdir()] == ["small.onnx"]


@pytest.mark.slow
def test_a_program_that_differs_from_the_model_is_not_kept(small, tmp_path, monkeypatch):
    load = torch.export.load

    class Wrong:
        def __init__(self, file):
            self.program = load(file)

        def module(self):
            return lambda photo: 1 - self.program.module()(photo)

    monkeypatch.setattr(torch.export, "load", Wrong)
    with pytest.raises(RunError, match="otherwise"):
        export(small, tmp_path / "small.pt2", 16, 16, 1)
    assert list(tmp_path.iterdir()) == []
