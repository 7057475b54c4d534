"""Downloads that continue where they stopped, are checked before use, and unpack only what is needed.

Everything happens in the folder .NAME.part below the data root, which is renamed once it is complete. In it
FILE.part grows beside FILE.json, the ETag, date and length that the server gave: the rest of a file is asked
for only while these stay the same.
"""

import hashlib
import json
import re
import shlex
import shutil
import sqlite3
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PureWindowsPath
from typing import BinaryIO
from urllib.error import URLError
from urllib.request import Request, urlopen
from zipfile import ZipFile, ZipInfo

from rich import progress
from rich.console import Console
from rich.filesize import decimal
from typer import BadParameter

from data import data_root

TABLE = Path(__file__).parent / "tables/downloads.toml"
RECORD = ".complete"  # what is done, a line for each file: its name, kind of digest, digest
OTHER_SOURCE = "try another source with --from PATH_OR_URL"
MAX_FAILURES = 5  # attempts in a row that bring no byte
TIMEOUT = 30  # seconds without an answer
BLOCK = 2**20  # bytes written at a time
PASSING = (408, 416, 429)  # HTTP codes below 500 that may pass: timeout, range, too many requests
MAX_MEMBERS = 500_000  # of an archive; the largest published one has 123,287 pictures
MAX_UNPACKED = 1e11  # bytes
MAX_RATIO = 100  # bytes unpacked for each one packed; pictures hardly shrink
UNIX_KINDS = (0, 4, 8)  # of an archive member: not said, a folder, a file; all others are links or devices


class DownloadError(Exception):
    """A download that cannot be completed; the message is one line: given, expected, fix."""

    exit_code = 4


@dataclass(frozen=True)
class Item:
    """One file of a download."""

    file: str  # its name here
    url: str  # where it comes from: an http address, or a path on this machine
    size: int  # bytes; 0: not published
    digest: str = ""  # its kind and its hexadecimal digits; empty: none is published
    folders: Sequence = ()  # of an archive: name here, name in the archive, number of pictures

    @property
    def is_local(self) -> bool:
        """Whether it is a file of the user, which is left where it is."""
        return not self.url.startswith(("http://", "https://"))


def described(name: str, sources: Sequence[str] = (), sha256: str | None = None) -> list[Item]:
    """Return the files of a download, with the user's sources and digest in place of the published ones.

    Raises BadParameter if a source or the digest fits none of the files.
    """
    items = [Item(**row) for row in tomllib.loads(TABLE.read_text(encoding="utf-8"))[name]]
    for source in sources:
        matching = [i for i, item in enumerate(items) if len(items) == 1 or item.file == Path(source).name]
        is_there = source.startswith(("http://", "https://")) or Path(source).is_file()
        if not matching or not is_there:
            names = " or ".join(item.file for item in items)
            raise BadParameter(f"--from {source}: expected a file or an http address of {names}")
        items[matching[0]] = replace(items[matching[0]], url=source)
    if sha256:
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            raise BadParameter(f"--sha256 {sha256}: expected 64 digits of 0-9 and a-f")
        # It belongs to the first file without a published digest, or else replaces the first one's.
        unpinned = [i for i, item in enumerate(items) if not item.digest]
        chosen = unpinned[0] if unpinned else 0
        items[chosen] = replace(items[chosen], digest=f"sha256 {sha256}")
    return items


def download(
    name: str,
    root: Path | None = None,
    sources: Sequence[str] = (),
    sha256: str | None = None,
    dry_run: bool = False,
    keep_archive: bool = False,
    quiet: bool = False,
) -> None:
    """Complete a data set or weights below the data root and say so on stdout.

    sources: paths or addresses in place of the published ones. sha256: digest of a file that has none.
    Raises DownloadError, or BadParameter for a wrong source or digest.
    """
    items = described(name, sources, sha256)
    root = data_root(root)
    work = root / f".{name}.part"
    is_dataset = len(items[0].folders) > 0
    home = root / name if is_dataset else root / "weights" / items[0].file
    last_written = home / RECORD if is_dataset else home
    if last_written.exists():
        print(f"{home} is complete")
        return
    if home.exists():
        raise DownloadError(f"{home} was not made by this command; use it as it is, or move it away")

    # What is going to happen is progress, but for --dry-run it is the result.
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, quiet=quiet)
    say = print if dry_run else console.print
    for item in items:
        size = decimal(item.size) if item.size else "size unknown"
        say(f"{item.file}: {size} from {item.url}")
    say(f"to {home}; {decimal(free_space(root))} free")
    if dry_run:
        return

    # The folder gets its name last, so that nothing incomplete can be taken for a data set.
    try:
        work.mkdir(parents=True, exist_ok=True)
        with locked(work.with_suffix(".lock")):
            for item in items:
                complete(item, work, keep_archive, console)
            finished = work if is_dataset else work / items[0].file
            home.parent.mkdir(exist_ok=True)
            finished.rename(home)
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise DownloadError(f"{error}; then the same command continues") from error
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped; the same command continues", style="yellow")
        raise
    print(f"{home} is complete")
    if is_dataset:
        print(f"next: {command('info', name, root)}, {command('train --dataset', name, root)}")


