"""Downloads that continue where they stopped, are checked before use, and unpack only what is needed.

Everything temporary is in the folder .NAME.part below the data root, which is renamed once it is complete. In
it FILE.part grows beside FILE.json, its address and the ETag, date and length that the server gave: the rest
of a file is asked for only while these stay the same. Nothing that a server or an archive says is believed
unchecked.
"""

import hashlib
import json
import re
import shlex
import shutil
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from http.client import HTTPException, HTTPResponse, InvalidURL
from pathlib import Path, PureWindowsPath
from typing import BinaryIO
from urllib.error import URLError
from urllib.request import HTTPRedirectHandler, Request, build_opener
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

from rich import progress
from rich.console import Console
from rich.filesize import decimal
from typer import BadParameter

from data import data_root, nearest
from flowseg_tools.terminal import printable

TABLE = Path(__file__).parent / "tables/downloads.toml"
RECORD = ".complete"  # what is done, a line for each file: its name, kind of digest, digest
WEB = ("http://", "https://")
OTHER_SOURCE = "try another source with --from PATH_OR_URL"
MAX_FAILURES = 5  # attempts in a row that bring nothing new
TIMEOUT = 30  # seconds without an answer
BLOCK = 2**20  # bytes written at a time
PASSING = (408, 416, 429)  # HTTP codes below 500 that may pass: timeout, range, too many requests
MAX_BYTES = 20_000_000_000  # of a file whose size is not published
TEXT = bytes(range(32, 256)) + b"\t\n\r\f"  # bytes of a text; archives and weights begin with others, too
MAX_MEMBERS = 500_000  # of an archive; the largest published one has 123,287 pictures
MAX_UNPACKED = 1e11  # bytes
MAX_RATIO = 100  # bytes unpacked for each one packed; pictures hardly shrink
UNIX_KINDS = (0, 4, 8)  # of an archive member: not said, a folder, a file; all others are links or devices


class DownloadError(Exception):
    """A download that cannot be completed; the message is one line: given, expected, fix."""

    exit_code = 4


# What there is -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """One file of a download."""

    file: str  # its name here
    url: str  # where it comes from: an http address, or a path on this machine
    size: int  # bytes, rounded where no exact figure is published; 0: not published
    digest: str = ""  # its kind and its hexadecimal digits; empty: none is published
    folders: Sequence = ()  # of an archive: name here, name in the archive, number of pictures

    @property
    def is_local(self) -> bool:
        """Whether it is a file of the user, which is left where it is."""
        return not self.url.startswith(WEB)


def read_table() -> dict[str, dict]:
    """Return what can be downloaded: for each name what it is, its licence and its files."""
    return tomllib.loads(TABLE.read_text(encoding="utf-8"))


def described(name: str, sources: Sequence[str] = (), sha256: str | None = None) -> list[Item]:
    """Return the files of a download, with the user's sources and digest in place of the published ones.

    Raises BadParameter if there is no such download, or if a source or the digest fits none of its files.
    """
    table = read_table()
    if name not in table:
        raise BadParameter(f"{name}: expected {', '.join(table)}{nearest(name, table)}")
    items = [Item(**row) for row in table[name]["files"]]
    for source in sources:
        matching = [i for i, item in enumerate(items) if len(items) == 1 or item.file == Path(source).name]
        if not matching or not (source.startswith(WEB) or Path(source).is_file()):
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


def home_of(name: str, items: list[Item], root: Path) -> Path:
    """Return where a download is when it is complete: a folder of pictures, or a file of weights."""
    return root / name if items[0].folders else root / "weights" / items[0].file


def is_complete(home: Path) -> bool:
    """Return whether a download is there."""
    return home.is_file() or (home / RECORD).is_file()


def listing(root: Path | None = None) -> list[dict[str, str]]:
    """Return a row for every download: name, size, here, about, licence, terms (an address)."""
    root = data_root(root)
    rows = []
    for name, entry in read_table().items():
        items = described(name)
        here = "yes" if is_complete(home_of(name, items, root)) else "no"
        if here == "no" and (root / f".{name}.part").exists():
            here = "in part"
        sizes = [item.size for item in items]
        row = {"name": name, "size": decimal(sum(sizes)) if all(sizes) else "unknown", "here": here}
        rows.append(row | {key: entry[key] for key in ("about", "licence", "terms")})
    return rows


# The command ---------------------------------------------------------------------------------------------


