"""The C modules with which Triton 3.6 launches: compiled ahead, found by Triton under its own keys, no
compiler asked at the first call. Later Triton has none, and neither does a bundle."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from bitfuse.core import triton_cache
from bitfuse_tools.compile import triton_kernels

triton = pytest.importorskip("triton")
driver = pytest.importorskip("triton.backends.nvidia.driver")
runtime = pytest.importorskip("triton.runtime.build")


@pytest.mark.skipif(not hasattr(driver, "make_launcher"), reason="this Triton launches without C of its own")
def test_triton_finds_its_launchers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = driver.make_launcher({}, {"a": "*fp32", "n": "i32"}, None)
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path / "cache")
        key, file = triton_kernels._c_module(text, "__triton_launcher")
        assert triton_kernels._c_module(text, "__triton_launcher") == (key, file)
    assert "libcuda.so.1" in subprocess.run(["readelf", "-d", file], capture_output=True, text=True).stdout
    compiled = triton_kernels.Compiled("kernel", {"k.json": file}, file, 0, 4, {key: file})
    triton_kernels.keep(compiled, tmp_path / "triton")

    def no_compiler(*arguments: Any) -> str:
        raise AssertionError("a compiler was asked")

    monkeypatch.setattr(runtime, "_build", no_compiler)
    monkeypatch.setattr(runtime, "_load_module_from_path", lambda name, path: path)
    monkeypatch.setattr(triton_cache, "_folders", [])
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path / "other")
        triton_cache.add(tmp_path / "triton")
        found: Any = runtime.compile_module_from_src(text, "__triton_launcher")
    assert Path(found).parent == tmp_path / "triton" / key
