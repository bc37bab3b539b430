"""What is in fast memory now: expert store, caches, cost model, runtime.

`load` and `Offload` need torch and are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from routing.ground.quantity import format_size, parse_size

from .cache.catalogue import CACHES, make_cache
from .cache.simulate import Simulated, simulate
from .cache.steps import ReplayedSteps, replay_steps
from .memory.budget import available_memory

if TYPE_CHECKING:
    from .engine.counters import EngineCounters
    from .engine.engine import Engine
    from .engine.events import Finished, NotReady, QueueFull, TokenEvent
    from .engine.options import EngineOptions
    from .engine.request import GenerationRequest, Sampling
    from .engine.stream import Stream
    from .finetune.examples import PackedRows
    from .finetune.options import TuneOptions
    from .finetune.tune import fine_tune
    from .forecast.calibrate import disk_bandwidth
    from .forecast.calibrate_gpu import wire_bandwidth
    from .forecast.fit import fit
    from .forecast.product_rates import product_rates
    from .forecast.steps import StepRates, forecast_steps, measure_step_rates
    from .formats.plain_copy import dequantise
    from .gpu.devices import open_lane
    from .lowbit.bit_router import train_bit_router
    from .lowbit.calibrating import calibrate
    from .lowbit.fitting import quantise_to_bits
    from .lowbit.quantise import quantise, quantise_in_levels, quantise_to_ternary
    from .members.members import load_members
    from .neurons.packing import pack_units
    from .prefetch.softmax_gates import softmax_gates
    from .quality.quality import Contestant, Judge, quality
    from .runtime.loading import load
    from .runtime.options import Part
    from .runtime.report import Offload
    from .store.packing import write_pack

_HOME = {
    "Engine": ".engine.engine",
    "EngineCounters": ".engine.counters",
    "EngineOptions": ".engine.options",
    "Finished": ".engine.events",
    "GenerationRequest": ".engine.request",
    "NotReady": ".engine.events",
    "Offload": ".runtime.report",
    "PackedRows": ".finetune.examples",
    "Part": ".runtime.options",
    "QueueFull": ".engine.events",
    "Sampling": ".engine.request",
    "Stream": ".engine.stream",
    "TokenEvent": ".engine.events",
    "TuneOptions": ".finetune.options",
    "StepRates": ".forecast.steps",
    "fit": ".forecast.fit",
    "forecast_steps": ".forecast.steps",
    "measure_step_rates": ".forecast.steps",
    "dequantise": ".formats.plain_copy",
    "Contestant": ".quality.quality",
    "Judge": ".quality.quality",
    "calibrate": ".lowbit.calibrating",
    "disk_bandwidth": ".forecast.calibrate",
    "fine_tune": ".finetune.tune",
    "load": ".runtime.loading",
    "load_members": ".members.members",
    "open_lane": ".gpu.devices",
    "pack_units": ".neurons.packing",
    "product_rates": ".forecast.product_rates",
    "softmax_gates": ".prefetch.softmax_gates",
    "quality": ".quality.quality",
    "quantise": ".lowbit.quantise",
    "quantise_in_levels": ".lowbit.quantise",
    "quantise_to_bits": ".lowbit.fitting",
    "quantise_to_ternary": ".lowbit.quantise",
    "train_bit_router": ".lowbit.bit_router",
    "wire_bandwidth": ".forecast.calibrate_gpu",
    "write_pack": ".store.packing",
}

__all__ = [
    "CACHES",
    "Contestant",
    "Engine",
    "EngineCounters",
    "EngineOptions",
    "Finished",
    "GenerationRequest",
    "Judge",
    "NotReady",
    "Offload",
    "PackedRows",
    "Part",
    "QueueFull",
    "ReplayedSteps",
    "Sampling",
    "Simulated",
    "StepRates",
    "Stream",
    "TokenEvent",
    "TuneOptions",
    "available_memory",
    "calibrate",
    "dequantise",
    "disk_bandwidth",
    "fine_tune",
    "fit",
    "forecast_steps",
    "format_size",
    "load",
    "load_members",
    "make_cache",
    "measure_step_rates",
    "open_lane",
    "pack_units",
    "parse_size",
    "product_rates",
    "quality",
    "quantise",
    "quantise_in_levels",
    "quantise_to_bits",
    "quantise_to_ternary",
    "replay_steps",
    "simulate",
    "softmax_gates",
    "train_bit_router",
    "wire_bandwidth",
    "write_pack",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)
