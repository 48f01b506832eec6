"""The README's numbers are those of the result files beside the scripts that made them."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_readme_tables_are_those_of_the_result_files():
    script = ROOT / "apps/readme_tables.py"
    run = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
