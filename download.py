"""Downloads that go on where they stopped, are checked before use, and unpack what is needed and no more.

All happens in .NAME.part below the data root, renamed when everything is there. FILE.part grows beside
FILE.json, the ETag, date and length that the server gave: only while they are the same is the rest asked for.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import sqlite3
import time
import tomllib
from contextlib import closing, suppress
from http.client import HTTPException
from pathlib import Path, PureWindowsPath
from urllib.error import URLError
from urllib.request import Request, urlopen
from zipfile import ZipFile

from rich import progress
from rich.console import Console
from rich.filesize import decimal
from typer import BadParameter

TABLE = Path(__file__).parent / "flowseg_data/downloads.toml"
OTHER = "try another --url, or --from-file"
COLUMNS = *progress.Progress.get_default_columns(), progress.DownloadColumn(), progress.TransferSpeedColumn()


class DownloadError(Exception):
    """What keeps a download from being complete, in one line: given, expected, fix."""

    exit_code = 4


def data_root(root: str | Path | None = None) -> Path:
    """The folder of data sets and weights."""
    return Path(root or os.environ.get("FLOWSEG_DATA") or "~/.cache/flowseg").expanduser()


def command(verb: str, name: str, root: Path) -> str:
    """What to type about a data set below that data root."""
    return f"flowseg {verb} {name}" + ("" if root == data_root() else f" --root {shlex.quote(str(root))}")


def free(folder: Path, needed: int = 0) -> str:
    """The space where a folder is or will be; OSError if it is not enough."""
    space = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    if space < needed:
        raise OSError(f"{folder}: {decimal(needed)} needed, {decimal(space)} free; make room, or use --root")
    return f"{decimal(space)} free"


def table(name: str, places: list[str] = (), sha256: str | None = None) -> list[dict]:
    """The files of a download, after --url, --from-file and --sha256."""
    rows = tomllib.loads(TABLE.read_text(encoding="utf-8"))[name]
    for place in places:
        row = next((row for row in rows if len(rows) == 1 or row["file"] == Path(place).name), None)
        if row is None or not (place.startswith(("http://", "https://")) or Path(place).is_file()):
            names = " or ".join(row["file"] for row in rows)
            raise BadParameter(f"{place}: expected file or http address of {names}")
        row["url"] = place
    if sha256:  # of the only file, or of the only one without a published digest
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            raise BadParameter(f"--sha256 {sha256}; expected 64 digits of 0-9 and a-f")
        min(rows, key=lambda row: "digest" in row)["digest"] = f"sha256 {sha256}"
    return rows


def advice(name: str, root: Path) -> str:
    """The command that gets a data set, with its size and the space for it."""
    size = decimal(sum(row["size"] for row in table(name)))
    return f"run {command('download', name, root)} ({size}, as much again unpacked; {free(root)})"


def download(
    name: str, root: Path | None = None, places: list[str] = (), sha256: str | None = None,
    dry_run: bool = False, keep: bool = False, quiet: bool = False,
) -> None:  # fmt: skip
    """Make a data set or weights complete and say so on stdout; `places` are copies and mirrors."""
    rows, root = table(name, places, sha256), data_root(root)
    unpack, work = "folders" in rows[0], root / f".{name}.part"
    home = root / (name if unpack else f"weights/{rows[0]['file']}")
    if (home / ".complete" if unpack else home).exists():
        print(f"{home} is complete")
        return
    if home.exists():
        raise DownloadError(f"{home} is not from this command; use it as it is, or move it away")
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, quiet=quiet)
    say = print if dry_run else console.print
    for row in rows:
        say(f"{row['file']}: {decimal(row['size']) if row['size'] else 'size unknown'} from {row['url']}")
    say(f"to {home}; {free(root)}")
    if dry_run:
        return

    try:
        work.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(work.with_suffix(".lock"), timeout=0)) as lock:
            lock.execute("BEGIN EXCLUSIVE")  # the system ends it with this process
            for row in rows:
                _complete(row, work, keep, console)
            home.parent.mkdir(exist_ok=True)
            (work if unpack else work / rows[0]["file"]).rename(home)
            shutil.rmtree(work, ignore_errors=True)
    except sqlite3.OperationalError:
        raise DownloadError(f"{work}: another process is at it; wait for it, or stop it") from None
    except OSError as error:
        raise DownloadError(f"{error}; then the same command continues") from error
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped; the same command continues", style="yellow")
        raise
    print(f"{home} is complete")
    if unpack:
        print(f"next: {command('info', name, root)}, {command('train --dataset', name, root)}")


def _complete(row: dict, work: Path, keep: bool, console: Console) -> None:
    """Fetch a file, check it, unpack it and write that down; nothing if that is written."""
    own, folders = row["url"].startswith(("http://", "https://")), row.get("folders", [])
    record = work / ".complete"
    done = record.read_text() if record.exists() else ""
    if f"{row['file']} " in done:
        return
    path = work / row["file"] if own else Path(row["url"])
    if not path.exists():
        _fetch(row, path, console)
    kind, _, published = row.get("digest", "sha256").partition(" ")
    with progress.open(path, "rb", description=f"checking {path.name}", console=console) as file:
        digest = hashlib.file_digest(file, kind).hexdigest()
    try:
        if published not in ("", digest):
            raise ValueError(f"{kind} is {digest}, expected {published}")
        if folders:
            _unpack(path, folders, work, console)
    except BaseException as error:
        for here, *_ in folders:
            shutil.rmtree(work / here, ignore_errors=True)
        if isinstance(error, (OSError, KeyboardInterrupt)):
            raise  # which says nothing about the file
        if own:
            path.unlink()
        raise DownloadError(f"{path}: {error}; {OTHER}") from error
    if not published:
        print(f"{path.name}: sha256 is {digest}, none is published; --sha256 pins it")
    if not folders and not own:
        shutil.copyfile(path, work / row["file"])
    record.write_text(f"{done}{row['file']} {kind} {digest}\n")
    if folders and own and not keep:
        path.unlink()


def _fetch(row: dict, path: Path, console: Console) -> None:
    """Fetch a file; try again where that may help, up to five times in a row that bring nothing."""
    url, part, failures = row["url"], Path(f"{path}.part"), 0
    with open(part, "ab") as file, progress.Progress(*COLUMNS, console=console) as bar:
        task = bar.add_task(path.name)
        while True:
            before = file.tell()
            try:
                _request(row, file, bar, task)
                break
            except (URLError, HTTPException, ConnectionError, TimeoutError) as error:
                code = getattr(error, "code", 503)
                if code == 416:  # the server has less than we have
                    file.truncate(file.seek(0))
                failures = 1 if file.tell() > before else failures + 1
                if failures == 5 or (code < 500 and code not in (408, 416, 429)):
                    raise DownloadError(f"{url}: {error}; the same command continues, or {OTHER}") from error
                bar.print(f"{url}: {error}; trying again", style="yellow")
            time.sleep(2**failures / 2)
    part.rename(path)
    part.with_suffix(".json").unlink()


def _request(row: dict, file, bar: progress.Progress, task: int) -> None:
    """Ask once for what the file lacks, or for everything where the server's file is another one by now."""
    side, seen, have = Path(file.name).with_suffix(".json"), {}, file.tell()
    with suppress(OSError, ValueError):
        seen = json.loads(side.read_text())
    if have and seen.get("length") == str(have):  # stopped before its name was changed
        return
    tag = seen.get("ETag") or "W/"
    same = seen.get("Last-Modified") if tag.startswith("W/") else tag  # a weak tag promises too little
    rest = {"Range": f"bytes={have}-", "If-Range": same} if have and same else {}
    with urlopen(Request(row["url"], headers={"User-Agent": "flowseg"} | rest), timeout=30) as response:
        headers, more = response.headers, response.status == 206
        length = headers.get("Content-Range", "").rpartition("/")[2] if more else headers["Content-Length"]
        facts = {"ETag": headers["ETag"], "Last-Modified": headers["Last-Modified"], "length": length}
        if more and any(value not in (None, seen.get(key)) for key, value in facts.items()):
            file.truncate(file.seek(0))
            raise ConnectionError("the file there has changed")
        if not more:
            if headers.get_content_type() == "text/html" or response.peek(1).lstrip()[:1] == b"<":
                raise DownloadError(f"{row['url']}: a web page, not the file; {OTHER}")
            file.truncate(file.seek(0))
            side.write_text(json.dumps(facts))
        size = int(length or row["size"])
        bar.update(task, total=size or None, completed=file.tell())
        free(side.parent, size * (1 + ("folders" in row)) - file.tell())
        while block := response.read1(1 << 20):
            file.write(block)
            bar.advance(task, len(block))
    if length and file.tell() != size:
        raise ConnectionError(f"closed after {file.tell():,} of {size:,} bytes")


