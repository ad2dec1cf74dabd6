"""The house from the door: what imports cost, which names there are, and the command's manners."""

import json
import subprocess
import sys

import pytest

import cascade_engine as ce

HEAVY = ("torch", "zarr", "cv2", "torchvision", "av", "matplotlib", "sklearn", "faiss")


def python(code, *arguments):
    return subprocess.run([sys.executable, "-P", "-c", code, *arguments], capture_output=True, text=True, check=False)


def cascade(*arguments):
    return python("from cascade_engine.cli.main import run; run()", *arguments)


@pytest.mark.parametrize(
    "code",
    [
        "import cascade_engine",
        "import cascade_engine; cascade_engine.CascadePlan.parse('flow:5').explain(9)",
        "import cascade_engine, numpy; cascade_engine.Bank({'rgb': numpy.ones((3, 2), 'f4')})",
        "import sys; sys.argv[1:] = ['--help']\nfrom cascade_engine.cli.main import main\nmain(standalone_mode=False)",
        "import cascade_engine.cli.bench",
    ],
)
def test_the_door_is_light(code):
    done = python(f"{code}\nimport sys, json; print('\\n' + json.dumps([m for m in {HEAVY!r} if m in sys.modules]))")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_numpy_mining_needs_no_torch():
    code = """
import sys, numpy as np, cascade_engine as ce
x = np.eye(4, dtype=np.float32)
bank = ce.Bank({"rgb": x}, video_id=np.arange(4))
assert ce.mine(ce.CascadePlan.parse("rgb:1"), {"rgb": x}, bank).index[:, 0].tolist() == [0, 1, 2, 3]
queue = ce.KeyQueue(3, {"rgb": 4})
queue.push({"rgb": x}, np.arange(4))
assert "torch" not in sys.modules
"""
    assert python(code).returncode == 0, python(code).stderr


def test_every_public_name_resolves():
    for name in ce.__all__:
        assert getattr(ce, name) is not None
        assert name in dir(ce)
    with pytest.raises(AttributeError, match="nosuch"):
        ce.nosuch  # noqa: B018


def test_names_are_found_afresh():
    names = sorted(ce.__all__)
    code = f"import cascade_engine as ce\nfor name in {names!r}: getattr(ce, name)"
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_help_lists_every_command_and_version():
    from cascade_engine.cli.main import COMMANDS

    shown = cascade("--help")
    assert shown.returncode == 0
    assert all(f"  {name} " in shown.stdout for name in COMMANDS)
    assert ce.__version__ in cascade("--version").stdout


def test_info_lists_backends_with_reasons():
    done = cascade("info", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert list(facts["backends"]) == ["cuda", "cpu", "reference"]
    assert all(backend["detail"] for backend in facts["backends"].values())
    assert facts["backends"]["reference"]["available"]
    text = cascade("info").stdout
    assert "reference" in text
    assert "packages" in text


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nosuch"], 2, "No such command"),
        (["info", "--nosuch"], 2, "No such option"),
        (["bench", "mining", "--case", "nosuch"], 2, "error: case: expected one of"),
        (["bench", "mining", "--threads", "0"], 2, "--threads"),
    ],
)
def test_wrong_usage_is_told_in_one_line_and_exits_2(arguments, code, message):
    done = cascade(*arguments)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        ("InvalidInput('x')", 2),
        ("BackendUnavailable('x')", 3),
        ("NotFound('x')", 4),
        ("Corrupt('x')", 4),
        ("VideoError('x')", 1),
        ("KeyboardInterrupt()", 130),
    ],
)
def test_exit_codes_are_as_promised(error, code):
    script = f"""
import click
from cascade_engine.cli import main as house
from cascade_engine.errors import *
@click.command("boom")
def boom(): raise {error}
house.LazyGroup.get_command = lambda self, ctx, name: boom
house.run()
"""
    done = python(script, "boom")
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert done.stderr.strip() in ("error: x", "interrupted")
    shown = python(script, "--debug", "boom")
    assert shown.returncode == code


def test_the_promised_api_runs_as_written():
    """The core of DESIGN's example, NumPy and torch."""
    import numpy as np
    import torch

    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal((64, width)).astype(np.float32) for width in (12, 7))
    q, f = (rng.standard_normal((4, width)).astype(np.float32) for width in (12, 7))
    ids, own = np.arange(64) // 4, np.arange(4)
    plan = ce.CascadePlan.parse("flow:50%,rgb:25%,flow:5")
    bank = ce.Bank(keys={"rgb": x, "flow": y}, video_id=ids)
    found = ce.mine(plan, queries={"rgb": q, "flow": f}, bank=bank, exclude=own)
    mask = own[:, None] == ids[None]
    scores = {"rgb": q.astype(float) @ x.astype(float).T, "flow": f.astype(float) @ y.astype(float).T}
    assert np.array_equal(ce.select(plan, similarities=scores, exclude=mask).index, found.index)
    queue = ce.KeyQueue(size=128, dims={"rgb": 12, "flow": 7})
    queue.push(keys={"rgb": torch.from_numpy(x), "flow": torch.from_numpy(y)}, video_id=torch.from_numpy(ids))
    queries = {"rgb": torch.from_numpy(q).requires_grad_(), "flow": torch.from_numpy(f)}
    key = torch.from_numpy(q)
    again, loss = ce.mine_and_contrast(plan, queries, key, queue.bank(), view="rgb", exclude=torch.from_numpy(own))
    loss.backward()
    assert np.array_equal(again.index.numpy(), found.index)
    same = ce.multi_positive_nce(queries["rgb"], key, queue.bank(), again, view="rgb", temperature=0.07)
    assert torch.equal(same, loss)
    assert ce.mine_self(plan, bank, mutual=True).index.shape == (64, 5)
