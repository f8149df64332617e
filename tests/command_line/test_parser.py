"""Mistakes on a command line are one line with the nearest flag or value, on every Python."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from igpt_ds.command_line.nearest import did_you_mean, nearest, unknown_value
from igpt_ds.command_line.parser import Parser, program
from igpt_ds.errors import InputError


@pytest.fixture
def parser():
    parser = Parser("What it does.")
    parser.add_argument("--run_dir", type=Path, required=True, help="a directory")
    parser.add_argument("--lr", type=float, default=0.1, help="a rate")
    parser.add_argument("--batch_images", type=int, help="images (default: all)")
    parser.add_argument("--steps", type=int, default=3, help="steps")
    parser.add_argument("--init", choices=("released", "sparse"), default="released", help="how")
    parser.add_argument("--ids", type=int, nargs="+", default=[1, 2], help="numbers")
    return parser


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--learning_rate", "3"], r"^unknown flag --learning_rate; did you mean --lr\? \(--help lists all\)$"),
        (["--batch-size=3"], r"^unknown flag --batch-size; did you mean --batch_images\? "),
        (["--epochs", "3"], r"--epochs; did you mean --steps\?"),
        (["--output_dir", "x"], r"--output_dir; did you mean --run_dir\?"),
        (["--run-dir", "x"], r"--run-dir; did you mean --run_dir\?"),
        (["-run_dir", "x"], r"^unknown flag -run_dir; did you mean --run_dir\?"),
        (["--stps", "3", "--LR", "1"], r"^unknown flag --stps; did you mean --steps\? unknown flag --LR; did you mean --lr\?"),
        (["--run", "x"], r"unknown flag --run; did you mean --run_dir\?"),
        (["--frobnicate"], r"^unknown flag --frobnicate \(--help lists all\)$"),
        ([], r"^missing: --run_dir \(--help"),
        (["--run_dir", "x", "--steps", "1.5"], r"^--steps '1.5' must be a whole number \("),
        (["--run_dir", "x", "--lr", "fast"], r"^--lr 'fast' must be a number \("),
        (["--run_dir", "x", "--steps", "9" * 20], r"^--steps 9+ must be below 2\^63$"),
        (
            ["--run_dir", "x", "--init", "relased"],
            r"^--init 'relased' is unknown; did you mean released\? known: rel.*, sparse$",
        ),
        (["--run_dir", "x", "--lr"], r"^--lr needs a value \("),
        (["--run_dir", "x", "--ids"], r"^--ids needs at least a value \("),
        (["--run_dir", ""], r"^--run_dir '' is empty; name "),
        (["--run_dir", "x", "igpt_s"], r"^unexpected 'igpt_s': no flag takes it \("),
    ],
)
def test_a_mistake_is_one_line(parser, words, line):
    with pytest.raises(InputError, match=line) as caught:
        parser.parse_args(words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("words", [["--nonsense", "-h"], ["--lr", "fast", "--help"], ["--steps", "--help"], ["x", "-h", "y"]])
def test_help_is_printed_whatever_else_is_wrong(parser, words, capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        parser.parse_args(words)
    assert "--batch_images" in capsys.readouterr().out


def test_words_after_two_dashes_ask_for_no_help(parser):
    with pytest.raises(InputError, match=r"unexpected .*'--help'"):
        parser.parse_args(["--run_dir", "x", "--", "--help"])


def test_values_may_look_like_flags(parser):
    assert parser.parse_args(["--run_dir", "x", "--lr", "-inf"]).lr == float("-inf")
    assert parser.parse_args(["--run_dir", "x", "--lr", "-1e-3", "--ids", "-4", "5"]).ids == [-4, 5]


def test_help_begins_with_what_is_required(parser):
    text = parser.format_help()
    assert text.startswith(f"usage: {parser.prog} --run_dir RUN_DIR [flags]\n")
    assert "numbers (default: 1 2)" in text


def test_one_of_several_required_flags():
    parser = Parser("What it does.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--recipe", help="a name")
    what.add_argument("--config", help="a file")
    assert "(--recipe RECIPE | --config CONFIG) [flags]" in parser.format_help()
    with pytest.raises(InputError, match=r"^missing: --recipe or --config "):
        parser.parse_args([])
    with pytest.raises(InputError, match=r"^--config: not allowed with --recipe "):
        parser.parse_args(["--recipe", "a", "--config", "b"])


def test_nearest_words():
    assert nearest("igpt_s", ["igpt_l_ar_32", "igpt_s_ar_32", "igpt_s_bert_32"])[:2] == ["igpt_s_ar_32", "igpt_s_bert_32"]
    assert did_you_mean([]) == ""
    assert unknown_value("x", ["abc"]) == "'x' is unknown; known: abc"


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        ("tools/a b.py", "a b.py"),
        ("/x/igpt_ds/plan/__main__.py", "python -m igpt_ds.plan"),
        ("/x/igpt_ds/plan/__main__.py goodput", "python -m igpt_ds.plan goodput"),
    ],
)
def test_a_program_has_the_name_of_its_command(monkeypatch, argv, name):
    monkeypatch.setattr(sys, "argv", [argv])
    assert program() == name