def _unpack(path: Path, folders: list, work: Path, console: Console) -> None:
    """Unpack the pictures of some folders below `work`; ValueError for another or a hostile archive."""
    with ZipFile(path) as archive:
        _inspect(archive.infolist(), path.stat().st_size)
        chosen = []
        for here, there, count in folders:
            picture = re.compile(rf"(?:.*/)?{there}/[^./][^/]*\.(?:jpg|png)")
            found = [info for info in archive.infolist() if picture.fullmatch(info.orig_filename)]
            if len(found) != count:
                raise ValueError(f"{len(found):,} pictures in {there}, expected {count:,}")
            for info in found:
                info.filename = f"{here}/{Path(info.orig_filename).name}"
            chosen += found
        free(work, sum(info.file_size for info in chosen))
        for info in progress.track(chosen, f"unpacking {path.name}", console=console):
            archive.extract(info, work)


def _inspect(members: list, packed: int) -> None:
    """Raise ValueError at what no honest maker packs; pictures hardly shrink."""
    size, names = sum(member.file_size for member in members), set()
    if len(members) > 500_000 or size > min(1e11, 100 * packed):
        raise ValueError(f"hostile, {len(members):,} members of {decimal(size)}")
    for member in members:
        name, kind = member.orig_filename, member.external_attr >> 28  # of Unix: 4 a folder, 8 a file
        faults = {
            "leads out of its folder": PureWindowsPath(name).anchor or ".." in PureWindowsPath(name).parts,
            "is a link or a device": kind not in (0, 4, 8),
            "occurs twice but for upper and lower case": name.casefold() in names,
        }
        for fault in filter(faults.get, faults):
            raise ValueError(f"hostile, {name!r} {fault}")
        names.add(name.casefold())
