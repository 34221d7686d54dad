"""What the command says: for people, quietly, or as JSON."""

import json
import os
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

__all__ = ["Report", "printable", "reporting"]


@dataclass
class Report:
    """Says what happens, as was asked for."""

    quiet: bool = False
    as_json: bool = False
    debug: bool = False
    entries: list[dict[str, Any]] = field(default_factory=list)
    """What is printed as JSON in the end."""

    def say(self, text: str) -> None:
        """Say something that nobody needs who wants it quiet, or who reads JSON."""
        if not self.quiet and not self.as_json:
            _print(text)

    def answer(self, text: str, entry: dict[str, Any]) -> None:
        """Give what was asked for: the text, or the same as an entry of the JSON."""
        if self.as_json:
            self.entries.append(entry)
        else:
            _print(text)

    def done(self, text: str, entry: dict[str, Any]) -> None:
        """Say what has been done."""
        self.entries.append(entry)
        self.say(text)

    def warn(self, text: str) -> None:
        """Say what everybody must know."""
        typer.echo(printable(text), err=True)

    def failed(self, name: str, error: Exception, is_explained: bool) -> None:
        """Say that a case failed: in a line, and with the traceback where voxloom did not expect it, or that was asked for."""
        if self.debug or not is_explained:
            traceback.print_exception(error)
        text = ". ".join([str(error) or type(error).__name__, *getattr(error, "__notes__", ())])
        self.entries.append({"case": name, "state": "failed", "error": text, "kind": type(error).__name__})
        self.warn(f"voxloom: {name} failed: {text}")

    def failed_file(self, path: Path, error: Exception) -> None:
        """Say what is wrong with one of several files."""
        self.entries.append({"file": str(path), "state": "failed", "error": str(error), "kind": type(error).__name__})
        self.warn(f"voxloom: {error}")

    def end(self) -> None:
        """Print the JSON, if that was asked for."""
        if self.as_json:
            _print(json.dumps(self.entries, indent=1))
            self.entries.clear()


reporting = Report()
"""How this run of the command reports; the command's own options set it."""


def _print(text: str) -> None:
    """Print a text; nothing more once nobody reads it, which is no error of what is said."""
    try:
        typer.echo(printable(text))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def printable(text: str) -> str:
    """Give a text without the bytes of names of files that are no text."""
    return text.encode("utf-8", "replace").decode()
