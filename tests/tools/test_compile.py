"""`bitfuse compile` and `bitfuse.load_kernels`: compilers, machine code, folders of kernels, with no GPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import bitfuse
import pytest
import torch
from bitfuse import _sources
from bitfuse.core import bundle
from bitfuse.core.gpus import ARCHS, find
from bitfuse_tools.bench.shapes import SHAPES
from bitfuse_tools.cli import app
from bitfuse_tools.compile import build, cubin, table, toolchain, triton_kernels
from bitfuse_tools.compile.toolchain import Target
from bitfuse_tools.hypothetical import EVERY, explain_sizes
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]

# which machine code


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("80;90a", [Target(80), Target(90, "a")]),
        ("8.0 9.0a+PTX", [Target(80), Target(90, "a", True)]),
        ("sm_86, sm_89+ptx", [Target(86), Target(89, "", True)]),
        ("h100;rtx4090,h100", [Target(90, "a"), Target(89)]),
        ("100a;120a", [Target(100, "a"), Target(120, "a")]),
    ],
)
def test_targets(text: str, targets: list[Target]) -> None:
    assert toolchain.parse_targets(text) == targets


@pytest.mark.parametrize("text", ["", "80+", "80+SASS", "gtx1080", ";"])
def test_targets_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="BITFUSE_CUDA_ARCHS"):
        toolchain.parse_targets(text)


def test_gencode() -> None:
    targets = toolchain.parse_targets("80+PTX;90a+PTX")
    assert toolchain.made_for(targets) == "sm_80 compute_80 sm_90a compute_90"
    assert toolchain.hopper_gencode(targets) == ["-gencode=arch=compute_90a,code=[sm_90a,compute_90a]"]
    assert toolchain.hopper_gencode(toolchain.parse_targets("80;90a")) == [
        "-gencode=arch=compute_90a,code=sm_90a"
    ]
    assert toolchain.hopper_gencode(toolchain.parse_targets("80;90")) == []


def program(folder: Path, name: str, says: str, code: int = 0) -> None:
    """A program that prints this, first on PATH with `only`."""
    file = folder / name
    file.write_text(f"#!/bin/sh\ncat <<'END'\n{says}\nEND\nexit {code}\n")
    file.chmod(0o755)


def only(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("BITFUSE_CUDA_ARCHS", raising=False)


def test_native(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    only(monkeypatch, tmp_path)
    program(tmp_path, "nvidia-smi", "9.0\n8.9\n9.0")
    assert toolchain.native() == [89, 90]
    assert toolchain.asked_targets() == [Target(89), Target(90, "a")]
    program(tmp_path, "nvidia-smi", "7.5")
    with pytest.raises(toolchain.CompilerMissing, match="sm_75: the CUDA kernels need sm_80"):
        toolchain.asked_targets()
    program(tmp_path, "nvidia-smi", "", code=9)
    assert toolchain.asked_targets() == toolchain.parse_targets(toolchain.DEFAULT_ARCHS)
    with pytest.raises(toolchain.CompilerMissing, match="nvidia-smi does not answer"):
        build.resolve(["native"])


def test_native_cards_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    only(monkeypatch, tmp_path)
    (tmp_path / "nvidia-smi").write_text(
        '#!/bin/sh\ncase "$1" in *compute_cap*) echo 9.0; echo 8.9;; *) echo NVIDIA H200; echo Odd 1;; esac\n'
    )
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert [gpu.name for gpu in build.resolve(["native", "h200"])] == ["h200", "rtx4090"]


# which compilers

NVCC_SAYS = "Cuda compilation tools, release 13.0, V13.0.88\nBuild cuda_13.0.r13.0/compiler.36424714_0"


def test_nvcc_of_each_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    only(monkeypatch, tmp_path / "bin")
    for place in ("home/bin", "bin", "site/nvidia/cu13/bin"):
        (tmp_path / place).mkdir(parents=True)
        program(tmp_path / place, "nvcc", NVCC_SAYS)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    found = toolchain.find_nvcc()
    assert (found.origin, found.version, found.home) == ("CUDA_HOME", "13.0.88", tmp_path / "home")
    monkeypatch.delenv("CUDA_HOME")
    assert str(toolchain.find_nvcc()) == "nvcc 13.0.88 of PATH"
    (tmp_path / "bin" / "nvcc").unlink()
    if shutil.which("nvcc") is None:
        assert toolchain.find_nvcc().path == tmp_path / "site/nvidia/cu13/bin/nvcc"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nothing"))
    with pytest.raises(toolchain.CompilerMissing, match="no bin/nvcc"):
        toolchain.find_nvcc()


def test_build_requirements(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """nvcc's wheels where a driver is and no compiler, and nowhere else."""
    code = "import sys; sys.path.insert(0, 'build_backend'); import bitfuse_build as b; "
    code += "b.toolchain.find_nvcc = lambda: (_ for _ in ()).throw(b.toolchain.CompilerMissing()); "
    code += "print(*b.compiler_wheels())"

    def asked(**environment: str) -> list[str]:
        path = f"{tmp_path}:/usr/bin:/bin"
        run = [sys.executable, "-c", code]
        env = {"PATH": path, **environment}
        return subprocess.run(
            run, cwd=ROOT, env=env, capture_output=True, text=True, check=True
        ).stdout.split()

    assert asked() == []
    assert asked(BITFUSE_CUDA="1") == list(toolchain.NVCC_WHEELS)
    program(tmp_path, "nvidia-smi", "")
    assert asked() == list(toolchain.NVCC_WHEELS)
    assert asked(BITFUSE_CUDA="0") == []
    assert asked(CUDA_HOME="/nothing") == []


