"""The kernels without Python: sanitizers, another architecture under emulation, and what the objects export."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "csrc" / "cpu"
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mpopcnt"]
AVX512 = [f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vbmi2", "vnni")] + AVX2
QUIET = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
FLAGS = {
    "isa_avx2": AVX2,
    "isa_avx512": [*AVX512, *QUIET],
    "isa_amx": [*AVX512, "-mamx-tile", "-mamx-int8", *QUIET],
}
X86_FILES = tuple(FLAGS)
X86 = platform.machine() in ("x86_64", "AMD64")
COMPILER = shutil.which("g++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no g++ here")


def build(folder: Path, *options: str, compiler: str = "g++", skip: tuple[str, ...] = ()) -> Path:
    """The test binary, two files at a time."""
    jobs: list[tuple[str, subprocess.Popen[str]]] = []
    common = [
        compiler,
        "-std=c++20",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-ffp-contract=off",
        f"-I{ROOT / 'csrc'}",
        f"-I{ROOT / 'tests'}",
        *options,
    ]
    sources = [each for each in sorted(SOURCES.glob("*.cpp")) if each.stem not in skip]
    for source in [*sources, ROOT / "tests" / "kernels_test.cpp"]:
        if len(jobs) >= 2:
            jobs[-2][1].wait()
        command = [*common, *FLAGS.get(source.stem, []), "-c", str(source), "-o", str(folder / f"{source.stem}.o")]
        jobs.append((source.name, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
    for name, job in jobs:
        _, errors = job.communicate()
        assert job.returncode == 0, f"{name}: {errors}"
    binary = folder / "kernels_test"
    objects = [str(each) for each in sorted(folder.glob("*.o"))]
    subprocess.run([*common, *objects, "-pthread", "-o", str(binary)], check=True)
    return binary


def run(*command: str | Path, **variables: str) -> str:
    done = subprocess.run(
        [str(each) for each in command], capture_output=True, text=True, env=os.environ | variables, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "all equal" in done.stdout
    return done.stdout


def machine_has() -> set[str]:
    """The instruction sets that /proc/cpuinfo promises, read independently of the library's own detection."""
    info = Path("/proc/cpuinfo").read_text()
    words = set(next((line for line in info.splitlines() if line.startswith("flags")), "").split())
    found = {"portable"}
    if X86 and {"avx2", "fma", "f16c"} <= words:
        found.add("avx2")
    if X86 and {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vbmi2", "avx512_vnni"} <= words:
        found.add("avx512")
        if {"amx_tile", "amx_int8"} <= words:
            found.add("amx")
    return found | ({"neon"} if platform.machine() == "aarch64" else set())


def test_no_instruction_set_of_this_machine_is_skipped():
    cpu = pytest.importorskip("cascade_engine._cpu", reason="the wheel was built without a C++ compiler")
    assert {name for name, runs in cpu.isas() if runs} == machine_has()


@needs_compiler
@pytest.mark.timeout(900)
def test_kernels_under_address_and_undefined_behaviour_sanitizers(tmp_path):
    skip = ("isa_neon",) if X86 else X86_FILES
    binary = build(tmp_path, "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", skip=skip)
    ran = run(binary, "1")
    print(ran)
    assert all(f"{name}: 14 problems" in ran for name in machine_has())


@pytest.mark.full
@needs_compiler
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_kernels_under_sanitizers_at_length(tmp_path, sanitizer):
    skip = ("isa_neon",) if X86 else X86_FILES
    binary = build(tmp_path, "-O2", "-g1", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", skip=skip)
    print(run(binary, "4"))


@pytest.mark.full
def test_neon_under_emulation(tmp_path):
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64")
    binary = build(tmp_path, "-O2", "-static", compiler=compiler, skip=X86_FILES)
    ran = run(emulator, binary, "1")
    print(ran)
    assert "neon: 14 problems" in ran
    assert "portable: 14 problems" in ran


@needs_compiler
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm here")
@pytest.mark.parametrize("name", ["portable", *(("avx2", "avx512", "amx") if X86 else ("neon",))])
def test_an_instruction_set_exports_one_symbol(tmp_path, name):
    """A shared inline function exported from here could be the copy the linker keeps, and crash older machines."""
    made = tmp_path / "isa.o"
    source = SOURCES / f"isa_{name}.cpp"
    flags = ["-std=c++20", "-O3", "-ffp-contract=off", f"-I{ROOT / 'csrc'}", *FLAGS.get(source.stem, [])]
    subprocess.run(["g++", *flags, "-c", str(source), "-o", str(made)], check=True)
    symbols = subprocess.run(["nm", "-C", "--defined-only", "-g", made], capture_output=True, text=True, check=True)
    exported = [line.split(maxsplit=2)[2] for line in symbols.stdout.splitlines()]
    assert exported == [f"cascade::cpu::{name}_kernels()"]
