"""The hook at interpreter start, in a bare Python, with module trees on disk.

Each test runs ``python -I -S``: no site-packages, so nothing but the standard library can be used.
What ``bootstrap`` would hand over to is replaced by a recorder.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from comfy_xdit_patch.marks import (
    CONTROL_MODULES,
    DECODE_MODULES,
    EXECUTION_MODULES,
    SAMPLING_MODULES,
    SERVER_MODULES,
    WORKER_MARK,
)

REPO = Path(__file__).resolve().parents[2]
START_FILES = REPO / "comfy_xdit_patch" / "start"
SAMPLING = sorted(SAMPLING_MODULES)

PRELUDE = """
import json, sys, types
sys.path[:0] = [{tree!r}, {repo!r}]
calls = []
recorder = types.ModuleType("comfy_xdit_patch.host.guest.activation")
recorder.modules_ready = lambda names, root: calls.append([sorted(names), root])
sys.modules[recorder.__name__] = recorder
def import_all(*names):
    for name in names:
        __import__(name)
def finders():
    return [f for f in sys.meta_path if type(f).__module__ == "comfy_xdit_patch.bootstrap"]
def show(value):
    print(json.dumps(value))
"""


@pytest.fixture
def comfyui(tmp_path):
    """Return a directory that looks like ComfyUI where it matters."""
    return write_tree(tmp_path / "ComfyUI", [*SAMPLING, "server"], is_comfyui=True)


def write_tree(root, modules, *, is_comfyui):
    marks = ["execution.py", "nodes.py", "comfy/model_patcher.py"] if is_comfyui else []
    for file in [*marks, *(name.replace(".", "/") + ".py" for name in modules)]:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("VALUE = __name__\n")
    for folder in {path.parent for path in root.rglob("*.py")} - {root}:
        (folder / "__init__.py").touch()
    return root


def run_bare(tree, code, **environ):
    """Run code in a bare Python; return what it showed, and its standard error."""
    prelude = PRELUDE.format(tree=str(tree), repo=str(REPO))
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", prelude + code],
        capture_output=True,
        text=True,
        env=environ,
        timeout=20,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_sampling_and_server_are_reported_apart_and_once_each(comfyui):
    code = f"import comfy_xdit_patch.bootstrap; import_all('server', *{SAMPLING}); show(calls)"
    calls, stderr = run_bare(comfyui, code)
    assert calls == [[["server"], str(comfyui)], [SAMPLING, str(comfyui)]]
    assert stderr == ""


def test_nothing_happens_before_the_last_module_is_there(comfyui):
    code = f"""
import comfy_xdit_patch.bootstrap
import_all(*{SAMPLING[:-1]})
before = list(calls)
import_all({SAMPLING[-1]!r})
show([len(before), len(calls)])
"""
    assert run_bare(comfyui, code)[0] == [0, 1]


def test_each_module_is_complete_when_the_hook_hands_over(comfyui):
    code = """
import comfy_xdit_patch.bootstrap
recorder.modules_ready = lambda names, root: calls.append(sys.modules["server"].VALUE)
import server
show(calls)
"""
    assert run_bare(comfyui, code)[0] == ["server"]


def test_other_modules_of_the_same_names_are_not_taken_for_comfyui(tmp_path):
    tree = write_tree(tmp_path / "other", [*SAMPLING, "server"], is_comfyui=False)
    code = f"""
import comfy_xdit_patch.bootstrap
import_all('server', *{SAMPLING})
show([calls, sys.modules['server'].VALUE, sys.modules['comfy.sd'].VALUE])
"""
    assert run_bare(tree, code) == ([[], "server", "comfy.sd"], "")


def test_a_package_named_server_is_not_taken_for_comfyui(comfyui):
    (comfyui / "server").mkdir()
    (comfyui / "server" / "__init__.py").touch()
    code = "import comfy_xdit_patch.bootstrap; import server; show(calls)"
    assert run_bare(comfyui, code)[0] == []


def test_a_missing_module_is_missing_as_without_us(tmp_path):
    code = """
import comfy_xdit_patch.bootstrap
try:
    import server
except ModuleNotFoundError as error:
    show([error.name, calls])
"""
    assert run_bare(tmp_path, code)[0] == ["server", []]


def test_an_exception_in_comfyuis_own_module_stays_what_it_is(comfyui):
    (comfyui / "server.py").write_text("raise RuntimeError('port in use')\n")
    code = """
import comfy_xdit_patch.bootstrap
try:
    import server
except RuntimeError as error:
    show([str(error), calls, 'server' in sys.modules])
"""
    assert run_bare(comfyui, code)[0] == ["port in use", [], False]


def test_looking_for_a_module_without_importing_it_does_not_make_the_hook_deaf(comfyui):
    code = """
import comfy_xdit_patch.bootstrap
import importlib.util
found = importlib.util.find_spec("server") is not None
import server
show([found, len(calls)])
"""
    assert run_bare(comfyui, code)[0] == [True, 1]


def test_loader_and_spec_of_a_watched_module_are_those_of_an_unwatched_one(comfyui):
    code = """
