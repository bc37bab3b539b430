"""Quantities of a cluster file in SI units once read, and the base of all its sections."""

import re
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from routing.ground.quantity import parse_bytes, parse_bytes_per_s, parse_flops, parse_seconds

LEAST_BARE = 1e6  # no device holds less than 1 MB or moves less than 1 MB/s; 80 or 450 are meant as GiB and GB/s
_BARE = re.compile(r"\s*[0-9.]+(?:[eE][+-]?[0-9]+)?\s*")
_LETTER_ONLY = re.compile(r"\s*[0-9.]+(?:[eE][+-]?[0-9]+)?\s*([kKMGTP]i?)(?:/s|ps)?\s*")


def _device_bytes(value: object) -> float:
    """Memory of a device: a size with its unit, or whole bytes."""
    size = parse_bytes(value)
    if 0 < size < LEAST_BARE and _is_bare(value):
        raise ValueError(f"{value} would be {size:g} bytes; write the unit, for instance {value}GiB")
    return size


def _rate(value: object) -> float:
    """A bandwidth with its unit, or whole bytes per second."""
    if isinstance(value, str) and (letter := _LETTER_ONLY.fullmatch(value)):
        number, prefix = value[: letter.start(1)].strip(), letter[1]
        raise ValueError(f"{value} is bytes or bits? write {number}{prefix}B/s or {number}{prefix}b/s (8 times less)")
    rate = parse_bytes_per_s(value)
    if 0 < rate < LEAST_BARE and _is_bare(value):
        raise ValueError(f"{value} would be {rate:g} bytes per second; write the unit, for instance {value}GB/s")
    return rate


def _is_bare(value: object) -> bool:
    return not isinstance(value, str) or _BARE.fullmatch(value) is not None


Bytes = Annotated[float, BeforeValidator(parse_bytes), Field(ge=0, allow_inf_nan=False)]
DeviceBytes = Annotated[float, BeforeValidator(_device_bytes), Field(ge=0, allow_inf_nan=False)]
BytesPerSecond = Annotated[float, BeforeValidator(_rate), Field(gt=0, allow_inf_nan=False)]
Seconds = Annotated[float, BeforeValidator(parse_seconds), Field(ge=0, allow_inf_nan=False)]
Flops = Annotated[float, BeforeValidator(parse_flops), Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Strict(BaseModel):
    """Base of all sections: unknown keys are errors, instances do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)
