"""Hostile input by the thousand: every attempt has to end well, or in one line of error, soon and small.

    python -m experiments.fuzz --minutes 10            all kinds of input in turn, with a table at the end
    python -m experiments.fuzz --kind reply --first 137 --attempts 1 --keep DIR       one attempt again

An attempt damages a valid input and runs the command that reads it, in a process of its own. It fails if
that process is killed, takes too long or too much memory, prints a traceback, two lines of error, none, or
"this may be a bug", writes NaN as JSON, or calls a file complete that is not. Attempt N of a kind is the same
each time.
"""

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import tomllib
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

import flowseg
import train
from flowseg_tools import check, download, segment
from flowseg_tools.dinov2 import load_dinov2
from flowseg_tools.pretrained import import_pixnerd
from model import CheckpointError

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 20  # of work in one attempt; waiting may take ten times as long
GIGABYTES = 2  # of memory more than the parent has
SMALL = ["hidden_size=16", "depth=1", "num_heads=2", "nerf_width=8", "conv_width=8", "steps=2"]
TRAIN = ["train", "--dataset", "data", "--batch-size", "2", "--crop-size", "32", "--quiet", "-o", "run"]
SMALL += ["eval_every=1", "save_every=1", "log_every=1"]
TRAIN += [word for setting in SMALL for word in ("--set", setting)]
DEEP = "nested deeply"  # stands for a hundred thousand brackets: see written
BODY = random.Random(0).randbytes(60_000)
ODD = [None, True, -1, 0, 1, 1e308, float("nan"), 10**30, 2**63, -0.5, "", "a" * 5000, "\x1b[31m\x07"]
ODD += ["\ud800", [], {}, [1, 1], {"a": 1}, ["a", "a"], "../..", "/dev/zero"]


# Damage --------------------------------------------------------------------------------------------------


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Bytes with up to four places flipped, cut, doubled, filled or replaced."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice([1, 2, 4, 8, 64, 1000]))
        change = rng.randrange(6)
        if change == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif change == 1:
            del data[at:end]
        elif change == 2:
            data[at:at] = rng.randbytes(end - at)
        elif change == 3:
            data[at:at] = data[at:end] * rng.choice([1, 100])
        elif change == 4:
            data[at:end] = rng.choice([b"\0", b"\xff", b"\x7f"]) * (end - at)
        else:
            del data[at:]
    return bytes(data)


def odd(rng: random.Random, value: object, top: bool = False) -> object:
    """A JSON value in which something is replaced, removed, added or nested deeply; top: it stays a table."""
    if isinstance(value, dict) and value and (top or rng.random() < 0.8):
        key = rng.choice(list(value))
        change = rng.randrange(8)
        if change == 0:
            return {name: entry for name, entry in value.items() if name != key}
        if change == 1:
            return {**value, rng.choice(["", "extra", "num_classes"]): rng.choice(ODD)}
        return {**value, key: odd(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], odd(rng, value[at]), *value[at + 1 :]]
    if isinstance(value, int) and rng.random() < 0.5:
        return rng.choice([value + 1, value - 1, -value, value * 2, value * 1000, float(value)])
    return rng.choice([*ODD, DEEP])


def written(value: object) -> str:
    """JSON text, with DEEP as deep as it says."""
    return json.dumps(value).replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000)


def odd_text(rng: random.Random, text: str) -> str:
    """A text in which a word or line is doubled, removed or replaced."""
    parts = text.splitlines(keepends=True) if rng.random() < 0.4 else text.split(" ")
    joint = "" if parts[0].endswith("\n") else " "
    at = rng.randrange(len(parts))
    change = rng.randrange(4)
    if change == 0:
        parts.insert(at, parts[rng.randrange(len(parts))])
    elif change == 1:
        del parts[at]
    elif change == 2:
        parts[at] = json.dumps(rng.choice(ODD)) + "\n"
    else:
        letter = rng.choice('"[]=.,\n01a')
        parts[at] = parts[at].replace(letter, rng.choice(["", '"', "[", "\x00", "9" * 400]))
    return joint.join(parts)


