"""Who may import what. Not tidiness: each row keeps a process working.

The bootstrap runs in every Python process. torch imported before ComfyUI makes ComfyUI warn and
lose its allocator choice. xfuser and diffusers take seconds to import, in every rank, and nothing
of theirs is needed. A worker that imported ``host`` would patch the ComfyUI that it computes with.
"""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from comfy_xdit_patch.report.status import Totals

REPO = Path(__file__).resolve().parents[2]
PACKAGE = REPO / "comfy_xdit_patch"
OWN = "comfy_xdit_patch"
MAX_LINES = 400

# Who imports them, at module scope and inside functions. Equality: a row that is too wide is wrong.
IMPORTERS = {
    "wrapt": {"host/guest/patchset.py"},
    "prometheus_client": {"report/metrics.py"},
    "comfy": {
        "host/boundary.py",
        "host/call.py",
        "host/decode/decoder.py",
        "host/guest/activation.py",
        "host/pool/inheritance.py",
        "host/reading/limits.py",
        "host/reading/weight_states.py",
        "host/weights/likeness.py",
        "host/weights/one_owner.py",
        "host/weights/residency.py",
        "wire/casts.py",
        "wire/skeleton.py",
        "wire/slots.py",
        "wire/weight_patches.py",
        "worker/attention/prescribed.py",
        "worker/decode/decoders.py",
        "worker/decode/lines.py",
        "worker/joining.py",
        "worker/shard/compiled_blocks.py",
        "worker/shard/quantised.py",
        "worker/weights/loading.py",
        "worker/weights/overlay.py",
        "worker/weights/placing.py",
        "worker/weights/resident.py",
        "worker/weights/residents.py",
    },
    "xfuser": set(),
    "diffusers": set(),
    "transformers": set(),
    "yunchang": set(),
    "torch.distributed": {
        "worker/attention/local_heads.py",
        "worker/attention/ring.py",
        "worker/attention/ulysses.py",
        "worker/pipefusion/attention.py",
        "worker/pipefusion/stage.py",
        "worker/ranks/collectives.py",
        "worker/ranks/groups.py",
        "worker/shard/rank_tokens.py",
        "worker/shard/residuals.py",
        "worker/weights/placing.py",
        "worker/weights/sharded_blocks.py",
        "worker/weights/shared_modulation.py",
        "worker/weights/tensor_blocks.py",
    },
    "torch": {
        "check/machine.py",
        "check/model_file.py",
        "check/nodes_pack/__init__.py",
        "hardware/devices.py",
        "host/call.py",
        "host/decode/decoder.py",
        "host/decode/decoding.py",
        "host/decode/tiles.py",
        "host/guest/host.py",
        "host/guest/outer_calls.py",
        "host/guest/wrappers.py",
        "host/pace/auto.py",
        "host/reading/arguments.py",
        "host/reading/limits.py",
        "host/reading/models.py",
        "host/reading/node_patches.py",
        "host/reading/weight_states.py",
        "host/step/block_calls.py",
        "host/step/controlnets.py",
        "host/step/lazy_tensor.py",
        "host/step/outcome.py",
        "host/step/residuals_there.py",
        "host/step/step.py",
        "host/step/tokens_there.py",
        "host/step/whole_call.py",
        "host/weights/residency.py",
        "planning/workload.py",
        "wire/casts.py",
        "wire/fingerprint.py",
        "wire/packs.py",
        "wire/recipes.py",
        "wire/registered.py",
        "wire/skeleton.py",
        "wire/slot.py",
        "wire/slots.py",
        "wire/tensors.py",
        "wire/torch_settings.py",
        "wire/values.py",
        "wire/weight_patches.py",
        "worker/answering.py",
        "worker/attention/attention.py",
        "worker/attention/local_heads.py",
        "worker/attention/lse.py",
        "worker/attention/masks.py",
        "worker/attention/prescribed.py",
        "worker/attention/ring.py",
        "worker/attention/transfer_dtypes.py",
        "worker/attention/ulysses.py",
        "worker/calls.py",
        "worker/decode/decoders.py",
        "worker/decode/lines.py",
        "worker/engine.py",
        "worker/forward.py",
        "worker/joining.py",
        "worker/nursery.py",
        "worker/pipefusion/attention.py",
        "worker/pipefusion/kept_keys.py",
        "worker/pipefusion/sequence.py",
        "worker/pipefusion/stage.py",
        "worker/ranks/collectives.py",
        "worker/ranks/first_exchange.py",
        "worker/ranks/groups.py",
        "worker/ranks/mailboxes.py",
        "worker/room.py",
        "worker/shard/blocks.py",
        "worker/shard/captured_forwards.py",
        "worker/shard/compiled_blocks.py",
        "worker/shard/controlnet.py",
        "worker/shard/node_patches.py",
        "worker/shard/later_columns.py",
        "worker/shard/pixel_space.py",
        "worker/shard/quantised.py",
        "worker/shard/rank_tokens.py",
        "worker/shard/residuals.py",
        "worker/shard/sequence.py",
        "worker/weights/flat_layout.py",
        "worker/weights/loading.py",
        "worker/weights/overlay.py",
        "worker/weights/placing.py",
        "worker/weights/resident.py",
        "worker/weights/residents.py",
        "worker/weights/sharded_blocks.py",
        "worker/weights/shared_modulation.py",
        "worker/weights/stage_blocks.py",
        "worker/weights/tensor_blocks.py",
    },
}
# Of those, the files that may do so inside functions only.
ONLY_IN_FUNCTIONS = {
    "comfy": IMPORTERS["comfy"],
    "prometheus_client": IMPORTERS["prometheus_client"],
    "torch": {
        "check/machine.py",
        "check/model_file.py",
        "check/nodes_pack/__init__.py",
        "hardware/devices.py",
        "host/guest/wrappers.py",
        "host/reading/arguments.py",
        "planning/workload.py",
        "worker/joining.py",
    },
}
# Outside of ``host`` and ``worker``, the files that need torch at their import.
HOLDS_TENSORS = {
    f"wire/{name}.py"
    for name in (
        *(
            "casts",
            "fingerprint",
            "functions",
            "packs",
            "recipes",
            "registered",
            "skeleton",
            "slot",
            "slots",
            "tensors",
        ),
        *("torch_settings", "values", "weight_patches"),
    )
}
# Modules of ComfyUI besides ``comfy.*``: none is imported.
NEVER = ("nodes", "server", "execution", "folder_paths", "app")

