#!/usr/bin/env python3
"""Install comfy_xdit_patch into the Python that runs this file, or show it, or test it.

Runs in: ComfyUI's own Python, also when ComfyUI-Manager starts it (standard library only).

    python install.py              install and enable the patch for this Python
    python install.py --check      say what would happen; change nothing
    python install.py --uninstall  remove the patch from this Python, and say what it leaves
    python install.py check-gpus ...  comfy-xdit check: whether it works on this machine's GPUs
    python install.py demo ...     the same image on stock ComfyUI and on several ranks
    python install.py bench ...    times, beside their baselines: steps by each strategy, overhead,
                                   xfuser's attention; --quick takes minutes
    python install.py test ...     the tests, one of each mechanism; --all runs everything, and
                                   further arguments go to pytest

Installing never replaces what ComfyUI brought along: packages are held at their versions, so pip
(or uv, where this Python has no pip) fails with a reason where it would have to change one
(docs/adr/0019-packages-are-held.md).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE = "comfy-xdit-patch"
START_FILES = ("comfy_xdit_patch.pth", "comfy_xdit_patch.start")
# What this package may bring, and raise where it is too old; everything else stays as it is.
BROUGHT = frozenset(
    {
        "xfuser",
        "yunchang",
        "distvae",
        "diffusers",
        "peft",
        "accelerate",
        "wrapt",
        "beautifulsoup4",
        "soupsieve",
        "prometheus-client",
    }
)
NOT_HELD = BROUGHT | {PACKAGE, "pip", "setuptools", "wheel"}
BROUGHT_FILE = "brought.txt"
"""In this package's .dist-info: the packages that were installed with it, one a line."""
QUIET = {
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PIP_NO_INPUT": "1",
    "PIP_PROGRESS_BAR": "off",
    "PIP_YES": "1",
}
TAIL_LINES = 25
IN_ENVIRONMENT = {"demo": "rig.demo", "bench": "bench.suite", "test": "pytest"}
"""What runs in the rig's environment, and as which module."""
# Two processes of pytest: ranks and servers wait for each other half of the time.
TWO_AT_A_TIME = ("-n", "2", "--dist", "loadscope", "--no-loadscope-reorder")


