"""A shell completes flags and values: the function of tools/completion.sh, called in bash as a Tab calls it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ASK = 'source tools/completion.sh; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _igpt_ds; printf "%s\\n" "${COMPREPLY[@]}"'


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("python train.py --rec", {"--recipe"}),
        ("deepspeed --num_gpus 2 train.py --recipe igpt_l", {"igpt_l_ar_32", "igpt_l_ar_48", "igpt_l_bert_32"}),
        ("python -m igpt_ds.plan --ds_config zero3_fp", {"zero3_fp16", "zero3_fp32"}),
        ("python setup.py --", {""}),
    ],
)
def test_a_tab_completes(line, expected):
    environment = os.environ | {"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
    command = ["bash", "-c", ASK, "bash", *line.split(" ")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert {word.strip() for word in done.stdout.splitlines()} == expected, done.stderr
