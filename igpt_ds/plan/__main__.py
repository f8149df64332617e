"""The plan as a command: `python -m igpt_ds.plan --recipe NAME --gpus N`, and `python -m igpt_ds.plan goodput --gpus N`."""

import sys

from igpt_ds import cli
from igpt_ds.plan import command, goodput_command

if __name__ == "__main__":
    goodput = sys.argv[1:2] == ["goodput"]
    if goodput:
        sys.argv[:2] = [f"{sys.argv[0]} goodput"]
    cli.run(goodput_command.main if goodput else command.main)