def test_jobs_are_made_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, header = tmp_path / "a.cpp", tmp_path / "a.h"
    header.write_text("#define A 1\n")
    source.write_text('#include "a.h"\nint a() { return A; }\n')
    job = toolchain.Job(("g++", "-O0"), source, tmp_path / "out" / "a.o")
    assert not job.up_to_date()
    assert toolchain.make_all([job], "made") == [job.target] and job.up_to_date()
    assert not replace(job, compiler=("g++", "-O1")).up_to_date()
    assert "made: [1/1] a, " in capsys.readouterr().err
    assert toolchain.make_all([job], "made") and capsys.readouterr().err == ""
    later = job.target.stat().st_mtime + 5
    os.utime(header, (later, later))
    assert not job.up_to_date()
    source.write_text("int a() { return }\n")
    with pytest.raises(toolchain.CompileError, match=r"compiling a\.cpp failed"):
        job.make()
    # a failure leaves the earlier object, and nothing half-written, and is tried again
    assert sorted(p.name for p in job.target.parent.iterdir()) in (["a.d", "a.o"], ["a.o"])
    assert not job.up_to_date()


def test_a_release_may_move(tmp_path: Path) -> None:
    """pip's isolated builds have headers and compilers in a folder of their own each time."""
    source = tmp_path / "a.cpp"
    source.write_text('#include "a.h"\nint a() { return A; }\n')

    def job(place: str, version: str) -> toolchain.Job:
        folder = str(tmp_path / place)
        compiler = ("g++", "-O0", f"-I{folder}/include")
        return toolchain.Job(compiler, source, tmp_path / "out" / "a.o", ((folder, f"headers {version}"),))

    for place in ("first", "second"):
        (tmp_path / place / "include").mkdir(parents=True)
        (tmp_path / place / "include" / "a.h").write_text("#define A 1\n")
    job("first", "1.0").make()
    shutil.rmtree(tmp_path / "first")
    later = source.stat().st_mtime + 5
    os.utime(tmp_path / "second" / "include" / "a.h", (later, later))
    assert job("second", "1.0").up_to_date() and not job("second", "1.1").up_to_date()
    os.utime(source, (later, later))
    assert not job("second", "1.0").up_to_date()


