"""What bits depend on beside the data: versions, processor or GPU, threads, number of processes.

Bits are compared only between nodes whose environments are equal.
"""

import functools
import importlib.metadata
import platform
from typing import Any

PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "safetensors")


@functools.cache
def describe_software() -> dict[str, str]:
    """Versions of what computes, without importing it."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **versions}


def make_deterministic(num_threads: int) -> None:
    """Ask torch for equal bits in equal environments; on the CPU only the threads need fixing."""
    import torch

    torch.set_num_threads(num_threads)
    if torch.cuda.is_available():
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def describe_environment(device: str, num_processes: int, num_threads: int) -> dict[str, Any]:
    """The environment of a training process.

    Args:
        device: `cpu` or `cuda`, where the parameters live.
        num_threads: CPU threads of every process; they matter on `cpu` only.
    """
    import torch

    hardware: dict[str, Any] = {"device": device, "machine": platform.machine()}
    if device == "cuda":
        hardware["gpu"] = torch.cuda.get_device_name()
        hardware["cuda"] = torch.version.cuda
    else:
        hardware["instructions"] = torch.backends.cpu.get_cpu_capability()
        hardware["threads"] = num_threads
    return {"software": describe_software(), "hardware": hardware, "num_processes": num_processes}
