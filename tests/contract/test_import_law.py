"""Who may import what. Not tidiness: each row keeps a process working.

The bootstrap runs in every Python process. torch imported before ComfyUI makes ComfyUI warn and
lose its allocator choice. xfuser and diffusers take seconds to import, in every rank, and nothing
of theirs is needed. A worker that imported ``patching`` would patch the ComfyUI that it computes
with.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PACKAGE = REPO / "comfy_xdit_patch"
OWN = "comfy_xdit_patch"
MAX_LINES = 250

# Who imports them, at module scope and inside functions. Equality: a row that is too wide is wrong.
IMPORTERS = {
    "wrapt": {"patching/patchset.py"},
    "comfy": {
        "activation.py",
        "engine/driven.py",
        "engine/loading.py",
        "engine/overlay.py",
        "engine/placing.py",
        "engine/prescribed.py",
        "engine/resident.py",
        "engine/residents.py",
        "engine/whole_tensor.py",
        "patching/boundary.py",
        "patching/controls.py",
        "patching/likeness.py",
        "patching/memory.py",
        "patching/residency.py",
        "patching/ring.py",
        "patching/steps.py",
        "patching/weights.py",
        "transport/patches.py",
        "transport/skeleton.py",
        "workers/environment.py",
        "workers/joining.py",
    },
    "xfuser": set(),
    "diffusers": set(),
    "transformers": set(),
    "yunchang": set(),
    "torch.distributed": {
        "engine/collectives.py",
        "engine/groups.py",
        "engine/link_probe.py",
        "engine/placing.py",
        "engine/residuals.py",
        "engine/ring.py",
        "engine/sequence.py",
        "engine/tensor_blocks.py",
        "engine/ulysses.py",
        "engine/weight_sharding.py",
        "engine/rank_tokens.py",
        "engine/patch_attention.py",
        "engine/stage.py",
    },
    "torch": {
        "check/machine.py",
        "check/model_file.py",
        "check/nodes_pack/__init__.py",
        "engine/answering.py",
        "engine/attention.py",
        "engine/calibration.py",
        "engine/calls.py",
        "engine/busy.py",
        "engine/collectives.py",
        "engine/control.py",
        "engine/driven.py",
        "engine/engine.py",
        "engine/first_exchange.py",
        "engine/flat_layout.py",
        "engine/flux.py",
        "engine/groups.py",
        "engine/link_probe.py",
        "engine/loading.py",
        "engine/lse.py",
        "engine/masks.py",
        "engine/overlay.py",
        "engine/patches.py",
        "engine/pixel_space.py",
        "engine/prescribed.py",
        "engine/probe.py",
        "engine/sharded_sequence.py",
        "engine/placing.py",
        "engine/resident.py",
        "engine/residents.py",
        "engine/residuals.py",
        "engine/ring.py",
        "engine/room.py",
        "engine/rows.py",
        "engine/sequence.py",
        "engine/tensor_blocks.py",
        "engine/token_order.py",
        "engine/ulysses.py",
        "engine/weight_sharding.py",
        "engine/whole_tensor.py",
        "engine/rank_tokens.py",
        "patching/auto.py",
        "engine/kept_keys.py",
        "engine/patch_attention.py",
        "engine/pipelined_sequence.py",
        "engine/stage.py",
        "engine/staged_blocks.py",
        "patching/carried.py",
        "patching/controls.py",
        "patching/deferred.py",
        "patching/driven.py",
        "patching/driven_step.py",
        "patching/holding.py",
        "patching/host.py",
        "patching/models.py",
        "patching/outer_calls.py",
        "patching/step.py",
        "patching/remote.py",
        "patching/remote_control.py",
        "patching/remote_tokens.py",
        "patching/residency.py",
        "patching/steps.py",
        "patching/tensor.py",
        "patching/weights.py",
        "patching/wrappers.py",
        "planning/arguments.py",
        "planning/topology.py",
        "planning/workload.py",
        "transport/fingerprint.py",
        "transport/packs.py",
        "transport/places.py",
        "transport/patches.py",
        "transport/skeleton.py",
        "transport/slices.py",
        "transport/slot.py",
        "transport/slot_map.py",
        "transport/slots.py",
        "transport/tensors.py",
        "transport/torch_settings.py",
        "transport/values.py",
        "workers/joining.py",
        "workers/nursery.py",
    },
}
# Of those, the files that may do so inside functions only.
ONLY_IN_FUNCTIONS = {
    "comfy": IMPORTERS["comfy"],
    "torch": {
        "check/machine.py",
        "check/model_file.py",
        "check/nodes_pack/__init__.py",
        "patching/wrappers.py",
        "planning/arguments.py",
        "planning/topology.py",
        "planning/workload.py",
        "workers/joining.py",
    },
}
# Outside of ``engine`` and ``patching``, the files that need torch at their import.
HOLDS_TENSORS = {
    f"transport/{name}.py"
    for name in (
        "fingerprint",
        "functions",
        "packs",
        "places",
        "patches",
        "skeleton",
        "slices",
        "slot",
        "slot_map",
        "slots",
        "tensors",
        "torch_settings",
        "values",
    )
}
# Modules of ComfyUI besides ``comfy.*``: none is imported.
NEVER = ("nodes", "server", "execution", "folder_paths", "app")

READS_ENVIRONMENT = {
    "check/server.py",  # ComfyUI gets the user's variables, but for ours
    "bootstrap.py",  # before settings.py may be imported
    "observability/doctor.py",  # shows the variables as the user set them
    "settings.py",
    "workers/environment.py",
    "workers/nursery.py",  # becomes a rank: takes over its variables
}

# Which parts of the package a part may import, wherever in its files. "root" is every module that
# is not in a folder, but for those named here.
MAY_IMPORT = {
    "errors": set(),
    "attributes": set(),
    "blame": set(),
    "strategy": set(),
    "variables": {"strategy"},
    "settings": {"errors", "strategy", "variables"},
    "system_memory": set(),
    "marks": set(),
    "bootstrap": {"activation", "marks"},
    "planning": {
        *("blame", "errors", "settings", "strategy", "system_memory", "variables", "planning"),
    },
    "transport": {"blame", "errors", "system_memory", "transport"},
    "observability": {
        *("errors", "settings", "strategy", "variables", "planning", "observability"),
    },
    "check": {"errors", "settings", "planning", "observability", "check"},
    "engine": {"attributes", "blame", "errors", "planning", "transport", "engine"},
    "workers": {"errors", "settings", "marks", "planning", "transport", "engine", "workers"},
    "patching": {
        *("attributes", "blame", "errors", "settings", "strategy", "planning", "transport"),
        *("workers", "observability", "patching"),
    },
    "activation": {
        *("marks", "errors", "settings", "planning", "workers", "observability", "patching")
    },
    "__main__": {"check", "errors", "observability"},
    "__init__": set(),
}


@dataclass(frozen=True)
class Import:
    """One imported module, and whether the import runs when its file is imported."""

    file: str
    module: str
    at_module_scope: bool


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imports_of(path: Path) -> Iterator[Import]:
    """Walk a file. Imports for type checkers do not run and are left out."""

    def walk(node: ast.AST, at_module_scope: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            inner = at_module_scope
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                inner = False
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(name_of(path), alias.name, at_module_scope)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{name_of(path)}: relative import"
                for alias in child.names:  # ``from a import b``: b may be a module
                    yield Import(name_of(path), f"{child.module}.{alias.name}", at_module_scope)
            yield from walk(child, inner)

    yield from walk(ast.parse(path.read_text()), True)


IMPORTS = [found for path in files() for found in imports_of(path)]


def is_of(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


@pytest.mark.parametrize("package", IMPORTERS)
def test_these_packages_are_imported_by_these_files_and_no_others(package):
    assert {i.file for i in IMPORTS if is_of(i.module, package)} == IMPORTERS[package]


@pytest.mark.parametrize("package", ONLY_IN_FUNCTIONS)
def test_these_files_import_them_inside_functions_only(package):
    found = {i.file for i in IMPORTS if is_of(i.module, package) and i.at_module_scope}
    assert not found & ONLY_IN_FUNCTIONS[package]


@pytest.mark.parametrize("module", NEVER)
def test_other_modules_of_comfyui_are_never_imported(module):
    assert [i.file for i in IMPORTS if is_of(i.module, module)] == []


def test_the_bootstrap_imports_the_standard_library_and_names_only():
    at_start = [i.module for i in IMPORTS if i.file == "bootstrap.py" and i.at_module_scope]
    assert at_start
    others = {m for m in at_start if m.partition(".")[0] not in sys.stdlib_module_names}
    assert others == {f"{OWN}.marks.SETS", f"{OWN}.marks.WORKER_MARK"}
    assert [i for i in IMPORTS if i.file == "marks.py"] == []


def part_of(module: str) -> str:
    """``comfy_xdit_patch.planning.plan.Workload`` -> ``planning``."""
    parts = module.split(".")
    if len(parts) == 1 or not ((PACKAGE / parts[1]).is_dir() or is_module(parts[1])):
        return "__init__"
    return parts[1]


def is_module(name: str) -> bool:
    return (PACKAGE / f"{name}.py").is_file()


def test_parts_of_the_package_import_in_one_direction():
    wrong = []
    for found in IMPORTS:
        if is_of(found.module, OWN):
            importer = found.file.split("/")[0].removesuffix(".py")
            imported = part_of(found.module)
            if imported not in {*MAY_IMPORT[importer], "__init__"}:
                wrong.append(f"{found.file} imports {found.module}")
    assert wrong == []


def test_every_part_of_the_package_has_a_row_in_the_table():
    parts = {name_of(path).split("/")[0].removesuffix(".py") for path in files()}
    assert parts == set(MAY_IMPORT)


def test_settings_are_read_in_one_place():
    found = set()
    for path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv"):
                found.add(name_of(path))
            if isinstance(node, ast.ImportFrom) and node.module == "os":
                found.add(name_of(path))
    assert found == READS_ENVIRONMENT


def test_what_needs_no_torch_is_imported_without_it():
    """In a bare Python without site-packages, where torch and wrapt do not exist."""
    modules = [
        f"{OWN}.{name_of(path).removesuffix('.py').replace('/', '.')}"
        for path in files()
        if not name_of(path).startswith(("patching/", "engine/", "activation", "__main__"))
        and name_of(path) not in HOLDS_TENSORS
    ]
    assert len(modules) > 15
    code = f"import sys, importlib; sys.path.insert(0, {str(REPO)!r})\n"
    code += f"for name in {modules!r}: importlib.import_module(name)"
    command = [sys.executable, "-I", "-S", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_no_file_has_two_subjects():
    lines = {name_of(path): len(path.read_text().splitlines()) for path in files()}
    too_long = {name: number for name, number in lines.items() if number > MAX_LINES}
    assert too_long == {}, f"lines; 200 is the wish, {MAX_LINES} the limit"


def test_a_file_says_what_it_does_and_where_it_runs():
    headers = {path: ast.get_docstring(ast.parse(path.read_text())) or "" for path in files()}
    assert len(headers) > 100
    silent = [
        name_of(path)
        for path, header in headers.items()
        if not header.partition("\n")[0].endswith((".", "``", "?"))
        or ("Runs in: " not in header and (path.name != "__init__.py" or path.parent == PACKAGE))
    ]
    assert silent == []
