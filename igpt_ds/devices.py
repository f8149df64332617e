"""The device of this process: its GPU, or the CPU where no GPU exists or DS_ACCELERATOR=cpu asks for it.

In: what torch, the machine and the environment say. Out: a torch.device, or an InputError that names the fix. Called by
train/engine.py, dist.py, evaluate/ and the preflight. Names of CUDA are avoided: torch.accelerator also stands for ROCm and XPU.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.distributed import Store

from igpt_ds.errors import InputError
from igpt_ds.launcher import node_name

_ANSWER_SECONDS = 20.0  # for all ranks to read why they cannot train
_SMI_SECONDS = 30.0  # nvidia-smi hangs on a broken GPU
_HIDDEN = ("", "-1", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES that leave no GPU
_DATA_CENTRE_AMD = ("0x0380", "0x1200")  # PCI classes of Instinct; an AMD processor's own graphics is 0x0300
_NVIDIA_GPUS = ("0x0300", "0x0302")
_FIXES = (  # of torch's reasons
    (r"too old|insufficient", "update the NVIDIA driver, or install a torch for an older CUDA (pytorch.org/get-started)"),
    (r"802|not yet initialized", "start nvidia-fabricmanager"),
    (r"no NVIDIA driver", "make nvidia-smi work; a container needs `docker run --gpus all` or `apptainer exec --nv`"),
    (r"no (CUDA|HIP) GPUs|no CUDA-capable", "give the job its GPUs (sbatch --gpus-per-node), and look at CUDA_VISIBLE_DEVICES"),
)


@dataclass(frozen=True)
class TorchBuild:
    """What the installed torch can use."""

    version: str
    cuda: str | None  # the version it is built for; None: it is not built for CUDA
    hip: str | None  # the same for ROCm
    works: bool  # it sees a device other than the CPU
    why: str = ""  # its reason if not


@dataclass(frozen=True)
class Arrival:
    """What a rank tells the others about its device before they exchange tensors."""

    device: str  # "cuda", "cpu"
    host: str = ""
    gpu: str = ""  # what tells its GPU from others of the host; "": no GPU, or unknown
    problem: str = ""  # why it cannot train


def torch_build() -> TorchBuild:
    """The installed torch, and why it sees no GPU."""
    works, why = torch.accelerator.is_available(), ""
    if not works and torch.cuda._is_compiled():
        try:
            torch.cuda.init()
        except Exception as error:  # RuntimeError, or AssertionError: each has a reason
            why = (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0]
    return TorchBuild(torch.__version__, torch.version.cuda, torch.version.hip, works, why)


def cpu_is_asked(env: Mapping[str, str] = os.environ) -> bool:
    """Whether the user wants the CPU, whatever the machine has."""
    return env.get("DS_ACCELERATOR") == "cpu"


def find_gpus(env: Mapping[str, str] = os.environ, root: Path = Path("/")) -> str:
    """Which GPUs this machine has, in words, whether torch can use them or not; "" if there are none.

    Args:
        root: of the file system, for /dev and /sys.
    """
    nodes = sorted(path.name for path in (root / "dev").glob("nvidia[0-9]*"))
    if nodes:
        return f"this machine has NVIDIA GPUs (/dev/{nodes[0]})"
    on_bus = list(_pci_devices(root))
    smi = shutil.which("nvidia-smi", path=env.get("PATH", os.defpath))
    if smi and (found := _ask_smi(smi, ("0x10de" in dict(on_bus)) and any(kind in _NVIDIA_GPUS for _, kind in on_bus))):
        return found
    if (root / "dev" / "kfd").exists() and any(maker == "0x1002" and kind in _DATA_CENTRE_AMD for maker, kind in on_bus):
        return "this machine has AMD GPUs (/dev/kfd)"
    return ""


def _pci_devices(root: Path) -> list[tuple[str, str]]:
    """(vendor, class) of each device on the bus."""
    found = []
    for device in sorted((root / "sys/bus/pci/devices").glob("*")):
        try:
            maker, kind = ((device / name).read_text(encoding="utf-8").strip() for name in ("vendor", "class"))
        except OSError:
            continue
        found.append((maker, kind[:6]))
    return found


def _ask_smi(smi: str, on_bus: bool) -> str:
    """What nvidia-smi knows of GPUs. If it fails, as without a driver, only a GPU on the PCI bus counts."""
    try:
        done = subprocess.run([smi, "-L"], capture_output=True, encoding="utf-8", errors="replace", timeout=_SMI_SECONDS)
    except subprocess.TimeoutExpired:
        return "this machine has NVIDIA GPUs (nvidia-smi hangs)"
    except OSError:
        return ""
    if done.returncode == 0:
        return "this machine has NVIDIA GPUs (nvidia-smi)" if re.search(r"^GPU \d", done.stdout, re.M) else ""
    return "this machine has NVIDIA GPUs (nvidia-smi fails)" if on_bus else ""


def refuse_idle_gpus(
    env: Mapping[str, str] = os.environ,
    root: Path = Path("/"),
    build: TorchBuild | None = None,
    otherwise: str = "export DS_ACCELERATOR=cpu to train on the CPU",
) -> None:
    """Refuses to compute on the CPU beside GPUs that torch cannot use, unless the user asked for the CPU.

    Args:
        otherwise: how to ask for the CPU.

    Raises:
        ValueError: with the reason and the fix.
    """
    if cpu_is_asked(env) or (build or torch_build()).works:
        return
    gpus = find_gpus(env, root)
    if gpus:
        raise InputError(f"{gpus} but torch {_why_idle(env, build or torch_build(), 'AMD' in gpus)}, or {otherwise}")


def _why_idle(env: Mapping[str, str], build: TorchBuild, amd: bool) -> str:
    version = build.version.partition("+")[0]
    wanted, built = ("ROCm", build.hip) if amd else ("CUDA", build.cuda)
    if built is None:
        fix = "make TORCH=rocm7.1 install" if amd else f"pip install --force-reinstall torch=={version}"
        return f"{build.version} is built without {wanted}; run {fix}"
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        if name in env and env[name].strip() in _HIDDEN:
            return f"{build.version} sees none: {name}={env[name]!r} hides them; unset {name}"
    fix = next(
        (fix for words, fix in _FIXES if re.search(words, build.why, re.I)),
        f"run {'rocm' if amd else 'nvidia'}-smi and dmesg there",
    )
    return f"{build.version} (built for {wanted} {built}) cannot use them: {build.why or 'no reason given'}; {fix}"


def usable_gpus() -> int:
    """The number of GPUs that this process can train on.

    Raises:
        ValueError: there are GPUs, and torch can use none of them.
    """
    refuse_idle_gpus()
    return 0 if cpu_is_asked() else torch.accelerator.device_count()


def device_index(local_rank: int, count: int) -> int:
    """The number of a rank's GPU among the `count` that its process sees.

    Usually each rank of a node sees all GPUs and takes that of its own number. Under `srun --gpus-per-task=1` or
    `--gpu-bind=single` each sees only its own, which is number 0 for all of them.

    Raises:
        ValueError: more ranks than GPUs.
    """
    if count == 1:
        return 0
    if local_rank >= count:
        raise InputError(
            f"this rank is number {local_rank} of its node and sees {count} GPUs; start at most {count} ranks a node, or give "
            "each rank its own GPU (srun --gpus-per-task=1)"
        )
    return local_rank


def own_device(local_rank: int) -> torch.device:
    """The device of a rank; makes it the process's current one. The CPU without usable GPUs.

    Raises:
        ValueError: more ranks than GPUs.
    """
    if cpu_is_asked() or not torch.accelerator.is_available():
        return torch.device("cpu")
    index = device_index(local_rank, torch.accelerator.device_count())
    torch.accelerator.set_device_index(index)
    return current_device()


def arrive(local_rank: int, accelerator: str, env: Mapping[str, str] = os.environ) -> tuple[torch.device, Arrival]:
    """This rank's device, and what it tells the others of it. A problem is told too, so that no rank waits for this one.

    Args:
        accelerator: DeepSpeed's name of its kind of device.
    """
    host = node_name(env)
    try:
        refuse_idle_gpus(env)
        device = own_device(local_rank)
        if accelerator != device.type:
            raise InputError(f"DS_ACCELERATOR={accelerator} but torch has {device.type} here; unset DS_ACCELERATOR")
    except InputError as error:
        return torch.device("cpu"), Arrival("cpu", host, problem=str(error))
    return device, Arrival(device.type, host, device_id(device))


def current_device() -> torch.device:
    """The device that this process computes on."""
    accelerator = None if cpu_is_asked() else torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def device_id(device: torch.device) -> str:
    """What tells this GPU from the others of its node: its UUID; "" for a CPU, or where torch does not know it."""
    if device.type == "cpu":
        return ""
    facts = torch.get_device_module(device).get_device_properties(device.index)
    return str(getattr(facts, "uuid", ""))


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def answer_to_all(store: Store, rank: int, size: int, arrival: Arrival) -> str:
    """Why the ranks cannot train together, on every rank; "" if they can. Rank 0 reads what all say: no rank reads N values."""
    at = f"igpt_ds/devices/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    store.set(f"{at}/{rank}", json.dumps(asdict(arrival)))
    if rank == 0:
        told = store.multi_get([f"{at}/{number}" for number in range(size)])
        store.set(f"{at}/answer", device_conflict([Arrival(**json.loads(text)) for text in told]))
    answer = str(store.get(f"{at}/answer").decode())
    read = store.add(f"{at}/read", 1)
    end = time.monotonic() + _ANSWER_SECONDS
    while answer and rank == 0 and read < size and time.monotonic() < end:  # rank 0 hosts the store, and would end with it
        time.sleep(0.05)
        read = store.add(f"{at}/read", 0)
    return answer


def device_conflict(arrivals: Sequence[Arrival]) -> str:
    """Why the devices of the ranks, given in the order of ranks, cannot train together; "" if they can."""
    names = [f"rank {rank} on {one.host}" for rank, one in enumerate(arrivals)]
    problems = [rank for rank, one in enumerate(arrivals) if one.problem]
    if problems:
        first = problems[0]
        more = f" ({len(problems)} of {len(arrivals)} ranks cannot train)" if len(problems) > 1 else ""
        return f"{names[first]}: {arrivals[first].problem}{more}" if len(arrivals) > 1 else arrivals[first].problem
    other = next((rank for rank, one in enumerate(arrivals) if one.device != arrivals[0].device), None)
    if other is not None:
        kinds = f"{names[0]} has the device {arrivals[0].device} and {names[other]} has {arrivals[other].device}"
        return f"{kinds}; give every rank a GPU, or export DS_ACCELERATOR=cpu for all of them"
    users = defaultdict[tuple[str, str], list[int]](list)
    for rank, one in enumerate(arrivals):
        if one.gpu:
            users[one.host, one.gpu].append(rank)
    shared = next((ranks for ranks in users.values() if len(ranks) > 1), None)
    if shared is None:
        return ""
    where = arrivals[shared[0]]
    who = f"ranks {', '.join(map(str, shared))} on {where.host} have the same GPU, {where.gpu}"
    return f"{who}; start one rank a GPU, and give each another one"