def download(
    name: str, root: Path | None = None, sources: Sequence[str] = (), sha256: str | None = None,
    max_bytes: int | None = None, dry_run: bool = False, keep_archive: bool = False, quiet: bool = False,
) -> None:  # fmt: skip
    """Complete a data set or weights below the data root and say so on stdout.

    sources: paths or addresses in place of the published ones. sha256: digest of a file that has none.
    max_bytes: the largest file that is accepted, by default a little more than its published size.
    Raises DownloadError, or BadParameter for a wrong name, source or digest.
    """
    items = described(name, sources, sha256)
    root = data_root(root)
    work = root / f".{name}.part"
    home = home_of(name, items, root)
    if is_complete(home):
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
        prepare(work)
        with locked(work):
            free_space(root, space_needed(items, work, keep_archive))
            for item in items:
                complete(item, work, max_bytes, keep_archive, console)
            home.parent.mkdir(exist_ok=True)
            (work if items[0].folders else work / items[0].file).rename(home)
            discard(work)
    except OSError as error:
        raise DownloadError(f"{error}; then the same command continues") from error
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped; the same command continues", style="yellow")
        raise
    print(f"{home} is complete")
    if items[0].folders:
        option = "" if root == data_root() else f" --root {shlex.quote(str(root))}"
        print(f"next: flowseg info {name}{option}, flowseg train --dataset {name}{option}")


def complete(item: Item, work: Path, max_bytes: int | None, keep_archive: bool, console: Console) -> None:
    """Fetch, check and unpack a file and write that down; do nothing if it is written down already."""
    if is_finished(item, work):
        return
    path = Path(item.url) if item.is_local else work / item.file
    if not path.exists():
        fetch(item, path, max_bytes, console)

    # A file that is wrong does not stay, nor does what was unpacked from it.
    try:
        digest = checked_digest(item, path, console)
        if item.folders:
            unpack(item, path, work, console)
    except BaseException as error:
        for here, *_ in item.folders:
            discard(work / here)
        if isinstance(error, (OSError, KeyboardInterrupt)):
            raise  # neither of them is the fault of the file
        if not item.is_local:
            path.unlink()
        raise DownloadError(f"{path}: {error}; {OTHER_SOURCE}") from error

    # Weights of the user are copied; an archive of the user is left alone, one of ours has served.
    if not item.digest:
        print(f"{path.name}: {digest.replace(' ', ' is ')}, none is published; --sha256 pins it")
    if item.is_local and not item.folders:
        shutil.copyfile(path, beside(work / item.file, ".part"))
        beside(work / item.file, ".part").rename(work / item.file)
    with open(work / RECORD, "a", encoding="utf-8") as record:
        record.write(f"{item.file} {digest}\n")
    if item.folders and not item.is_local and not keep_archive:
        path.unlink()


def is_finished(item: Item, work: Path) -> bool:
    """Return whether a file was checked and unpacked; with another digest than it should have it was not."""
    lines = (work / RECORD).read_text(encoding="utf-8", errors="replace").splitlines()
    return any(line.startswith(f"{item.file} {item.digest}") for line in lines)


def checked_digest(item: Item, path: Path, console: Console) -> str:
    """Return kind and digits of a file's digest; ValueError if they are not the published ones."""
    kind, _, published = (item.digest or "sha256 ").partition(" ")
    with progress.open(path, "rb", description=f"checking {path.name}", console=console) as file:
        digest = hashlib.file_digest(file, kind).hexdigest()
    if published and published != digest:
        raise ValueError(f"{kind} is {digest}, expected {published}")
    return f"{kind} {digest}"


# Temporary files and space -------------------------------------------------------------------------------


def prepare(work: Path) -> None:
    """Make the folder of temporary files; links and pipes at their names are removed, never followed."""
    if work.is_symlink() or not work.is_dir():
        discard(work)
    work.mkdir(parents=True, exist_ok=True)
    for path in work.iterdir():
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            discard(path)


