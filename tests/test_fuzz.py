"""A short seed of experiments/fuzz.py; a long one is run by hand."""

import subprocess
import sys
from pathlib import Path

import pytest

from experiments import fuzz

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(fuzz.os, "fork"), reason="attempts are processes of their own")
def test_no_attempt_of_a_short_seed_fails():
    command = [sys.executable, "-m", "experiments.fuzz", "--attempts", "3", "--minutes", "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for kind in fuzz.KINDS:
        assert [line.split()[:3] for line in done.stdout.splitlines() if line.split()[:1] == [kind]] == [
            [kind, "3", "0"]
        ]


BAD = [
    (-9, "\0", "killed by signal 9"),
    (1, "\0Traceback (most recent call last):\nKeyError: 3\n", "traceback: KeyError: 3"),
    (1, "\0error: KeyError: 3; this may be a bug\n", "may be a bug"),
    (5, "\0", "0 lines of error"),
    (2, "\0error: a\nerror: b\n", "2 lines of error"),
    (0, '{"mIoU": NaN}\0', "JSON"),
    (4, "\0error: \x1b[31m\n", "control characters"),
    (70, "\0", "exit code 70"),
]


@pytest.mark.parametrize(("code", "said", "reason"), BAD)
def test_what_a_failure_is(code, said, reason, tmp_path):
    assert reason in fuzz.verdict(code, said, "toml", tmp_path)
    assert fuzz.verdict(0, '{"mIoU": null}\0warning: a\n', "toml", tmp_path) == ""


@pytest.mark.slow
def test_an_attempt_that_hangs_or_fills_the_memory_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    for work in (lambda: fuzz.time.sleep(60), lambda: sum(iter(int, 1))):
        code, said = fuzz.attempt(work, tmp_path)
        assert fuzz.verdict(code, said, "toml", tmp_path) == "takes too long"
    monkeypatch.setattr(fuzz, "SECONDS", 20)
    code, said = fuzz.attempt(lambda: bytearray(3 * 2**30), tmp_path)
    assert "MemoryError" in fuzz.verdict(code, said, "toml", tmp_path)
