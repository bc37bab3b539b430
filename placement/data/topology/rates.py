"""How fast links are, bytes per second in one direction, with the source of each number.

Data sheets give NVLink as the sum over all links and both directions: H100 900 GB/s = 18 links x 2 x 25 GB/s.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LinkRate:
    """One link of a GPU.

    Args:
        bytes_per_s: one link, one direction.
        source: where the number is from.
    """

    bytes_per_s: float
    source: str


# bytes per second of one link in one direction; each names its data sheet
NVLINK_1 = LinkRate(bytes_per_s=20e9, source="P100 data sheet: 160 GB/s over 4 links")
NVLINK_2 = LinkRate(bytes_per_s=25e9, source="V100 data sheet: 300 GB/s over 6 links")
NVLINK_3 = LinkRate(bytes_per_s=25e9, source="A100 data sheet: 600 GB/s over 12 links")
NVLINK_3_BRIDGE = LinkRate(bytes_per_s=14.0625e9, source="RTX A6000 and A40 data sheets: 112.5 GB/s over 4 links")
NVLINK_4 = LinkRate(bytes_per_s=25e9, source="H100 SXM data sheet: 900 GB/s over 18 links")
NVLINK_4_RAW = LinkRate(bytes_per_s=26.5e9, source="nvidia-smi nvlink --status on H100: 26.562 GB/s per link")
NVLINK_5 = LinkRate(bytes_per_s=50e9, source="B200 and GB200 data sheets: 1.8 TB/s over 18 links")

# by compute capability, as NCCL's topology names GPUs; without NVLink: 89 (L40S), 120 (RTX PRO Blackwell)
NVLINK_BY_SM = {
    60: NVLINK_1,
    70: NVLINK_2,
    75: LinkRate(bytes_per_s=25e9, source="RTX 8000 data sheet: 100 GB/s over 2 links"),
    80: NVLINK_3,
    86: NVLINK_3_BRIDGE,
    90: NVLINK_4_RAW,
    100: NVLINK_5,
    103: LinkRate(bytes_per_s=50e9, source="B300 data sheet: 1.8 TB/s over 18 links"),
}
# by the name in `nvidia-smi -L`; the first that fits
NVLINK_BY_NAME = (
    (re.compile(r"\bG?B[123]00\b"), NVLINK_5),
    (re.compile(r"\b(G?H100|G?H200|H800|H20)\b"), NVLINK_4),
    (re.compile(r"\b(A100|A800|A30)\b"), NVLINK_3),
    (re.compile(r"\b(A40|A6000|A5000|A5500|3090)\b"), NVLINK_3_BRIDGE),
    (re.compile(r"\bV100\b"), NVLINK_2),
    (re.compile(r"\bP100\b"), NVLINK_1),
)
XGMI_BY_GCN = {
    "gfx90a": LinkRate(bytes_per_s=50e9, source="MI250X data sheet: 100 GB/s per Infinity Fabric link"),
    "gfx942": LinkRate(bytes_per_s=64e9, source="MI300X data sheet: 128 GB/s per Infinity Fabric link"),
    "gfx950": LinkRate(bytes_per_s=76.8e9, source="MI355X data sheet: 153.6 GB/s per Infinity Fabric link"),
}
# links that a GPU has at most; more between its pairs than this go through a switch (18: H100, B200)
MOST_LINKS = 18

# bytes per second in one direction
PCIE_5_X16 = LinkRate(bytes_per_s=64e9, source="PCIe 5.0 x16: 32 GT/s x 16 lanes / 8, before encoding")
NIC_400G = LinkRate(bytes_per_s=50e9, source="one 400 Gb/s card per GPU, as in DGX H100")


def pcie_bytes_per_s(speed: str, width: str) -> float | None:
    """Payload rate of a PCIe link as sysfs writes it (`32.0 GT/s PCIe`, `16`); None if it does not say.

    Generations 1 and 2 (2.5 and 5 GT/s) send 8 bits as 10, later ones 128 as 130.
    """
    match = re.match(r"\s*([\d.]+)\s*GT/s", speed)
    if match is None or not width.strip().isdecimal() or not int(width):
        return None
    transfers = float(match[1]) * 1e9
    return transfers * int(width) / 8 * (0.8 if transfers <= 5e9 else 128 / 130)
