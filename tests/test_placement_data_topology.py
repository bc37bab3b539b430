"""Machines as they describe themselves: devices are counted, not lines, and what is guessed is said."""

import pytest
import yaml

from experiments import cli
from placement import Cluster, load_cluster
from placement.data.topology import TopologyOptions, read_nccl_topology, read_nvidia_smi_topo, read_topology
from placement.data.topology.rates import pcie_bytes_per_s


def matrix(gpus, cards, link, near=lambda g, c: "PIX" if g == c else "NODE", between=lambda a, b: "NODE", name="NIC{}"):
    """`nvidia-smi topo -m`: `link`, `near` and `between` say what joins two GPUs, a GPU and a card, two cards."""
    names = [f"GPU{g}" for g in range(gpus)] + [name.format(c) for c in range(cards)]
    joins = link if callable(link) else lambda a, b: link

    def cell(a, b):
        low, high = min(a, b), max(a, b)
        if low == high:
            return " X "
        if high < gpus:
            return joins(low, high)
        return near(low, high - gpus) if low < gpus else between(low - gpus, high - gpus)

    size = range(len(names))
    lines = ["\t" + "\t".join(names) + "\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID"]
    lines += [
        "\t".join([names[i], *(cell(i, j) for j in size), *(["0-31", "0", "N/A"] if i < gpus else [])]) for i in size
    ]
    return "\n".join([*lines, "", "Legend:", "  X    = Self", "  NV#  = a bonded set of # NVLinks", ""])


def system(gpus, nets=(), sm=90, links=18, attributes="", host=""):
    body = "".join(
        f'<pci busid="{host}0000:{g:02x}:00.0" {attributes}><gpu dev="{g}" sm="{sm}" rank="{g}">'
        + (f'<nvlink target="0" count="{links}" tclass="0x068000"/>' if links else "")
        + "</gpu></pci>"
        for g in range(gpus)
    )
    cards = f'<pci busid="0000:ff:00.0"><nic>{"".join(nets)}</nic></pci>'
    return f'<cpu host_hash="{host or 1}" numaid="0">{body}{cards}</cpu>'


def xml(*systems):
    return f'<system version="1">{"".join(systems)}</system>'


def net(name, speed, guid, port="1"):
    return f'<net name="{name}" dev="0" speed="{speed}" port="{port}" guid="{guid}"/>'


PCIE_4 = 'link_speed="16.0 GT/s PCIe" link_width="16"'
FAST = [net(f"mlx5_{i}", 400000, hex(160 + i)) for i in range(8)]


