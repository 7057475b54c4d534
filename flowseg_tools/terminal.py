"""The terminal: streams whose failures never end the work, bars, results in words, errors in one line."""

import json
import os
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rich import progress
from rich.console import Console
from rich.table import Column, Table

HINTS = {  # what to do about errors that come from elsewhere, by a word of them
    "Too many open files": "raise the limit of the shell (ulimit -n), or lower --workers",
    "Errno": "check the path and the space left there",
    "memory": "lower --batch-size or --crop-size, or --set activation_checkpointing=true in train; lower "
    "--short-side elsewhere",
    "DataLoader": "check the storage, or try --workers 0",
    "onnection closed": "another process has failed: see its error",
}


class Steady:
    """A stream whose failures never end the work: a full disk, a closed terminal, a reader that has gone."""

    def __init__(self, stream):
        if stream is None:  # it was closed before we began
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        self._stream = stream
        self.error: Exception | None = None
        with suppress(AttributeError):  # a stream in memory encodes nothing
            stream.reconfigure(errors="backslashreplace")  # what it cannot encode is shown escaped

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or remember the error; what was to be written is then lost."""
        try:
            return self._stream.write(text)
        except (OSError, ValueError) as error:
            self.error = error
            return len(text)

    def flush(self) -> None:
        """Flush, or remember the error."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self.error = error

    def close_quietly(self) -> bool:
        """Flush for the last time; whether something was lost that somebody was there to read."""
        self.flush()
        if self.error:  # nothing may be flushed there again when Python ends
            with suppress(OSError):  # of a stream without a file
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        return self.error is not None and not isinstance(self.error, BrokenPipeError)


def printable(text: object) -> str:
    """A text whose control characters are escaped, since it may quote a file or a server."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(text))


# Consoles, bars, results ----------------------------------------------------------------------------------


def make_console(stderr: bool = False, quiet: bool = False) -> Console:
    """A console whose lines break at words where somebody watches, and stay whole in a file or a pipe."""
    stream = sys.stderr if stderr else sys.stdout
    watched = stream is not None and stream.isatty()
    width = None if watched else 10_000  # whatever $COLUMNS says, no cell of a table is cut in a file
    return Console(
        stderr=stderr, soft_wrap=not watched, width=width, highlight=False, markup=False, quiet=quiet
    )


def make_bar(console: Console, quiet: bool = False) -> progress.Progress:
    """Bars with a count and the time left, known from the second step on; only where somebody watches."""
    columns = [
        progress.BarColumn(16),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(compact=True),
        progress.TextColumn("{task.description}"),
    ]
    hidden = quiet or not console.is_terminal
    return progress.Progress(*columns, console=console, transient=True, disable=hidden)


def tracked(bar: progress.Progress, indices: Sequence[int], title: str) -> Iterator[int]:
    """Go through indices under a bar of their own, which vanishes at the end."""
    task = bar.add_task(title, total=len(indices))
    try:
        for index in indices:
            yield index
            bar.advance(task)
    finally:
        bar.remove_task(task)


def track(indices: Sequence[int], title: str, quiet: bool = False) -> Iterator[int]:
    """Go through indices under a bar, which vanishes at the end."""
    with make_bar(make_console(stderr=True, quiet=quiet)) as bar:
        yield from tracked(bar, indices, title)


@contextmanager
def waiting(title: str, quiet: bool = False) -> Iterator[None]:
    """Show that something is at work of which nobody knows how far it is."""
    with make_console(stderr=True, quiet=quiet).status(title):
        yield


def percent(share: float | None, digits: int = 1) -> str:
    """A share as text; None is the score of a class that does not occur."""
    return "absent" if share is None else f"{share:.{digits}%}"


def print_table(console: Console, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print names to the left and numbers to the right; as wide as needed when piped."""
    table = Table(columns[0], *(Column(name, justify="right") for name in columns[1:]), box=None)
    for row in rows:
        table.add_row(*(printable(cell) for cell in row))
    console.print(table)