READS_ENVIRONMENT = {
    "check/server.py",  # ComfyUI gets the user's variables, but for ours
    "bootstrap.py",  # before settings.py may be imported
    "report/doctor.py",  # shows the variables as the user set them
    "settings.py",
    "host/pool/inheritance.py",
    "worker/nursery.py",  # becomes a rank: takes over its variables
}

# Rooms from the top of the house to its ground: a file imports from its own room and from rooms
# below. A room is a folder, or a file of the package that lies in none.
HOUSE = (
    *("bootstrap", "__main__", "check"),
    *(
        "host/guest",
        "host/decode",
        "host/step",
        "host/weights",
        "host/pace",
        "host/pool",
        "host",
        "host/reading",
    ),
    *(
        "worker",
        "worker/decode",
        "worker/pipefusion",
        "worker/weights",
        "worker/shard",
        "worker/attention",
    ),
    "worker/ranks",
    *("report", "hardware", "settings", "variables"),
    *("planning/cost", "planning", "wire", "wire/messages"),
    *("system_memory", "blame", "errors", "marks", "__init__"),
)
# What runs in ComfyUI's process and what runs in a rank meet in messages. Neither believes the
# model of cost: what they decide by is measured.
WALLS = (
    *(("host", "worker"), ("worker", "host"), ("wire", "hardware"), ("planning", "wire")),
    *(("host", "planning/cost"), ("worker", "planning/cost"), ("hardware", "planning/cost")),
)


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


