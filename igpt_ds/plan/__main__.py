"""The plan as a command: `python -m igpt_ds.plan --recipe NAME --gpus N`."""

from igpt_ds import cli
from igpt_ds.plan.command import main

if __name__ == "__main__":
    cli.run(main)