import comfy_xdit_patch.bootstrap
import nodes, server
def seen(module):
    spec = module.__spec__
    return [
        type(module.__loader__).__name__, spec.loader is module.__loader__, spec.name,
        module.__file__ == spec.origin, spec.has_location, sorted(vars(module.__loader__)),
        sorted(set(vars(module))),
    ]
show([seen(nodes), seen(server), len(calls)])
"""
    (unwatched, watched, num_calls), _ = run_bare(comfyui, code)
    assert num_calls == 1
    assert watched == [*unwatched[:2], "server", *unwatched[3:]]


def test_a_loader_of_somebody_elses_finder_is_used_and_given_back(comfyui):
    code = """
import comfy_xdit_patch.bootstrap
from importlib.machinery import PathFinder, SourceFileLoader
class TheirLoader(SourceFileLoader):
    def exec_module(self, module):
        super().exec_module(module)
        module.theirs = True
class TheirFinder:
    def find_spec(self, name, path=None, target=None):
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and name == "server":
            spec.loader = TheirLoader(name, spec.origin)
        return spec
sys.meta_path.insert(0 if before else 1, TheirFinder())
import server
show([server.theirs, type(server.__loader__).__name__, 'exec_module' in vars(server.__loader__)])
"""
    after_us, _ = run_bare(comfyui, "before = False\n" + code)
    before_us, _ = run_bare(comfyui, "before = True\n" + code)
    assert after_us == before_us == [True, "TheirLoader", False]


def test_start_files_executed_twice_register_one_hook(comfyui):
    pth = (START_FILES / "comfy_xdit_patch.pth").read_text()
    module, function = (START_FILES / "comfy_xdit_patch.start").read_text().strip().split(":")
    code = f"""
for _ in range(2):
    exec({pth!r})
    getattr(__import__({module!r}, fromlist=["x"]), {function!r})()
import server
show([len(finders()), len(calls)])
"""
    assert run_bare(comfyui, code)[0] == [1, 1]


@pytest.mark.parametrize(
    "environ",
    [
        {"XDIT_STRATEGY": "off"},
        {"XDIT_STRATEGY": " OFF "},
        {"XDIT_GPUS": "0"},
        {WORKER_MARK: "1"},
    ],
)
def test_no_hook_is_registered_when_switched_off_or_in_a_worker(comfyui, environ):
    code = "import comfy_xdit_patch.bootstrap, server; show([len(finders()), len(calls)])"
    assert run_bare(comfyui, code, **environ)[0] == [0, 0]
    assert run_bare(comfyui, code, XDIT_GPUS="1")[0] == [1, 1]


def test_a_bad_setting_is_no_fault_at_interpreter_start(comfyui):
    code = "import comfy_xdit_patch.bootstrap, server; show(len(calls))"
    assert run_bare(comfyui, code, XDIT_GPUS="seven", XDIT_STRATEGY="?") == (1, "")


@pytest.mark.parametrize("fault", ["RuntimeError('planted')", "ImportError('planted')"])
def test_a_fault_of_ours_is_logged_and_comfyuis_import_goes_on(comfyui, fault):
    code = f"""
import comfy_xdit_patch.bootstrap
def broken(names, root):
    raise {fault}
recorder.modules_ready = broken
import server
show(server.VALUE)
"""
    value, stderr = run_bare(comfyui, code)
    assert value == "server"
    assert "ComfyUI goes on alone" in stderr
    assert "planted" in stderr


def test_start_does_not_raise_even_if_the_import_system_is_not_the_usual_one(comfyui):
    code = """
import os
import comfy_xdit_patch.bootstrap as bootstrap
del os.environ["XDIT_STRATEGY"]
sys.meta_path = tuple(sys.meta_path)
bootstrap.start()
show(len(finders()))
"""
    assert run_bare(comfyui, code, XDIT_STRATEGY="off") == (0, "")


def test_a_python_without_comfyui_loads_three_modules_of_ours_and_nothing_else():
    """The cost at every interpreter start: ``typing`` and what it imports are several ms."""
    code = f"""
import os, sys  # site, which runs the .pth file, has imported these
sys.path.insert(0, {str(REPO)!r})
before = set(sys.modules) | {{"__future__"}}
import comfy_xdit_patch.bootstrap
print(*sorted(set(sys.modules) - before))
"""
    command = [sys.executable, "-I", "-S", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env={}, timeout=20)
    assert done.stdout.split() == [
        "comfy_xdit_patch",
        "comfy_xdit_patch.bootstrap",
        "comfy_xdit_patch.marks",
    ], done.stderr


def test_the_hook_waits_for_exactly_the_modules_of_the_patch_points():
    from comfy_xdit_patch.host.guest.points import (
        control_points,
        decode_points,
        execution_points,
        sampling_points,
        server_points,
    )

    class Any:
        def __getattr__(self, name):
            return lambda *_: None

    assert {point.module for point in sampling_points(Any())} == SAMPLING_MODULES
    assert {point.module for point in control_points(Any())} == CONTROL_MODULES
    assert {point.module for point in decode_points(Any())} == DECODE_MODULES
    assert {point.module for point in execution_points(Any())} == EXECUTION_MODULES
    assert {point.module for point in server_points(lambda *_: None)} == SERVER_MODULES