def room_of(file: str) -> str:
    """``host/step/step.py`` -> ``host/step``; ``errors.py`` -> ``errors``."""
    folder, _, name = file.rpartition("/")
    return folder or name.removesuffix(".py")


def file_of(module: str) -> str:
    """``comfy_xdit_patch.planning.plan.Workload`` -> ``planning/plan.py``."""
    parts = module.split(".")[1:]
    for length in range(len(parts), 0, -1):
        path = "/".join(parts[:length])
        if (PACKAGE / f"{path}.py").is_file():
            return f"{path}.py"
        if (PACKAGE / path).is_dir():
            return f"{path}/__init__.py"
    return "__init__.py"


def arrows() -> dict[tuple[str, str], list[str]]:
    """Imports from one room into another, by the two rooms."""
    found: dict[tuple[str, str], list[str]] = {}
    for one in IMPORTS:
        if is_of(one.module, OWN):
            rooms = room_of(one.file), room_of(file_of(one.module))
            if rooms[0] != rooms[1]:
                found.setdefault(rooms, []).append(f"{one.file} imports {one.module}")
    return found


def test_rooms_import_downwards_and_no_process_imports_the_other(capsys):
    """``-s`` shows all arrows between rooms."""
    heights = {room: -index for index, room in enumerate(HOUSE)}
    found = arrows()
    for (above, below), imports in sorted(found.items()):
        print(f"{above:18} -> {below:18} {len(imports)}")  # noqa: T201
    print(f"{len(found)} arrows between {len(HOUSE)} rooms")  # noqa: T201
    upwards = [imports for (a, b), imports in found.items() if heights[a] < heights[b]]
    through_walls = [
        imports
        for (a, b), imports in found.items()
        for one, other in WALLS
        if f"{a}/".startswith(f"{one}/") and f"{b}/".startswith(f"{other}/")
    ]
    assert upwards == []
    assert through_walls == []


def test_every_room_has_its_place_in_the_house():
    assert {room_of(name_of(path)) for path in files()} <= {*HOUSE, "check/nodes_pack"}


def test_files_import_each_other_in_no_circle():
    imported: dict[str, set[str]] = {name_of(path): set() for path in files()}
    for one in IMPORTS:
        if is_of(one.module, OWN):
            imported[one.file].add(file_of(one.module))
    done: set[str] = set()

    def walk(file: str, on_the_way: tuple[str, ...]) -> None:
        assert file not in on_the_way, f"a circle: {' -> '.join((*on_the_way, file))}"
        if file not in done:
            for other in sorted(imported[file] - {file}):
                walk(other, (*on_the_way, file))
            done.add(file)

    for file in imported:
        walk(file, ())


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
        if not name_of(path).startswith(("host/", "worker/", "__main__"))
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


def test_nothing_in_the_host_decides_by_what_it_counted_for_people():
    """Attributes of ``Totals`` are written to; the status page asks its methods."""
    attributes = {item.name for item in dataclasses.fields(Totals)}
    reads = []
    for path in sorted((PACKAGE / "host").rglob("*.py")):
        tree = ast.parse(path.read_text())
        parents = {id(c): node for node in ast.walk(tree) for c in ast.iter_child_nodes(node)}
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Attribute) and node.attr in attributes):
                continue
            owner = getattr(node.value, "attr", getattr(node.value, "id", ""))
            above = parents[id(node)]
            is_written = isinstance(node.ctx, ast.Store) or (
                isinstance(above, ast.Subscript) and isinstance(above.ctx, ast.Store)
            )
            if owner.strip("_") == "totals" and not is_written:
                reads.append(f"{path.name}:{node.lineno} reads {node.attr}")
    assert reads == []
