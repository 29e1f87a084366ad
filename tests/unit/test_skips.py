"""A skipped test fails the run where EAGLERUN_TEST_FORBID_SKIPS is set, as it is in CI."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"
ONE_SKIPPED = """
import pytest

@pytest.mark.skip(reason="no browser")
def test_skipped():
    pass

def test_passed():
    pass
"""


def test_a_skip_fails_the_run_where_it_is_forbidden(tmp_path: Path):
    shutil.copy(CONFTEST, tmp_path)
    (tmp_path / "test_one.py").write_text(ONE_SKIPPED)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path,
        env=os.environ | {"EAGLERUN_TEST_FORBID_SKIPS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout
    assert "1 passed, 1 skipped" in done.stdout
    assert "skips are forbidden" in done.stdout
