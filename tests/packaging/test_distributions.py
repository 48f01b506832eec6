"""What the wheel and the sdist hold, and that an installed wheel works away from the repository."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "bmojo_edge": "bmojo_edge",
    "metal_kernels/bmojo_metal": "bmojo_metal",
    "cuda_kernels/bmojo_cuda": "bmojo_cuda",
    "converters/bmojo_convert": "bmojo_convert",
}
PLANTED = "metal_kernels/bmojo_metal/planted_kernel.metal"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources with one more Metal body in it."""
    tree = tmp_path_factory.mktemp("source")
    skip = shutil.ignore_patterns("__pycache__")
    for folder in ("bmojo_edge", "metal_kernels", "cuda_kernels", "converters", "tests"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=skip)
    for file in (".gitignore", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / file, tree)
    (tree / PLANTED).write_text("// a kernel body\n")
    return tree


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    return Path(next(WheelBuilder(str(tree)).build(directory=str(out), versions=["standard"])))


def test_wheel_holds_every_file_of_the_four_packages_and_nothing_else(tree: Path, wheel: Path) -> None:
    expected = {
        f"{name}/{file.relative_to(tree / folder).as_posix()}"
        for folder, name in PACKAGES.items()
        for file in (tree / folder).rglob("*")
        if file.is_file()
    }
    got = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert got == expected
    assert "bmojo_metal/planted_kernel.metal" in got
    page = {"index.html", "app.js", "style.css", "vendor/purify.js", "vendor/purify.LICENSE"}
    assert {f"bmojo_edge/server/page/{file}" for file in page} <= got
    assert not any(part in name for name in got for part in ("test", ".pyc"))


def test_wheel_metadata_names_licence_script_and_python(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = archive.read(f"{info}/METADATA").decode()
        scripts = archive.read(f"{info}/entry_points.txt").decode()
        licence = archive.read(f"{info}/licenses/LICENSE")
    assert "\nName: bmojo-edge\n" in metadata
    assert "\nRequires-Python: >=3.11\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert licence == (ROOT / "LICENSE").read_bytes()
    assert "bmojo-edge = bmojo_edge.cli:main" in scripts


def test_wheel_built_from_the_sdist_is_the_same(tree: Path, wheel: Path, tmp_path: Path) -> None:
    sdist = next(SdistBuilder(str(tree)).build(directory=str(tmp_path), versions=["standard"]))
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = next(path for path in tmp_path.iterdir() if path.is_dir())
    again = next(WheelBuilder(str(unpacked)).build(directory=str(tmp_path / "out"), versions=["standard"]))
    contents = [
        {name: archive.read(name) for name in archive.namelist() if not name.endswith("RECORD")}
        for archive in (zipfile.ZipFile(wheel), zipfile.ZipFile(again))
    ]
    assert contents[0] == contents[1]


def test_installed_wheel_works_away_from_the_repository(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run(pip, check=True)
    code = (
        "import bmojo_edge, bmojo_metal, bmojo_cuda, bmojo_convert, importlib.resources as r;"
        "print(bmojo_edge.__file__, bmojo_edge.Config.preset('tiny').n_layers, bmojo_edge.__version__);"
        "print((r.files('bmojo_metal') / 'planted_kernel.metal').read_text())"
    )
    env = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert str(site) in done.stdout
    assert "// a kernel body" in done.stdout
    assert (site / "bin" / "bmojo-edge").exists()