@pytest.mark.parametrize("asked", ["0", "-1", "many"])
def test_jobs_at_once(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITFUSE_JOBS", asked)
    with pytest.raises(ValueError, match=f"BITFUSE_JOBS is '{asked}'"):
        toolchain.worker_count()


# machine code

KERNEL = """
template <int Size>
__global__ void __launch_bounds__(256) scale(float* y, const float* x, int n) {
  __shared__ float held[Size];
  held[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  float own[32];
  for (int i = 0; i < 32; ++i) own[i] = 0;
  for (int i = 0; i < n; ++i) own[int(x[i]) & 31] += held[i];
  y[threadIdx.x] = own[n & 31] + held[(threadIdx.x + 1) % Size];
}
template __global__ void scale<512>(float*, const float*, int);
"""


@pytest.fixture(scope="module")
def nvcc() -> toolchain.Nvcc:
    return toolchain.find_nvcc()


@pytest.fixture(scope="module")
def compiled(nvcc: toolchain.Nvcc, tmp_path_factory: pytest.TempPathFactory) -> cubin.Image:
    """A kernel with an array that no register holds, as an object of nvcc."""
    folder = tmp_path_factory.mktemp("kernel")
    source = folder / "scale.cu"
    source.write_text(KERNEL)
    flags = ["-std=c++20", "-arch=sm_90a"]
    job = toolchain.Job((str(nvcc.path), *flags), source, folder / "scale.o")
    [image] = cubin.read(job.make())
    return image


def test_resources(compiled: cubin.Image) -> None:
    assert compiled.arch == "sm_90a"
    [found] = cubin.resources(compiled.elf)
    assert cubin.demangled([found.name]) == ["scale<512>"]
    assert (found.threads, found.static_shared) == (256, 512 * 4 + 1024)  # Hopper's own kilobyte
    assert 8 <= found.registers <= 255 and found.local == 128 and found.code >= 256
    mix = cubin.instruction_mix(compiled.elf)
    if mix is not None:  # nvdisasm comes with Triton and with the toolkit
        assert mix[found.name]["STL"] > 0 and mix[found.name]["LDL"] > 0 and "HMMA" not in mix[found.name]


@pytest.mark.parametrize("cut", [0, 3, 40, 200, 1500])
def test_damaged_machine_code(compiled: cubin.Image, cut: int) -> None:
    with pytest.raises(cubin.NotMachineCode):
        cubin.resources(compiled.elf[:cut])


def test_an_object_without_machine_code() -> None:
    assert cubin.images(b"\x7fELF" + bytes(200)) == []
    assert cubin.images(b"\x50\xed\x55\xba" + b"\xff" * 60) == []  # the magic number by chance


SASS = """
\t.section\t.text._Z1av,"ax",@progbits
.text._Z1av:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0020*/             @!UP0 UTMALDG.2D [UR8], [UR4], desc[UR6] ;
        /*0030*/                   HGMMA.64x128x16.F32 R24, gdesc[UR4], R24 ;
        /*0040*/                   UTCHMMA gdesc[UR8], gdesc[UR10], tmem[UR6] ;
.text._Z1bv:
        /*0000*/               @P1 STL.64 [R1+0x8], R2 ;
        /*0010*/                   LDGSTS.E.BYPASS.128 [R7], desc[UR4][R2.64] ;
        /*0020*/                   LDGSTS.E.BYPASS.128 [R7+0x10], desc[UR4][R2.64+0x10] ;
"""


def test_count_instructions() -> None:
    counted = cubin.count_instructions(SASS)
    assert counted["_Z1av"] == {"HGMMA": 1, "UTCMMA": 1, "HMMA": 1, "UTMALDG": 1}
    assert counted["_Z1bv"] == {"LDGSTS": 2, "STL": 1}


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("void bitfuse::(anonymous namespace)::f<int, (bitfuse::E)2>(bitfuse::A, int)", "f<int, (E)2>"),
        ("void a::b::g<a::b::T<__half, 4> >(a::b::Call)", "g<T<__half, 4> >"),
        ("_Z1av", "_Z1av"),
    ],
)
def test_short_name(name: str, short: str) -> None:
    assert cubin.short_name(name) == short