@pytest.fixture
def described(tmp_path):
    """GPUs of a node, GB/s of NVLink per GPU, GB/s of the network per GPU, number of nodes, and the guesses."""

    def read(text, **options):
        path = tmp_path / "machine"
        path.write_text(text)
        found = read_topology(path, TopologyOptions(**options))
        cluster = Cluster.from_mapping(found)
        nvlink, nic = cluster.nvlink_bytes_per_s_G[0] / 1e9, cluster.nic_bytes_per_s_G[0] / 1e9
        nodes = cluster.num_nodes
        return (
            (cluster.num_gpus // nodes, round(float(nvlink), 2), round(float(nic), 2)),
            nodes,
            found.get("guessed", []),
        )

    return read


FIVE_FUNCTIONS = {
    "near": lambda g, c: "PIX" if c // 5 == g else "NODE",
    "between": lambda a, b: "PIX" if a // 5 == b // 5 else "NODE",
}


@pytest.mark.parametrize(
    ("text", "expected", "guess"),
    [
        (matrix(8, 8, "NV18"), (8, 450, 50), "18 links per GPU"),
        (matrix(8, 40, "NV18", **FIVE_FUNCTIONS), (8, 450, 50), "40 ports and functions are taken for 8 cards"),
        (matrix(8, 10, "NV18"), (8, 450, 50), "NIC8, NIC9 share no PCIe switch"),
        (matrix(8, 8, "NV18", name="mlx5_{}"), (8, 450, 50), "18 links per GPU"),
        (matrix(8, 8, "NV12"), (8, 300, 50), "12 links per GPU"),
        (matrix(4, 4, "NV4"), (4, 300, 50), "12 links per GPU"),
        (matrix(4, 4, "NV6"), (4, 450, 50), "18 links per GPU"),
        (matrix(2, 1, "NV4"), (2, 56.25, 25), "4 links per GPU"),
        (matrix(4, 0, "NV18"), (4, 900, 50), "tray of GB200 NVL72"),
        (matrix(8, 8, "NODE"), (8, 64, 50), "no NVLink is described"),
        (matrix(4, 4, lambda a, b: "NV12" if a // 2 == b // 2 else "SYS"), (4, 64, 50), "joins only some pairs"),
        (matrix(1, 1, "NV18"), (1, 64, 50), "nic: the rate is not described"),
    ],
)
def test_nvidia_smi(described, text, expected, guess):
    got, _, guessed = described(text)
    assert got == expected
    assert any(guess in one for one in guessed)


def test_names_of_gpus_tell_the_generation(described):
    for name, rate in (
        ("NVIDIA B200", 900),
        ("NVIDIA H100 80GB HBM3", 450),
        ("NVIDIA GB300", 900),
        ("NVIDIA H20", 450),
    ):
        text = f"GPU 0: NVIDIA {name} (UUID: GPU-1)\nGPU 1: NVIDIA {name} (UUID: GPU-2)\n" + matrix(8, 8, "NV18")
        got, _, guessed = described(text)
        assert got == (8, rate, 50)
        assert not any(one.startswith("nvlink") for one in guessed)


def test_options_settle_guesses(described):
    got, _, guessed = described(matrix(8, 8, "NV18"), nvlink_bytes_per_s=900e9, nic_bytes_per_s=100e9)
    assert (got, guessed) == ((8, 900, 100), [])
    got, _, _ = described(xml(system(8, FAST, sm=100)), nic_bytes_per_s=25e9)
    assert got == (8, 900, 25)


def test_trays_are_one_nvlink_domain(described):
    tray = matrix(4, 4, "NV18")
    assert described(tray, nodes=18)[:2] == ((72, 900, 50), 1)
    assert described(tray, nodes=36)[:2] == ((72, 900, 50), 2)
    assert described(tray, nodes=9)[:2] == ((36, 900, 50), 1)
    assert described(tray, nodes=18, domain_gpus=4)[:2] == ((4, 900, 50), 18)
    assert described(matrix(8, 8, "NV18"), nodes=4, domain_gpus=16)[:2] == ((16, 450, 50), 2)
    assert described(xml(system(4, FAST[:4], sm=100)), nodes=18)[:2] == ((72, 900, 50), 1)
    with pytest.raises(ValueError, match="not made of whole nodes of 8 GPUs"):
        described(matrix(8, 8, "NV18"), domain_gpus=12)


def test_a_last_rack_may_have_fewer_trays(tmp_path):
    (tmp_path / "t").write_text(matrix(4, 4, "NV18"))
    cluster = Cluster.from_mapping(read_nvidia_smi_topo(tmp_path / "t", nodes=20))
    assert [int((cluster.node_G == node).sum()) for node in range(cluster.num_nodes)] == [72, 8]


@pytest.mark.parametrize(
    ("text", "expected", "guess"),
    [
        (xml(system(8, FAST)), (8, 477, 50), None),
        (xml(system(8, [*FAST, net("eth0", 10000, "0x0")])), (8, 477, 50), "eth0 are far slower"),
        (xml(system(8, [net(f"eth{i}", 200000, "0x0") for i in range(8)])), (8, 477, 25), None),
        (xml(system(8, [net(f"mlx5_{i}", 400000, hex(160 + i // 5)) for i in range(40)])), (8, 477, 50), None),
        (
            xml(system(4, [net(f"mlx5_{i}", 200000, hex(160 + i // 2), str(1 + i % 2)) for i in range(8)])),
            (4, 477, 50),
            "2 ports, added up",
        ),
        (xml(system(8, FAST, sm=100)), (8, 900, 50), None),
        (xml(system(8, FAST, sm=80, links=12)), (8, 300, 50), None),
        (xml(system(8, FAST, sm=107)), (8, 900, 50), "links of sm 107 are taken for those of sm 103"),
        (xml(system(8, FAST, links=0)), (8, 64, 50), "no NVLink is described"),
        (
            xml(system(8, FAST, links=0, attributes='link_speed="16.0 GT/s PCIe" link_width="16"')),
            (8, 31.51, 50),
            "NVLink",
        ),
        (xml(system(8, [net(f"mlx5_{i}", -1, hex(160 + i)) for i in range(8)])), (8, 477, 50), "rate is not described"),
        (xml(system(8)), (8, 477, 50), "no network card is described"),
    ],
)
def test_nccl(described, text, expected, guess):
    got, _, guessed = described(text)
    assert got == expected
    assert any(guess in one for one in guessed) if guess else not guessed


def test_functions_of_one_port_share_its_pcie_link(described):
    nets = "".join(net(f"mlx5_{i}", 400000, "0xa0", str(1 + i)) for i in range(5))
    body = system(1) + f'<cpu><pci busid="9" link_speed="32.0 GT/s PCIe" link_width="16"><nic>{nets}</nic></pci></cpu>'
    got, _, guessed = described(xml(body))
    assert got == (1, 477, 50)
    assert any("5 ports, 400 Gb/s once" in one for one in guessed)


def test_a_dump_of_several_hosts_counts_each_gpu_once(described):
    """GPUs of different hosts have the same `dev` and PCI address."""
    hosts = [system(4, [net("mlx5_0", 400000, hex(160 + h))], sm=100, host=f"0x{h + 1}") for h in range(2)]
    got, nodes, guessed = described(xml(*hosts))
    assert (got, nodes) == ((8, 900, 12.5), 1)
    assert any("joins 2 hosts" in one for one in guessed)


def test_links_to_cpus_are_no_way_to_other_gpus(described):
    links = '<nvlink count="3" tclass="0x030200"/><nvlink count="3" tclass="{1}"/>'
    gpu = f'<pci busid="{{0}}"><gpu dev="{{0}}" sm="70">{links}</gpu></pci>'
    power = xml(f"<cpu>{gpu.format(0, '0x068001')}{gpu.format(1, '0x068001')}</cpu>")
    assert described(power)[0][1] == 75
    assert described(power.replace("0x068001", "0x030200"))[0][1] == 150


def test_rccl_and_static_files(described):
    gpu = '<pci busid="{0}"><gpu dev="{0}" gcn="{1}"><xgmi count="7" tclass="0x03"/></gpu></pci>'
    assert described(xml(f"<cpu>{gpu.format(0, 'gfx942')}{gpu.format(1, 'gfx942')}</cpu>"))[0][:2] == (2, 448)
    with pytest.raises(ValueError, match="XGMI rate of gfx12 is not known"):
        described(xml(f"<cpu>{gpu.format(0, 'gfx12')}</cpu>"))
    cards = '<pci busid="0101:00:00.0" class="0x020700" link_speed="16.0 GT/s PCIe" link_width="16"/>'
    gpus = "".join(f'<pci busid="000{g}:00:00.0" class="0x030200"/>' for g in range(2))
    got, _, guessed = described(xml(f'<cpu numaid="0">{gpus}{cards}</cpu>'))
    assert got == (2, 64, 15.75)
    assert {one.partition(":")[0] for one in guessed} == {"nvlink", "nic"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("       GPU0  GPU1\nGPU0   0     XGMI\nGPU1   XGMI  0\n", "AMD link table of 2 GPUs.* --nvlink RATE"),
        ('<graphs version="1"><graph id="0"><channel><gpu dev="0"/></channel></graph></graphs>', "graph dump"),
        ("<topology/>", "expected a <system>"),
        (xml("<cpu/>"), "no <gpu>"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><system/>', "entities"),
        ("<system", "not readable as XML"),
        ("hello\n", "header GPU0"),
        (matrix(8, 0, "NV18").rpartition("GPU7")[0], "no whole row for GPU7"),
        (matrix(2, 0, "??"), "row GPU0 has '\\?\\?'"),
        ("  MIG 1g.10gb     Device  0: (UUID: MIG-1)\n" + matrix(2, 0, "SYS"), "MIG instances"),
        (xml('<cpu><pci busid="1"><gpu dev="0" sm="90"/><gpu dev="1" sm="90"/></pci></cpu>'), "as MIG instances have"),
        (
            xml('<cpu><pci busid="1"><gpu dev="0" sm="90"><nvlink count="x"/></gpu></pci></cpu>'),
            "whole number; got 'x'",
        ),
    ],
)
def test_what_cannot_be_told_is_refused(described, text, words):
    with pytest.raises(ValueError, match=words):
        described(text)


def test_amd_tables_with_the_rate(described):
    text = "       GPU0  GPU1\nGPU0   0     XGMI\nGPU1   XGMI  0\n"
    assert described(text, nvlink_bytes_per_s=448e9)[0] == (2, 448, 50)


def rocm(gpus, kind=lambda a, b: "XGMI", hops=lambda a, b: 1, names="", tail=""):
    """`rocm-smi --showtopo`, after what `--showproductname` says of the GPUs."""

    def table(title, cell):
        rows = [["GPU" + str(a), *("0" if a == b else str(cell(a, b)) for b in range(gpus))] for a in range(gpus)]
        head = " ".join(f"GPU{g}" for g in range(gpus))
        return [f"{f' {title} between two GPUs ':=^90}", f"       {head}", *("   ".join(row) for row in rows), ""]

    lines = [f"{' ROCm System Management Interface ':=^90}", names, *table("Weight", lambda a, b: 15)]
    lines += [*table("Hops", hops), *table("Link Type", kind), f"{' Numa Nodes ':=^90}"]
    lines += [f"GPU[{g}]\t\t: (Topology) Numa Node: {g // 4}" for g in range(gpus)]
    return "\n".join([*lines, f"{' End of ROCm SMI Log ':=^90}", tail])


def test_rocm_tables(described):
    """Rates by architecture and direct neighbours, by --nvlink, or a guess where XGMI joins only some pairs."""
    mi300 = "GPU[0]\t\t: GFX Version: \t\tgfx942"
    assert described(rocm(8, names=mi300))[0] == (8, 448, 50)
    two_away = described(rocm(4, hops=lambda a, b: 2 if abs(a - b) == 2 else 1, names=mi300))
    assert two_away[0][:2] == (4, 128)
    assert any("2 neighbours is a guess" in one for one in two_away[2])
    assert described(rocm(4), nvlink_bytes_per_s=448e9)[0][:2] == (4, 448)
    islands = described(rocm(8, kind=lambda a, b: "XGMI" if a // 4 == b // 4 else "PCIE", names=mi300))
    assert islands[0][:2] == (8, 64)
    assert any("joins only some pairs" in one for one in islands[2])
    assert described(rocm(1))[0][:2] == (1, 64)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (rocm(4), "does not say how fast XGMI is.*--showproductname"),
        (rocm(2, kind=lambda a, b: "IPC", names="XGMI"), "expected the link table"),
        (rocm(3, kind=lambda a, b: "XGMI" if a < b else "PCIE"), "GPU0 to GPU1 is 'XGMI'; expected .* both ways"),
        (rocm(4).replace("GPU3   XGMI   XGMI   XGMI   0", "GPU3   XGMI   XGMI"), "row of GPU3 has 2 cells of 4"),
        (rocm(4).replace("GPU3   XGMI   XGMI   XGMI   0", ""), "Link Type has no whole row"),
        (rocm(3) + rocm(2).replace("Link Type", "Other"), "different GPUs"),
        ("ROCm\n", "expected the link table"),
    ],
)
def test_damaged_rocm_tables_are_refused(described, text, words):
    with pytest.raises(ValueError, match=words):
        described(text)


def test_pcie_rates():
    assert pcie_bytes_per_s("32.0 GT/s PCIe", "16") == pytest.approx(63.015e9, rel=1e-3)
    assert pcie_bytes_per_s("2.5 GT/s PCIe", "1") == 250e6
    assert pcie_bytes_per_s("", "") is None


def test_readers_take_keywords(tmp_path):
    (tmp_path / "n.xml").write_text(xml(system(2, FAST[:2])))
    assert Cluster.from_mapping(read_nccl_topology(tmp_path / "n.xml", nodes=3)).num_gpus == 6


def test_the_command_writes_and_prints_its_guesses(tmp_path, monkeypatch, capsys):
    (tmp_path / "t").write_text(matrix(8, 8, "NV18"))
    command = ["expertier", "place", "cluster", str(tmp_path / "t"), "--nodes", "2", "--out", str(tmp_path / "c.yaml")]
    for options, words in ((["--nic", "200Gb/s"], "guessed: nvlink"), (["--nic", "200"], "--nic needs a unit")):
        monkeypatch.setattr("sys.argv", [*command, *options])
        with pytest.raises(SystemExit):
            cli.main()
        said = capsys.readouterr()
        assert words in said.out + said.err
    written = yaml.safe_load((tmp_path / "c.yaml").read_text())
    assert [one.partition(":")[0] for one in written["guessed"]] == ["nvlink"]
    assert load_cluster(tmp_path / "c.yaml").nic_bytes_per_s_G[0] == 25e9