def main(arguments: list[str]) -> int:
    """Do what the first argument names."""
    if not sys.platform.startswith("linux"):
        print(f"{PACKAGE} needs Linux; this is {sys.platform}. Nothing was done.", file=sys.stderr)
        return 1
    if arguments and arguments[0] in IN_ENVIRONMENT:
        return _in_environment(arguments[0], arguments[1:])
    if arguments and arguments[0] == "check-gpus":
        return _check_gpus(arguments[1:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing")
    parser.add_argument("--uninstall", action="store_true", help="remove the patch")
    options = parser.parse_args(arguments)
    if options.uninstall:
        return _uninstall(check=options.check)
    return _check() if options.check else _install()


def _install() -> int:
    print(f"Installing {PACKAGE} into {sys.executable}")
    before = _brought() or set()
    there = _installed(None).keys()
    code, output = _pip_install()
    if code:
        print(_advice(output), file=sys.stderr)
        return 1
    place = _start_file()
    if place is None:
        folders = ", ".join(map(str, _site_folders()))
        print(f"Not enabled: {START_FILES[0]} is in none of {folders}.", file=sys.stderr)
        return 1
    _record(before | (_installed(None).keys() - there - {PACKAGE}))
    for path in shadowing():
        path.unlink()
        print(f"removed {path}: an empty file of xfuser that hides others' modules of that name")
    print(f"{PACKAGE} {_version(PACKAGE)} is enabled by {place}")
    print("Restart ComfyUI, then queue any FLUX workflow as it is. XDIT_GPUS chooses the GPUs.")
    print(f"What was found and planned: {sys.executable} -m comfy_xdit_patch doctor")
    return 0


def _check() -> int:
    print(f"Python     {sys.executable} ({sys.version.split()[0]})")
    for name in ("torch", "xfuser", PACKAGE):
        print(f"{name:10} {_version(name) or 'not installed'}")
    print(f"enabled    {_start_file() or 'no'}")
    print(f"would hold {', '.join(held()) or 'nothing: no package of ComfyUI is installed here'}")
    if _version("torch") is None:
        print("torch is not installed here: is this the Python that runs ComfyUI?")
    code, output = _pip_install("--dry-run")
    would = [line for line in output.splitlines() if line.startswith(("Would install", " + "))]
    print(_advice(output) if code else "\n".join(would) or "pip would change nothing")
    return 1 if code else 0


def _check_gpus(arguments: list[str]) -> int:
    """Run ``comfy-xdit check`` in this Python."""
    if _version(PACKAGE) is None:
        print(f"{PACKAGE} is not installed in {sys.executable}: run install.py.", file=sys.stderr)
        return 2
    os.execv(sys.executable, [sys.executable, "-m", "comfy_xdit_patch", "check", *arguments])


def _uninstall(*, check: bool) -> int:
    files = [folder / name for folder in _site_folders() for name in START_FILES]
    installed, stays = _version(PACKAGE), _what_stays()
    if check:
        print(f"would uninstall {PACKAGE} {installed or '(not installed)'} and remove what is left")
        print("of: " + " ".join(str(path) for path in files if path.exists()))
        print(stays)
        return 0
    if installed:
        code, output = _run(_pip("uninstall", PACKAGE))
        if code:
            print(_advice(output, "uninstall"), file=sys.stderr)
            return 1
    for path in files:
        path.unlink(missing_ok=True)
    print(f"{PACKAGE} is removed from {sys.executable}. Restart ComfyUI.")
    print(stays)
    return 0


def _pip_install(*options: str) -> tuple[int, str]:
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("".join(f"{pin}\n" for pin in held()))
        return _run(_pip("install", *options, "-c", str(constraints), str(HERE)))


def _pip(action: str, *arguments: str) -> list[str]:
    """Return a command of pip, or of uv where this Python has no pip; nothing where uv is not."""
    if importlib.util.find_spec("pip"):
        # A portable ComfyUI runs as `python -s`: it would not find what is in the user's folder.
        own = ["-s"] if sys.flags.no_user_site else []
        return [sys.executable, *own, "-m", "pip", action, *arguments]
    beside = Path(sys.executable).parent  # where `pip install uv` has put it
    uv = shutil.which("uv", path=f"{beside}{os.pathsep}{os.environ.get('PATH', os.defpath)}")
    if uv is None:
        return []
    # uv takes the wheel that it built before, also where the source has changed since.
    anew = ["--reinstall-package", PACKAGE] if action == "install" else []
    return [uv, "pip", action, "--python", sys.executable, *anew, *arguments]


def _run(command: list[str]) -> tuple[int, str]:
    if not command:
        return 1, ""
    environment = {**os.environ, **QUIET}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout + done.stderr


def held(folders: list[str] | None = None) -> list[str]:
    """Return a constraint for each installed package that must stay as it is."""
    found = _installed(folders)
    return sorted(f"{name}=={each.version}" for name, each in found.items() if name not in NOT_HELD)


def unneeded(folders: list[str] | None = None) -> list[str]:
    """Return what installing brought and no other installed package requires.

    Where this package was not installed by this file, nobody knows: then all of ``BROUGHT``.
    """
    found = _installed(folders)
    brought = _brought(folders)
    found.pop(PACKAGE, None)
    left = (BROUGHT if brought is None else brought) & found.keys()
    while True:
        needed = {
            _requirement(line) for name in found.keys() - left for line in _needs(found[name])
        }
        if not left & needed:
            return sorted(left)
        left -= needed


def shadowing(folders: list[str] | None = None) -> list[Path]:
    """Return the empty ``entrypoints/__init__.py`` of xfuser, where no other package has it too.

    A package with that file is found before a module ``entrypoints.py`` and before folders of
    that name without one, wherever they lie. xfuser itself never imports it.
    """
    found = _installed(folders)
    owners = [
        (name, Path(str(file.locate())))
        for name, each in found.items()
        for file in each.files or ()
        if file.as_posix() == "entrypoints/__init__.py"
    ]
    if [name for name, _ in owners] != ["xfuser"]:
        return []
    path = owners[0][1]
    return [path] if path.is_file() and not path.read_bytes().strip() else []


def _brought(folders: list[str] | None = None) -> set[str] | None:
    """Return the packages that were installed with this one, as ``_record`` has noted them."""
    ours = _installed(folders).get(PACKAGE)
    text = ours.read_text(BROUGHT_FILE) if ours else None
    return None if text is None else set(text.split())


def _record(brought: set[str]) -> None:
    """Note what came along, in a file that pip and uv remove with the package."""
    files = metadata.files(PACKAGE) or ()
    (record,) = (file for file in files if file.name == "RECORD")
    path = Path(str(record.locate()))
    path.with_name(BROUGHT_FILE).write_text("".join(f"{name}\n" for name in sorted(brought)))
    with path.open("a") as lines:
        lines.write(f"{record.with_name(BROUGHT_FILE).as_posix()},,\n")


def _what_stays() -> str:
    names = unneeded()
    if not names:
        return "Of what it brought, nothing is left that no other package requires."
    command = shlex.join(_pip("uninstall", *names))
    return (
        f"Left, for node packs may import them: {' '.join(names)}\n"
        f"No installed package requires them. To remove them: {command}"
    )


def _installed(folders: list[str] | None) -> dict[str, metadata.Distribution]:
    paths = [*sys.path, *map(str, _site_folders())] if folders is None else folders
    found: dict[str, metadata.Distribution] = {}
    for distribution in metadata.distributions(path=paths):
        name = _canonical(distribution.metadata["Name"] or "")
        if name:
            found.setdefault(name, distribution)
    return found


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _needs(distribution: metadata.Distribution) -> list[str]:
    return [line for line in distribution.requires or () if "extra ==" not in line]


def _requirement(line: str) -> str:
    named = re.match(r"[A-Za-z0-9._-]+", line)
    return _canonical(named.group()) if named else ""


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _site_folders() -> list[Path]:
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    return [Path(folder) for folder in dict.fromkeys(folders)]


def _start_file() -> Path | None:
    places = (folder / START_FILES[0] for folder in _site_folders())
    return next((place for place in places if place.is_file()), None)


def _advice(output: str, action: str = "install") -> str:
    """Say what went wrong in the output of pip or uv; it is empty where neither is there."""
    if not output:
        return f"No pip, and uv is not on PATH. {sys.executable} -m ensurepip brings pip."
    if re.search("externally.managed", output):
        return (
            f"{sys.executable} belongs to the system's packages (PEP 668), which pip leaves alone. "
            f"Run install.py with the Python of ComfyUI's own environment."
        )
    return f"{_tail(output)}\n{PACKAGE} could not be {action}ed; nothing of ComfyUI's was changed."


def _tail(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-TAIL_LINES:])


def _in_environment(command: str, arguments: list[str]) -> int:
    """Run the demo, the benchmark or the tests in the rig's environment, with a fresh wheel."""
    sys.path.insert(0, str(HERE / "tests"))
    from rig import environment, trees

    try:
        print(f"{PACKAGE} {command}: preparing {environment.environment_path()}", flush=True)
        python = environment.ensure_environment()
        version = environment.install_wheel(python, HERE)
        print(f"{PACKAGE} {version} is installed there", flush=True)
        if command == "test":
            found = ", ".join(tree.version for tree in trees.trees_for_tests())
            print(f"ComfyUI {found}", flush=True)
    except environment.RigError as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 1
    line = [str(python), "-m", IN_ENVIRONMENT[command]]
    if command == "test":
        line += ["--import-mode=importlib", *TWO_AT_A_TIME]
        os.chdir(HERE)
    line += arguments
    os.execve(python, line, {**os.environ, "PYTHONPATH": str(HERE / "tests")})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
