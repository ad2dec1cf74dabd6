"""What the wheel holds, and what happens where there is no C++ compiler."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_nothing_but_the_package_lands_in_site_packages():
    files = metadata.files("cascade-engine") or []
    tops = {file.parts[0] for file in files if file.parts[0] != ".."}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"cascade_engine"}
    installed = {str(file).removeprefix("cascade_engine/") for file in files}
    assert {"cli/main.py", "benchmarks/__init__.py", "py.typed"} <= installed


@pytest.mark.full
def test_without_a_compiler_the_reference_backend_installs_and_says_so(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("cmake", "ninja"):
        found = shutil.which(tool, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        assert found, f"{tool} is needed to build"
        (tools / tool).symlink_to(found)
    source = tmp_path / "source"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in tracked.stdout.splitlines():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name)
    environment = {name: value for name, value in os.environ.items() if name not in ("CXX", "CC")}
    pip = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-w", str(tmp_path / "dist")]
    subprocess.run(pip, cwd=source, env=environment | {"PATH": str(tools)}, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    script = "import cascade_engine.cli.main as m; m.main(['info', '--json'])"
    environment["PYTHONPATH"] = str(site)
    printed = subprocess.run(
        [sys.executable, "-c", script], cwd=site, env=environment, capture_output=True, text=True, check=True
    )
    backends = json.loads(printed.stdout)["backends"]
    assert backends["reference"]["available"]
    assert not backends["cpu"]["available"]
    assert "compiler" in backends["cpu"]["detail"]
