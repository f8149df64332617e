"""Builds the extension of DeepSpeed's CPU Adam before test workers start side by side, so that none waits for another.

    python tests/build_extension.py

takes a minute the first time, seconds after that. Called by `make test`.
"""

from __future__ import annotations

import os

from igpt_ds.train.safety.build_locks import wait_for_builds


def main() -> None:
    """Builds it, or finds it built."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    wait_for_builds()
    from deepspeed.ops.op_builder import CPUAdamBuilder

    CPUAdamBuilder().load(verbose=False)


if __name__ == "__main__":
    main()