def command(verb: str, name: str, root: Path) -> str:
    """Return what to type for a data set below that data root."""
    option = "" if root == data_root() else f" --root {shlex.quote(str(root))}"
    return f"flowseg {verb} {name}{option}"


def free_space(folder: Path) -> int:
    """Return the bytes that are free where a folder is or will be."""
    place = next(place for place in (folder, *folder.parents) if place.exists())
    return shutil.disk_usage(place).free


def require_space(folder: Path, needed: int) -> None:
    """Raise OSError if there is less space than needed."""
    space = free_space(folder)
    if space < needed:
        given = f"{decimal(needed)} needed, {decimal(space)} free"
        raise OSError(f"{folder}: {given}; make room, or choose another place with --root")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that the system releases with this process, however it ends; SQLite has one everywhere."""
    with closing(sqlite3.connect(path, timeout=0)) as lock:
        try:
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            raise DownloadError(f"{path}: another process holds it; wait for it, or stop it") from error
        yield


def complete(item: Item, work: Path, keep_archive: bool, console: Console) -> None:
    """Fetch, check and unpack a file and write that down; do nothing if it is written down already."""
    record = work / RECORD
    done = record.read_text() if record.exists() else ""
    if item.file in [line.split()[0] for line in done.splitlines()]:
        return
    path = Path(item.url) if item.is_local else work / item.file
    if not path.exists():
        fetch(item, path, console)

    try:
        kind, digest = checked_digest(item, path, console)
        if item.folders:
            unpack(item, path, work, console)
    except BaseException as error:
        for here, *_ in item.folders:  # nothing that is half unpacked stays
            shutil.rmtree(work / here, ignore_errors=True)
        if isinstance(error, (OSError, KeyboardInterrupt)):
            raise  # neither of them is the fault of the file
        if not item.is_local:
            path.unlink()
        raise DownloadError(f"{path}: {error}; {OTHER_SOURCE}") from error

    if not item.digest:
        print(f"{path.name}: sha256 is {digest}, none is published; --sha256 pins it")
    if item.is_local and not item.folders:
        shutil.copyfile(path, work / item.file)
    record.write_text(f"{done}{item.file} {kind} {digest}\n")
    if item.folders and not item.is_local and not keep_archive:
        path.unlink()


def checked_digest(item: Item, path: Path, console: Console) -> tuple[str, str]:
    """Return kind and digits of a file's digest; ValueError if they are not the published ones."""
    kind, _, published = (item.digest or "sha256 ").partition(" ")
    with progress.open(path, "rb", description=f"checking {path.name}", console=console) as file:
        digest = hashlib.file_digest(file, kind).hexdigest()
    if published and published != digest:
        raise ValueError(f"{kind} is {digest}, expected {published}")
    return kind, digest


def fetch(item: Item, path: Path, console: Console) -> None:
    """Fetch a file, and try again after what may pass: up to five times in a row that bring no byte."""
    part = path.with_name(f"{path.name}.part")
    failures = 0
    columns = [*progress.Progress.get_default_columns(), progress.DownloadColumn()]
    columns.append(progress.TransferSpeedColumn())
    with open(part, "ab") as file, progress.Progress(*columns, console=console) as bar:
        task = bar.add_task(path.name)
        while True:
            before = file.tell()
            try:
                receive(item, file, bar, task)
                break
            except (URLError, HTTPException, ConnectionError, TimeoutError) as error:
                code = getattr(error, "code", None)
                may_pass = code is None or code >= 500 or code in PASSING
                if code == 416:  # the server has less than is here
                    empty(file)
                failures = 1 if file.tell() > before else failures + 1
                if failures == MAX_FAILURES or not may_pass:
                    fix = f"the same command continues, or {OTHER_SOURCE}"
                    raise DownloadError(f"{item.url}: {error}; {fix}") from error
                bar.print(f"{item.url}: {error}; trying again", style="yellow")
            time.sleep(2**failures / 2)
    part.rename(path)
    facts_file(part).unlink()


