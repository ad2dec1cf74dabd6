"""What every run says at its end: which instruction sets the kernels' tests really ran on."""

from __future__ import annotations

import re
from collections import Counter

import pytest

ISA = re.compile(r"(?<![a-z0-9])(avx512|avx2|neon|portable)(?![a-z0-9])")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    ran = Counter(
        found.group()
        for report in terminalreporter.stats.get("passed", [])
        if "test_kernels.py" in report.nodeid and (found := ISA.search(report.nodeid))
    )
    if ran:
        terminalreporter.write_line("instruction sets: " + ", ".join(f"{isa} in {n} tests" for isa, n in ran.items()))
