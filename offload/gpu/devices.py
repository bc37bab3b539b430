"""Which device computes experts, from what the caller asked for."""

from collections.abc import Mapping

from routing.ground.expect import expect_choice

from .cuda import CudaLane
from .lanes import Lane
from .simulated import SimulatedLane

LANES: Mapping[str, type[Lane]] = {"cuda": CudaLane, "simulated": SimulatedLane}
DEVICES = ("auto", "cpu", *LANES)


def expect_device(device: str, gpu_memory: str | int, gpu_experts: int | None) -> None:
    """Refuse a device and budgets for it that contradict each other, before anything is read.

    Raises:
        ValueError: if the device is unknown, or has no use for what is given for it.
    """
    expect_choice(device, DEVICES, "device")
    if device == "cpu" and _wants_gpu(gpu_memory, gpu_experts):
        raise ValueError(f'device="cpu" has no GPU slots; leave gpu_memory={gpu_memory!r} out, or use device="cuda"')
    if device in LANES and gpu_memory in (0, "0"):
        raise ValueError(f'device="{device}" with gpu_memory=0: nothing fits; give some memory, or use device="cpu"')
    if gpu_experts is not None and gpu_experts < 1:
        raise ValueError(f"gpu_experts must be at least 1 slot per layer; got {gpu_experts}")


def open_lane(device: str, gpu_memory: str | int, gpu_experts: int | None) -> Lane | None:
    """The device that experts are computed on, or None for the CPU.

    `"auto"` is a GPU only if it is said how much of one may be used, because this tier's speed has not been measured.

    Raises:
        ValueError: if the device is unknown or absent, or the arguments contradict each other.
    """
    expect_device(device, gpu_memory, gpu_experts)
    if not wants_device(device, gpu_memory, gpu_experts):
        return None
    return LANES["cuda" if device == "auto" else device]()


def wants_device(device: str, gpu_memory: str | int, gpu_experts: int | None) -> bool:
    """Whether everything outside experts goes to a GPU, by what a caller asked for."""
    return device in LANES or (device == "auto" and _wants_gpu(gpu_memory, gpu_experts))


def _wants_gpu(gpu_memory: str | int, gpu_experts: int | None) -> bool:
    return gpu_memory not in ("auto", 0, "0") or gpu_experts is not None
