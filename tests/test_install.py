"""The three folders install as one package, whichever way and from wherever it is used.

Nothing is downloaded: the throw-away environments see the packages of the running one through a ``.pth`` file, and the
project is built without isolation.
"""

from __future__ import annotations

import email
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import runtime_only
from lbllm_compile.codegen.errors import COMPILE_PACKAGES
from typer.main import get_command

from lbllm_compile import cli

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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """``(wheel, checkout it was built from)``."""
    base = tmp_path_factory.mktemp("wheel")
    checkout = base / "checkout"
    checkout.mkdir()
    clone(checkout)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    run([*pip, "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", base, checkout], base)
    (built,) = base.glob("*.whl")
    return built, checkout


@pytest.mark.slow
def test_only_the_extra_for_compiling_takes_the_compiler(wheel: tuple[Path, Path]) -> None:
    archive = zipfile.ZipFile(wheel[0])
    (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    required: dict[str, set[str]] = {}
    for line in email.message_from_bytes(archive.read(name)).get_all("Requires-Dist", []):
        package, _, condition = line.partition(";")
        extra = re.search(r'extra == "([a-z]+)"', condition)
        bare = re.split(r"[<>=\[ ]", package.strip())[0]
        required.setdefault(extra.group(1) if extra else "", set()).add({"apache-tvm": "tvm"}.get(bare, bare))
    assert required["compile"] == set(COMPILE_PACKAGES)
    assert required[""] & set(COMPILE_PACKAGES) == set()
    assert required["run"] == {"lbllm-compile"}


_VERBS = """
import lbllm_compile
from lbllm_compile import cli
from typer.testing import CliRunner
for line in sys.argv[1:]:
    result = CliRunner().invoke(cli.app, line.split(), prog_name="lbllm-compile")
    print(result.exit_code, result.stderr.strip())
for name in lbllm_compile._HOMES:
    try:
        getattr(lbllm_compile, name)
    except lbllm_compile.codegen.errors.MissingPackageError as error:
        print(name, error)
"""

LOOKING = ("doctor", "targets")
"""Verbs that need no artifact."""

RUNNING = ("run", "chat", "serve", *LOOKING)
"""The verbs of an install without the compiler."""


NEEDED = {"tune search": ("--shapes", "64x64"), "eval nowhere": ("--text", "nowhere")}
"""Options that a verb asks for beside what it requires."""


def lines_of(command: Any, words: Sequence[str] = ()) -> Iterator[list[str]]:
    """A command line for every verb of a command, with what it needs alone."""
    if hasattr(command, "commands"):
        for name, verb in command.commands.items():
            yield from lines_of(verb, [*words, name])
        return
    for parameter in (p for p in command.params if p.required):
        words = [*words, *([parameter.opts[0]] if parameter.opts[0].startswith("-") else []), "nowhere"]
    yield [*words, *NEEDED.get(" ".join(words), ())]


def test_what_needs_the_compiler_says_so_where_it_is_not_installed() -> None:
    """Every verb runs, or names in one sentence what to install; so does what the package offers."""
    lines = [*lines_of(get_command(cli.app)), ["model.py"]]
    assert {*RUNNING, "compile", "inspect", "export", "tune"} <= {line[0] for line in lines}
    said = run(runtime_only.script(_VERBS, *map(" ".join, lines)), ROOT).splitlines()
    told = "which an install for running alone does not have; install it with `pip install 'lbllm-compile[compile]'`"
    nowhere = "2 lbllm-compile: there is no artifact at 'nowhere'; name the directory that a compile wrote"
    for line, answer in zip(lines, said, strict=False):
        verb = "compile" if line == ["model.py"] else line[0]
        if verb in RUNNING:
            assert answer == ("0 " if verb in LOOKING else nowhere), line
        else:
            assert re.fullmatch(rf"2 lbllm-compile: `{verb}` needs the package \w+, {re.escape(told)}", answer), line
    names = [line.split()[0] for line in said[len(lines) :] if line.endswith(told)]
    assert names == ["CompileReport", "CompiledModel", "compile", "load"]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in /proc")
def test_importing_starts_no_thread() -> None:
    """torch computes nothing in a process that was forked after its threads had begun."""
    code = (
        "import os, torch, transformers, tvm; before = os.listdir('/proc/self/task'); "
        "import lbllm_compile.driver, lbllm_compile.kernels; assert os.listdir('/proc/self/task') == before"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.slow
def test_the_wheel_has_every_file(wheel: tuple[Path, Path]) -> None:
    built, checkout = wheel
    stored = {n for n in zipfile.ZipFile(built).namelist() if ".dist-info/" not in n}
    folders = {"lbllm_compile": "lbllm_compile", "passes": "lbllm_compile/passes", "codegen": "lbllm_compile/codegen"}
    expected = {
        f"{package}/{file.relative_to(checkout / folder)}"
        for folder, package in folders.items()
        for file in (checkout / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert stored == expected
