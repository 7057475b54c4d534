"""The terminal: streams whose failures never end the work, and errors in one line."""

import os
from contextlib import suppress
from pathlib import Path

HINTS = {  # what to do about errors that come from elsewhere, by a word of them
    "Too many open files": "raise the limit of the shell (ulimit -n), or lower --workers",
    "Errno": "check the path and the space left there",
    "memory": "lower --batch-size or --crop-size in train, --short-side elsewhere",
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


def describe_error(error: Exception) -> tuple[str, int]:
    """One line and the exit code of an error."""
    code = getattr(error, "exit_code", 2 if isinstance(error, OSError) else 1)
    text = str(error)
    if hasattr(error, "format_message"):  # an error of the command line's library
        text = error.format_message()
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
    process = ""
    if "RANK" in os.environ:  # of torchrun
        process = f"process {os.environ['RANK']}: "
    return printable(f"error: {process}{' '.join(text.split())}"), code