def receive(item: Item, file: BinaryIO, bar: progress.Progress, task: progress.TaskID) -> None:
    """Ask once for what the file lacks, or for everything if the server's file has changed.

    Raises ConnectionError if the server ends before the file is whole.
    """
    facts = facts_file(Path(file.name))
    known = read_facts(facts)
    have = file.tell()
    if have and known.get("length") == str(have):  # a process was stopped before it could rename the file
        return
    headers = {"User-Agent": "flowseg"} | range_headers(known, have)

    with urlopen(Request(item.url, headers=headers), timeout=TIMEOUT) as response:
        # 206 announces the rest of the file, every other answer the file from its beginning.
        given = given_facts(response)
        if response.status == 206:
            if any(value not in (None, known.get(key)) for key, value in given.items()):
                empty(file)
                raise ConnectionError("the file there has changed")
        else:
            refuse_web_page(item, response)
            empty(file)
            facts.write_text(json.dumps(given))

        # An archive and its pictures, which hardly shrink, need space at the same time.
        size = int(given["length"] or item.size)
        copies = 2 if item.folders else 1
        require_space(facts.parent, copies * size - file.tell())
        bar.update(task, total=size or None, completed=file.tell())
        while block := response.read1(BLOCK):
            file.write(block)
            bar.advance(task, len(block))
    if given["length"] and file.tell() != size:
        raise ConnectionError(f"closed after {file.tell():,} of {size:,} bytes")


def facts_file(part: Path) -> Path:
    """Return the file beside FILE.part that says what the server told about it."""
    return part.with_suffix(".json")


def read_facts(path: Path) -> dict:
    """Return what an earlier answer said about a file, or nothing if that cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def given_facts(response: HTTPResponse) -> dict:
    """Return what tells whether a server's file is still the same: ETag, date, length of the whole file."""
    length = response.headers["Content-Length"]
    if response.status == 206:  # Content-Range: bytes FIRST-LAST/LENGTH
        length = response.headers.get("Content-Range", "").rpartition("/")[2]
    return {
        "ETag": response.headers["ETag"],
        "Last-Modified": response.headers["Last-Modified"],
        "length": length,
    }


def range_headers(known: dict, have: int) -> dict:
    """Return the headers that ask for the rest after `have` bytes if the file is still the known one."""
    tag = known.get("ETag") or "W/"
    # A weak tag does not promise equal bytes, so the date is asked for in its place.
    same = known.get("Last-Modified") if tag.startswith("W/") else tag
    if not have or not same:
        return {}
    return {"Range": f"bytes={have}-", "If-Range": same}


def refuse_web_page(item: Item, response: HTTPResponse) -> None:
    """Raise DownloadError if the answer is a page to read, which servers send in place of a moved file."""
    begins_like_one = response.peek(1).lstrip()[:1] == b"<"
    if begins_like_one or response.headers.get_content_type() == "text/html":
        raise DownloadError(f"{item.url}: a web page, not the file; {OTHER_SOURCE}")


def empty(file: BinaryIO) -> None:
    """Drop what a file holds and go to its beginning."""
    file.seek(0)
    file.truncate()


def unpack(item: Item, path: Path, work: Path, console: Console) -> None:
    """Unpack the pictures of an archive's folders below `work`; ValueError for a wrong or hostile archive."""
    with ZipFile(path) as archive:
        members = archive.infolist()
        inspect(members, path.stat().st_size)

        # Each picture is written to a name of ours, never to the one that the archive asks for.
        chosen = []
        for here, there, count in item.folders:
            picture = re.compile(rf"(?:.*/)?{re.escape(there)}/[^./][^/]*\.(?:jpg|png)")
            found = [member for member in members if picture.fullmatch(member.orig_filename)]
            if len(found) != count:
                raise ValueError(f"{len(found):,} pictures in {there}, expected {count:,}")
            for member in found:
                member.filename = f"{here}/{Path(member.orig_filename).name}"
            chosen += found

        require_space(work, sum(member.file_size for member in chosen))
        for member in progress.track(chosen, f"unpacking {path.name}", console=console):
            archive.extract(member, work)


def inspect(members: list[ZipInfo], packed: int) -> None:
    """Raise ValueError at what no honest archive of `packed` bytes contains."""
    size = sum(member.file_size for member in members)
    if len(members) > MAX_MEMBERS or size > min(MAX_UNPACKED, MAX_RATIO * packed):
        raise ValueError(f"hostile, {len(members):,} members of {decimal(size)}")
    names = set()
    for member in members:
        name = member.orig_filename
        place = PureWindowsPath(name)  # takes both / and \ for a separator
        if place.anchor or ".." in place.parts:
            raise ValueError(f"hostile, {name!r} leads out of its folder")
        if member.external_attr >> 28 not in UNIX_KINDS:
            raise ValueError(f"hostile, {name!r} is a link or a device")
        if name.casefold() in names:  # some file systems take the two for one
            raise ValueError(f"hostile, {name!r} occurs twice but for upper and lower case")
        names.add(name.casefold())
