"""The kernel's log names a node with broken hardware, and not one whose program failed."""

from __future__ import annotations

from pathlib import Path

import pytest

from igpt_ds.ops.kernel_log import find_fault, node_fault


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("[ 900.5] NVRM: Xid (PCI:0000:1b:00): 79, pid=1, GPU has fallen off the bus.", True),
        ("[  900.5] NVRM: Xid (PCI:0000:1b:00): 48, DBE (double bit error)", True),
        ("<3>[900.500000] mce: [Hardware Error]: CPU 3: Machine Check Exception: 5 Bank 4: be00", True),
        ("[900.5] [Hardware Error]: Uncorrected, software restartable error.", True),
        ("[900.5] {1}[Hardware Error]: event severity: recoverable", True),
        ("[900.5] nvidia-nvswitch3: SXid (PCI:0000:c1:00.0): 20034, Fatal, Link 30 LTSSM Fault Up", True),
        ("[900.5] NVRM: Xid (PCI:0018:01:00): 145, RLW_CTRL Fatal XC0 i0 Link 09", True),
        ("[900.5] NVRM: Xid (PCI:0018:01:00): 145, RLW_CTRL Nonfatal XC0 i0 Link 09", False),
        ("[900.5] nvidia-nvswitch3: SXid (PCI:0000:c1:00.0): 12028, Non-fatal, Link 32 egress error", False),
        ("[900.5] mce: [Hardware Error]: Machine check events logged", False),  # of corrected errors as well
        ("[900.5] {1}[Hardware Error]: event severity: corrected", False),
        ("[900.5] [Hardware Error]: Corrected error, no action required.", False),
        ("[900.5] pcieport 0000:00:01.0: AER: Uncorrected (Fatal) error received", True),
        ("[900.5] NVRM: Xid (PCI:0000:1b:00): 31, pid=1, MMU Fault", False),
        ("[900.5] NVRM: Xid (PCI:0000:1b:00): 43, pid=1, channel stopped", False),
        ("[900.5] pcieport: AER: Uncorrected (Non-Fatal) error received", False),
        ("[900.5] python[7]: segfault at 0", False),
        ("[800.0] NVRM: Xid (PCI:0000:1b:00): 79, GPU has fallen off the bus.", False),
        ("without a time: GPU has fallen off the bus", False),
    ],
)
def test_a_fault_is_of_the_hardware_and_of_this_start(line: str, fault: bool):
    found = find_fault(f"[899.0] usb 1-1: new device\n{line}\n", since=850.0)
    assert bool(found) is fault
    assert not found or line.endswith(found)


def test_a_node_reads_its_own_log(tmp_path: Path):
    (tmp_path / "uptime").write_text("1000.00 900.00\n")
    log = ("printf", "[990.0] NVRM: Xid (PCI:0): 79, lost\\n")
    assert node_fault(60, log, tmp_path / "uptime") == "NVRM: Xid (PCI:0): 79, lost"
    assert node_fault(5, log, tmp_path / "uptime") == ""
    assert node_fault(60, ("no-such-dmesg",)) == ""
