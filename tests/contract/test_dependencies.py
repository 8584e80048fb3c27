"""Installing as the README says changes no package of ComfyUI, and hides no module of a user.

pip resolves against the package index without installing: a bare environment gets the metadata of
what a user of ComfyUI has (torch too: nothing large is fetched), and pip says what it would do.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import sysconfig
import venv
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPO = Path(__file__).resolve().parents[2]
SITE = Path(sysconfig.get_path("purelib"))
README_LINES = """    pip list --format=freeze > installed.txt
    pip install -c installed.txt comfy-xdit-patch
"""
# The oldest ComfyUI at hand, 0.3.75, asks for transformers>=4.50.3; its users have the last 4.x.
OLDEST = {
    "transformers": (
        "4.57.6",
        ("huggingface-hub<1.0,>=0.34.0", "tokenizers<=0.23.0,>=0.22.0", "safetensors>=0.4.3"),
    ),
    "tokenizers": ("0.22.2", ("huggingface-hub<2.0,>=0.16.4",)),
    "huggingface-hub": ("0.36.2", ("filelock", "fsspec>=2023.5.0", "requests", "tqdm>=4.42.1")),
    "safetensors": ("0.6.2", ()),
}
TODAY: dict[str, tuple[str, tuple[str, ...]]] = {}
UNREACHABLE = ("Could not find a version", "No matching distribution", "NewConnectionError")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
DEADLINE_S = 120


@cache
def installer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install_under_test", REPO / "install.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_metadata(folder: Path, name: str, version: str, requires: tuple[str, ...] = ()) -> Path:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {line}" for line in requires]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    (info / "INSTALLER").write_text("pip\n")
    (info / "RECORD").write_text("")
    return info


def without_ours() -> dict[str, metadata.Distribution]:
    """Return the rig's packages that ComfyUI's requirements bring, by name."""
    found = {
        canonicalize_name(each.metadata["Name"]): each
        for each in metadata.distributions(path=[str(SITE)])
    }
    lock = (REPO / "tests/rig/requirements.lock").read_text()
    assert "transformers==" in lock
    left_out = installer().NOT_HELD
    return {name: each for name, each in found.items() if name not in left_out}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        *PIP,
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(REPO),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=DEADLINE_S)
    return next(folder.glob("*.whl"))


@pytest.mark.parametrize("versions", [OLDEST, TODAY], ids=["oldest", "today"])
def test_installing_changes_no_package_that_is_there(
    versions: dict[str, tuple[str, tuple[str, ...]]], wheel: Path, tmp_path: Path
) -> None:
    assert README_LINES in (REPO / "README.md").read_text()
    venv.create(tmp_path / "user", with_pip=False, symlinks=True)
    site = next((tmp_path / "user").glob("lib/python*/site-packages"))
    for name, each in without_ours().items():
        requires = tuple(each.requires or ())
        write_metadata(site, name, *versions.get(name, (each.version, requires)))
    there = {
        canonicalize_name(each.metadata["Name"]): each.version
        for each in metadata.distributions(path=[str(site)])
    }
    assert {"torch", "transformers", "huggingface-hub", "tokenizers", "safetensors"} <= there.keys()
    pip = [*PIP, "--python", str(tmp_path / "user/bin/python")]
    listed = subprocess.run(
        [*pip, "list", "--format=freeze"], check=True, capture_output=True, text=True
    ).stdout
    held = {canonicalize_name(pin.split("==")[0]) for pin in installer().held([str(site)])}
    assert held == there.keys(), "install.py holds what the README's command holds"
    (tmp_path / "installed.txt").write_text(listed)
    report = tmp_path / "report.json"
    command = [*pip, "install", "--no-input", "--dry-run", "--report", str(report)]
    command += ["-c", str(tmp_path / "installed.txt"), str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    if done.returncode and any(sign in done.stderr for sign in UNREACHABLE):
        reachable = subprocess.run(
            [*PIP, "download", "-q", "--no-deps", "-d", str(tmp_path), "lazy-importer"],
            capture_output=True,
            text=True,
        )
        if reachable.returncode:
            pytest.skip(f"the package index cannot be reached: {reachable.stderr[-300:]}")
    assert done.returncode == 0, done.stdout + done.stderr

    brought = [each["metadata"] for each in json.loads(report.read_text())["install"]]
    names = {canonicalize_name(each["name"]): each["version"] for each in brought}
    assert {"comfy-xdit-patch", "xfuser", "diffusers", "wrapt", "prometheus-client"} <= names.keys()
    assert not names.keys() & there.keys(), "a package of ComfyUI would be changed"
    after = there | names
    lines = [line for each in brought for line in each.get("requires_dist", ())]
    lines += [line for _, needs in versions.values() for line in needs]
    assert conflicts(lines, after) == []


def conflicts(lines: list[str], after: dict[str, str]) -> list[str]:
    """Return the requirements that the packages do not meet, as ``pip check`` has it."""
    unmet = []
    for line in lines:
        needed = Requirement(line)
        if needed.marker and not needed.marker.evaluate({"extra": ""}):
            continue
        version = after.get(canonicalize_name(needed.name))
        if version is None or not needed.specifier.contains(version, prereleases=True):
            unmet.append(f"{line}: {version}")
    return unmet


def test_of_what_xfuser_brings_beside_itself_only_entrypoints_can_hide_a_module() -> None:
    """Folders without ``__init__.py`` come after everything of a user and are merged with it."""
    strays = {
        file.parts[0]
        for name in ("xfuser", "yunchang", "distvae")
        for file in metadata.files(name) or ()
        if len(file.parts) > 1 and not file.parts[0].endswith(".dist-info")
    } - {"xfuser", "yunchang", "distvae", ".."}
    regular = {name for name in strays if (SITE / name / "__init__.py").is_file()}
    assert {"tests", "test", "docs", "docker"} <= strays
    assert regular <= {"entrypoints"}


def test_the_file_that_hides_modules_is_found_and_without_it_they_are_not_hidden(
    tmp_path: Path,
) -> None:
    site, user = tmp_path / "site", tmp_path / "user"
    record = write_metadata(site, "xfuser", "0.7.0") / "RECORD"
    record.write_text("entrypoints/__init__.py,,\nentrypoints/launch.py,,\n")
    (site / "entrypoints").mkdir()
    (site / "entrypoints/__init__.py").write_text("")
    (user / "entrypoints").mkdir(parents=True)
    (user / "entrypoints/mine.py").write_text("")
    code = f"import sys; sys.path[:0] = {[str(user), str(site)]!r}; import entrypoints.mine"
    command = [sys.executable, "-S", "-c", code]
    assert subprocess.run(command, capture_output=True).returncode == 1
    (found,) = installer().shadowing([str(site)])
    found.unlink()
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert installer().shadowing([str(site)]) == []


def test_a_file_that_another_package_has_too_is_left_alone(tmp_path: Path) -> None:
    for name in ("xfuser", "other"):
        record = write_metadata(tmp_path, name, "1.0") / "RECORD"
        record.write_text("entrypoints/__init__.py,,\n")
    (tmp_path / "entrypoints").mkdir()
    (tmp_path / "entrypoints/__init__.py").write_text("")
    assert installer().shadowing([str(tmp_path)]) == []


def test_uninstalling_names_what_is_left_that_nobody_requires(tmp_path: Path) -> None:
    site = [str(tmp_path)]
    write_metadata(tmp_path, "comfy-xdit-patch", "0.1.0", ("xfuser", "diffusers"))
    write_metadata(tmp_path, "xfuser", "0.7.0", ("diffusers>=0.33", "peft", "torch"))
    write_metadata(tmp_path, "peft", "0.18.0", ("accelerate>=0.21.0", "torch"))
    write_metadata(tmp_path, "diffusers", "0.37.1")
    write_metadata(tmp_path, "accelerate", "1.12.0")
    write_metadata(tmp_path, "torch", "2.9.0", ('accelerate; extra == "more"',))
    everything = ["accelerate", "diffusers", "peft", "xfuser"]
    assert installer().unneeded(site) == everything
    write_metadata(tmp_path, "somebody", "1.0", ("PEFT (>=0.1)",))
    assert installer().unneeded(site) == ["diffusers", "xfuser"]