@pytest.mark.parametrize(
    ("sm", "threads", "registers", "shared", "blocks", "limit"),
    [
        # by hand, with the programming guide's table of limits
        (80, 256, 32, 0, 8, "warps"),
        (80, 256, 64, 0, 4, "registers"),
        (80, 128, 255, 0, 2, "registers"),
        (80, 128, 32, 48 * 1024, 3, "shared memory"),
        (80, 32, 32, 0, 32, "blocks"),
        (86, 32, 32, 0, 16, "blocks"),
        (90, 384, 168, 200 * 1024, 1, "registers"),
        (90, 128, 96, 227 * 1024, 1, "shared memory"),
        (89, 128, 32, 100 * 1024, 0, "shared memory"),
        (90, 1024, 128, 0, 0, "registers"),
    ],
)
def test_occupancy(sm: int, threads: int, registers: int, shared: int, blocks: int, limit: str) -> None:
    held = cubin.occupancy(ARCHS[sm], threads, registers, shared)
    assert (held.blocks, held.limit, held.warps) == (blocks, limit, blocks * -(-threads // 32))


# which machine code a card runs


@pytest.mark.parametrize(
    ("holds", "sm", "runs", "told"),
    [
        ("sm_80 sm_90a compute_90", 80, "sm_80", None),
        ("sm_80 sm_90a compute_90", 90, "sm_90a", None),
        ("sm_80 sm_90a compute_90", 89, "sm_80", "no machine code for sm_89: the card runs that of sm_80"),
        ("sm_80 sm_90a compute_90", 100, "compute_90", "no machine code for sm_100: the driver compiles"),
        ("sm_90a", 100, None, "holds code for sm_90a, none that sm_100 runs"),
        ("sm_89", 86, None, "none that sm_86 runs"),
        ("sm_100f", 103, "sm_100f", "no machine code for sm_103"),
    ],
)
def test_machine_code(holds: str, sm: int, runs: str | None, told: str | None) -> None:
    found, said = bundle.machine_code(holds, sm)
    assert found == runs
    assert (said is None) == (told is None) and (told is None or told in str(said))


def test_old_code_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    class Old:
        @staticmethod
        def architectures() -> str:
            return "sm_80 compute_80"

    old: Any = Old
    for _ in range(2):
        assert bitfuse.core.cuda.refuse(old, 120) is None
    [record] = caplog.records
    assert "sm_120" in record.message and "PTX of compute_80" in record.message
    assert bitfuse.core.cuda.refuse(old, 75) == "compute capability 7.5 is below 8.0"


def test_two_extensions_can_be_loaded() -> None:
    """pybind11 registers a class for the whole process unless it is told that it is the module's own."""
    for file in (ROOT / "csrc/bind").glob("cuda*.cpp"):
        text = file.read_text()
        assert text.count("py::class_<") == text.count("py::module_local()"), file.name


# folders of kernels

SMALL = {
    "name": "small", "hidden": 256, "intermediate": 512, "heads": 4, "kv_heads": 2, "head_dim": 64,
    "vocab": 1000,
}  # fmt: skip


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """gated_activation for an H100 and an A100, by the command line."""
    folder = tmp_path_factory.mktemp("compile")
    (folder / "small.json").write_text(json.dumps(SMALL))
    options = ["--arch", "h100", "--arch", "sm_80", "--op", "gated_activation", "--backend", "triton"]
    options += [
        "--shapes",
        str(folder / "small.json"),
        "--dtype",
        "bfloat16",
        "--out",
        str(folder / "kernels"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITFUSE_CACHE", str(folder / "cache"))
        patch.setenv("BITFUSE_JOBS", "1")
        result = CliRunner().invoke(app, ["compile", *options])
    assert result.exit_code == 0, result.output
    assert "gated_activation._forward_kernel" in result.stdout and "sm_90a" in result.stdout
    return folder / "kernels"


def test_manifest(kernels: Path) -> None:
    manifest = bundle.read_manifest(kernels)
    assert manifest["archs"] == ["sm_90a", "sm_80"] and manifest["cuda"] is None
    assert manifest["triton"]["kernels"] == len(manifest["kernels"]) == 4
    names = [f.name for f in fields(build.Kernel)]
    found = [build.Kernel(**{name: kernel[name] for name in names}) for kernel in manifest["kernels"]]
    assert not any(kernel["spills"] for kernel in manifest["kernels"])
    for kernel in found:
        assert kernel.op == "gated_activation" and kernel.fits and not kernel.spills
        assert kernel.registers <= 128 and kernel.warps >= 8 and kernel.threads == 128 and kernel.code > 256
    assert len(table.rows(found, each=True)) == 4 and len(table.rows(found, each=False)) == 4
    assert not list(kernels.parent.glob(".*"))  # what was aside is gone
    text = (kernels / bundle.MANIFEST).read_text() + "".join(p.read_text() for p in kernels.rglob("__grp__*"))
    assert str(kernels.parent) not in text  # it can be moved


CALL = """
import os, sys
import cusim
cusim.load_if_no_gpu()
import torch, bitfuse
from accuracy import assert_accurate
from triton import knobs
compiled = []
knobs.compilation.listener = lambda src, cache_hit, **_: cache_hit or compiled.append(src.name)
gate, up = (torch.randn(4, 512).bfloat16().requires_grad_() for _ in range(2))
with cusim.device(sm=int(sys.argv[1])), bitfuse.use_backend("triton"):
    y = bitfuse.gated_activation(gate, up)
    y.sum().backward()
silu, y, gate, up = torch.nn.functional.silu, y.detach(), gate.detach(), up.detach()
assert_accurate(y, silu(gate.double()) * up.double(), silu(gate) * up)
cache = os.environ["TRITON_CACHE_DIR"]
print(len(compiled), len(os.listdir(cache)) if os.path.isdir(cache) else 0)
"""


def first_call(tmp_path: Path, sm: int, **environment: str) -> tuple[str, str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    env |= {"OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, "-c", CALL, str(sm)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


@pytest.mark.parametrize("sm", [80, 90])
def test_the_first_call_compiles_nothing(kernels: Path, tmp_path: Path, sm: int) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(kernels, moved)
    said, told = first_call(tmp_path, sm, BITFUSE_KERNEL_PATH=str(moved))
    assert said == "0 0" and told == ""


def test_a_mismatch_is_told_and_not_used(kernels: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(kernels, other)
    manifest = json.loads((kernels / bundle.MANIFEST).read_text())
    (other / bundle.MANIFEST).write_text(
        json.dumps({**manifest, "triton": {**manifest["triton"], "sources": "0"}})
    )
    said, told = first_call(tmp_path, 90, BITFUSE_KERNEL_PATH=str(other))
    assert said == "2 2"
    assert "other: it was made of other Triton kernels (0, here" in told


def changed(kernels: Path, folder: Path, **changes: Any) -> Path:
    """A bundle's manifest alone, changed."""
    manifest = json.loads((kernels / bundle.MANIFEST).read_text())
    for part, change in changes.items():
        manifest[part] = {**(manifest[part] or {}), **change} if isinstance(change, dict) else change
    folder.mkdir(exist_ok=True)
    (folder / bundle.MANIFEST).write_text(json.dumps(manifest))
    return folder


def test_load_kernels_refuses_parts(kernels: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = {"abi": bundle.abi(), "sources": bundle.source_hash(bundle.cuda_sources())}
    for changes, part, why in (
        ({"triton": {"version": "2.0"}}, "triton", "it was made by Triton 2.0, here is"),
        ({"triton": {}}, "triton", "triton/.* is missing: copy the folder again"),
        ({"triton": {"files": None}}, "triton", "no sizes and hashes"),
        ({"cuda": {**good, "abi": ".cp27"}}, "cuda", "it was made for .cp27"),
        ({"cuda": {**good, "sources": "1"}}, "cuda", "it was made of other C\\+\\+ sources"),
        ({"cuda": good}, "cuda", "no sizes and hashes"),
        ({"cuda": {**good, "files": {}}}, "cuda", "no size and hash of _cuda"),
        ({"cuda": {**good, "files": {f"_cuda{bundle.abi()}": 3}}}, "cuda", "_cuda.* is missing"),
    ):
        caplog.clear()
        loaded = bitfuse.load_kernels(changed(kernels, tmp_path / "it", **changes))
        assert part not in loaded.used
        assert re.search(why, loaded.refused[part]), loaded
        assert loaded.refused[part] in caplog.text and "nothing used" in str(loaded)


def test_load_kernels_bad_input(kernels: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="folder is a int, expected a path"):
        bitfuse.load_kernels(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"has no bitfuse-kernels\.json"):
        bitfuse.load_kernels(tmp_path / "nothing")
    whole = (kernels / bundle.MANIFEST).read_text()
    for text, why in (
        (whole[: len(whole) // 2], "is not JSON"),
        ("[1]", "layout None, expected 1"),
        (json.dumps({**json.loads(whole), "layout": 0}), "layout 0, expected 1"),
        (json.dumps({**json.loads(whole), "triton": 3}), "is damaged"),
        ("[" * 100_000, "is nested deeper"),
        ('{"layout": ' + "1" * 5000 + "}", "thousands of digits"),
        ("\ud800", "can't be read"),
    ):
        (tmp_path / bundle.MANIFEST).write_bytes(text.encode(errors="surrogatepass"))
        with pytest.raises(ValueError, match=why) as told:
            bitfuse.load_kernels(tmp_path)
        assert "\n" not in str(told.value)


@pytest.mark.parametrize("name", ["a circle", "a file", "a zero\0byte"])
def test_load_kernels_of_no_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in a line; from BITFUSE_KERNEL_PATH, a warning, and the import goes on."""
    path = tmp_path / name
    if name == "a circle":
        path.symlink_to(path)
    elif name == "a file":
        path.write_text("")
    with pytest.raises(ValueError, match=r"^folder") as told:
        bitfuse.load_kernels(path)
    assert "\n" not in str(told.value)
    if "\0" not in name:
        monkeypatch.setenv("BITFUSE_KERNEL_PATH", str(path))
        bundle.load_from_environment()


def damages(size: int) -> dict[str, Any]:
    """What copying, or a disk, may do to a file of this many bytes."""
    cuts = {f"cut to {share:.0%}": lambda b, s=share: b[: int(s * len(b))] for share in (0, 0.001, 0.3, 0.99)}
    return {
        **cuts,
        "less a byte": lambda b: b[:-1],
        "a byte more": lambda b: b + b"\0",
        "a hole": lambda b: b[: size // 2] + bytes(4096) + b[size // 2 + 4096 :],
        "a text": lambda b: b"<html>404</html>",
    }


@pytest.mark.parametrize("how", damages(0))
def test_a_damaged_extension_is_never_mapped(how: str, tmp_path: Path) -> None:
    """Mapping one that was cut ends the process with SIGBUS: its size and its hash are compared before."""
    whole = (bundle.PACKAGE / f"_cuda{bundle.abi()}").read_bytes()
    file = tmp_path / f"_cuda{bundle.abi()}"
    file.write_bytes(whole)
    said: dict[str, Any] = {"abi": bundle.abi(), "sources": bundle.source_hash(bundle.cuda_sources())}
    said["files"] = bundle.file_facts(tmp_path, file.name)
    manifest = {"layout": bundle.LAYOUT, "archs": ["sm_90a"], "cuda": said}
    (tmp_path / bundle.MANIFEST).write_text(json.dumps(manifest))
    file.write_bytes(damages(len(whole))[how](whole))
    loaded = bitfuse.load_kernels(tmp_path)
    assert loaded.used == () and "copy the folder again" in loaded.refused["cuda"]


def test_a_damaged_triton_kernel_is_not_used(kernels: Path, tmp_path: Path) -> None:
    """Whichever of its files it is."""
    folder = tmp_path / "kernels"
    shutil.copytree(kernels, folder)
    names = json.loads((folder / bundle.MANIFEST).read_text())["triton"]["files"]
    assert {Path(name).suffix for name in names} >= {".cubin", ".json"}
    for name in sorted(names, key=lambda name: Path(name).suffix)[::3]:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
        loaded = bitfuse.load_kernels(folder)
        assert loaded.used == () and name in loaded.refused["triton"]
        (folder / name).write_bytes(whole)


BINDING = """
#include <pybind11/pybind11.h>
extern "C" void launch_small();
extern "C" void launch_large();
PYBIND11_MODULE(_cuda, module) {
  module.def("architectures", [] { return BITFUSE_CUDA_ARCHITECTURES; });
  module.def("launch", [] { launch_small(); });
#ifdef BITFUSE_SM90A
  module.def("launch_large", [] { launch_large(); });
#endif
}
"""
SOURCE = """
__global__ void __launch_bounds__(128) NAME_kernel(float* x) { x[threadIdx.x] *= x[threadIdx.x + 1]; }
extern "C" void launch_NAME() { NAME_kernel<<<1, 128>>>(nullptr); }
"""


def test_the_extension_is_built(
    nvcc: toolchain.Nvcc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of sources that take seconds: a file for both architectures, one for Hopper alone."""
    package = tmp_path / "bitfuse"
    (package / "csrc" / "cuda").mkdir(parents=True)
    (package / "csrc" / "bind").mkdir()
    (package / "csrc" / "bind" / "cuda.cpp").write_text(BINDING)
    (package / "csrc" / "cuda" / "rope.cu").write_text(SOURCE.replace("NAME", "small"))
    (package / "csrc" / "cuda" / "rope_sm90.cu").write_text(SOURCE.replace("NAME", "large"))
    monkeypatch.setattr(_sources, "PACKAGE", package)
    monkeypatch.setenv("BITFUSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("BITFUSE_CUDART", raising=False)
    monkeypatch.setattr(toolchain, "CXXFLAGS", ("-std=c++20", "-O0", "-fPIC", "-fvisibility=hidden"))
    options = ["compile", "--arch", "a100", "--arch", "sm_90", "--backend", "cuda", "--op", "rope", "--json"]
    options += ["--cubins", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.output
    assert f"compiler: {nvcc}" in result.stderr
    manifest = json.loads(result.stdout)
    assert manifest == bundle.read_manifest(tmp_path / "out")
    assert manifest["cuda"]["architectures"] == "sm_80 sm_90a" and manifest["cuda"]["nvcc"] == nvcc.version
    names = sorted((k["name"], k["arch"]) for k in manifest["kernels"])
    assert names == [("large_kernel", "sm_90a"), ("small_kernel", "sm_80"), ("small_kernel", "sm_90a")]
    for kernel in manifest["kernels"]:
        assert kernel["threads"] == 128 and kernel["static_shared"] == 0 and kernel["limit"] == "warps"
    assert len(list((tmp_path / "out" / "cubins").iterdir())) == 3
    # it brings CUDA's runtime with it: no torch, of whatever CUDA, is needed to load it
    code = "import sys; sys.path.insert(0, sys.argv[1]); import _cuda; print(_cuda.architectures())"
    run = [sys.executable, "-c", code, str(tmp_path / "out")]
    assert subprocess.run(run, capture_output=True, text=True).stdout == "sm_80 sm_90a\n"
    assert bundle.cudart_of(tmp_path / "out" / f"_cuda{bundle.abi()}") == "static"
    # a second run makes nothing anew
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.o")}
    assert CliRunner().invoke(app, options).exit_code == 0 and len(made) == 3
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.o")}


SWAP = """
import json, shutil, sys
import cusim
cusim.load_if_no_gpu()
import torch, bitfuse
from bitfuse.core import bundle
from bitfuse.core.cuda import cuda as held
folder = sys.argv[1]
shutil.copy(held.module.__file__, f"{folder}/_cuda{bundle.abi()}")
cuda = {"abi": bundle.abi(), "sources": bundle.source_hash(bundle.cuda_sources())}
cuda["files"] = bundle.file_facts(bundle.Path(folder), f"_cuda{bundle.abi()}")
with open(f"{folder}/{bundle.MANIFEST}", "w") as file:
    json.dump({"layout": bundle.LAYOUT, "archs": ["sm_90a"], "cuda": cuda}, file)
x, w = torch.randn(2, 256).half(), bitfuse.quantize(torch.randn(64, 256), "int4")
def call():
    with cusim.device(sm=90), bitfuse.use_backend("cuda"):
        return bitfuse.lowbit_linear(x, w)
before, first = held.module, call()
print(bitfuse.load_kernels(folder).used, held.module is not before, held.module is bitfuse._cuda)
print(held.module.__file__.startswith(folder), torch.equal(first, call()))
"""


def test_load_kernels_swaps_the_extension(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-c", SWAP, str(tmp_path)]
    done = subprocess.run(run, env=env, capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["('cuda',) True True", "True True"], done.stdout + done.stderr


# the command line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--arch", "gtx1080"], "no GPU or architecture 'gtx1080'"),
        (["--arch", "h100", "--op", "softmax"], "--op is 'softmax', expected one of lowbit_linear"),
        (["--arch", "h100", "--format", "int5"], "int5"),
        (["--arch", "h100", "--dtype", "int8"], "--dtype is 'int8', expected one of float32"),
        (["--arch", "h100", "--backend", "metal"], "--backend is 'metal', expected one of cuda, triton"),
        (["--arch", "h100", "--shapes", "gpt5"], "shapes is 'gpt5'"),
        (["--arch", "t4", "--op", "rope", "--backend", "triton"], "our kernels need sm_80"),
        (["--arch", "h100", "--out", "/proc/here", "--backend", "triton"], "can't write"),
        (["--arch", "h100", "--out", str(ROOT / "csrc"), "--backend", "triton"], "no kernels of ours"),
    ],
)
def test_bad_input_is_one_line(options: list[str], said: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["compile", *options])
    assert result.exit_code == 2, result.output
    assert said in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_an_unsupported_card_is_told_before(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["compile", "--arch", "t4", "--op", "rope", "--backend", "triton"])
    assert result.stderr.splitlines()[0].startswith(
        "sm_75 (t4): rope runs in plain PyTorch there (triton: it needs"
    )


@pytest.mark.parametrize("ends", ["full disk", "Ctrl-C", "no nvcc", "failing compiler"])
def test_what_ends_a_build_leaves_the_folder(
    ends: str, kernels: Path, monkeypatch: Any, tmp_path: Path
) -> None:
    out = tmp_path / "kernels"
    shutil.copytree(kernels, out)
    before = (out / bundle.MANIFEST).read_text()
    options = ["compile", "--arch", "h100", "--op", "rope", "--out", str(out), "--backend", "triton"]
    error, code, said = {
        "full disk": (OSError(28, "No space left on device"), 2, "the disk is full, nothing was written"),
        "Ctrl-C": (KeyboardInterrupt(), 130, "interrupted"),
        "no nvcc": (toolchain.CompilerMissing("no nvcc found: set CUDA_HOME"), 2, "set CUDA_HOME"),
        "failing compiler": (toolchain.CompileError("compiling a.cu failed"), 1, "compiling a.cu failed"),
    }[ends]

    def end(folder: Path, *_: Any) -> Any:
        (folder / "half").write_text("written")
        raise error

    monkeypatch.setattr(build, "_triton", end)
    result = CliRunner().invoke(app, options)
    assert result.exit_code == code and said in result.stderr, result.output
    assert (out / bundle.MANIFEST).read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["kernels"]


def test_sizes_of_every_op() -> None:
    """Each op's calls are distinct, and an op with kernels has some."""
    for op in EVERY:
        calls = list(triton_kernels.sizes(op, SHAPES.values(), ("int4",), (torch.float16,)))
        assert calls and len({triton_kernels.in_short(op, s) + str(s.causal) for s in calls}) == len(calls)
    assert triton_kernels.has_kernels("lowbit_linear") and find("h100").arch is ARCHS[90]


def test_variants_of_every_op() -> None:
    """Each alone, of the formats that have it, and each is a call that can be made."""
    small = [SHAPES["llama3-8b"]]
    for op, declaration in EVERY.items():
        usual = triton_kernels.sizes(op, small, ["int4", "nf4", "fp8"], [torch.bfloat16])
        every = triton_kernels.sizes(op, small, ["int4", "nf4", "fp8"], [torch.bfloat16], True)
        more = [s for s in every if s not in usual]
        assert bool(more) == bool(declaration.variants) and set(usual) <= set(every)
        for variant in declaration.variants:
            having = [s for s in more if all(getattr(s, name) == value for name, value in variant.items())]
            if "nested" in variant:
                assert {s.format for s in having} == {"nf4"}
            elif {"zero_points", "group_size"} & variant.keys():
                assert {s.format for s in having} <= {"int4"}
            if variant != {"group_size": 128}:  # int4's own
                assert explain_sizes(op, having[0], find("h100")).chosen in ("cuda", "triton"), variant
                assert str(next(iter(variant))) in triton_kernels.in_short(op, having[0])
