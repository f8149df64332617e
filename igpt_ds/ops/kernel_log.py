"""What the kernel of a node says about broken hardware. In: its log of the last minutes. Out: one line, also without a fault.

    srun --nodes=2 --ntasks-per-node=1 python -m igpt_ds.ops.kernel_log --seconds 600

ops/slurm.py runs it on every node after ranks died: a node that prints nothing is lost. It prints `node: NODE: FAULT`, and
`node: NODE` where the log is clean or may not be read (kernel.dmesg_restrict). The standard library is enough.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from igpt_ds import cli
from igpt_ds.launcher import node_name

# NVIDIA's Xids of hardware: 48, 63, 64, 92, 94, 95 memory, 62 and 119, 120 the GPU's own processor, 74 NVLink, 79 off the bus,
# 110 security, 136, 140 uncorrected, 143 boot; 144 to 150 NVLink of Blackwell, if fatal. 13, 31, 43 and 45 are a program's fault,
# or follow from it. Machine checks and PCIe errors that the hardware corrected are no fault.
_XIDS = "48|62|63|64|74|79|92|94|95|110|119|120|136|140|143"
_FAULT = re.compile(
    rf"NVRM: Xid \([^)]*\): (?:(?:{_XIDS})\b|1(?:4[4-9]|50),.*\bFatal\b)|SXid .*\bFatal\b|GPU has fallen off the bus"
    r"|\[Hardware Error\].*(?:Machine Check Exception|(?:severity|type): (?:recoverable|fatal))|EDAC .*\bUE\b|Uncorrected.* error"
    r"|amdgpu.*(?:uncorrectable|GPU reset begin|RAS .*fatal)|AER: .*[Ff]atal"
)
_STAMP = re.compile(r"^(?:<\d+>)?\[\s*(\d+\.\d+)\] ?")


def find_fault(log: str, since: float) -> str:
    """The first line of a kernel log about broken hardware, without its time; "" if there is none.

    Args:
        since: seconds after the start of the kernel from which lines count.
    """
    for line in log.splitlines():
        stamp = _STAMP.match(line)
        if stamp and float(stamp[1]) >= since and _FAULT.search(line) and "non-fatal" not in line.lower():
            return line[stamp.end() :].strip()[:200]
    return ""


def node_fault(seconds: float, command: Sequence[str] = ("dmesg",), uptime: Path = Path("/proc/uptime")) -> str:
    """The fault of this node in the last seconds; "" without one, or if the log cannot be read."""
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=20)
        now = float(uptime.read_text(encoding="utf-8").split()[0])
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError):
        return ""
    return find_fault(done.stdout, now - seconds)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the name of this node, and its fault."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--seconds", type=float, required=True, help="age of the oldest line that counts")
    args = parser.parse_args(argv)
    name, fault = node_name(), node_fault(args.seconds)
    print(f"node: {name}: {fault}" if fault else f"node: {name}")


if __name__ == "__main__":
    cli.run(main)
