"""The host's share of a step: the CPU time in which a rank's Python starts the kernels and collectives of a micro step.

In: a number of blocks and a layout of ranks. Out: seconds on the host of a GPU. A GPU that is faster than its host waits. The
law is a straight line: each block costs the same, and under ZeRO-3 each rank adds a little to each block. Called by step_time.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from igpt_ds.plan.costs import RankLayout

# CPU milliseconds are measured on one core of a virtual EPYC. A core of a GPU node is taken to be this much faster: the ratio of
# their speeds in single-threaded Python, 2 to 2.5. Assumed; no GPU node has been measured.
GPU_HOST = 2.2
FORWARD = 0.35  # share of a micro step's CPU time that its forward pass takes: one of three passes over the hooks (assumed)


@dataclass(frozen=True)
class HostLaw:
    """CPU milliseconds of one block in one micro step."""

    block: float
    rank: float = 0.0  # more for each rank


# Of tools/bench/host.py with 60 blocks, 8 to 512 ranks of a fake process group, and the hooks and loops of train/ds_patches.py.
# By whether weights are sharded (stage 3), and by the mode of activation checkpointing.
LAWS = {
    (False, "none"): HostLaw(1.8),
    (False, "selective"): HostLaw(5.2),
    (False, "full"): HostLaw(3.8),
    (True, "none"): HostLaw(3.7, 0.0012),
    (True, "selective"): HostLaw(6.5, 0.0012),
    (True, "full"): HostLaw(5.4, 0.0012),
}
STEP = 25.0  # CPU milliseconds of a step beside its blocks


def host_seconds(n_layer: int, layout: RankLayout) -> float:
    """Seconds of Python on the host of a GPU for all micro steps of a step."""
    law = LAWS[layout.stage == 3, layout.checkpointing]
    return (STEP + layout.accumulation * n_layer * (law.block + law.rank * layout.world_size)) / 1e3 / GPU_HOST
