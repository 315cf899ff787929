"""Peak memory of this process, or of what it allocated on a GPU."""

import resource
import sys
from pathlib import Path

import torch


def peak_memory(device: torch.device) -> float:
    """MiB: of the GPU what was allocated, else what this process had in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:  # getrusage would count what the parent had, too
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 2**10
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
