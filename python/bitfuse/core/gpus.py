"""What a GPU is: its architecture by any of its names, its limits on a kernel, its rates.

Limits are those of the CUDA C++ programming guide's table of compute capabilities; rates are those of the
vendor's data sheets, dense.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Arch:
    """A compute capability: every fact of a generation that a kernel is planned by.

    Attributes:
        target: what the compiler calls it, "90a": with the letter where some instructions exist only there.
        shared_operands: its tensor cores read their operands from shared memory (wgmma; tcgen05 from
            Blackwell on), not from registers.
        shared_kib, block_kib: shared memory of a multiprocessor, and what one block may have of it.
        registers: of 32 bits, a multiprocessor.
        warps, blocks: that a multiprocessor holds at most.
        name: of the generation.
    """

    target: str
    shared_kib: int
    block_kib: int
    warps: int
    blocks: int
    name: str
    shared_operands: bool = False
    registers: int = 65536

    @property
    def number(self) -> int:
        """The capability, 90 for 9.0."""
        return int(self.target.rstrip("af"))

    @property
    def roomy(self) -> bool:
        """Whether a block may have the 160 KiB of the generations for data centers, not 99."""
        return self.block_kib >= 160

    @property
    def tensor_memory(self) -> bool:
        """Whether sums of its tensor cores lie in a memory of their own (tcgen05), 512 columns a block."""
        return self.shared_operands and self.number >= 100

    @property
    def converts_fp8(self) -> bool:
        """Whether it has instructions from e4m3 to float16."""
        return self.number >= 89

    @property
    def overlaps(self) -> bool:
        """Whether a kernel may begin before the one that it reads from has ended (programmatic dependent
        launch)."""
        return self.number >= 90

    def __str__(self) -> str:
        return f"sm_{self.target}"


ARCHS = {
    arch.number: arch
    for arch in (
        Arch("75", 64, 64, 32, 16, "Turing"),
        Arch("80", 164, 163, 64, 32, "Ampere"),
        Arch("86", 100, 99, 48, 16, "Ampere"),
        Arch("87", 164, 163, 48, 16, "Ampere"),
        Arch("89", 100, 99, 48, 24, "Ada"),
        Arch("90a", 228, 227, 64, 32, "Hopper", shared_operands=True),
        Arch("100a", 228, 227, 64, 32, "Blackwell", shared_operands=True),
        Arch("103a", 228, 227, 64, 32, "Blackwell", shared_operands=True),
        Arch("120a", 100, 99, 48, 24, "Blackwell"),
    )
}


def arch_of(capability: int) -> Arch:
    """The row of a capability; of one that has none, of the nearest before it, whose code it may run."""
    known = ARCHS.get(capability)
    return known or ARCHS[max((n for n in ARCHS if n <= capability), default=min(ARCHS))]


@dataclass(frozen=True)
class Gpu:
    """A card.

    Attributes:
        name: as people say it, "h100".
        arch: of `ARCHS`.
        multiprocessors: how many.
        gb_per_s: memory bandwidth, 1e9 bytes a second.
        tflop_per_s: of the tensor cores in fp16 and bf16 with float32 sums (sm_75: fp16), 1e12 a second.
        float_tflop_per_s: of float32 outside the tensor cores.
        l2_mib: its L2 cache.
    """

    name: str
    capability: int
    multiprocessors: int
    gb_per_s: float
    tflop_per_s: float
    float_tflop_per_s: float
    l2_mib: int

    @property
    def arch(self) -> Arch:
        return ARCHS[self.capability]

    @property
    def clock_ghz(self) -> float:
        """Of its multiprocessors, 1e9 a second: what the float32 rate says, of two a lane and clock."""
        lanes = 64 if self.capability in (75, 80) else 128
        return self.float_tflop_per_s * 1e3 / (2 * lanes * self.multiprocessors)

    @property
    def memory_bytes(self) -> float:
        """Bytes of memory that a multiprocessor is given a clock."""
        return self.gb_per_s / (self.clock_ghz * self.multiprocessors)

    @property
    def clock_hz(self) -> float:
        """Of its multiprocessors, as the rate of float32 says: two operations a lane and clock."""
        lanes = 64 if self.capability in (75, 80) else 128
        return self.float_tflop_per_s * 1e12 / (2 * lanes * self.multiprocessors)


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("t4", 75, 40, 320, 65, 8.1, 4),
        Gpu("a100", 80, 108, 2039, 312, 19.5, 40),
        Gpu("a100-40gb", 80, 108, 1555, 312, 19.5, 40),
        Gpu("a30", 80, 56, 933, 165, 10.3, 24),
        Gpu("a10", 86, 72, 600, 125, 31.2, 6),
        Gpu("a40", 86, 84, 696, 149.7, 37.4, 6),
        Gpu("rtxa6000", 86, 84, 768, 154.8, 38.7, 6),
        Gpu("rtx3060", 86, 28, 360, 25.5, 12.7, 3),
        Gpu("rtx3090", 86, 82, 936, 71.2, 35.6, 6),
        Gpu("orin", 87, 16, 204.8, 42.5, 5.3, 4),
        Gpu("l4", 89, 58, 300, 121, 30.3, 48),
        Gpu("l40s", 89, 142, 864, 362, 91.6, 96),
        Gpu("rtx4060", 89, 24, 272, 30.2, 15.1, 24),
        Gpu("rtx4090", 89, 128, 1008, 165.2, 82.6, 72),
        Gpu("h100", 90, 132, 3352, 989.4, 66.9, 50),
        Gpu("h100-pcie", 90, 114, 2039, 756, 51.2, 50),
        Gpu("h200", 90, 132, 4800, 989.4, 66.9, 50),
        Gpu("gh200", 90, 132, 4000, 989.4, 66.9, 50),
        Gpu("b200", 100, 148, 8000, 2250, 80, 126),
        Gpu("b300", 103, 148, 8000, 2250, 77, 126),
        Gpu("rtx5070", 120, 48, 672, 61.7, 30.9, 48),
        Gpu("rtx5090", 120, 170, 1792, 209.5, 104.8, 96),
    )
}

# the card that stands for an architecture when only that is named
TYPICAL = {
    75: "t4", 80: "a100", 86: "rtx3090", 87: "orin", 89: "rtx4090", 90: "h100", 100: "b200", 103: "b300",
    120: "rtx5090",
}  # fmt: skip


def find(name: str) -> Gpu:
    """The card of a name ("h100", "RTX 4090", "NVIDIA H100 80GB HBM3"), or the typical one of an architecture
    ("sm_90a", "90", "9.0", "compute_80").

    Raises:
        ValueError: neither; the message lists what there is.
    """
    plain = re.sub(r"[^a-z0-9.]+", "", name.lower())
    architecture = re.fullmatch(r"(?:sm|compute)?(\d+)\.?(\d)([af]?)", plain)
    if architecture and (number := int(architecture[1] + architecture[2])) in ARCHS:
        return GPUS[TYPICAL[number]]
    said = re.sub(r"^(nvidia)?(geforce)?", "", plain)
    if said.startswith("h100") and "pcie" in said:
        return GPUS["h100-pcie"]
    if said.startswith("a100") and "40gb" in said:
        return GPUS["a100-40gb"]
    keys = {key.replace("-", ""): gpu for key, gpu in GPUS.items()}
    matches = [g for key, g in keys.items() if said.startswith(key) or f"rtx{said}".startswith(key)]
    if matches:
        return max(matches, key=lambda g: len(g.name))
    raise ValueError(
        f"no GPU or architecture {name!r}; architectures: {', '.join(map(str, ARCHS.values()))}; "
        f"cards: {', '.join(GPUS)}"
    )
