"""Roads into ComfyUI: ``install.py`` with pip and with uv, a clone in ``custom_nodes``.

A user's environment is a venv with the rig's packages, but for those that installing brings. These
are wheels that this test writes: nothing is downloaded but uv.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name
from rig import graphs
from rig.checkpoints import models_directory
from rig.downloads import Wheel, obtain
from rig.environment import RigError
from rig.server import Server, base_directory
from rig.trees import Tree

import comfy_xdit_patch

REPO = Path(__file__).resolve().parents[2]
SITE = Path(sysconfig.get_path("purelib"))
SOURCES = ("comfy_xdit_patch", "docs", "install.py", "pyproject.toml", "README.md", "LICENSE")
BROUGHT = {"xfuser", "yunchang", "distvae", "diffusers", "peft", "accelerate", "wrapt"} | {
    "beautifulsoup4",
    "soupsieve",
}
# Name, version, requirements, files: as the real ones have them, as far as it matters.
WHEELS = {
    "xfuser": (
        "0.7.1",
        ("diffusers>=0.33.0", "peft", "torch"),
        ("entrypoints/__init__.py", "entrypoints/launch.py"),
    ),
    "diffusers": ("0.37.1", ("newcomer",), ()),
    "peft": ("0.18.0", ("torch",), ()),
    "wrapt": ("1.17.3", (), ()),
    "newcomer": ("1.0", (), ()),
}
UV = Wheel("uv==0.13.9", "d7f459fe4fd247d830351c75686d3996ace3c6f3f728eb0e85a30b7ada0cef19")
DEADLINE_S = 120
AWAY = ("PIP", "UV", "PYTHONPATH", "VIRTUAL")
# pip takes the value 0 for "no", and so for what the variable's name says.
OFFLINE = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_YES": "1"} | {
    "UV_OFFLINE": "1",
    "UV_NO_BUILD_ISOLATION": "1",
}


@dataclass(frozen=True)
class User:
    """A user's environment."""

    root: Path
    wheels: Path

    @property
    def python(self) -> Path:
        return self.root / "bin" / "python"

    @property
    def site(self) -> Path:
        return next(self.root.glob("lib/python*/site-packages"))

    def run(self, *arguments: object, **env: str) -> tuple[int, str]:
        """Run its Python, from another folder than the checkout's."""
        return self.call([str(self.python), *map(str, arguments)], **env)

    def call(self, command: list[str], **env: str) -> tuple[int, str]:
        """Run a command as this user."""
        kept = {k: v for k, v in os.environ.items() if k.partition("_")[0] not in AWAY}
        links = dict.fromkeys(("PIP_FIND_LINKS", "UV_FIND_LINKS"), str(self.wheels))
        done = subprocess.run(
            command,
            cwd=self.wheels,
            env={**kept, "PATH": os.defpath, **links, **OFFLINE, **env},
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )
        return done.returncode, done.stdout + done.stderr

    def files(self) -> set[str]:
        """All files in it, but for bytecode and uv's own lock. pip leaves some folders empty."""
        found = (p for p in self.root.rglob("*") if p.is_symlink() or p.is_file())
        places = {str(p.relative_to(self.root)) for p in found if "__pycache__" not in p.parts}
        return places - {".lock"}


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    for name, (version, requires, more) in WHEELS.items():
        info = f"{name}-{version}.dist-info"
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {line}" for line in requires]
        files = {
            f"{name}/__init__.py": "",
            **dict.fromkeys(more, ""),
            f"{info}/METADATA": "\n".join(lines) + "\n",
            f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
        with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            for file, text in files.items():
                wheel.writestr(file, text)
    return folder


@pytest.fixture
def user(tmp_path: Path, wheels: Path, request: pytest.FixtureRequest) -> User:
    """A user's environment, with pip; ``uv`` as parameter: with uv instead."""
    has_pip = getattr(request, "param", "pip") == "pip"
    made = User(tmp_path / "user", wheels)
    venv.create(made.root, with_pip=False, symlinks=True)
    left_out = {"comfy-xdit-patch", *BROUGHT, *(() if has_pip else ("pip",))}
    names = {
        file.parts[0]
        for each in metadata.distributions(path=[str(SITE)])
        if canonicalize_name(each.metadata["Name"]) in left_out
        for file in each.files or ()
    }
    for entry in SITE.iterdir():
        if entry.name not in names and entry.suffix == ".dist-info":
            shutil.copytree(entry, made.site / entry.name)  # uv sees no links
        elif entry.name not in names:
            (made.site / entry.name).symlink_to(entry)
    if not has_pip:
        (made.root / "bin" / "uv").symlink_to(request.getfixturevalue("uv"))
    return made


@pytest.fixture(scope="module")
def uv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, out of its wheel."""
    try:
        wheel = obtain(UV)
    except RigError as error:
        pytest.skip(f"uv cannot be obtained: {error}")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith("/scripts/uv"))
        program = Path(archive.extract(member, tmp_path_factory.mktemp("uv")))
    program.chmod(0o755)
    return program


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout that the test may change."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (REPO / name).is_dir() else shutil.copy
        copy(REPO / name, folder / name)
    return folder


@pytest.mark.parametrize("user", ["pip", "uv"], indirect=True)
def test_it_installs_into_the_python_that_runs_it_and_uninstalls_all_but_what_it_names(
    user: User, checkout: Path
) -> None:
    before = user.files()
    code, said = user.run(checkout / "install.py", "--check")
    assert code == 0, said
    assert "xfuser" in said.split("would hold")[1].splitlines()[-1], said
    assert user.files() == before, "--check changes nothing"

    code, said = user.run("-s", checkout / "install.py")  # so a portable ComfyUI runs its Python
    assert code == 0, said
    assert f"is enabled by {user.site}/comfy_xdit_patch.pth" in said
    started = "import sys; print(sys.modules['comfy_xdit_patch'].__file__)"
    for options in ([], ["-s"], ["-I"]):
        code, said = user.run(*options, "-c", started)
        assert said == f"{user.site}/comfy_xdit_patch/__init__.py\n"
    with_it = user.files()

    code, said = user.run(checkout / "install.py", "--uninstall", "--check")
    assert (code, user.files()) == (0, with_it)
    code, said = user.run(checkout / "install.py", "--uninstall")
    assert code == 0, said
    names = said.split("may import them: ")[1].splitlines()[0].split()
    assert names == ["diffusers", "newcomer", "peft", "wrapt", "xfuser"]
    left = {Path(file).parts[3] for file in user.files() - before}
    assert left == {*names, "entrypoints"} | {f"{n}-{WHEELS[n][0]}.dist-info" for n in names}

    command = said.split("To remove them: ")[1].split()
    code, said = user.call(command)
    assert code == 0, said
    assert user.files() == before


@pytest.mark.parametrize("user", ["pip", "uv"], indirect=True)
def test_a_newer_version_leaves_nothing_of_the_older_one(user: User, checkout: Path) -> None:
    stale = checkout / "comfy_xdit_patch" / "stale.py"
    stale.touch()
    code, said = user.run(checkout / "install.py")
    assert code == 0, said
    older = user.files()
    stale.unlink()
    code, said = user.run(checkout / "install.py")
    assert code == 0, said
    assert {Path(file).name for file in older - user.files()} == {"stale.py"}
    assert user.files() < older
    assert len(list(user.root.rglob("comfy_xdit_patch.pth"))) == 1
    code, said = user.run(checkout / "install.py", "--uninstall", "--check")
    assert "may import them: diffusers newcomer peft wrapt xfuser\n" in said, "as first recorded"


def test_without_pip_and_uv_it_says_what_brings_pip(user: User, checkout: Path) -> None:
    (user.site / "pip").unlink()
    before = user.files()
    code, said = user.run(checkout / "install.py")
    assert code == 1
    assert f"No pip, and uv is not on PATH. {user.python} -m ensurepip brings pip." in said
    assert user.files() == before


def test_a_python_of_the_system_is_left_alone_with_one_clear_line(
    user: User, checkout: Path, tmp_path: Path
) -> None:
    """PEP 668, as pip itself sees it: no virtual environment, and a file beside the library."""
    (tmp_path / "EXTERNALLY-MANAGED").write_text("[externally-managed]\nError=Use apt.\n")
    (user.site / "sitecustomize.py").write_text(
        "import sys, sysconfig\n"
        "sys.base_prefix, get = sys.prefix, sysconfig.get_path\n"
        "sysconfig.get_path = lambda name, *a, **k: "
        f"{str(tmp_path)!r} if name == 'stdlib' else get(name, *a, **k)\n"
    )
    before = user.files()
    code, said = user.run(checkout / "install.py")
    assert code == 1
    first, *_ = said.splitlines()[1:]
    assert first.startswith(f"{user.python} belongs to the system's packages (PEP 668)"), said
    assert user.files() == before


@pytest.mark.parametrize("platform", ["win32", "darwin"])
@pytest.mark.parametrize("arguments", [[], ["--uninstall"], ["demo"]])
def test_on_other_systems_nothing_is_done_and_one_line_says_why(
    user: User, checkout: Path, platform: str, arguments: list[str]
) -> None:
    before = user.files()
    code, said = user.run(
        "-c",
        "import runpy, sys, argparse, tempfile, subprocess, importlib.metadata\n"
        f"sys.platform, sys.argv[1:] = {platform!r}, {arguments!r}\n"
        f"runpy.run_path({str(checkout / 'install.py')!r}, run_name='__main__')",
    )
    assert code == 1
    assert said == f"comfy-xdit-patch needs Linux; this is {platform}. Nothing was done.\n"
    assert user.files() == before


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What git would write into ``custom_nodes``, of another version than is installed."""
    folder = tmp_path / "comfy-xdit-patch"
    shutil.copytree(REPO, folder, ignore=shutil.ignore_patterns(".*", "__pycache__", "demo"))
    version = folder / "comfy_xdit_patch" / "__init__.py"
    version.write_text(version.read_text().replace(comfy_xdit_patch.__version__, "9.9.9"))
    return folder


@pytest.mark.every_version
def test_comfyui_loads_a_clone_without_nodes_and_the_installed_package_is_active(
    tree: Tree, clone: Path, tmp_path: Path
) -> None:
    with (
        base_directory(tmp_path / "base", models_directory()) as base,
        Server(tree, base, env={"XDIT_GPUS": "cpu:2"}, node_packs=[clone]) as server,
    ):
        assert server.status()["version"] == comfy_xdit_patch.__version__
        modules = {node["python_module"] for node in server.request("/object_info").values()}
        assert "nodes" in modules
        assert f"custom_nodes.{clone.name}" not in modules
        said = server.log_path.read_text()
    assert f"seconds: {base / 'custom_nodes' / clone.name}\n" in said, "it was loaded"
    for complaint in ("(IMPORT FAILED)", "Unable to parse pyproject.toml", "is not enabled"):
        assert complaint not in said


def test_a_clone_says_that_the_package_is_not_enabled_in_this_python(clone: Path) -> None:
    code = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('pack', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(module.NODE_CLASS_MAPPINGS)\n"
    )
    # Without site no .pth file is read.
    command = [sys.executable, "-S", "-c", code, str(clone / "__init__.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "{}\n"
    assert f"not enabled in {sys.executable}: run {clone}/install.py with it" in done.stderr


@pytest.mark.thorough  # it downloads what the tests above have written themselves
def test_comfyui_is_parallel_in_an_environment_that_install_has_made(
    tree: Tree, user: User, tmp_path: Path
) -> None:
    before = user.files()
    index = {k: v for k, v in os.environ.items() if k.startswith("PIP_")}
    code, said = user.run(
        REPO / "install.py", **{"PIP_FIND_LINKS": "", **index, "PIP_NO_INDEX": "0"}
    )
    assert code == 0, said
    graph = graphs.with_values(graphs.load("ksampler_dev"), seed=7, size=(128, 128), steps=2)
    with (
        base_directory(tmp_path / "base", models_directory()) as base,
        Server(
            tree, base, env={"XDIT_GPUS": "cpu:2", "XDIT_STRICT": "1"}, python=user.python
        ) as server,
    ):
        server.run(graph, 300)
        run = server.status()["last_run"]
    assert run["steps_parallel"] == run["steps"] == 2
    code, said = user.run(REPO / "install.py", "--uninstall")
    code, said = user.call(said.split("To remove them: ")[1].split())
    assert code == 0, said
    assert user.files() == before
