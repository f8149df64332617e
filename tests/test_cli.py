"""Bad input is one line on stderr and status 2; a mistake of ours keeps its traceback."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from igpt_ds import cli
from igpt_ds.errors import InputError
from igpt_ds.launcher import LaunchError


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No rank has joined in this process, whatever another test did; `run` would end pytest itself."""
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)


def failing(error):
    def main(argv=None):
        raise error

    return main


@pytest.mark.parametrize("error", [InputError("lr=-1 must be positive"), FileNotFoundError(2, "No such file", "a.npy")])
def test_bad_input_is_one_line_and_status_2(error, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tools/sample.py"])
    with pytest.raises(SystemExit) as end:
        cli.run(failing(error))
    assert end.value.code == 2
    text = "a.npy: No such file; check the path" if isinstance(error, OSError) else str(error)
    assert capsys.readouterr().err == f"sample.py: error: {text}\n"


def test_an_error_of_many_lines_is_printed_on_one(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit):
        cli.run(failing(InputError("1 validation error\nstagee\n  not permitted\n")))
    assert capsys.readouterr().err == "train.py: error: 1 validation error; stagee; not permitted\n"


@pytest.mark.parametrize("error", [ZeroDivisionError(), ValueError("of a library"), TypeError(), KeyError("a")])
def test_other_errors_are_ours_and_keep_their_traceback(error):
    with pytest.raises(type(error)):
        cli.run(failing(error))


def test_main_is_called_without_arguments_of_its_own():
    seen = []
    cli.run(seen.append)
    assert seen == [None]


def test_before_the_ranks_have_joined_only_the_first_of_a_node_speaks(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as end:
        cli.run(failing(InputError("bad")), ranks=True)
    assert end.value.code == 2
    assert capsys.readouterr().err == ""
    with pytest.raises(SystemExit):
        cli.run(failing(LaunchError("bad")), ranks=True)
    assert capsys.readouterr().err.endswith(": error: bad\n")


def test_a_tool_ignores_the_variables_of_another_launch(capsys, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "7")
    with pytest.raises(SystemExit):
        cli.run(failing(cli.SharedError("bad")))
    assert capsys.readouterr().err.endswith(": error: bad\n")
    assert "WORLD_SIZE" not in os.environ


def test_a_shared_error_is_rank_0s_to_tell(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program.py"])
    for rank, told in (("0", "program.py: error: bad\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as end:
            cli.run(failing(cli.SharedError("bad")), ranks=True)
        assert end.value.code == 2
        assert capsys.readouterr().err == told


JOINED = """
import torch.distributed as ranks
from igpt_ds import cli
from igpt_ds.launcher import LaunchError
from igpt_ds.errors import InputError

def main(argv):
    ranks.init_process_group("gloo", init_method="tcp://127.0.0.1:{port}", rank=0, world_size=1)
    print("joined")
    {then}

cli.run(main, ranks=True)
"""


@pytest.mark.parametrize(
    ("then", "expected"),
    [
        ("raise InputError('bad')", (2, "joined\n", "program.py: error: bad\n")),
        ("pass", (0, "joined\n", "")),
    ],
)
def test_joined_ranks_all_speak_and_leave_with_the_right_status(launch, tmp_path, free_port, then, expected):
    program = tmp_path / "program.py"
    program.write_text(JOINED.format(port=free_port, then=then))
    done = launch([program], env={"LOCAL_RANK": "1", "PYTHONWARNINGS": "ignore"}, by="python")
    assert (done.returncode, done.stdout, done.stderr) == expected


def test_a_mistake_in_joined_ranks_is_a_traceback_and_status_1(launch, tmp_path, free_port):
    """Not an abort in the threads of gloo, which an interpreter that shuts down risks."""
    program = tmp_path / "program.py"
    program.write_text(JOINED.format(port=free_port, then="{}['format']"))
    done = launch([program])
    assert (done.returncode, done.stdout) == (1, "joined\n"), done.stderr
    assert "Traceback (most recent call last):" in done.stderr
    assert done.stderr.endswith("KeyError: 'format'\n")


def test_parser_keeps_the_docstring_shows_defaults_and_refuses_abbreviations():
    parser = cli.parser("Line one.\n\n    an example\n")
    parser.add_argument("--images", type=int, default=7, help="how many")
    assert "\n    an example\n" in parser.format_help()
    assert "how many (default: 7)" in parser.format_help()
    with pytest.raises(InputError, match=r"unknown flag --imag; did you mean --images\?"):
        parser.parse_args(["--imag", "3"])


def test_a_program_ends_with_status_2(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "from igpt_ds import cli\nfrom igpt_ds.errors import InputError\n\ndef main(argv):\n    raise InputError('no')\n\n"
        "cli.run(main)\n"
    )
    done = subprocess.run([sys.executable, program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "program.py: error: no\n")


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOSPC, "free some space there and run the same command again"),
        (errno.EDQUOT, "ask for a higher quota"),
        (errno.EIO, "use a copy on another disk"),
        (errno.EACCES, "change its permissions"),
        (errno.EROFS, "that can be written"),
        (errno.ENAMETOOLONG, "choose a shorter name"),
        (errno.EMFILE, "ulimit -n"),
    ],
)
def test_an_error_of_the_system_names_the_file_and_the_fix(number, fix, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["make_shards.py"])
    with pytest.raises(SystemExit):
        cli.run(failing(OSError(number, os.strerror(number), b"\x1b[31m\xff.tar")))
    line = capsys.readouterr().err
    assert line.startswith(f"make_shards.py: error: \\x1b[31m\\udcff.tar: {os.strerror(number)}; ")
    assert fix in line
    assert line.count("\n") == 1


NAMES = """
from igpt_ds import cli
from igpt_ds.errors import InputError
from igpt_ds.errors import InputError

def main(argv):
    open(__file__).read()  # as libraries open their own files
    print("größe \\udcff \\x1b[2J \\x9b31m \\u202e \\r")
    raise InputError("größe \\udcff \\x1b[2J\\n")

cli.run(main)
"""


@pytest.mark.parametrize(
    ("settings", "printed"),
    [
        ({}, "größe".encode()),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, b"gr\\xf6\\xdfe"),
        ({"PYTHONIOENCODING": "latin-1"}, "größe".encode("latin-1")),
        ({"PYTHONIOENCODING": "utf-8:strict"}, "größe".encode()),
    ],
)
def test_names_are_printed_in_any_locale_and_without_control_characters(tmp_path, settings, printed):
    program = tmp_path / "program.py"
    program.write_text(NAMES)
    done = subprocess.run([sys.executable, program], capture_output=True, env=os.environ | settings)
    assert done.stdout == printed + rb" \udcff \x1b[2J \x9b31m \u202e \r" + b"\n"
    assert done.stderr == b"program.py: error: " + printed + rb" \udcff \x1b[2J" + b"\n"


def test_a_traceback_is_printable(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("from igpt_ds import cli\n\ndef main(argv):\n    raise RuntimeError('\\x1b[2J')\n\ncli.run(main)\n")
    done = subprocess.run([sys.executable, program], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith("RuntimeError: \\x1b[2J\n")


@pytest.mark.parametrize(
    ("terminal", "text", "written"),
    [
        (True, "\r 50% \x1b[A", "\r 50% \\x1b[A"),
        (True, "\n\x1b[A\x1b[A", "\n\x1b[A\x1b[A"),
        (True, "name\r", "name\\r"),
        (False, "\r 50%", "\\r 50%"),
        (False, "\x1b[A", "\\x1b[A"),
    ],
)
def test_a_progress_bar_moves_on_a_terminal_alone(terminal, text, written, monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    cli.run(lambda argv: sys.stdout.write(text))
    assert stream.getvalue() == written


@pytest.mark.parametrize(
    ("redirect", "status", "told"),
    [(">/dev/full", 2, "standard output: No space left on device"), (">&-", 0, ""), ("2>&-", 0, "")],
)
def test_output_that_cannot_be_written_is_told_and_closed_output_is_none(tmp_path, redirect, status, told):
    program = tmp_path / "program.py"
    program.write_text("from igpt_ds import cli\n\ncli.run(lambda argv: print('words'))\n")
    done = subprocess.run(["sh", "-c", f"{sys.executable} {program} {redirect}"], capture_output=True, text=True)
    assert done.returncode == status
    assert done.stderr.startswith(f"program.py: error: {told}" if told else "")
    assert done.stderr.count("\n") == bool(told)


@pytest.mark.parametrize("home", [None, "", "/missing"])
def test_a_missing_home_is_replaced(home, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", home or "")
    if home is None:
        monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cli.run(failing_not)
    assert Path.home().parent == tmp_path
    assert f"caches in {Path.home()};" in capsys.readouterr().err


def failing_not(argv):
    pass


def test_a_flag_takes_no_number_that_libraries_cannot_hold():
    parser = cli.parser("a tool")
    parser.add_argument("--seeds", type=int, nargs="+")
    assert parser.parse_args(["--seeds", "-7", str(2**63 - 1)]).seeds == [-7, 2**63 - 1]
    with pytest.raises(InputError, match="--seeds 99999999999999999999 must be below 2"):
        parser.parse_args(["--seeds", "1", "99999999999999999999"])
