"""Runs each program's --help, every one in a forked process, and imports all modules in one; prints what they did as JSON.

    python tests/house/fresh.py            the JSON that the house tests read
    python tests/house/fresh.py --flags    one line a flag, for tests/house/flags.txt
    python tests/house/fresh.py CALLS      the same, with what each program's parser says to the arguments in CALLS, a JSON file

What many load is loaded once, before the forks, so that the whole house takes seconds and not minutes. The programs come first:
they must answer --help and a wrong flag without torch.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import tqdm  # noqa: F401  (loaded before the forks)

ROOT = Path(__file__).parents[2]
ENTRY = '\nif __name__ == "__main__":\n'


def modules() -> list[str]:
    """Every module of the package by its dotted name."""
    names = []
    for path in sorted((ROOT / "igpt_ds").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def programs() -> list[str]:
    """What can be started: root scripts and tools by their path, modules with an entry as `-m name`."""
    scripts = [*sorted(ROOT.glob("*.py")), *sorted((ROOT / "tools").rglob("*.py"))]
    scripts = [path for path in scripts if ENTRY in path.read_text()]  # the benchmarks' harness is no program
    runnable = [name.removesuffix(".__main__") for name in modules() if ENTRY in _source(name)]
    return [str(path.relative_to(ROOT)) for path in scripts] + [f"-m {name}" for name in runnable]


def _source(module: str) -> str:
    path = ROOT / module.replace(".", "/")
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()


def import_modules(names: list[str]) -> dict[str, Any]:
    """Imports the modules, one after another: what each import did besides defining names."""
    import torch

    def state() -> dict[str, Any]:
        numbers, dtype = str(np.random.get_state()), torch.get_default_dtype()
        return {
            "environment": dict(os.environ),
            "random numbers": (torch.get_rng_state().tolist(), numbers),
            "torch": (torch.get_num_threads(), dtype),
        }

    reports, before = {}, state()
    for name in names:
        loaded, error = set(sys.modules), ""
        try:
            __import__(name)
        except Exception:
            error = traceback.format_exc()
        after = state()
        changed = [what for what in before if before[what] != after[what]]
        reports[name] = {"error": error, "changed": changed, "loaded": packages(set(sys.modules) - loaded)}
        before = after
    return {"modules": reports}


def packages(names: set[str]) -> list[str]:
    """The packages of the modules."""
    return sorted({name.split(".")[0] for name in names})


def run_program(program: str, *words: str) -> tuple[int, str, str]:
    """Runs a program in this process: its exit status and what it printed to stdout and stderr."""
    sys.argv = [program, *words]
    output, errors, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            if program.startswith("-m "):
                runpy.run_module(program[3:], run_name="__main__", alter_sys=True)
            else:
                sys.path.insert(0, str((ROOT / program).parent))  # as `python PROGRAM` does
                runpy.run_path(str(ROOT / program), run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
    return status, output.getvalue(), errors.getvalue()


def parsing_first(calls: list[list[str]]) -> list[str]:
    """Makes the next parser take the arguments of each call before its own. The errors are in the list once it has."""
    from igpt_ds.command_line.parser import Parser

    errors: list[str] = []
    real = Parser.parse_args

    def parse_args(parser: Parser, *given: Any) -> Any:
        Parser.parse_args = real  # type: ignore[method-assign]
        for words in calls:
            try:
                real(parser, words)
            except ValueError as error:
                errors.append(f"{shlex.join(words)}: {error}")
            except SystemExit:  # --help and --list_recipes
                pass
        return real(parser, *given)

    Parser.parse_args = parse_args  # type: ignore[method-assign,assignment]
    return errors


def ask_help(program: str, calls: list[list[str]]) -> dict[str, Any]:
    """Runs a program with a flag that none has, and with --help; its answers, its flags, what its parser says to the calls."""
    refused, _, mistake = run_program(program, "--hepl")
    errors = parsing_first(calls)
    status, usage, _ = run_program(program, "--help")
    named = re.findall(
        r"^  (-.*?)(?:  |$)", usage, flags=re.MULTILINE
    )  # all names of each flag; Python 3.13 writes them otherwise
    return {
        "refused": refused,
        "mistake": mistake,
        "status": status,
        "help": usage,
        "wrong_calls": errors,
        "flags": sorted({flag for names in named for flag in re.findall(r"(?<!\S)--[\w-]+", names)} - {"--help"}),
    }


def in_fork(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The work's report from a child process, with what the child printed and which packages it loaded."""
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as answer:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads; torch has none running yet
            child = os.fork()
        if child == 0:
            os.dup2(printed.fileno(), 1)
            os.dup2(printed.fileno(), 2)
            report: dict[str, Any] = {"error": "", "flags": [], "help": ""}
            try:
                report |= work()
            except BaseException:
                report["error"] = traceback.format_exc()
            report["loaded"] = packages(set(sys.modules))
            json.dump(report, answer)
            for file in (sys.stdout, sys.stderr, answer):
                file.flush()
            os._exit(0)
        os.waitpid(child, 0)
        for file in (answer, printed):
            file.seek(0)
        return json.load(answer) | {"printed": printed.read()}


def main() -> None:
    """Every program, then every module."""
    PIL.Image.init()
    calls = json.loads(Path(sys.argv[1]).read_text()) if sys.argv[1:] and sys.argv[1] != "--flags" else {}
    reports = {name: in_fork(partial(ask_help, name, calls.get(name, []))) for name in programs()}
    if sys.argv[1:] == ["--flags"]:
        broken = [f"{name} --help\n{report['error']}" for name, report in reports.items() if report["error"]]
        if broken:
            sys.exit("\n".join(broken))
        print("# Every flag of every program. After a change made on purpose:")
        print("#     python tests/house/fresh.py --flags > tests/house/flags.txt")
        for program, report in reports.items():
            print(program)
            print(*(f"    {flag}" for flag in report["flags"]), sep="\n")
    else:
        import torch  # noqa: F401  (loaded before the forks)

        print(json.dumps({"imports": in_fork(partial(import_modules, modules())), "programs": reports}))


if __name__ == "__main__":
    main()
