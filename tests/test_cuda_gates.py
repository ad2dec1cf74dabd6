"""The CUDA sources compile for every architecture without a warning, a spill or local memory, into the code we mean."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from cascade_engine.cli.info import command
from click.testing import CliRunner

from cascade_engine import kernels
from cascade_engine.errors import BackendUnavailable

ROOT = Path(__file__).parents[1]
FLAGS = ("-std=c++20", "-O3", "-Xptxas", "-v,-warn-spills,-warn-lmem-usage", "-Werror", "all-warnings")
# kernel -> threads of a block, its shared memory in bytes (asserted in the sources), blocks that fit an SM at least
OCCUPANCY = {
    "bound_scores<Shape<2, 2, 4>>": (256, 66_048, 2),
    "bound_scores<Shape<1, 1, 2>>": (256, 98_432, 1),
    "cascade_over_bounds": (256, 28_672, 3),
    "preselect": (256, 28_672, 3),
    "cascade_over_scores": (256, 8_192, 2),
    "exact_scores": (256, 8_192, 3),
    "contrast_keys": (256, 34_816, 2),
    "pack_rows": (256, 0, 4),
    "measure_rows": (256, 0, 4),
    "push_rows": (256, 0, 4),
}
SHARED_PER_SM = {"sm_80": 164 * 1024, "sm_90": 228 * 1024}


def tool(name: str) -> str:
    """cuobjdump or nvdisasm, from the path or from NVIDIA's pip packages."""
    found = shutil.which(name)
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec is not None else ():
        found = found or next((str(each) for each in Path(folder).glob(f"*/bin/{name}")), None)
    return found or pytest.skip(f"{name} is not installed (pip install nvidia-cuda-{name})")


def compile_for(folder: Path, *codes: str) -> tuple[Path, str]:
    """The object of backend.cu for the given architectures, and what ptxas said."""
    nvcc = shutil.which("nvcc") or pytest.skip("nvcc is not installed")
    target = folder / f"backend.{'.'.join(codes)}.o"
    generate = [f"-gencode=arch=compute_{code.split('_')[1]},code={code}" for code in codes]
    command = [
        nvcc,
        *FLAGS,
        *generate,
        f"-I{ROOT / 'csrc'}",
        "-c",
        str(ROOT / "csrc/cuda/backend.cu"),
        "-o",
        str(target),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return target, done.stderr


def short(symbol: str) -> str:
    """A kernel's name without namespaces, parameters and blanks."""
    name = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"cascade::cuda::|^void ", "", name)
    return name[: name.index("(")].replace(" >", ">")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> tuple[Path, str]:
    return compile_for(tmp_path_factory.mktemp("gates"), "sm_80", "sm_90")


def test_no_kernel_spills_and_occupancy_is_as_designed(compiled):
    seen = set()
    pattern = (
        r"Compiling entry function '(\S+)' for '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores"
        r".*?Used (\d+) registers"
    )
    for symbol, arch, stack, spills, registers in re.findall(pattern, compiled[1], re.DOTALL):
        kernel = short(symbol)
        threads, shared, wanted = OCCUPANCY[kernel]
        assert (stack, spills) == ("0", "0"), (kernel, arch)
        per_warp = -(-int(registers) * 32 // 256) * 256
        blocks = min(65536 // (per_warp * threads // 32), 2048 // threads, SHARED_PER_SM[arch] // (shared + 1024))
        assert blocks >= wanted, (kernel, arch, registers, blocks)
        seen.add((kernel, arch))
    assert seen == {(kernel, arch) for kernel in OCCUPANCY for arch in SHARED_PER_SM}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_machine_code_uses_tensor_cores_and_asynchronous_copies(compiled, arch):
    path = f"{Path(tool('nvdisasm')).parent}:{os.environ['PATH']}"
    dump = [tool("cuobjdump"), "-sass", "-arch", arch, str(compiled[0])]
    sass = subprocess.run(dump, capture_output=True, text=True, check=True, env=os.environ | {"PATH": path}).stdout
    bodies = {short(part.split()[0]): part for part in sass.split("Function : ")[1:]}
    assert set(bodies) == set(OCCUPANCY)
    for kernel, body in bodies.items():
        found = Counter(re.findall(r"\b(HMMA\.16816\.F32|LDGSTS\S*\.128|LDSM\.16\.M88\.4|LDL|STL)\b", body))
        assert not found["LDL"], kernel
        assert not found["STL"], kernel
        if kernel.startswith("bound_scores"):
            # Per 16 columns: row tiles x column tiles products, a load for each row tile and pair of column tiles.
            rows, columns = map(int, re.findall(r"Shape<\d+, (\d+), (\d+)>", kernel)[0])
            assert found["HMMA.16816.F32"] == 2 * rows * columns, kernel
            assert found["LDSM.16.M88.4"] == 2 * (rows + columns // 2), kernel
            assert any(name.startswith("LDGSTS") for name in found), kernel


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("code", ["sm_75", "sm_86", "sm_89", "sm_100", "compute_80", "compute_90"])
def test_every_other_architecture_compiles_without_a_warning(tmp_path, code):
    compile_for(tmp_path, code)


def test_cuda_says_why_it_is_unavailable_and_refuses():
    if kernels.load("cuda").unavailable() is None:
        pytest.skip("a GPU is here")
    reason = kernels.load("cuda").unavailable()
    assert reason
    with pytest.raises(BackendUnavailable, match=re.escape(f"backend 'cuda' cannot run here: {reason}")):
        kernels.backend("cuda")
    shown = CliRunner().invoke(command, ["--json"])
    assert json.loads(shown.output)["backends"]["cuda"] == {"available": False, "detail": reason}
