"""The flags of the health checks. Called by train/flags.py."""

from __future__ import annotations

import argparse

NORMS_EVERY = 100
LEAST = {"norms_every": 0, "replay_every": 0}


def add_health_flags(group: argparse._ArgumentGroup) -> None:
    """How often a run measures its layers, and checks its arithmetic."""
    norms = (
        "steps between measurements of each layer's gradient norm, weight norm and activation scale, for TensorBoard; the last "
        "step counts too; 0 disables"
    )
    group.add_argument("--norms_every", type=int, metavar="STEPS", default=NORMS_EVERY, help=norms)
    replay = (
        "steps between checks of the hardware: each rank computes a micro batch twice, and the run stops if a bit differs; 0 "
        "disables"
    )
    group.add_argument("--replay_every", type=int, metavar="STEPS", default=0, help=replay)
