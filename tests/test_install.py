"""The three folders install as one package, whichever way and from wherever it is used.

Nothing is downloaded: the throw-away environments see the packages of the running one through a ``.pth`` file, and the
project is built without isolation.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

PROBE = """
import lbllm_compile
from lbllm_compile import cli
from lbllm_compile.codegen import errors
from lbllm_compile.codegen.kernels import __name__ as kernels
from lbllm_compile.codegen.targets import Target
from lbllm_compile.passes import Pass, pipeline, registry
assert issubclass(registry.get("cleanup"), Pass)
assert kernels == "lbllm_compile.codegen.kernels"
print(lbllm_compile.__file__)
print(errors.__file__)
"""

WAYS = {
    "wheel": [],
    "editable": ["--editable"],
    "strict-editable": ["--config-settings", "editable_mode=strict", "--editable"],
}


def run(command: list[str | Path], cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def clone(destination: Path) -> Path:
    """A checkout without build leftovers, so that installing leaves no trace in the real one."""
    names = ["pyproject.toml", "README.md", "LICENSE", "lbllm_compile", "passes", "codegen"]
    run(["cp", "-r", *(ROOT / n for n in names), destination], ROOT)
    return destination


@pytest.fixture(scope="module", params=WAYS)
def installed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """``(way, checkout, python of the environment)`` after installing the project one way."""
    base = tmp_path_factory.mktemp(request.param)
    checkout = base / "checkout"
    checkout.mkdir()
    clone(checkout)
    venv.create(base / "env", with_pip=False, symlinks=True)
    python = base / "env" / "bin" / "python"
    here = [sysconfig.get_path("purelib"), *(p for p in sys.path if p.endswith("site-packages"))]
    site = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], base).strip()
    (Path(site) / "zz-packages-of-the-tests.pth").write_text("\n".join(dict.fromkeys(here)) + "\n")
    install = ["-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    run([python, *install, "--force-reinstall", "--no-index", *WAYS[request.param], checkout], base)
    return request.param, checkout, python


@pytest.mark.slow
@pytest.mark.parametrize("where", ["/", "root"])
def test_everything_imports(installed: tuple[str, Path, Path], where: str) -> None:
    way, checkout, python = installed
    own, lower = run([python, "-c", PROBE], checkout if where == "root" else Path("/")).split()
    from_checkout = way == "editable" or where == "root"
    assert (checkout in Path(own).parents) == (from_checkout or way == "strict-editable")
    assert Path(lower).name == "errors.py"


@pytest.mark.slow
@pytest.mark.parametrize("where", ["/", "root"])
def test_the_command_works(installed: tuple[str, Path, Path], where: str) -> None:
    _, checkout, python = installed
    cwd = checkout if where == "root" else Path("/")
    assert run([python.with_name("lbllm-compile"), "--version"], cwd) == "0.1.0\n"
    assert run([python, "-m", "lbllm_compile", "--version"], cwd) == "0.1.0\n"
    assert "cpu:generic" in run([python.with_name("lbllm-compile"), "targets", "--json"], cwd)


@pytest.mark.slow
def test_no_generic_name_is_installed(installed: tuple[str, Path, Path]) -> None:
    _, _, python = installed
    code = "import importlib.util as u; print([n for n in ('passes', 'codegen') if u.find_spec(n)])"
    assert run([python, "-c", code], Path("/")) == "[]\n"


@pytest.mark.slow
def test_the_wheel_has_every_file(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    clone(checkout)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    run([*pip, "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", tmp_path, checkout], tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    stored = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    folders = {"lbllm_compile": "lbllm_compile", "passes": "lbllm_compile/passes", "codegen": "lbllm_compile/codegen"}
    expected = {
        f"{package}/{file.relative_to(checkout / folder)}"
        for folder, package in folders.items()
        for file in (checkout / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert stored == expected
