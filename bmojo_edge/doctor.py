"""What runs on this machine: engines and their devices, every Metal kernel checked and timed, a model's golden prompt.

Engines are imported when they are looked at, and one that is missing or broken is a fact like others. Knows no
terminal; `bmojo-edge doctor` prints.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bmojo_edge import golden

if TYPE_CHECKING:
    from bmojo_metal.device_check import Check, Timing

MIN_MACOS = "14.0"  # MLX's wheels need it


@dataclass(frozen=True)
class Engine:
    """A package that computes, its version, None where it is missing, and the device it takes or why it has none."""

    name: str
    version: str | None
    device: str


@dataclass(frozen=True)
class GoldenPrompt:
    """Whether a model gives the logits kept beside it. ok None: it was not checked, `detail` says why."""

    model: str | None
    ok: bool | None
    detail: str


@dataclass
class Report:
    """All that was found. unchecked: what this machine cannot tell, a sentence each."""

    machine: dict[str, str | int]
    engines: list[Engine]
    golden: GoldenPrompt
    kernels: list[Check] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        """What is wrong, a sentence each; a machine that lacks something has nothing wrong."""
        kernels = [f"{c.op} {c.dtype} at {shown(c.sizes)}: {c.problem}" for c in self.kernels if c.problem is not None]
        return kernels + ([f"golden prompt: {self.golden.detail}"] if self.golden.ok is False else [])

    def as_json(self) -> dict[str, Any]:
        """The report as plain values."""
        checks = [asdict(check) | {"sizes": check.sizes._asdict()} for check in self.kernels]
        return {
            "ok": not self.failures,
            "failures": self.failures,
            "machine": self.machine,
            "engines": [asdict(engine) for engine in self.engines],
            "kernels": {"checks": checks, "timings": [asdict(timing) for timing in self.timings]},
            "golden": asdict(self.golden),
            "unchecked": self.unchecked,
        }


def shown(sizes: Any) -> str:
    """Sizes of a check for people."""
    return " ".join(f"{name}={value}" for name, value in sizes._asdict().items())


def examine(model: str | Path | None, progress: Callable[[str, int, int], None] | None = None) -> Report:
    """Look at everything. model: a folder of ours or a hub id, None = none to check; progress (op, done, total)."""
    report = Report(machine(), [mlx_engine(), torch_engine()], golden_prompt(model))
    if kernels_run():
        report.kernels, report.timings = check_kernels(progress)
    else:
        report.unchecked.append(
            "the Metal kernels on a device: MLX has no Apple GPU here. Their text runs on a Linux CPU in the tests, "
            "see metal_kernels/README.md in the source"
        )
    if report.golden.ok is None:
        report.unchecked.append(f"a golden prompt: {report.golden.detail}")
    return report


# --- the machine ------------------------------------------------------------------------------------------------------


def machine() -> dict[str, str | int]:
    """System, chip, cores, memory in bytes, and Python."""
    mac = platform.mac_ver()[0]
    facts: dict[str, str | int] = {
        "system": f"macOS {mac}" if mac else f"{platform.system()} {platform.release()}",
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": f"{platform.python_version()} ({sys.executable})",
    }
    if mac and tuple(int(n) for n in mac.split(".")[:1]) < tuple(int(n) for n in MIN_MACOS.split(".")[:1]):
        facts["system"] = f"macOS {mac}, too old: MLX needs {MIN_MACOS}"
    return facts


def installed_version(package: str) -> str | None:
    """The version of an installed package, None where it is not."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def mlx_engine() -> Engine:
    """MLX and the device it computes on."""
    found = installed_version("mlx")
    if found is None:
        return Engine("mlx", None, "not installed: pip install mlx (Linux: pip install 'mlx[cpu]')")
    try:
        import mlx.core as mx
    except (ImportError, OSError) as error:
        return Engine("mlx", found, f"cannot be imported: {error}")
    if not mx.metal.is_available():
        return Engine("mlx", found, "CPU")
    facts = mx.device_info()
    working = facts["max_recommended_working_set_size"]
    return Engine("mlx", found, f"Metal on {facts['device_name']}, {int(working) / 2**30:.1f} GiB for a GPU's work")


def torch_engine() -> Engine:
    """PyTorch and the device it would compute on."""
    found = installed_version("torch")
    if found is None:
        return Engine("torch", None, "not installed; only training needs it: pip install 'bmojo-edge[torch]'")
    try:
        import torch
    except (ImportError, OSError) as error:
        return Engine("torch", found, f"cannot be imported: {error}")
    if torch.cuda.is_available():
        return Engine("torch", found, f"CUDA on {torch.cuda.get_device_name()}")
    return Engine("torch", found, "Metal (mps)" if torch.backends.mps.is_available() else "CPU")


# --- kernels and golden prompt ----------------------------------------------------------------------------------------


def kernels_run() -> bool:
    """Whether MLX would run the Metal kernels here."""
    try:
        from bmojo_metal import kernels_available
    except (ImportError, OSError):
        return False
    return kernels_available()


def check_kernels(progress: Callable[[str, int, int], None] | None = None) -> tuple[list[Check], list[Timing]]:
    """Every kernel against its plain op in all dtypes and at odd sizes, and times of those that are right."""
    import mlx.core as mx

    from bmojo_metal import device_check

    small = list(device_check.cases(device_check.CHECKED))
    typical = list(device_check.cases((device_check.TYPICAL,), (mx.float16,)))
    done, total = 0, len(small) + len(typical)

    def each(cases: Iterable[device_check.Case]) -> Iterable[device_check.Case]:
        nonlocal done
        for case in cases:
            if progress is not None:
                progress(case.op, done, total)
            yield case
            done += 1

    checks = [device_check.check(case) for case in each(small)]
    wrong = {check.op for check in checks if check.problem is not None}
    timings = [device_check.timing(case) for case in each(typical) if case.op not in wrong]
    return checks, timings


def golden_prompt(model: str | Path | None) -> GoldenPrompt:
    """Load a model on MLX and compare it with its golden logits."""
    import bmojo_edge as be

    if model is None:
        return GoldenPrompt(None, None, "no model is here yet; bmojo-edge chat makes the default one")
    name = str(model)
    if installed_version("mlx") is None:
        return GoldenPrompt(name, None, "MLX is not installed")
    try:
        be.load(model, verify=True)
        if Path(model).is_dir() and golden.read(model) is None:
            return GoldenPrompt(name, None, f"{name} has no {golden.FILE}; bmojo-edge convert writes one")
    except (be.CheckpointError, OSError) as error:
        return GoldenPrompt(name, False, str(error))
    except Exception as error:  # a kernel that Apple's compiler refuses shows here too, and the rest must still be told
        return GoldenPrompt(name, False, f"{name}: {type(error).__name__}: {error}")
    return GoldenPrompt(name, True, "the model gives the logits kept beside it, but for rounding")