def in_words(value: object) -> str:
    """A value of JSON as people write it: lists and tables on one line, of a long list its beginning."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {in_words(entry)}" for name, entry in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        more = f" and {len(value) - 12} more" if len(value) > 12 else ""
        return (", ".join(in_words(entry) for entry in value[:12]) or "none") + more
    if isinstance(value, float):
        return f"{value:.4g}"
    return "none" if value in (None, "") else str(value)


def print_lines(console: Console, lines: Iterable[str]) -> None:
    """Print lines, each in one piece."""
    for line in lines:
        console.print(line, soft_wrap=True)


def print_json(facts: dict | list) -> None:
    """Print JSON, and nothing else, to stdout."""
    sys.stdout.write(json.dumps(facts, indent=2, allow_nan=False) + "\n")


def print_facts(console: Console, facts: dict) -> None:
    """Print what is known of a machine, a run or a checkpoint, a line for each fact."""
    for name, value in facts.items():
        score = name.endswith(("IoU", "Acc")) and value is not None
        text = percent(value) if score else in_words(value)
        line = printable(f"{name.replace('_', ' ')}: {text}")
        console.print(line, soft_wrap=name == "continue" or None)  # a command stays in one piece


def print_scores(console: Console, facts: dict, classes: Sequence[dict]) -> None:
    """Print the scores of an evaluation: of every class, of all of them, and their protocol."""
    rows = [(c["name"], percent(c["IoU"]), percent(c["Acc"]), f"{c['pixels']:,}") for c in classes]
    print_table(console, ("class", "IoU", "accuracy", "labelled pixels"), rows)
    scores = [f"{name} {percent(facts[name], 2)}" for name in ("mIoU", "aAcc", "mAcc")]
    console.print("  ".join(scores), style="bold")
    console.print("protocol: " + ", ".join(f"{key} {value}" for key, value in facts["protocol"].items()))


def print_dataset(console: Console, facts: dict) -> None:
    """Print what `check.describe` found: label table, share of every class, counts and problems."""
    parts = facts["splits"]
    rows = []
    for entry in facts["classes"]:
        row = [entry["name"], str(entry["id"]), str(entry["raw"])]
        for part in parts.values():
            total = sum(part["pixels"])
            row.append(f"{part['pixels'][entry['id']] / total:.2%}" if total else "-")
        rows.append(row)
    print_table(console, ("class", "id", "raw value", *parts), rows)
    for split, part in parts.items():
        total = part["ignored"] + sum(part["pixels"])
        ignored = part["ignored"] / max(1, total)
        counts = f"{part['images']:,} images, {part['checked']:,} checked, {ignored:.1%} ignored"
        console.print(f"{split}: {counts}")
    for note in facts["notes"]:
        console.print(printable(f"note: {note}"), style="yellow")
    for problem in facts["problems"]:
        console.print(printable(f"problem: {problem}"), style="red")
    console.print(f"problems: {len(facts['problems']) or 'none'}")


def print_downloads(console: Console, rows: Sequence[dict]) -> None:
    """Print what can be downloaded, and below it the licence of each."""
    table = Table("name", Column("size", justify="right"), "here", "what it is", box=None)
    licences: dict[str, list[str]] = {}
    for row in rows:
        table.add_row(row["name"], row["size"], row["here"], row["about"])
        licences.setdefault(f"{row['licence']}, {row['terms']}", []).append(row["name"])
    console.print(table)
    for licence, names in licences.items():
        console.print(f"{', '.join(names)}: {licence}")


# Errors --------------------------------------------------------------------------------------------------


def habit(error: Exception) -> str:
    """What an option or a command that is unknown here, but usual elsewhere, is called here; or nothing."""
    context = getattr(error, "ctx", None)
    kinds = r"(No such option:|No such command|Got unexpected extra argument\S*)"
    unknown = re.match(kinds + r" [('\"]?([^\s'\")]+)", str(error))
    if not context or not unknown:
        return ""
    kind, word = unknown.groups()
    known = {"--help", *getattr(context.command, "commands", ())}
    for parameter in context.command.params:
        known.update(parameter.opts)
    if kind == "No such command" and Path(word).is_file():
        return f"did you mean flowseg segment {word}?"
    if kind.startswith("Got unexpected") and "--dataset" in known:
        return f"a data set is named with --dataset {word}"
    table = tomllib.loads((Path(__file__).parent / "tables/habits.toml").read_text(encoding="utf-8"))
    for meaning, words in (table["commands"] | table["options"]).items():
        here = meaning.replace(",", " ").split()[0] in known
        if here and word.replace("_", "-").lower() in words.split():
            return f"here it is {meaning}"
    return ""


def describe_error(error: Exception) -> tuple[str, int]:
    """One line and the exit code of an error."""
    code = getattr(error, "exit_code", 2 if isinstance(error, OSError) else 1)
    text = str(error)
    if hasattr(error, "format_message"):  # an error of the command line's library
        text = error.format_message().replace("Value error, ", "")
        if hasattr(error.__context__, "errors"):  # of a value that is of another kind, or out of range
            given = str(error.__context__.errors()[0]["input"])
            text = text.partition(", unable")[0].replace("Input should be", f"{given!r}; expected")
        if hint := habit(error):
            text = f"{error.message.rstrip('.')}; {hint}"
    if not hasattr(error, "exit_code"):
        frame = error.__traceback__
        while frame.tb_next:
            frame = frame.tb_next
        place = f"{Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}"
        hint = f"at {place}; this may be a bug: flowseg --debug COMMAND shows more"
        for word, advice in HINTS.items():
            if word in text:
                hint = advice
                break
        text = f"{type(error).__name__}: {text}; {hint}"
    process = f"process {os.environ['RANK']}: " if "RANK" in os.environ else ""  # of torchrun
    return printable(f"error: {process}{' '.join(text.split())}"), code
