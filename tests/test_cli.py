"""The command line as a user meets it: each command, its output streams, its errors and exit codes."""

import io
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import typer
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from flowseg import app, main
from flowseg_tools import options
from flowseg_tools.runs import RunError
from flowseg_tools.settings import RECIPES, TABLES_DIR, given_fields
from model import FlowSeg, ModelConfig
from train import TrainConfig, resolve

ROOT = Path(__file__).parent.parent
SETTINGS = ("hidden_size=16", "depth=1", "num_heads=2", "nerf_width=8", "conv_width=8", "steps=2")
QUICK = ["--crop-size", "32", "--batch-size", "2"]
for setting in SETTINGS:
    QUICK += ["--set", setting]


def flowseg(*arguments, cwd):
    """Run the command in this process, as `main` would from the shell, in the folder cwd."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        patch.setenv("FLOWSEG_DATA", str(cwd / "no-data"))
        patch.setenv("COLUMNS", os.environ.get("COLUMNS", "80"))  # main changes it: put back afterwards
        patch.setattr(sys, "argv", ["flowseg", *map(str, arguments)])
        patch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit) as stop:
            main()
    texts = [stream.buffer.getvalue().decode() for stream in (out, err)]
    return SimpleNamespace(returncode=stop.value.code, stdout=texts[0], stderr=texts[1])


def command(*arguments, launch=(str(ROOT / "flowseg.py"),)):
    """The command line of a process of its own."""
    return [sys.executable, *map(str, launch), *map(str, arguments)]


def environment(**changes):
    return {**os.environ, "OMP_NUM_THREADS": "1", **changes}


def fails(result, code, *words):
    """One line on stderr, no traceback, nothing on stdout, the exit code."""
    message = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == code, result.stderr
    assert len(message) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in message[0]


def make_folder(root, count=3, size=(24, 20)):
    """A folder data set of grey photos, no two alike, with two classes, left and right."""
    for number, split in enumerate(("training", "validation", "test")):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            mask = np.zeros(size[::-1], np.uint8)
            mask[:, size[0] // 2 :] = 7
            mask[0] = 255
            photo = mask // 7 * 200 + 10 * number + i
            Image.fromarray(photo.astype(np.uint8)).convert("RGB").save(root / "images" / split / f"{i}.png")
            Image.fromarray(mask).save(root / "annotations" / split / f"{i}.png")
    (root / "dataset.toml").write_text(
        'name = "halves"\nclasses = ["left", "right"]\nids = [0, 7]\nignore = [255]\n'
    )
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a two-step run on a folder data set under runs/, and what `train` printed."""
    cwd = tmp_path_factory.mktemp("project")
    make_folder(cwd / "halves")
    result = flowseg("train", "--dataset", "halves", "--max-steps", 2, *QUICK, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return cwd, result


# ---------------------------------------------------------------- help


def test_help_names_every_command_and_does_not_import_torch(tmp_path):
    result = flowseg("--help", cwd=tmp_path)
    assert result.returncode == 0
    assert result.stderr == ""
    for name in ("train", "eval", "segment", "info", "download"):
        assert name in result.stdout
    code = "import sys, flowseg; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_no_argument_and_h_are_help_too(tmp_path):
    expected = flowseg("--help", cwd=tmp_path).stdout
    for arguments in ((), ("-h",)):
        result = flowseg(*arguments, cwd=tmp_path)
        assert result.returncode == 0
        assert result.stdout.split() == expected.split()


def test_version(tmp_path):
    assert flowseg("--version", cwd=tmp_path).stdout.startswith("flowseg")


def options_of(name):
    """What the help says about every option and argument of a command, by its name in Python."""
    context = typer.Context(typer.main.get_command(app).commands[name])
    texts = {}
    for parameter in context.command.params:
        usage, text = parameter.get_help_record(context) or ("", "")
        texts[parameter.name] = f"{usage} {text}".replace(",", "")
    return texts


COMMANDS = typer.main.get_command(app).commands


def parse(line):
    """What a command line means; UsageError if it means nothing. Nothing is run."""
    name, *arguments = shlex.split(line)[1:]
    return COMMANDS[name].make_context(name, arguments).params


def test_every_option_has_a_help_text_and_stands_in_the_readme_or_the_docs():
    prose = "".join(path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md")))
    for name, command in COMMANDS.items():
        for option, text in options_of(name).items():
            assert text, f"{name} {option}"
        for parameter in command.params:
            assert parameter.param_type_name == "argument" or parameter.opts[0] in prose, parameter.opts


def test_the_fields_that_the_help_reads_are_those_of_the_configurations():
    fields_of = {field.name: field.default for field in (*fields(TrainConfig), *fields(ModelConfig))}
    del fields_of["num_classes"]  # the data set decides
    written = options.written_fields()
    assert written.keys() == fields_of.keys()
    for name, (text, _) in written.items():
        kind = type(fields_of[name])
        assert text == str(fields_of[name]) if kind in (str, bool) else kind(text) == fields_of[name], name


def test_the_help_shows_the_defaults_of_the_configurations():
    checked = set()
    for option, text in options_of("train").items():
        default = options.written_fields().get(option, ("",))[0]
        if default not in ("", "False", "auto", "-1"):
            assert f"default: {default.replace('_', '')}" in text, option
            checked.add(option)
    assert {"max_steps", "batch_size", "lr", "grad_accum_steps", "encoding_dims", "eps", "dataset"} <= checked


def test_set_help_lists_every_field_with_its_default(tmp_path):
    shown = flowseg("train", "--set", "help", cwd=tmp_path).stdout
    for name, (default, comment) in options.written_fields().items():
        assert f"{name}={default} " in shown.replace("\n", " \n") and comment in shown


def examples():
    """Every command line of ours in the help, the README and the docs."""
    lines = [line for command in options.EXAMPLES.values() for line in command]
    for path in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        for block in path.read_text().split("```")[1::2]:
            for line in block.replace("\\\n", " ").splitlines():
                parts = [part.strip() for part in line.partition("  #")[0].split("&&")]
                for part in parts:
                    begin = re.search(r"(?:^|-m |\| |=8 )(flowseg [a-z].*)", part)
                    lines += [begin[1]] if begin else []
    return sorted(set(lines))


@pytest.mark.parametrize("line", examples())
def test_every_example_is_understood(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parse(line)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("columns", ["80", "120"])
def test_the_help_cuts_no_name_at_the_usual_widths(name, columns):
    shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": columns})
    assert "…" not in shown.stdout
    for parameter in COMMANDS[name].params:
        if parameter.param_type_name == "option":
            assert all(option in shown.stdout for option in parameter.opts)


@pytest.mark.parametrize(("line", "words"), [
    ("train --lr fast", ["--lr", "'fast'", "number"]), ("train --max-steps 0", ["--max-steps", "'0'", "1"]),
    ("eval --mode tile", ["--mode", "tile", "slide"]), ("train --font no", ["--font", "no", ".otf"]),
    ("train --config no", ["--config no", "config.json"]), ("train --set dept=1", ["dept=1", "--set help"]),
    ("eval -o scores", ["--report"]),
])  # fmt: skip
def test_a_value_that_is_wrong_is_said_with_what_is_expected(tmp_path, line, words):
    fails(flowseg(*line.split(), cwd=tmp_path), 2, *words)


def test_every_command_has_two_examples_in_its_help():
    assert options.EXAMPLES.keys() == COMMANDS.keys()
    for name, lines in options.EXAMPLES.items():
        assert len(lines) == 2 and all(
            parse(line) is not None and f"flowseg {name}" in line for line in lines
        )
        assert all(line in COMMANDS[name].epilog for line in lines)


def test_the_help_names_every_recipe_and_download_every_name(tmp_path):
    downloads = tomllib.loads((TABLES_DIR / "downloads.toml").read_text())
    assert all(name in options_of("train")["recipe"] for name in RECIPES)
    table = flowseg("download", cwd=tmp_path).stdout
    assert all(name in table for name in downloads)


# ---------------------------------------------------------------- settings of train


def resolved(line):
    """The configurations that a train command asks for."""
    parameters = parse(line)
    settings = parameters.get("settings") or []
    return resolve(given_fields(parameters, parameters["config_file"]), settings)


def test_options_set_the_fields_that_they_name():
    line = (
        "flowseg train --lr 1e-3 --accumulate 2 --eval-every 7 --warmup-steps 0 --optimizer adamw --workers 0"
    )
    line += " --activation-checkpointing --objective vanilla --encoding kronecker --dims 3 --tau 1 --eps 0.5"
    config, network = resolved(line)
    assert (config.lr, config.grad_accum_steps, config.eval_every, config.warmup_steps) == (1e-3, 2, 7, 0)
    assert (config.optimizer, config.activation_checkpointing, config.num_workers) == ("adamw", True, 0)
    assert (network.objective, network.encoding, network.encoding_dims) == ("vanilla", "kronecker", 3)
    assert (network.tau, network.eps) == (1, 0.5)


def test_a_zero_is_a_value_and_wins_over_a_recipe():
    recipe = resolved("flowseg train --recipe ade20k-256")[0]
    given = resolved("flowseg train --recipe ade20k-256 --warmup-steps 0 --workers 0")[0]
    assert (recipe.warmup_steps > 0, recipe.num_workers) == (True, -1)
    assert (given.warmup_steps, given.num_workers) == (0, 0)


def test_the_settings_of_a_run_are_taken_from_its_config_and_options_win(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = resolved("flowseg train --preset small --lr 1e-3 --seed 5 --set depth=2")
    config = {"train": asdict(before[0]), "model": asdict(before[1]), "labels": {}}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    assert resolved("flowseg train --config run/config.json") == before
    after = resolved("flowseg train --config run --seed 6 --set depth=1")
    assert after == (replace(before[0], seed=6), replace(before[1], depth=1))
    for line, word in (
        ("--config run --preset tiny", "leave out --preset"),
        ("--config none.json", "none.json"),
        ("--config runs", "runs"),
    ):
        with pytest.raises(RunError, match=word):
            resolved(f"flowseg train {line}")


@pytest.mark.parametrize("text", [
    "", "[]", "{}", '{"train": 1, "model": 2}', '{"train": {}, "model": {}}',
    '{"train": {"lr": "fast"}, "model": {"num_classes": 2}}',
    '{"train": {"dataset": 7}, "model": {"num_classes": 2}}',
    '{"train": {"unknown": 7}, "model": {"num_classes": 2}}',
])  # fmt: skip
def test_a_config_that_is_none_is_one_line(tmp_path, text):
    (tmp_path / "c.json").write_text(text)
    fails(flowseg("train", "--config", "c.json", "--dry-run", cwd=tmp_path), 2)


# ---------------------------------------------------------------- commands


def test_train_ends_with_score_preview_and_next_command(trained):
    cwd, result = trained
    assert "validation mIoU" in result.stdout
    assert "preview.png" in result.stdout
    assert "flowseg segment photo.jpg -o mask.png" in result.stdout
    assert "step 2/2" in result.stderr
    assert Image.open(cwd / "runs" / "halves-tiny" / "preview.png").width > 100


def test_train_again_does_nothing_and_says_the_same(trained):
    cwd, result = trained
    again = flowseg("train", "--dataset", "halves", "--max-steps", 2, *QUICK, cwd=cwd)
    assert again.returncode == 0
    assert again.stdout == result.stdout
    assert "finished" in again.stderr and "--max-steps 4" in again.stderr


def test_quiet_leaves_stderr_empty(tmp_path):
    make_folder(tmp_path / "halves")
    result = flowseg("train", "--dataset", "halves", "--max-steps", 1, "-q", *QUICK, cwd=tmp_path)
    assert result.returncode == 0
    assert result.stderr == ""


def test_eval_takes_the_newest_run_and_writes_a_report(trained):
    cwd, _ = trained
    result = flowseg("eval", "--split", "test", "--steps", 3, "--report", "scores.json", cwd=cwd)
    assert result.returncode == 0, result.stderr
    assert "runs/halves-tiny/best.safetensors (halves, step 2, validation mIoU" in result.stderr
    scores = json.loads((cwd / "scores.json").read_text())
    assert [row["name"] for row in scores["classes"]] == ["left", "right"]
    assert [row["pixels"] for row in scores["classes"]] == [3 * 12 * 19, 3 * 12 * 19]
    assert scores["protocol"]["steps"] == 3
    assert scores["protocol"]["split"] == "test"
    assert {"mIoU", "aAcc", "mAcc"} <= scores.keys()
    for word in ("left", "right", f"mIoU {scores['mIoU']:.2%}", "protocol:"):
        assert word in result.stdout


def test_eval_prints_the_same_as_json(trained):
    cwd, _ = trained
    result = flowseg("eval", "--json", "--report", "same.json", cwd=cwd)
    facts = json.loads(result.stdout)
    assert facts == json.loads((cwd / "same.json").read_text())
    assert facts.keys() == {"mIoU", "aAcc", "mAcc", "classes", "confusion", "protocol", "worst"}
    assert all(row.keys() == {"name", "IoU", "Acc", "pixels"} for row in facts["classes"])
    counts = np.array(facts["confusion"])
    assert counts.shape == (2, 2)
    assert counts.sum(1).tolist() == [row["pixels"] for row in facts["classes"]]
    assert counts.trace() / counts.sum() == pytest.approx(facts["aAcc"])
    for k, row in enumerate(facts["classes"]):
        assert counts[k, k] / counts[k].sum() == pytest.approx(row["Acc"])


def test_eval_options_are_in_the_protocol(trained):
    cwd, _ = trained
    options = ["--limit", 2, "--flip", "--mode", "slide", "--short-side", 24, "--report", "part.json"]
    result = flowseg("eval", *options, cwd=cwd)
    assert result.returncode == 0, result.stderr
    assert "images 2, evenly_spaced_of 3, mode slide, flip True" in result.stdout
    facts = json.loads((cwd / "part.json").read_text())
    assert facts["protocol"]["short_side"] == 24
    assert [row["pixels"] for row in facts["classes"]] == [456, 456]


@pytest.mark.parametrize("where", [
    ("runs/halves-tiny",), ("runs/halves-tiny/best.safetensors",), ("-c", "runs/halves-tiny"),
    ("--checkpoint", "runs/halves-tiny/best.safetensors"),
])  # fmt: skip
def test_weights_are_a_file_or_a_run_named_by_place_or_option(trained, where):
    cwd, _ = trained
    facts = json.loads(flowseg("eval", *where, "--json", cwd=cwd).stdout)
    best = FlowSeg.load(cwd / "runs" / "halves-tiny" / "best.safetensors")
    assert facts["protocol"] == best.info.protocol
    assert facts["mIoU"] == best.info.mIoU


def test_a_missing_split_is_named_by_eval(trained):
    cwd, _ = trained
    toml = cwd / "halves" / "dataset.toml"
    before = toml.read_text()
    toml.write_text(before + 'splits = ["training", "validation"]\n')
    try:
        fails(flowseg("eval", "--split", "test", cwd=cwd), 3, "halves has no test split")
        facts = json.loads(flowseg("info", "halves", "--json", cwd=cwd).stdout)
        assert list(facts["splits"]) == ["training", "validation"]
        assert facts["problems"] == []
    finally:
        toml.write_text(before)


def test_segment_one_photo(trained):
    cwd, _ = trained
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 53, 3), np.uint8))
    photo.save(cwd / "photo.jpg")
    before = (cwd / "photo.jpg").read_bytes()
    options = ["--overlay", "--confidence", "--trajectory", "--steps", 2]
    result = flowseg("segment", "photo.jpg", "-o", "mask.png", *options, cwd=cwd)
    assert result.returncode == 0, result.stderr
    mask = Image.open(cwd / "mask.png")
    assert (mask.mode, mask.size) == ("P", (53, 37))
    assert set(np.unique(mask)) <= {0, 1}
    confidence = Image.open(cwd / "mask-confidence.png")
    assert (confidence.mode, confidence.size) == ("L", (53, 37))
    assert np.asarray(confidence).min() >= 127
    assert Image.open(cwd / "mask-overlay.png").width >= 53
    assert Image.open(cwd / "mask-trajectory.png").width > 3 * 53
    assert (cwd / "photo.jpg").read_bytes() == before


def test_segment_a_folder_keeps_names_and_goes_on_after_a_bad_file(trained):
    cwd, _ = trained
    photos = cwd / "photos"
    (photos / "sub").mkdir(parents=True)
    for name in ("a.jpg", "sub/b.png"):
        Image.new("RGB", (20, 30), "green").save(photos / name)
    (photos / "broken.jpg").write_bytes(b"not a photo")
    result = flowseg("segment", "photos", "-o", "masks", cwd=cwd)
    fails(result, 1, "broken.jpg")
    written = sorted(str(path.relative_to(cwd / "masks")) for path in (cwd / "masks").rglob("*.png"))
    assert written == ["a.png", "sub/b_png.png"]


def test_info_on_machine_data_and_checkpoint(trained):
    cwd, _ = trained
    machine = json.loads(flowseg("info", "--json", cwd=cwd).stdout)
    assert {
        "python",
        "torch",
        "commit",
        "device",
        "threads",
        "gpus",
        "data root",
        "data sets",
    } <= machine.keys()
    assert machine["newest run"] == "runs/halves-tiny"
    run = json.loads(flowseg("info", "runs/halves-tiny", "--json", cwd=cwd).stdout)
    assert (run["step"], run["max_steps"], run["state"], run["best_step"]) == (2, 2, "finished", 2)
    assert "--max-steps 4" in run["continue"]
    data = flowseg("info", "halves", "--json", cwd=cwd)
    facts = json.loads(data.stdout)
    assert data.returncode == 0
    assert facts["problems"] == []
    assert facts["classes"][1] == {"id": 1, "raw": 7, "name": "right"}
    assert facts["splits"]["training"]["pixels"] == [3 * 12 * 19, 3 * 12 * 19]
    assert "right" in flowseg("info", "halves", cwd=cwd).stdout
    weights = json.loads(flowseg("info", "runs/halves-tiny/last.safetensors", "--json", cwd=cwd).stdout)
    assert weights["classes"] == ["left", "right"]
    assert weights["config"]["num_classes"] == 2
    assert weights["step"] == 2


def test_info_reports_problems_with_exit_code_3(tmp_path):
    make_folder(tmp_path / "halves")
    mask = tmp_path / "halves" / "annotations" / "test" / "1.png"
    Image.new("L", (24, 20), 9).save(mask)
    result = flowseg("info", "halves", cwd=tmp_path)
    assert result.returncode == 3
    assert "problem: test:" in result.stdout
    assert "1.png" in result.stdout


def test_info_prints_the_table_of_a_named_data_set_that_is_not_there(tmp_path):
    result = flowseg("info", "ade20k", cwd=tmp_path)
    assert result.returncode == 3
    for word in ("windowpane", "149", "150", "images/training", "flowseg download ade20k"):
        assert word in result.stdout
    facts = json.loads(flowseg("info", "coco-stuff", "--json", cwd=tmp_path).stdout)
    assert facts["classes"][170] == {"id": 170, "raw": 181, "name": "wood"}
    assert list(facts["splits"]) == ["training", "validation"]
    assert len(facts["problems"]) == 1 and "also in validation" in facts["problems"][0]


def test_info_on_weights_without_classes(tmp_path):
    """A backbone cannot segment, but what it is can be said."""
    FlowSeg(ModelConfig(2, hidden_size=16, depth=1, num_heads=2)).save(tmp_path / "backbone.safetensors")
    result = flowseg("info", "backbone.safetensors", "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["config"]["hidden_size"] == 16
    assert facts["classes"] == []


def test_segment_prints_its_records_as_json(trained):
    cwd, _ = trained
    Image.new("RGB", (20, 30), "green").save(cwd / "green.jpg")
    result = flowseg("segment", "green.jpg", "-o", "green.png", "--json", cwd=cwd)
    (record,) = json.loads(result.stdout)
    assert record["state"] != "failed"


def test_train_takes_the_short_names_of_before(tmp_path):
    result = flowseg("train", "--dry-run", "--size", 64, "--batch", 4, "--workers", 2, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    facts = [line.strip() for line in result.stdout.splitlines()]
    assert {"crop_size: 64", "batch_size: 4", "num_workers: 2"} <= set(facts)


# ---------------------------------------------------------------- signals and streams


class Endless:
    """A training run without end in a process of its own, waited for until it has logged two steps."""

    def __init__(self, cwd, **streams):
        make_folder(cwd / "halves")
        options = ["--dataset", "halves", "--max-steps", 100_000, "--set", "log_every=1", *QUICK]
        self.run = cwd / "runs" / "halves-tiny"
        self.process = subprocess.Popen(
            command("train", *options), cwd=cwd, env=environment(), text=True, **streams
        )
        metrics = self.run / "metrics.jsonl"
        for _ in range(600):
            if metrics.exists() and metrics.read_text().count("\n") >= 2:
                return
            time.sleep(0.1)
        self.process.kill()
        raise AssertionError(self.process.communicate())

    def stop(self, number):
        """Exit code and stderr after the signal; the state that was saved is whole."""
        self.process.send_signal(number)
        try:
            _, stderr = self.process.communicate(timeout=60)
        finally:
            self.process.kill()
        load_file(self.run / "state.safetensors")
        return self.process.returncode, stderr


@pytest.mark.parametrize("name", [
    "SIGTERM",
    pytest.param("SIGINT", marks=pytest.mark.slow),  # test_runs.py sends these within one process
    pytest.param("SIGHUP", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_signal_saves_and_the_same_command_continues(tmp_path, name):
    number = getattr(signal, name)
    code, stderr = Endless(tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE).stop(number)
    assert code == 128 + number
    assert "the same command continues" in stderr


@pytest.mark.slow
def test_progress_that_cannot_be_written_does_not_end_training(tmp_path):
    with open("/dev/full", "w") as full:
        code, _ = Endless(tmp_path, stdout=subprocess.DEVNULL, stderr=full).stop(signal.SIGINT)
    assert code == 130


def test_a_reader_of_the_progress_that_goes_away_does_not_end_training(tmp_path):
    read, write = os.pipe()
    os.close(read)
    code, _ = Endless(tmp_path, stdout=subprocess.DEVNULL, stderr=write).stop(signal.SIGINT)
    os.close(write)
    assert code == 130


def test_results_that_cannot_be_written_are_an_error(tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run(command("--version"), stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")
    assert "stdout" in done.stderr


def test_a_reader_of_the_results_that_has_enough_is_no_error(tmp_path):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command("--help"), stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 0
    assert done.stderr == ""


@pytest.mark.parametrize("closed", ["1", "2", "0"])
def test_a_stream_that_is_closed_from_the_start_is_no_error(tmp_path, closed):
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}>&-', "sh", *command("--version")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_a_name_that_the_terminal_cannot_print_is_escaped(tmp_path):
    toml = make_folder(tmp_path / "halves") / "dataset.toml"
    toml.write_text(toml.read_text().replace('"left"', '"Straße"'), encoding="utf-8")
    ascii_only = environment(PYTHONIOENCODING="ascii")
    done = subprocess.run(command("info", "halves"), cwd=tmp_path, env=ascii_only, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert rb"Stra\xdfe" in done.stdout


# ---------------------------------------------------------------- modules of the user

IMPOSTORS = ("model.py", "data.py", "train.py", "network.py", "data/__init__.py", "flowseg_tools/__init__.py",
             "flowseg_tools/runs.py")  # fmt: skip


@pytest.fixture
def impostors(tmp_path):
    """A folder of a user whose modules have the names of ours; importing any of them is an error."""
    for name in IMPOSTORS:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"raise SystemExit('{name} of the user was imported')\n")
    make_folder(tmp_path / "halves")
    return tmp_path


def torchrun(count):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return ("-m", "torch.distributed.run", "--nproc-per-node", count, "--master-port", port, "-m", "flowseg")


SCRIPT = ("-c", "import sys; sys.path.pop(0); from flowseg import main; main()")  # what pip writes to bin/


@pytest.mark.parametrize("launch", [
    SCRIPT,
    pytest.param(("-m", "flowseg"), marks=pytest.mark.slow),
    pytest.param(1, marks=pytest.mark.slow),
    pytest.param(2, marks=pytest.mark.slow),
], ids=["script", "module", "torchrun", "torchrun with 2 processes"])  # fmt: skip
def test_modules_of_the_user_are_not_taken_for_ours(impostors, launch):
    """python -m and torchrun -m put the current folder first, and a user may have it in PYTHONPATH."""
    if isinstance(launch, int):
        launch = torchrun(launch)
    options = ["--dataset", "halves", "--max-steps", 1, "--workers", 1, "--out", "run", *QUICK]
    places = os.pathsep.join([str(impostors), str(ROOT)])
    done = subprocess.run(
        command("train", *options, launch=launch), cwd=impostors, env=environment(PYTHONPATH=places),
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "validation mIoU" in done.stdout
    assert FlowSeg.load(impostors / "run" / "last.safetensors").info.classes == ("left", "right")


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(("arguments", "code", "words"), [
    (["train", "--dataset", "shaeps"], 3, ["'shaeps' not found", "did you mean 'shapes'"]),
    (["train", "--preset", "tinny"], 2, ["--preset tinny", "did you mean 'tiny'"]),
    (["train", "--recipe", "ade20k"], 2, ["--recipe ade20k", "ade20k-256"]),
    (["train", "--objective", "reshapd"], 2, ["objective is 'reshapd'", "reshaped or vanilla"]),
    (["train", "--max-steps", "many"], 2, ["--max-steps", "integer"]),
    (["train", "--max-steps", "0"], 2, ["--max-steps", "1"]),
    (["train", "--device", "gpu"], 2, ["--device gpu", "cpu"]),
    (["train", "--datset", "shapes"], 2, ["--datset", "--dataset"]),
    (["trian"], 2, ["trian", "train"]),
    (["predict", "a.jpg"], 2, ["predict", "segment"]),
    (["val"], 2, ["val", "here it is eval"]),
    (["test"], 2, ["test", "here it is eval"]),
    (["help"], 2, ["help", "--help"]),
    (["train", "--epochs", "5"], 2, ["--epochs", "--max-steps"]),
    (["train", "my-data"], 2, ["--dataset my-data"]),
    (["train", "--epochs=5"], 2, ["--epochs", "--max-steps"]),
    (["train", "--learning_rate", "5"], 2, ["--learning_rate", "here it is --lr"]),
    (["train", "--weights", "w"], 2, ["--weights", "--init"]),
    (["eval", "--weights", "w"], 2, ["--weights", "--checkpoint"]),
    (["segment", "a.jpg", "--output", "b"], 2, ["--output", "--out"]),
    (["train", "--lr", "-1"], 2, ["lr is -1", "expected"]),
    (["export", "-o", "a.onx"], 2, ["a.onx", ".pt2"]),
    (["export", "--size", "a"], 2, ["no weights"]),
    (["train", "--set", "epss=1"], 2, ["epss", "did you mean 'eps'"]),
    (["train", "--stage", "2"], 2, ["--stage"]),
    (["eval"], 2, ["no weights", "flowseg train"]),
    (["eval", "--mode", "tiles"], 2, ["--mode", "tiles", "whole", "slide"]),
    (["eval", "--csv", "table.csv"], 2, ["--csv"]),
    (["eval", "--report", "no/scores.json"], 2, ["--report", "no/scores.json"]),
    (["eval", "--report", "scores.txt"], 2, ["--report", "scores.txt", ".json"]),
    (["eval", "missing.safetensors"], 5, ["missing.safetensors"]),
    (["info", "missing"], 3, ["'missing' not found"]),
    (["info", "ade2k"], 3, ["'ade2k' not found", "did you mean 'ade20k'"]),
    (["train", "--dataset", "ade20k"], 3, ["ade20k/images/training", "download ade20k"]),
    (["segment", "missing.jpg", "-o", "mask.png"], 1, ["missing.jpg"]),
    (["segment", "a.jpg", "-o", "mask.png", "--tiles"], 2, ["--tiles"]),
    (["segment", "a.jpg", "-o", "mask.png", "--side-by-side"], 2, ["--side-by-side"]),
    (["download", "camvid", "--url", "http://localhost/"], 2, ["--url"]),
], ids=lambda value: " ".join(value) if isinstance(value, list) else None)  # fmt: skip
def test_a_mistake_is_one_line(tmp_path, arguments, code, words):
    fails(flowseg(*arguments, cwd=tmp_path), code, *words)
    assert not (tmp_path / "runs").exists()


def test_debug_shows_the_traceback(tmp_path):
    command = [sys.executable, str(ROOT / "flowseg.py"), "--debug", "info", "missing"]
    assert "Traceback" in subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stderr


def break_annotation(root):
    (root / "annotations" / "training" / "1.png").unlink()


def break_value(root):
    for i in range(3):
        Image.new("L", (24, 20), 9).save(root / "annotations" / "training" / f"{i}.png")


def break_size(root):
    for i in range(3):
        Image.new("L", (24, 21), 7).save(root / "annotations" / "training" / f"{i}.png")


def break_mode(root):
    for i in range(3):
        Image.new("RGB", (24, 20), (1, 2, 3)).save(root / "annotations" / "training" / f"{i}.png")


def break_photo(root):
    for i in range(3):
        (root / "images" / "training" / f"{i}.png").write_bytes(b"\x89PNG\r\n")


@pytest.mark.parametrize(("damage", "words"), [
    (break_annotation, ["1.png", "annotation"]),
    (break_value, ["value 9", ".png", "ids"]),
    (break_size, ["24 x 21", "24 x 20"]),
    (break_mode, ["0.png", "#rrggbb"]),
    (break_photo, [".png"]),
])  # fmt: skip
@pytest.mark.parametrize("workers", [0, 1])
def test_bad_data_is_named_and_no_process_left(tmp_path, damage, words, workers):
    damage(make_folder(tmp_path / "halves"))
    options = ["--dataset", "halves", "--max-steps", 1, "--workers", workers, *QUICK]
    fails(flowseg("train", *options, cwd=tmp_path), 3, *words)
    assert multiprocessing.active_children() == []


def test_bad_checkpoints_and_outputs_are_named(trained):
    cwd, _ = trained
    best = cwd / "runs" / "halves-tiny" / "best.safetensors"
    (cwd / "cut.safetensors").write_bytes(best.read_bytes()[:1000])
    (cwd / "other.safetensors").write_bytes(b"something else")
    Image.new("RGB", (20, 30)).save(cwd / "p.jpg")
    fails(flowseg("eval", "cut.safetensors", cwd=cwd), 5, "cut.safetensors is damaged")
    fails(
        flowseg("segment", "p.jpg", "-o", "m.png", "--checkpoint", "other.safetensors", cwd=cwd), 5, "damaged"
    )
    fails(flowseg("segment", "p.jpg", "-o", "p.jpg/m.png", cwd=cwd), 2, "p.jpg")
    fails(flowseg("segment", "p.jpg", "-o", "m.txt", cwd=cwd), 2, "m.txt", "expected")
    fails(flowseg("eval", "--report", "no/where.json", cwd=cwd), 2, "no/where.json")
    fails(flowseg("train", "--out", "p.jpg", *QUICK, cwd=cwd), 2, "p.jpg", "--out")
    fails(flowseg("eval", "--dataset", "shapes", cwd=cwd), 2, "shapes has other classes", "--dataset")


def test_what_weights_do_not_say_is_asked_for_and_the_advice_works(trained, tmp_path):
    project = shutil.copytree(trained[0], tmp_path / "project")
    folder = project / "runs" / "halves-tiny"
    model = FlowSeg.load(folder / "last.safetensors")
    said = asdict(model.info)
    Image.new("RGB", (20, 30)).save(project / "p.jpg")
    segment = ("segment", "p.jpg", "-o", "m.png", "-c", "some.safetensors")
    for name, words, option, code in (
        ("crop_size", ("eval", "some.safetensors"), ("--short-side", 32), 5),
        ("crop_size", segment, ("--short-side", 32), 5),
        ("dataset", ("eval", "some.safetensors"), ("--dataset", "halves"), 3),
    ):
        model.save(project / "some.safetensors", **{key: said[key] for key in said if key != name})
        fails(flowseg(*words, cwd=project), code, option[0])
        result = flowseg(*words, *option, cwd=project)
        assert result.returncode == 0, result.stderr
    model.save(project / "some.safetensors")
    fails(flowseg("export", "some.safetensors", cwd=project), 5, "backbone")
    model.save(project / "some.safetensors", classes=said["classes"], ids=said["ids"])
    fails(flowseg("export", "some.safetensors", cwd=project), 5, "--size")  # with it: test_describe.py


@pytest.mark.parametrize("lost", [("best",), ("last",), ("best", "last")], ids="+".join)
def test_a_finished_run_that_lost_weights_is_used_with_what_is_left(trained, tmp_path, lost):
    project = shutil.copytree(trained[0], tmp_path / "project")
    folder = project / "runs" / "halves-tiny"
    for name in lost:
        (folder / f"{name}.safetensors").unlink()
    result = flowseg("train", "--dataset", "halves", "--max-steps", 2, *QUICK, cwd=project)
    assert result.returncode == 0, result.stderr
    assert (folder / "last.safetensors").exists()
    for file in result.stdout.splitlines()[0].partition(": ")[2].split(", "):
        assert (folder / file).exists()
    assert flowseg("info", folder, cwd=project).returncode == 0


def test_damaged_weights_of_a_finished_run_are_one_line_whose_advice_works(trained, tmp_path):
    project = shutil.copytree(trained[0], tmp_path / "project")
    best = project / "runs" / "halves-tiny" / "best.safetensors"
    best.write_bytes(best.read_bytes()[:-1])
    again = ("train", "--dataset", "halves", "--max-steps", 2, *QUICK)
    for command in (again, ("eval",), (*again, "-o", "other", "--init", "runs/halves-tiny")):
        fails(flowseg(*command, cwd=project), 5, "best.safetensors is damaged", "move it away")
    best.rename(project / "away")
    for command in (again, ("eval",)):
        assert flowseg(*command, cwd=project).returncode == 0


@pytest.mark.parametrize("columns", ["0", "20", "40"])
def test_a_narrow_window_cuts_nothing_in_a_pipe(tmp_path, monkeypatch, columns):
    texts = []
    for width in (None, columns):
        monkeypatch.delenv("COLUMNS", raising=False)
        if width:
            monkeypatch.setenv("COLUMNS", width)
        said = [flowseg(*words, cwd=tmp_path).stdout for words in (["info", "ade20k"], ["train", "-h"])]
        texts.append(said)
    assert texts[0] == texts[1]
    assert "chest of drawers" in texts[1][0] and "--activation-checkpointing" in texts[1][1]


def test_existing_outputs_and_the_photo_itself_are_never_overwritten(trained):
    cwd, _ = trained
    Image.new("RGB", (20, 30), "red").save(cwd / "own.png")
    before = (cwd / "own.png").read_bytes()
    fails(flowseg("segment", "own.png", "-o", "own.png", "--force", cwd=cwd), 1, "own.png exists")
    assert (cwd / "own.png").read_bytes() == before
    (cwd / "kept.png").write_bytes(b"precious")
    fails(flowseg("segment", "own.png", "-o", "kept.png", cwd=cwd), 1, "kept.png exists", "--force")
    assert (cwd / "kept.png").read_bytes() == b"precious"
