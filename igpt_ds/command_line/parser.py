"""An argument parser that answers mistakes in one line with the nearest flags or values, and completes words in a shell."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from igpt_ds.command_line.nearest import did_you_mean, nearest_flags, unknown_value
from igpt_ds.errors import InputError

_HELP = "--help lists all"
_KINDS = {int: "a whole number", float: "a number"}


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the docstring's line breaks. Adds each flag's default, except None, False, [] and what the help text names."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        named = "(default" in (action.help or "") or action.default in (None, []) or action.default is False
        if not named and isinstance(action.default, list | tuple):
            return f"{action.help} (default: {' '.join(map(str, action.default))})".replace("%", "%%")
        return action.help if named else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Refuses abbreviated flags. Every mistake is an InputError of one line.

    Args:
        description: the program's docstring.
    """

    def __init__(self, description: str) -> None:
        super().__init__(prog=program(), description=description, formatter_class=Formatter, allow_abbrev=False)
        self._negative_number_matcher = re.compile(r"^-(inf|(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?)$")  # argparse's has no exponent

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """The values of the flags. An unknown flag is reported before a missing one, which may be the same misspelt."""
        words = list(sys.argv[1:] if args is None else args)
        if "_ARGCOMPLETE" in os.environ:  # a shell asks which words may follow
            import argcomplete

            argcomplete.autocomplete(self)
        if {"-h", "--help"} & set(_before_dashes(words)):  # whatever else is wrong
            self.print_help()
            self.exit()
        self._refuse_unknown(words)
        found, more = self.parse_known_args(words, namespace)
        if more:
            raise InputError(f"unexpected {', '.join(map(repr, more))}: no flag takes it ({_HELP})")
        return found

    def _refuse_unknown(self, words: Sequence[str]) -> None:
        known = self._option_string_actions
        flags = [word.partition("=")[0] for word in _before_dashes(words)]
        unknown = [flag for flag in dict.fromkeys(flags) if flag not in known and _is_flag(flag)]
        if unknown:
            long = [flag for flag in known if flag.startswith("--")]
            lines = [f"unknown flag {flag}{did_you_mean(nearest_flags(flag, long))}" for flag in unknown]
            raise InputError(f"{'; '.join(lines)} ({_HELP})".replace("?;", "?"))

    def error(self, message: str) -> NoReturn:
        """Raises argparse's message as an InputError."""
        message = re.sub(r"^the following arguments are required: ", "missing: ", message)
        message = re.sub(r"^one of the arguments (.+) is required$", lambda found: _one_of(found[1]), message)
        message = re.sub(r"^argument (.+?): expected (.*?)arguments?$", r"\1 needs \2value(s)", message)
        message = re.sub(r"\bargument (?=-)", "", message.replace("one value(s)", "a value"))
        raise InputError(f"{message} ({_HELP})")

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        kind = self._registry_get("type", action.type, action.type)
        flag = _name(action)
        if kind is Path and not arg_string:  # would be the current directory; a variable of the shell may be unset
            raise InputError(f"{flag} '' is empty; name a file or a directory")
        try:
            value = kind(arg_string)
        except (argparse.ArgumentTypeError, InputError) as error:
            raise InputError(f"{flag}: {error}") from None
        except (TypeError, ValueError):
            raise InputError(f"{flag} {arg_string!r} must be {_KINDS.get(kind, 'as its help says')} ({_HELP})") from None
        if isinstance(value, int) and abs(value) >= 1 << 63:  # numpy and torch do not hold it
            raise InputError(f"{flag} {arg_string} must be below 2^63")
        return value

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            raise InputError(f"{_name(action)} {unknown_value(str(value), known)}")

    def format_help(self) -> str:
        """The help. Its usage names only what is required; a list of all flags follows it anyway."""
        groups = [group for group in self._mutually_exclusive_groups if group.required]
        either = [action for group in groups for action in group._group_actions]
        needed = [action for action in self._actions if action.required or not action.option_strings or action in either]
        formatter = self._get_formatter()
        formatter.add_usage(None, needed, groups, prefix="")
        self.usage = f"{formatter.format_help().strip()} [flags]".replace("%", "%%")
        return super().format_help()


def switch(group: argparse._ActionsContainer, flag: str, default: bool | None, text: str) -> None:
    """Adds `--flag` and `--no-flag`. The text names the default, which some Pythons would add a second time."""
    group.add_argument(flag, action=argparse.BooleanOptionalAction, default=default).help = text


class Print(argparse.Action):
    """A flag that prints a text and ends the program, as --help does."""

    def __init__(self, option_strings: Sequence[str], dest: str, table: Callable[[], str], help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)
        self._table = table

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        """Prints."""
        print(self._table())
        parser.exit()


def program() -> str:
    """The running program as a user starts it, for messages: `train.py`, `python -m igpt_ds.plan goodput`."""
    path = Path(sys.argv[0])
    file, _, command = path.name.partition(" ")  # which igpt_ds/plan/__main__.py adds
    if file == "__main__.py":
        return " ".join(filter(None, ("python -m", f"{path.parent.parent.name}.{path.parent.name}", command)))
    return path.name


def completing(action: argparse.Action, words: Iterable[str]) -> None:
    """A shell completes the values of a flag from these words, which are no choices: other values may follow."""
    known = list(words)
    action.completer = lambda **_: known  # type: ignore[attr-defined]  # of argcomplete


def _before_dashes(words: Sequence[str]) -> Sequence[str]:
    return words[: words.index("--") if "--" in words else None]


def _is_flag(word: str) -> bool:
    if not word.startswith("-") or word == "-" or " " in word:
        return False
    try:
        float(word)
    except ValueError:
        return True
    return False


def _name(action: argparse.Action) -> str:
    return "/".join(action.option_strings) or str(action.metavar or action.dest)


def _one_of(flags: str) -> str:
    return f"missing: {' or '.join(flags.split())}"
