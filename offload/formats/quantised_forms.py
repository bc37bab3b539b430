"""The quantised forms by name; each is a way to store matrices, and all lie in files and slots alike."""

from collections.abc import Mapping
from typing import ClassVar

from .quantised import QuantisedForm


class Mxfp4Form(QuantisedForm):
    """Floats of four bits (E2M1), an exponent for each 32."""

    name: ClassVar[str] = "mxfp4"


class Nvfp4Form(QuantisedForm):
    """Floats of four bits (E2M1), a float of eight bits for each 16, and a scale of these scales."""

    name: ClassVar[str] = "nvfp4"


class Mxfp8Form(QuantisedForm):
    """Floats of eight bits (E4M3), an exponent for each 32."""

    name: ClassVar[str] = "mxfp8"


class Fp8Form(QuantisedForm):
    """Floats of eight bits (E4M3), a scale for each block, row or tensor."""

    name: ClassVar[str] = "fp8"


class Int4Form(QuantisedForm):
    """Integers of four bits, a scale and perhaps a zero for each group."""

    name: ClassVar[str] = "int4"


class Int8Form(QuantisedForm):
    """Integers of eight bits, a scale and perhaps a zero for each row or group."""

    name: ClassVar[str] = "int8"


class Int1Form(QuantisedForm):
    """Integers of one bit (HQQ), a scale and a zero for each group."""

    name: ClassVar[str] = "int1"


class Int2Form(QuantisedForm):
    """Integers of two bits, a scale for each group."""

    name: ClassVar[str] = "int2"


class Int3Form(QuantisedForm):
    """Integers of three bits, a scale for each group."""

    name: ClassVar[str] = "int3"


class Nf4Form(QuantisedForm):
    """Quantiles of four bits (bitsandbytes), a scale for each 64."""

    name: ClassVar[str] = "nf4"


class GptqForm(QuantisedForm):
    """Integers of GPTQ, four or eight bits, down the inputs; packed copies hold them as rows."""

    name: ClassVar[str] = "gptq"


class AwqForm(QuantisedForm):
    """Integers of AWQ, four bits, down the inputs; packed copies hold them as rows."""

    name: ClassVar[str] = "awq"


class HqqForm(QuantisedForm):
    """Integers of HQQ, rows of which share bytes; packed copies hold them as rows."""

    name: ClassVar[str] = "hqq"


class MixedForm(QuantisedForm):
    """Matrices of different stored forms in one layer."""

    name: ClassVar[str] = "mixed"


ALL = (
    Mxfp4Form,
    Nvfp4Form,
    Mxfp8Form,
    Fp8Form,
    Int1Form,
    Int2Form,
    Int3Form,
    Int4Form,
    Int8Form,
    Nf4Form,
    GptqForm,
    AwqForm,
    HqqForm,
    MixedForm,
)
QUANTISED_FORMS: Mapping[str, type[QuantisedForm]] = {form.name: form for form in ALL}
