"""The settings of pyproject.toml put every file of the package into the wheel."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "moss_jax"


def test_every_file_is_in_the_wheel():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    (patterns,) = settings["package-data"].values()
    packages = [path.parent for path in PACKAGE.rglob("__init__.py")]
    for package in packages:  # a package below a folder that is none would not be found
        assert package == PACKAGE or package.parent in packages, package
    included = {path for package in packages for path in package.glob("*.py")}
    included |= {path for package in packages for pattern in patterns for path in package.glob(pattern)}
    files = {path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert sorted(files - included) == []
