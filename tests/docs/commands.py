"""The `megatron-fipo` commands of a shell block, taken apart as the shell would, and parsed without being run."""

from __future__ import annotations

import re
import shlex
from typing import Any

import typer

from megatron_fipo.cli import app
from megatron_fipo.config import Config
from megatron_fipo.config.setting import settings
from tests.support.markdown import ROOT

_END = re.compile(r"[|&;<>()]+")
_DICTIONARIES = ("model.overrides", "data.validation", "data.chat_template_kwargs")  # settings with keys of their own


def commands(text: str) -> list[list[str]]:
    """Return the arguments of every `megatron-fipo` in a block: called itself, as a module, or in a batch script."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if not _END.fullmatch(word):
                words.append(word)
                continue
            if (arguments := _arguments(words)) is not None:
                found.append(arguments)
            words = []
    return found


def _arguments(words: list[str]) -> list[str] | None:
    """Return what `megatron-fipo` gets from one simple command; None if it is another program's."""
    for place, word in enumerate(words):
        if word.rpartition("/")[2] == "megatron-fipo" or (word == "megatron_fipo.cli" and words[place - 1] == "-m"):
            return words[place + 1 :]
        if re.fullmatch(r"slurm/\w+\.sh", word):
            return _of_script(word) + [argument for argument in words[place + 1 :] if argument]
    return None


def _of_script(script: str) -> list[str]:
    """Return the arguments that a batch script puts before its own."""
    text = (ROOT / script).read_text()
    match = re.search(r"^(?!#).*?megatron-fipo ((?:(?!\"\$).)*)\"\$", text.replace("\\\n", " "), re.MULTILINE)
    assert match is not None, f"{script} has no megatron-fipo command"
    return match[1].split()


def parse(arguments: list[str]) -> list[str]:
    """Parse the arguments of one command, and return the settings that it changes.

    Raises:
        click's UsageError: no such subcommand or option, or a value of the wrong type.
        ValueError: a setting that does not exist.
    """
    command: Any = typer.main.get_command(app)
    context = command.make_context("megatron-fipo", list(arguments))
    while hasattr(command, "commands"):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)
    given = [*(context.params.get("overrides") or []), str(context.params.get("config") or "")]
    settings = [text.partition("=")[0] for text in given if re.match(r"[\w.]+=", text)]
    for setting in settings:
        _check(setting)
    return settings


def _check(setting: str) -> None:
    """Raise ValueError unless a setting exists."""
    if setting == "checkpoint" or setting.startswith(_DICTIONARIES):
        return
    if setting not in {s.name for s in settings(Config)}:
        raise ValueError(f"{setting} is no setting")
