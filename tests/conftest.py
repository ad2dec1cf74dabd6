"""No test fails for being slow; every run says at its end on which instruction sets the kernels really ran."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from hypothesis import HealthCheck, settings

ISA = re.compile(r"(?<![a-z0-9])(amx|avx512|avx2|neon|portable)(?![a-z0-9])")

settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    ran = Counter(
        found.group()
        for report in terminalreporter.stats.get("passed", [])
        if "test_kernels.py" in report.nodeid and (found := ISA.search(report.nodeid))
    )
    if ran:
        terminalreporter.write_line("instruction sets: " + ", ".join(f"{isa} in {n} tests" for isa, n in ran.items()))
