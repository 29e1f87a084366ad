"""What must be decided before any test imports the engine."""

import os

import pytest
import torch

FORBID_SKIPS = "EAGLERUN_TEST_FORBID_SKIPS" in os.environ

# Without a GPU, kernels are tested in Triton's interpreter, and Triton looks when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = len(terminalreporter.stats.get("skipped", ()))
    if skipped and FORBID_SKIPS:
        terminalreporter.section("skips are forbidden")
        terminalreporter.write_line(f"EAGLERUN_TEST_FORBID_SKIPS is set and {skipped} were skipped")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run that skipped a test where EAGLERUN_TEST_FORBID_SKIPS is set, as it is in CI."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if FORBID_SKIPS and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