def discard(path: Path) -> None:
    """Remove a file or folder of this module, if it is there; a link is removed, never followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def beside(path: Path, suffix: str) -> Path:
    """Return the name of what belongs to a file: its growing `.part`, or `.json`, what its server said."""
    return path.with_name(path.name + suffix)


@contextmanager
def locked(work: Path) -> Iterator[None]:
    """Keep other processes out of the temporary folder; the system ends that with this process."""
    with open(work / RECORD, "a") as record:
        try:
            import fcntl

            fcntl.flock(record, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass  # Windows has no such lock
        except BlockingIOError as error:
            raise DownloadError(f"{work}: another process uses it; wait for it, or stop it") from error
        yield


def free_space(folder: Path, needed: int = 0) -> int:
    """Return the bytes that are free where a folder is or will be; OSError if fewer than needed are."""
    place = next(place for place in (folder, *folder.parents) if place.exists())
    space = shutil.disk_usage(place).free
    if space < needed:
        given = f"{decimal(needed)} needed, {decimal(space)} free"
        raise OSError(f"{folder}: {given}; make room, or choose another place with --root")
    return space


def space_needed(items: list[Item], work: Path, keep_archive: bool) -> int:
    """Return the bytes that the rest of a download takes, as far as sizes are published.

    Pictures take about as much as their archive, which is removed when it is unpacked.
    """
    rest = [item for item in items if not is_finished(item, work)]
    pictures = sum(item.size for item in rest if item.folders)
    copies = [item.size for item in rest if not (item.is_local and item.folders)]
    archives = sum(copies) if keep_archive else max(copies, default=0)
    here = [path.stat().st_size for item in rest for path in work.glob(f"{item.file}*") if path.is_file()]
    return pictures + archives - sum(here)


# Fetching ------------------------------------------------------------------------------------------------


def fetch(item: Item, path: Path, max_bytes: int | None, console: Console) -> None:
    """Fetch a file, and try again after what may pass: up to five times in a row that bring nothing new."""
    expected = round(1.1 * item.size) + BLOCK if item.size else MAX_BYTES
    limit = max_bytes or expected
    columns = [*progress.Progress.get_default_columns(), progress.DownloadColumn()]
    columns.append(progress.TransferSpeedColumn())
    with open(beside(path, ".part"), "ab") as file, progress.Progress(*columns, console=console) as bar:
        show = partial(bar.update, bar.add_task(path.name))
        failures = 0
        most = file.tell()
        while True:
            try:
                receive(item, path, file, limit, show)
                break
            except (ValueError, OverflowError, InvalidURL) as error:  # an address or header without sense
                raise DownloadError(f"{item.url}: {error}; {OTHER_SOURCE}") from error
            except (URLError, HTTPException, ConnectionError, TimeoutError) as error:
                code = getattr(error, "code", None)
                may_pass = code is None or code >= 500 or code in PASSING
                if code == 416:  # the server has less than is here
                    empty(file)
                # Bytes that had come before, and were lost since, are no progress.
                failures = 1 if file.tell() > most else failures + 1
                most = max(most, file.tell())
                if failures == MAX_FAILURES or not may_pass:
                    fix = f"the same command continues, or {OTHER_SOURCE}"
                    raise DownloadError(f"{item.url}: {error}; {fix}") from error
                bar.print(printable(f"{item.url}: {error}; trying again"), style="yellow")
            time.sleep(2**failures / 2)
    beside(path, ".part").rename(path)
    beside(path, ".json").unlink(missing_ok=True)


def receive(item: Item, path: Path, file: BinaryIO, limit: int, show: Callable) -> None:
    """Ask once for what the file lacks, or for everything if the server's file has changed.

    Raises ConnectionError if the server ends before the file is whole, ValueError for a header without sense,
    and DownloadError for another answer than a file of at most `limit` bytes.
    """
    known = read_facts(path)
    if known.get("url") != item.url and not item.digest:  # another server's file may be another one
        known = {}
    have = file.tell()
    if have and known.get("length") == str(have):  # a process was stopped before it could rename the file
        return
    request = Request(item.url, headers={"User-Agent": "flowseg"} | range_headers(known, have))
    with build_opener(WebRedirects).open(request, timeout=TIMEOUT) as response:
        # The server sends the rest, or if its file is another one by now, that file from its beginning.
        first, facts = given_facts(response)
        block = b""
        if response.status == 206:
            if not have or first != have or any(known.get(key) != facts[key] for key in facts):
                empty(file)
                raise ConnectionError("the server sent another part, or its file has changed")
        else:
            block = response.read(512)
            refuse_other_content(item, response, block)
            empty(file)
            beside(path, ".json").write_text(json.dumps(facts | {"url": item.url}), encoding="utf-8")

        # Size and space are checked before the first byte is written, the size again with every block.
        length = int(facts.get("length", 0))
        refuse_more(item, length, limit)
        copies = 2 if item.folders else 1  # an archive and its pictures
        free_space(path.parent, copies * (length or item.size) - file.tell())
        block = block or response.read1(BLOCK)
        while block:
            refuse_more(item, file.tell() + len(block), limit)
            file.write(block)
            show(total=length or item.size or None, completed=file.tell())
            block = response.read1(BLOCK)
    if length and file.tell() != length:
        raise ConnectionError(f"closed after {file.tell():,} of {length:,} bytes")


class WebRedirects(HTTPRedirectHandler):
    """Redirects are followed to http and https only."""

    def redirect_request(self, request, answer, code, reason, headers, address) -> Request | None:
        """Return the request that a redirect asks for; its text, which may be of any size, is not read."""
        answer.close()
        if not address.startswith(WEB):
            raise DownloadError(f"{request.full_url} leads to {address}; {OTHER_SOURCE}")
        return super().redirect_request(request, answer, code, reason, headers, address)


def read_facts(path: Path) -> dict[str, str]:
    """Return what an earlier answer said about a file, or nothing if that cannot be read."""
    with suppress(OSError, ValueError, AttributeError, RecursionError):
        facts = json.loads(beside(path, ".json").read_text(encoding="utf-8"))
        return {key: value for key, value in facts.items() if isinstance(value, str)}
    return {}


def range_headers(known: dict[str, str], have: int) -> dict[str, str]:
    """Return the headers that ask for the rest after `have` bytes if the file is still the known one."""
    tag = known.get("ETag", "W/")
    # A weak tag does not promise equal bytes, so the date is asked for in its place.
    same = known.get("Last-Modified") if tag.startswith("W/") else tag
    return {"Range": f"bytes={have}-", "If-Range": same} if have and same else {}


def given_facts(response: HTTPResponse) -> tuple[int, dict[str, str]]:
    """Return the first byte of an answer, and ETag, date and length of the whole file, as far as it has them.

    The first byte of a part is -1 if the answer does not say it. Raises ValueError for a length that is none.
    """
    first = 0
    length = response.headers["Content-Length"]
    if response.status == 206:
        part = re.fullmatch(r"bytes ([0-9]+)-[0-9]+/([0-9]+)", response.headers.get("Content-Range", ""))
        first = int(part[1]) if part else -1
        length = part[2] if part else None
    elif length is not None and not re.fullmatch("[0-9]+", length):
        raise ValueError(f"Content-Length is {length!r}, expected a number")
    facts = {name: response.headers[name] for name in ("ETag", "Last-Modified")} | {"length": length}
    return first, {name: value for name, value in facts.items() if value is not None}


def refuse_other_content(item: Item, response: HTTPResponse, begin: bytes) -> None:
    """Raise DownloadError if an answer that begins like this is no file of pictures or weights.

    Servers send pages to read in place of a file that has moved, and some compress what they send.
    """
    kind = response.headers.get("Content-Type", "")
    length = response.headers["Content-Length"]
    reason = ""
    if response.status != 200:
        reason = f"the server answered {response.status} {response.reason}"
    elif not begin and length in (None, "0"):
        reason = "an empty file"
    elif "html" in kind or "json" in kind or (begin and not begin.translate(None, TEXT)):
        reason = "a text or web page, not the file"
    elif begin.startswith(b"\x1f\x8b") or response.headers.get("Content-Encoding", "identity") != "identity":
        reason = "a compressed answer, not the file"
    elif length is None and not (response.chunked or item.digest or item.folders):
        reason = "the server gives no length, so a cut would not be seen; pin the file with --sha256"
    if reason:
        raise DownloadError(f"{item.url}: {reason}; {OTHER_SOURCE}")


def refuse_more(item: Item, size: int, limit: int) -> None:
    """Raise DownloadError if a file is larger than expected."""
    if size > limit:
        given = f"at least {decimal(size)}, expected at most {decimal(limit)}"
        raise DownloadError(f"{item.url}: {given}; pass --max-bytes {size} if that is right")


def empty(file: BinaryIO) -> None:
    """Drop what a file holds and go to its beginning."""
    file.seek(0)
    file.truncate()


# Unpacking -----------------------------------------------------------------------------------------------


def unpack(item: Item, path: Path, work: Path, console: Console) -> None:
    """Unpack the pictures of an archive's folders below `work`; ValueError for a wrong or hostile archive."""
    with ZipFile(path) as archive:
        members = archive.infolist()
        inspect(members, path.stat().st_size)

        # Each picture is written to a name of ours, never to the one that the archive asks for.
        chosen = {}
        for here, there, count in item.folders:
            picture = re.compile(rf"(?:.*/)?{re.escape(there)}/[^./][^/]*\.(?:jpg|png)")
            found = [member for member in members if picture.fullmatch(member.orig_filename)]
            for member in found:
                member.filename = f"{here}/{Path(member.orig_filename).name}"
            names = {member.filename.casefold(): member for member in found}
            if len(found) != count:
                raise ValueError(f"{len(found):,} pictures in {there}, expected {count:,}")
            if len(names) != count:
                raise ValueError(f"{len(names):,} names of {count:,} pictures in {there}, expected one each")
            chosen |= names

        # Nothing is left here of a process that was killed while it unpacked.
        free_space(work, sum(member.file_size for member in chosen.values()))
        for here, *_ in item.folders:
            discard(work / here)
        for member in progress.track(chosen.values(), f"unpacking {path.name}", console=console):
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
        reason = ""
        if not name.isprintable():
            reason = "has control characters"
        elif place.anchor or ".." in place.parts:
            reason = "leads out of its folder"
        elif member.external_attr >> 28 not in UNIX_KINDS:
            reason = "is a link or a device"
        elif member.compress_type not in (ZIP_STORED, ZIP_DEFLATED):  # others may take gigabytes of memory
            reason = "is packed in an unusual way"
        elif name.casefold() in names:  # some file systems take the two for one
            reason = "occurs twice but for upper and lower case"
        if reason:
            raise ValueError(f"hostile, {name!r} {reason}")
        names.add(name.casefold())
