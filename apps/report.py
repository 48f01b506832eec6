"""What every benchmark writes: one JSON of rows, with the machine, the versions and the commit beside them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import resource
import subprocess
from pathlib import Path
from typing import Any


def machine() -> str:
    """Processor, cores and system of this machine, in words."""
    name = platform.processor() or platform.machine()
    if platform.system() == "Linux":
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = names[0] if names else name
    elif platform.system() == "Darwin":
        name = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True
        ).stdout.strip()
    return f"{name}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+)", status.read_text(encoding="ascii")) if status.exists() else None
    if found is not None:  # Linux's ru_maxrss starts at that of the process which started this one
        return 1024 * int(found[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of Python and of the packages named; one that is absent is left out."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit of this checkout, marked when files differ from it."""
    here = Path(__file__).parent
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=here, capture_output=True, text=True
    )
    return run.stdout.strip() or "unknown"


def write(path: Path, rows: list[dict[str, Any]], packages: tuple[str, ...], **more: Any) -> None:
    """Write the results file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"machine": machine(), "versions": versions(*packages), "commit": commit(), **more, "rows": rows}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
