"""What the harness raises. Every message names the kernel and, where there is one, the line of its text."""

from dataclasses import dataclass


class KernelError(Exception):
    """A kernel that cannot be accepted: the base of all errors below."""


class LintError(KernelError):
    """The text uses something that Metal's language, or MLX's way of passing it on, does not have."""


class TypeCheckError(KernelError):
    """The text fails as C++14 with address spaces."""


class CompileError(KernelError):
    """The text passed the type check and still does not compile for this machine, or for CUDA."""


@dataclass(frozen=True)
class Finding:
    """One thing the checker saw: what kind it is, where in the kernel, and the thread and memory concerned."""

    kind: str
    location: str
    message: str

    def __str__(self) -> str:
        return f"{self.kind} at {self.location}: {self.message}"


class CheckError(KernelError):
    """The kernel ran and did something wrong: see `findings`."""

    def __init__(self, kernel: str, findings: list[Finding]) -> None:
        self.findings = findings
        super().__init__(f"{kernel}: {len(findings)} finding(s)\n" + "\n".join(f"  {finding}" for finding in findings))
