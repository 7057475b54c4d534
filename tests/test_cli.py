"""The command line as a user meets it: each command, its output streams, its errors and exit codes."""

import csv
import io
import json
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from flowseg import main

ROOT = Path(__file__).parent.parent
SETTINGS = ("hidden=16", "depth=1", "heads=2", "field_depth=1", "field_width=8", "conv_width=8", "steps=2")
QUICK = ["--size", "32", "--batch", "2", *(word for setting in SETTINGS for word in ("--set", setting))]


def flowseg(*arguments, cwd):
    """Run the command in this process, as `main` would from the shell, in the folder cwd."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        patch.setenv("FLOWSEG_DATA", str(cwd / "no-data"))
        patch.setattr(sys, "argv", ["flowseg", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
    return SimpleNamespace(returncode=stop.value.code, stdout=out.getvalue(), stderr=err.getvalue())


def fails(result, code, *words):
    """One line on stderr, no traceback, nothing on stdout, the exit code."""
    message = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == code, result.stderr
    assert len(message) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in message[0]


def make_folder(root, count=3, size=(24, 20)):
    """A folder data set of grey photos with two classes, left and right."""
    for split in ("training", "validation", "test"):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            mask = np.zeros(size[::-1], np.uint8)
            mask[:, size[0] // 2 :] = 7
            mask[0] = 255
            Image.fromarray(mask // 7 * 200).convert("RGB").save(root / "images" / split / f"{i}.png")
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


# ---------------------------------------------------------------- commands


def test_help_names_every_command_and_does_not_import_torch(tmp_path):
    result = flowseg("--help", cwd=tmp_path)
    assert result.returncode == 0
    assert all(command in result.stdout for command in ("train", "eval", "segment", "info"))
    code = "import sys, flowseg; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_version(tmp_path):
    assert flowseg("--version", cwd=tmp_path).stdout.startswith("flowseg")


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


def test_quiet_leaves_stderr_empty(tmp_path):
    make_folder(tmp_path / "halves")
    result = flowseg("train", "--dataset", "halves", "--max-steps", 1, "-q", *QUICK, cwd=tmp_path)
    assert result.returncode == 0
    assert result.stderr == ""


def test_eval_takes_the_newest_run_and_writes_json(trained):
    cwd, _ = trained
    result = flowseg("eval", "--split", "test", "--steps", 3, "--json", "scores.json", cwd=cwd)
    assert result.returncode == 0, result.stderr
    assert "runs/halves-tiny/best.safetensors" in result.stderr
    scores = json.loads((cwd / "scores.json").read_text())
    assert [row["name"] for row in scores["classes"]] == ["left", "right"]
    assert [row["pixels"] for row in scores["classes"]] == [3 * 12 * 19, 3 * 12 * 19]
    assert scores["protocol"]["steps"] == 3
    assert scores["protocol"]["split"] == "test"
    assert {"mIoU", "aAcc", "mAcc"} <= scores.keys()
    for word in ("left", "right", f"mIoU {scores['mIoU']:.2%}", "protocol:"):
        assert word in result.stdout


def test_eval_options_are_in_the_protocol_and_the_table_is_written_as_csv(trained):
    cwd, _ = trained
    options = ["--limit", 2, "--flip", "--mode", "slide", "--csv", "table.csv", "--json", "part.json"]
    result = flowseg("eval", *options, cwd=cwd)
    assert result.returncode == 0, result.stderr
    assert "images 2, evenly_spaced_of 3, mode slide, flip True" in result.stdout
    facts = json.loads((cwd / "part.json").read_text())
    rows = list(csv.DictReader(io.StringIO((cwd / "table.csv").read_text())))
    assert [row["name"] for row in rows] == ["left", "right"]
    assert [int(row["pixels"]) for row in rows] == [c["pixels"] for c in facts["classes"]] == [456, 456]
    assert [float(row["IoU"]) for row in rows] == [c["IoU"] for c in facts["classes"]]
    fails(flowseg("eval", "--csv", "no/table.csv", cwd=cwd), 2, "no/table.csv", "a folder that exists")


def test_a_missing_split_is_named_by_eval(trained):
    cwd, _ = trained
    toml = cwd / "halves" / "dataset.toml"
    before = toml.read_text()
    toml.write_text(before + 'splits = ["training", "validation"]\n')
    try:
        fails(flowseg("eval", "--split", "test", cwd=cwd), 3, "halves has no test split")
        facts = json.loads(flowseg("info", "halves", "--json", cwd=cwd).stdout)
        assert list(facts["splits"]) == ["training", "validation"] and facts["problems"] == []
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
    assert written == ["a.png", "sub/b.png"]


def test_info_on_machine_data_and_checkpoint(trained):
    cwd, _ = trained
    machine = json.loads(flowseg("info", "--json", cwd=cwd).stdout)
    assert {"python", "torch", "commit", "device", "data root"} == machine.keys()
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
    assert all(
        word in result.stdout for word in ("windowpane", "149", "150", "images/training: no such folder")
    )
    facts = json.loads(flowseg("info", "coco-stuff", "--json", cwd=tmp_path).stdout)
    assert facts["classes"][170] == {"id": 170, "raw": 181, "name": "wood"}
    assert list(facts["splits"]) == ["training", "validation"]
    assert len(facts["problems"]) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_same_command_continues(tmp_path, number):
    make_folder(tmp_path / "halves")
    command = ["train", "--dataset", "halves", "--max-steps", 100_000, "--set", "log_every=1", *QUICK]
    process = subprocess.Popen([sys.executable, str(ROOT / "flowseg.py"), *map(str, command)], cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    metrics = tmp_path / "runs" / "halves-tiny" / "metrics.jsonl"
    for _ in range(600):
        if metrics.exists() and metrics.read_text().count("\n") >= 2:
            break
        time.sleep(0.1)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "the same command continues" in stderr
    assert (tmp_path / "runs" / "halves-tiny" / "state.safetensors").exists()


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(("arguments", "code", "words"), [
    (["train", "--dataset", "shaeps"], 3, ["'shaeps' not found", "did you mean 'shapes'"]),
    (["train", "--preset", "tinny"], 2, ["--preset tinny", "did you mean 'tiny'"]),
    (["train", "--objective", "reshapd"], 2, ["objective is 'reshapd'", "reshaped or vanilla"]),
    (["train", "--max-steps", "many"], 2, ["--max-steps", "integer"]),
    (["train", "--device", "gpu"], 2, ["--device gpu", "cpu"]),
    (["train", "--datset", "shapes"], 2, ["--datset", "--dataset"]),
    (["trian"], 2, ["trian", "train"]),
    (["train", "--set", "epss=1"], 2, ["epss", "did you mean 'eps'"]),
    (["eval"], 2, ["no weights", "flowseg train"]),
    (["eval", "--mode", "tile"], 2, ["--mode", "tile", "whole", "slide"]),
    (["eval", "missing.safetensors"], 5, ["missing.safetensors does not exist"]),
    (["info", "missing"], 3, ["'missing' not found"]),
    (["info", "ade2k"], 3, ["'ade2k' not found", "did you mean 'ade20k'"]),
    (["train", "--dataset", "ade20k"], 3, ["ade20k/images/training: no such folder; run", "970.0 MB"]),
    (["segment", "missing.jpg", "-o", "mask.png"], 1, ["missing.jpg"]),
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
        Image.new("RGB", (24, 20)).save(root / "annotations" / "training" / f"{i}.png")


def break_photo(root):
    for i in range(3):
        (root / "images" / "training" / f"{i}.png").write_bytes(b"\x89PNG\r\n")


@pytest.mark.parametrize(("damage", "words"), [
    (break_annotation, ["1.png", "annotation"]), (break_value, ["raw value 9", ".png", "ids"]),
    (break_size, ["24 x 21", "24 x 20"]), (break_mode, ["RGB"]), (break_photo, [".png"]),
])  # fmt: skip
@pytest.mark.parametrize("workers", [0, 1])
def test_bad_data_is_named(tmp_path, damage, words, workers):
    damage(make_folder(tmp_path / "halves"))
    result = flowseg(
        "train", "--dataset", "halves", "--max-steps", 1, "--workers", workers, *QUICK, cwd=tmp_path
    )
    fails(result, 3, *words)


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
    fails(flowseg("segment", "p.jpg", "-o", "p.jpg/m.png", cwd=cwd), 1, "p.jpg")
    fails(flowseg("segment", "p.jpg", "-o", "m.txt", cwd=cwd), 2, "m.txt", "expected")
    fails(flowseg("eval", "--json", "no/where.json", cwd=cwd), 2, "no/where.json", "a folder that exists")
    fails(flowseg("train", "--out", "p.jpg", *QUICK, cwd=cwd), 2, "cannot use p.jpg", "--out")
    fails(flowseg("eval", "--dataset", "shapes", cwd=cwd), 2, "shapes has other classes", "--dataset")


def test_existing_outputs_and_the_photo_itself_are_never_overwritten(trained):
    cwd, _ = trained
    Image.new("RGB", (20, 30), "red").save(cwd / "own.png")
    before = (cwd / "own.png").read_bytes()
    fails(flowseg("segment", "own.png", "-o", "own.png", "--force", cwd=cwd), 1, "own.png exists")
    assert (cwd / "own.png").read_bytes() == before
    (cwd / "kept.png").write_bytes(b"precious")
    fails(flowseg("segment", "own.png", "-o", "kept.png", cwd=cwd), 1, "kept.png exists", "--force")
    assert (cwd / "kept.png").read_bytes() == b"precious"
