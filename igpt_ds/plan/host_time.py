"""The host's share of a step: the CPU time in which a rank's Python starts the kernels and collectives of a micro step.

In: a number of blocks and a layout of ranks. Out: seconds on the host of a GPU. A GPU that is faster than its host waits. The
law is a straight line: each block costs the same, and under ZeRO-3 each rank adds a little to each block. Called by step_time.py.
"""

from __future__ import annotations

from igpt_ds.plan.costs import RankLayout

# CPU milliseconds are measured on one core of a virtual EPYC. A core of a GPU node is taken to be this much faster: the ratio of
# their speeds in single-threaded Python, 2 to 2.5. Assumed; no GPU node has been measured.
GPU_HOST = 2.2
FORWARD = 0.35  # share of a micro step's CPU time that its forward pass takes: one of three passes over the hooks (assumed)

# CPU milliseconds of one block in one micro step, by whether weights are sharded (stage 3) and by the mode of activation
# checkpointing. Of tools/bench/host.py with 20 and 60 blocks, 8 to 512 ranks of a fake process group, and the hooks and loops of
# train/ds_patches.py. What a step costs beside its blocks is too little to be seen.
LAWS = {
    (False, "none"): 3.7,
    (False, "selective"): 10.5,
    (False, "full"): 5.4,
    (True, "none"): 7.2,
    (True, "selective"): 15.6,
    (True, "full"): 10.5,
}
OF_RANK = 0.0065  # more for each rank, if weights are sharded


def host_seconds(n_layer: int, layout: RankLayout) -> float:
    """Seconds of Python on the host of a GPU for all micro steps of a step."""
    sharded = layout.stage == 3
    of_block = LAWS[sharded, layout.checkpointing] + (OF_RANK * layout.world_size if sharded else 0.0)
    return layout.accumulation * n_layer * of_block / 1e3 / GPU_HOST
