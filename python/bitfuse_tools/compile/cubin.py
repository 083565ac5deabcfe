"""Machine code without a GPU: what a kernel takes of a multiprocessor, read from the files that the compilers
leave.

A cubin is an ELF file: a section of code a kernel (.text.NAME), its static shared memory (.nv.shared.NAME),
and attributes (.nv.info) with its registers, stack and threads. A fat binary, in an object file's .nv_fatbin,
is a row of cubins and PTX, each compressed by zstd or not at all.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitfuse.core.gpus import Arch

from .toolchain import find_tool

# .nv.info: format 4 has its size in the two bytes after the attribute, the others stand in those bytes
_SIZED = 4
_MAX_THREADS, _REQUIRED_THREADS, _FRAME, _REGISTERS = 0x05, 0x10, 0x11, 0x2F
_FATBIN = b"\x50\xed\x55\xba"
_ELF, _PTX = 2, 1
_NOBITS = 8
# what is counted of the machine code: tensor cores by generation, floats, copies past registers, spills
MIX = ("HGMMA", "IGMMA", "QGMMA", "UTCMMA", "HMMA", "IMMA", "FFMA", "LDGSTS", "UTMALDG", "LDSM", "LDL", "STL")


class NotMachineCode(ValueError):
    """The bytes are no cubin, or no fat binary, that this file can read."""


@dataclass(frozen=True)
class Resources:
    """What a kernel takes.

    Attributes:
        registers: a thread.
        local: bytes a thread on the stack in device memory: spills, and arrays that no register holds.
        static_shared: bytes a block.
        threads: a block at most, as `__launch_bounds__` or the compiler says; None when neither does.
        code: bytes of machine code.
    """

    name: str
    registers: int
    local: int
    static_shared: int
    threads: int | None
    code: int


@dataclass(frozen=True)
class Occupancy:
    """What a multiprocessor holds of a kernel at once, and what sets that."""

    blocks: int
    warps: int
    limit: str


def occupancy(arch: Arch, threads: int, registers: int, shared: int) -> Occupancy:
    """How many blocks of a kernel a multiprocessor holds: `threads` and `shared` bytes a block, `registers` a
    thread. 0 blocks: it can't be launched.

    Registers are given to a warp by 256, warps to a quarter of the multiprocessor, shared memory to a block
    by 128 bytes after the 1024 that the system keeps (CUDA C++ programming guide, compute capabilities).
    """
    warps = -(-threads // 32)
    a_warp = -(-max(registers, 1) * 32 // 256) * 256
    held_by_registers = 4 * (arch.registers // 4 // a_warp)
    reserved = 1024 if arch.number >= 80 else 0
    a_block = -(-(shared + reserved) // 128) * 128
    limits = {
        "warps": arch.warps // warps,
        "blocks": arch.blocks,
        "registers": held_by_registers // warps,
        "shared memory": arch.shared_kib * 1024 // a_block if a_block else arch.blocks,
    }
    if shared > arch.block_kib * 1024:
        limits["shared memory"] = 0
    blocks = min(limits.values())
    return Occupancy(blocks, blocks * warps, next(name for name, count in limits.items() if count == blocks))


# ELF


@dataclass(frozen=True)
class _Section:
    name: str
    kind: int
    offset: int
    size: int
    link: int


def _sections(elf: bytes) -> list[_Section]:
    if elf[:6] != b"\x7fELF\x02\x01":
        raise NotMachineCode("no 64-bit little-endian ELF file")
    try:
        (start,) = struct.unpack_from("<Q", elf, 40)
        size, count, names = struct.unpack_from("<HHH", elf, 58)
        raw = [struct.unpack_from("<IIQQQQII", elf, start + i * size) for i in range(count)]
        base = raw[names][4]
        found = []
        for name, kind, _, _, offset, length, link, _ in raw:
            end = elf.index(b"\0", base + name)
            if kind != _NOBITS and offset + length > len(elf):
                raise NotMachineCode("a section that ends past the file")
            found.append(_Section(elf[base + name : end].decode(), kind, offset, length, link))
    except (struct.error, IndexError, ValueError) as why:
        raise NotMachineCode(f"a damaged ELF file: {why}") from None
    return found


def _attributes(elf: bytes, section: _Section) -> Iterator[tuple[int, bytes]]:
    at, end = section.offset, section.offset + section.size
    while at + 4 <= end:
        form, attribute, value = struct.unpack_from("<BBH", elf, at)
        at += 4
        size = value if form == _SIZED else 0
        yield attribute, elf[at : at + size]
        at += size


def resources(elf: bytes) -> list[Resources]:
    """The kernels of a cubin.

    Raises:
        NotMachineCode: it is none.
    """
    sections = _sections(elf)
    by_name = {s.name: s for s in sections}
    registers: dict[str, int] = {}
    local: dict[str, int] = {}
    try:
        if (info := by_name.get(".nv.info")) is not None:
            symbols = sections[info.link]
            strings = sections[symbols.link]
            for attribute, value in _attributes(elf, info):
                into = {_REGISTERS: registers, _FRAME: local}.get(attribute)
                if into is not None:
                    symbol, number = struct.unpack("<II", value)
                    (name,) = struct.unpack_from("<I", elf, symbols.offset + 24 * symbol)
                    start = strings.offset + name
                    into[elf[start : elf.index(b"\0", start)].decode()] = number
        found = []
        for section in sections:
            if not section.name.startswith(".text."):
                continue
            name = section.name.removeprefix(".text.")
            own = by_name.get(f".nv.info.{name}")
            if own is None:  # a function that kernels call
                continue
            threads = None
            for attribute, value in _attributes(elf, own):
                if attribute in (_MAX_THREADS, _REQUIRED_THREADS):
                    x, y, z = struct.unpack("<III", value)
                    threads = x * y * z
            shared = by_name.get(f".nv.shared.{name}")
            found.append(
                Resources(
                    name=name,
                    registers=registers.get(name, 0),
                    local=local.get(name, 0),
                    static_shared=shared.size if shared else 0,
                    threads=threads,
                    code=section.size,
                )
            )
    except (struct.error, IndexError, ValueError) as why:
        raise NotMachineCode(f"a damaged cubin: {why}") from None
    return found


# fat binaries


@dataclass(frozen=True)
class Image:
    """A cubin of a fat binary: the architecture as the compiler says it, "sm_90a", and the ELF file."""

    arch: str
    elf: bytes


def images(obj: bytes) -> list[Image]:
    """The cubins of an object file or library made by nvcc; PTX is left out.

    Raises:
        NotMachineCode: its fat binary is damaged, or compressed and there is no libzstd.
    """
    found = []
    at = obj.find(_FATBIN)
    while at >= 0:
        try:
            header, size = struct.unpack_from("<HQ", obj, at + 6)
            begin, end = at + header, at + header + size
            if header != 16 or end > len(obj):  # those four bytes by chance
                at = obj.find(_FATBIN, at + 4)
                continue
            while begin < end:
                kind, header, size, packed = struct.unpack_from("<H2xIQI", obj, begin)
                (number,) = struct.unpack_from("<I", obj, begin + 28)
                flags, plain = struct.unpack_from("<Q8xQ", obj, begin + 40)
                if header < 64 or begin + header + size > end:
                    raise NotMachineCode("a damaged fat binary")
                if kind == _ELF:
                    body = obj[begin + header : begin + header + (packed or size)]
                    elf = _inflated(body, plain) if packed else body
                    found.append(Image(f"sm_{number}{'a' if flags & 1 << 20 else ''}", elf))
                begin += header + size
        except struct.error as why:
            raise NotMachineCode(f"a damaged fat binary: {why}") from None
        at = obj.find(_FATBIN, end)
    return found


def _inflated(body: bytes, size: int) -> bytes:
    """zstd: Python has it from 3.14 on, systems mostly as a library."""
    if body[:4] != b"\x28\xb5\x2f\xfd" or not 0 < size < 1 << 32:
        raise NotMachineCode("a cubin in a compression that is not zstd")
    if sys.version_info >= (3, 14):
        from compression import zstd

        return bytes(zstd.decompress(body))
    library = _zstd()
    out = ctypes.create_string_buffer(size)
    if library.ZSTD_decompress(out, size, body, len(body)) != size:
        raise NotMachineCode("a damaged fat binary: it does not unpack")
    return out.raw


def _zstd() -> Any:
    try:
        library = ctypes.CDLL("libzstd.so.1")
    except OSError:
        raise NotMachineCode("its cubins are compressed and there is no libzstd.so.1 here") from None
    library.ZSTD_decompress.restype = ctypes.c_size_t
    library.ZSTD_decompress.argtypes = [
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t,
    ]  # fmt: skip
    return library


# machine code as text


def instruction_mix(elf: bytes) -> dict[str, dict[str, int]] | None:
    """How often each instruction of `MIX` stands in each kernel of a cubin; None without nvdisasm."""
    tool = find_tool("nvdisasm")
    if tool is None:
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(elf)
        file.flush()
        try:
            done = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True)
        except (OSError, subprocess.SubprocessError):  # an nvdisasm older than the architecture
            return None
    return count_instructions(done.stdout)


_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")


def count_instructions(text: str) -> dict[str, dict[str, int]]:
    """The same of what nvdisasm prints."""
    counted: dict[str, Counter[str]] = {}
    now: Counter[str] = Counter()
    for line in text.splitlines():
        if line.startswith(".text.") and line.rstrip().endswith(":"):
            now = counted.setdefault(line.rstrip()[len(".text.") : -1], Counter())
        elif (found := _INSTRUCTION.match(line)) is not None:
            name = found[1]
            now["UTCMMA" if re.fullmatch(r"UTC\w*MMA", name) else name] += 1
    return {kernel: {name: count[name] for name in MIX if count[name]} for kernel, count in counted.items()}


def demangled(names: list[str]) -> list[str]:
    """C++ names without namespaces and arguments, "lowbit_linear_kernel<__half, 4>", where binutils or the
    toolkit has a program for it; else as they are."""
    tool = shutil.which("c++filt") or find_tool("cu++filt")
    if tool is None or not names:
        return names
    try:
        done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return names
    said = done.stdout.splitlines()
    return [short_name(name) for name in said] if len(said) == len(names) else names


def short_name(name: str) -> str:
    """A C++ function without what is around its name and template arguments."""
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    depth = 0
    for at, letter in enumerate(name):  # the arguments open outside all angle brackets
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            name = name[:at]
            break
    return re.sub(r"\b(?:[a-z_]\w*::)+", "", name)


def read(path: Path) -> list[Image]:
    """The cubins of an object file, or the one that the file is."""
    data = path.read_bytes()
    if data[:4] == b"\x7fELF" and struct.unpack_from("<H", data, 18)[0] == 190:  # EM_CUDA
        return [Image("", data)]
    return images(data)