def read_tensors(path: Path) -> tuple[dict, bytes]:
    """Header and values of a safetensors file; its metadata, which have no fixed order, are sorted."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    return header, data[8 + size :]


def tensors(header: object, values: bytes) -> bytes:
    """The bytes of a safetensors file."""
    text = written(header).encode()
    return struct.pack("<Q", len(text)) + text + values


def odd_metadata(rng: random.Random, header: dict) -> None:
    """Change or remove one of the metadata of a safetensors file."""
    metadata = header["__metadata__"]
    key = rng.choice(list(metadata))
    if rng.random() < 0.2:
        del metadata[key]
    else:
        metadata[key] = written(odd(rng, json.loads(metadata[key])))


# Kinds: each damages an input in the current folder and returns what to run ------------------------------


def checkpoint(rng: random.Random) -> list[str]:
    """A file of our weights: its header, its metadata, its numbers or its bytes."""
    path = Path("run/best.safetensors")
    header, values = read_tensors(path)
    change = rng.randrange(5)
    if change == 0:
        header = odd(rng, header)
    elif change == 1:
        odd_metadata(rng, header)
    elif change == 2:
        at = 4 * rng.randrange(len(values) // 4)
        number = struct.pack("<f", rng.choice([float("nan"), float("inf"), 3e38, -1e-45]))
        values = values[:at] + number + values[at + 4 :]
    data = tensors(header, values)
    if change == 3:
        data = damaged(rng, tensors(header, b"")) + values
    elif change == 4:
        data = damaged(rng, data)
    path.write_bytes(data)
    segment = ["segment", "data/images/training/0.png", "-o", "mask.png", "-c", str(path)]
    return rng.choice([segment, ["info", str(path), "--json"], ["eval", str(path), "--json"]])


def public(rng: random.Random) -> Callable[[], None]:
    """A public checkpoint of PixNerd or DINOv2: its tensors, its pickle or its bytes."""
    name, read = rng.choice([("pixnerd_tiny.ckpt", import_pixnerd), ("dinov2_tiny.pth", load_dinov2)])
    path = Path(name)
    whole = torch.load(path, weights_only=True)
    state = whole.get("state_dict", whole)
    key = rng.choice(list(state))
    value = state[key]
    change = rng.randrange(12)
    if change >= 6:
        path.write_bytes(damaged(rng, path.read_bytes()))
        return lambda: read(path)
    if change == 0:
        del state[key]
    elif change == 1:
        others = [None, 3, "text", [value], value.long(), value.half(), value.to_sparse(), value[None]]
        state[key] = rng.choice(others)
    elif change == 2:
        state[key] = value.flatten()[:1].expand(rng.choice([10, 10**6]), 10**5)
    elif change == 3:
        state[key] = torch.full_like(value, rng.choice([float("nan"), float("inf"), 1e38]))
    elif change == 4:
        state[key.replace("0", str(rng.choice([-1, 5, 10**9])))] = value
    else:
        names = [3, None, "", "blocks.x.attn", "ema_denoiser.blocks.7.attn.qkv.weight"]
        state[rng.choice(names)] = value
    torch.save(whole, path)
    return lambda: read(path)


def toml(rng: random.Random) -> list[str]:
    """A label table: its values, its text or its bytes."""
    path = Path("data/dataset.toml")
    text = path.read_text()
    change = rng.random()
    if change < 0.6:
        more = {"images": "images/{split}/*", "masks": "annotations/{split}/*", "validation": 0.5}
        more |= {"colors": ["#ff0000", "#00ff00"], "clear": ["left"], "splits": ["training", "validation"]}
        key = rng.choice([None] * 4 + [*more])
        table = tomllib.loads(text) | ({key: more[key]} if key else {})
        text = "".join(f"{name} = {toml_value(value)}\n" for name, value in odd(rng, table, top=True).items())
    else:
        for _ in range(rng.randint(1, 3)):
            text = odd_text(rng, text)
    data = text.encode("utf-8", "surrogatepass")
    path.write_bytes(damaged(rng, data) if change > 0.9 else data)
    return rng.choice(
        [["info", "data", "--json"], ["info", "data"], [*TRAIN, "--max-steps", "1", "-o", "new"]]
    )


def toml_value(value: object) -> str:
    """A value as TOML writes it; it has no null."""
    if isinstance(value, dict):
        return (
            "{" + ", ".join(f"{json.dumps(key)} = {toml_value(entry)}" for key, entry in value.items()) + "}"
        )
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    return {"None": "[]", "nan": "nan"}.get(str(value), written(value))


def picture(rng: random.Random, grey: bool) -> tuple[str, bytes]:
    """A small picture in some format, mode and size, mostly damaged."""
    form = rng.choice(["PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP"])
    size = rng.choice([(24, 20)] * 5 + [(1, 1), (3, 400), (20, 24)])
    mode = rng.choice(["L", "P", "1"] if grey else ["L", "P", "RGB"])
    image = Image.new(mode, size, rng.choice([0, 1]))
    if form == "JPEG":
        image = image.convert("RGB")
    data = io.BytesIO()
    image.save(data, form)
    content = data.getvalue()
    return form.lower(), content if rng.random() < 0.15 else damaged(rng, content)


def photo(rng: random.Random) -> list[str]:
    """A photo, to be segmented alone, in a folder, or checked as part of a data set."""
    form, data = picture(rng, grey=False)
    if rng.random() < 0.3:
        Path("data/images/training/0.png").write_bytes(data)
        return ["info", "data", "--json"]
    Path(f"photo.{form}").write_bytes(data)
    more = rng.sample(["--overlay", "--confidence", "--entropy", "--trajectory", "--flip", "--mode=slide"], 2)
    photos = [f"photo.{form}", "data/images/validation"]
    return ["segment", *photos, "-o", "masks", "-c", "run/best.safetensors", *more]


def mask(rng: random.Random) -> list[str]:
    """The mask of a photo in a data set."""
    form, data = picture(rng, grey=True)
    Path("data/annotations/training/0.png").unlink()
    Path(f"data/annotations/training/0.{rng.choice([form, 'png'])}").write_bytes(data)
    return rng.choice([["info", "data", "--json"], [*TRAIN, "--max-steps", "1", "-o", "new"]])


def run_file(rng: random.Random) -> list[str]:
    """A file of a run directory that is to be continued."""
    names = ["metrics.jsonl", "state.safetensors", "previous.safetensors", "config.json", "last.safetensors"]
    name = rng.choice(names)
    path = Path("run") / name
    data = path.read_bytes()
    if name.endswith("json") and rng.random() < 0.7:
        path.write_text(written(odd(rng, json.loads(data))))
    elif name.endswith("jsonl") and rng.random() < 0.7:
        lines = data.decode().splitlines()
        at = rng.randrange(len(lines))
        lines[at] = written(odd(rng, json.loads(lines[at])))
        path.write_text("\n".join(lines) + "\n")
    elif name.startswith(("state", "previous")) and rng.random() < 0.7:
        header, values = read_tensors(path)
        odd_metadata(rng, header)
        path.write_bytes(tensors(header if rng.random() < 0.7 else odd(rng, header), values))
    else:
        path.write_bytes(damaged(rng, data))
    again = [*TRAIN, "--max-steps", "3"]
    return rng.choice([again, again, ["segment", "data/images/training", "-o", "masks"], ["eval", "--json"]])


def reply(rng: random.Random) -> list[str]:
    """The answers of a server, of which each is damaged by chance, and then one that is right."""
    heads = ["HTTP/1.1 200 OK", "HTTP/1.1 206 Partial Content", "HTTP/1.1 302 Found", "HTTP/1.1 503 Busy"]
    heads += ["HTTP/1.1 404 \x1b[31m", "HTTP/1.0 200", "HTTP/1.1 204 None", "ICY 200 OK", "HTTP/9 abc"]
    values = {
        "Content-Length": ["60000", "0", "-1", "abc", "9" * 30, "1e3", "30000", str(10**14)],
        "Content-Range": ["bytes 0-59999/60000", "bytes 30000-59999/60000", "bytes 5-9/10", "bytes */*", "x"],
        "Content-Type": ["text/html", "application/json", "application/octet-stream", "\xff", ""],
        "Content-Encoding": ["gzip", "br", "identity"],
        "Transfer-Encoding": ["chunked"],
        "Location": [
            "ftp://a/b",
            "file:///etc/passwd",
            "/w",
            "http://[",
            "//",
            "\x00",
            "http://127.0.0.1:1/",
        ],
        "ETag": ['"a"', 'W/"a"', "\x80", '"b"'],
        "Last-Modified": ["Mon, 01 Jan 2024 00:00:00 GMT", "yesterday"],
    }
    bodies = [BODY, BODY[:30_000], BODY[30_000:], b"", b"<html>", b'{"a": 1}', b"\x1f\x8b" + BODY]
    bodies += [b"4\r\nabcd\r\n0\r\n\r\n", b"zz\r\n", b"text\n" * 50]
    answers = []
    for _ in range(rng.randint(1, 4)):
        names = rng.sample(list(values), rng.randint(0, 4))
        lines = [rng.choice(heads), *(f"{name}: {rng.choice(values[name])}" for name in names)]
        answer = "\r\n".join([*lines, "", ""]).encode("latin-1") + rng.choice(bodies)
        answers.append(damaged(rng, answer[:500]) + answer[500:] if rng.random() < 0.2 else answer)
    right = f"HTTP/1.1 200 OK\r\nContent-Length: {len(BODY)}\r\n\r\n".encode() + BODY
    address = serve([*answers, right])
    return ["download", "pixnerd-xl-256", "--root", "root", "--from", f"{address}/w", "--max-bytes", "100000"]


def serve(answers: list[bytes]) -> str:
    """Answer one request after another from a list, the last for ever; returns the address."""
    server = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        number = 0
        while True:
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                connection.recv(65_536)
                connection.sendall(answers[min(number, len(answers) - 1)])
            number += 1

    threading.Thread(target=run, daemon=True).start()
    time.sleep = lambda seconds: None  # of the attempts that follow a failure
    return f"http://127.0.0.1:{server.getsockname()[1]}"


KINDS = {
    "checkpoint": checkpoint,
    "public": public,
    "toml": toml,
    "photo": photo,
    "mask": mask,
    "run": run_file,
    "reply": reply,
}


# One attempt ---------------------------------------------------------------------------------------------


def prepare(folder: Path) -> None:
    """Make valid inputs: a data set, a run of two of three steps, public weights."""
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (folder / "data" / kind / split).mkdir(parents=True)
        for i in range(2):
            labels = np.zeros((20, 24), np.uint8)
            labels[:, 12:] = 7
            Image.fromarray(labels * 30).convert("RGB").save(folder / f"data/images/{split}/{i}.png")
            Image.fromarray(labels).save(folder / f"data/annotations/{split}/{i}.png")
    text = 'name = "halves"\nclasses = ["left", "right"]\nids = [0, 7]\nignore = [255]\n'
    text += 'splits = ["training", "validation"]\n'
    (folder / "data/dataset.toml").write_text(text)
    for name in ("pixnerd_tiny.ckpt", "dinov2_tiny.pth"):
        shutil.copyfile(ROOT / "tests/golden" / name, folder / name)
    assert all((train, check, download, segment))  # imported here, not in every attempt
    code, said = attempt([*TRAIN, "--max-steps", "2"], folder)
    assert code == 0, said


def attempt(command: list[str] | Callable, folder: Path) -> tuple[int, str]:
    """Run a command in this folder in a process of its own; its exit code (negative: a signal) and output."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        in_child(command, folder)
    deadline = time.monotonic() + 10 * SECONDS
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            code = -signal.SIGXCPU
            break
        time.sleep(0.002)
    said = [(folder / name).read_text(errors="replace") for name in ("stdout.txt", "stderr.txt")]
    return code, "\0".join(said)


