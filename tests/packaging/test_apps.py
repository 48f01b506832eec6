"""Programs in `apps/` use what any user may: no command line, no insides of the twins, no private names."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

APPS = Path(__file__).parents[2] / "apps"
INSIDES = re.compile(r"bmojo_edge\.(cli|server|(mlx|torch)\.\w+)(\.|$)|bmojo_\w+\.(.*\.)?_")
KERNELS = re.compile(r"bmojo_(metal|cuda)(\.|$)")


def imports(source: str) -> Iterator[str]:
    """Dotted names a program imports, also inside functions; `from a import b` gives a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def breaches(source: str, bench: bool) -> list[str]:
    names = (
        "mlx.load",
        "mlx.Model",
        "torch.load",
        "torch.Model",
        "torch.Trainer",
        "torch.World",
        "torch.linear_cross_entropy",
    )
    public = {f"bmojo_edge.{name}" for name in names}
    return [
        name
        for name in imports(source)
        if name not in public and (INSIDES.match(name) or (KERNELS.match(name) and not bench))
    ]


@pytest.mark.parametrize("program", sorted(APPS.rglob("*.py")), ids=lambda path: str(path.relative_to(APPS)))
def test_app_uses_the_public_face(program: Path) -> None:
    assert not breaches(program.read_text(), bench=program.is_relative_to(APPS / "bench"))


def test_breaches_are_seen() -> None:
    inside = "import bmojo_edge.cli\nfrom bmojo_edge.torch.ops import scan\nfrom bmojo_edge.config import _T\n"
    source = inside + "import bmojo_metal"
    assert len(breaches(source, bench=False)) == 4
    assert len(breaches(source, bench=True)) == 3
    assert not breaches("import bmojo_edge as be\nfrom bmojo_edge.torch import Model", bench=False)