def in_child(command: list[str] | Callable, folder: Path) -> None:
    """Run a command under a limit of memory, with its streams in files, and end this process."""
    code = 70
    try:
        os.chdir(folder)
        for number, name in ((1, "stdout.txt"), (2, "stderr.txt")):
            os.dup2(os.open(name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + GIGABYTES * 2**30,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
        words = command if isinstance(command, list) else command()
        if not isinstance(words, list):
            code = 0
        else:
            sys.argv = ["flowseg", *words]
            flowseg.main()
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def verdict(code: int, said: str, kind: str, folder: Path) -> str:
    """What is wrong with the end of an attempt; nothing if it survived."""
    out, _, err = said.partition("\0")
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    if code == -signal.SIGXCPU:
        return "takes too long"
    if code < 0:
        return f"killed by signal {-code}"
    if "Traceback" in err:
        return f"traceback: {err.strip().splitlines()[-1][:60]}"
    if "may be a bug" in err:
        return f"may be a bug: {errors[-1][:80] if errors else ''}"
    if code not in range(6):
        return f"exit code {code}"
    if (code in (2, 4, 5) or (code == 3 and not out)) and len(errors) != 1:
        return f"{len(errors)} lines of error with exit code {code}"
    if any(not letter.isprintable() for letter in (out + err).replace("\n", "").replace("\r", "")):
        return "control characters on the terminal"
    if code in (0, 3) and out.lstrip().startswith("{"):
        try:
            json.loads(out, parse_constant=lambda text: 1 / 0)
        except (ValueError, ZeroDivisionError):
            return "JSON that is none"
    if kind == "reply" and code == 0:
        whole = (folder / "root/weights/pixnerd-xl-256.ckpt").read_bytes()
        if whole not in (BODY, BODY[:30_000], BODY[30_000:]):  # some answers call a half the whole file
            return "another file is called complete"
    return ""


def fuzz(
    kinds: list[str], first: int, attempts: int, seconds: float, keep: Path | None
) -> dict[str, Counter]:
    """Make attempts of each kind in turn until the number or the time is over.

    Returns for each kind how often an attempt survived, by its exit code, or failed, by the reason.
    """
    counts = {kind: Counter() for kind in kinds}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        base = Path(place) / "base"
        base.mkdir()
        prepare(base)
        for number in range(first, first + attempts):
            for kind in kinds:
                if time.monotonic() - began > seconds:
                    return counts
                folder = Path(place) / f"{kind}-{number}"
                shutil.copytree(base, folder)
                rng = random.Random(f"{kind} {number}")
                code, said = attempt(lambda rng=rng, kind=kind: run_now(KINDS[kind](rng)), folder)
                reason = verdict(code, said, kind, folder)
                counts[kind][reason or code] += 1
                if reason and keep:
                    shutil.copytree(folder, keep / folder.name, dirs_exist_ok=True)
                shutil.rmtree(folder)
    return counts


def run_now(work: list[str] | Callable) -> list[str] | None:
    """A command is returned to be run, anything else is called."""
    return work if isinstance(work, list) else work()


def main() -> None:
    """Read the options, fuzz, print a table and the failures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", action="append", choices=list(KINDS), help="default: all")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--first", type=int, default=0, help="number of the first attempt")
    parser.add_argument("--attempts", type=int, default=10**9, help="most attempts of each kind")
    parser.add_argument("--keep", type=Path, help="folder for the inputs of failures")
    given = parser.parse_args()
    counts = fuzz(given.kind or list(KINDS), given.first, given.attempts, 60 * given.minutes, given.keep)
    table = Table("kind", "attempts", "failed", "exit codes of the others", box=None)
    failures = []
    for kind, verdicts in counts.items():
        codes = {code: number for code, number in verdicts.items() if isinstance(code, int)}
        others = ", ".join(f"{code}: {codes[code]}" for code in sorted(codes))
        table.add_row(kind, str(verdicts.total()), str(verdicts.total() - sum(codes.values())), others)
        for reason, number in verdicts.items() - codes.items():
            failures.append(f"{kind}: {number} x {reason}")
    console = Console(width=160, markup=False)
    console.print(table)
    console.print(*sorted(failures), sep="\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
