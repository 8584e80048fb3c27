"""Pages made from code are current, and every text that a user can meet is explained.

Texts are collected from the source: the reason of every ``Refusal``, the message of every exception
of ours, every line that is logged, and what ``install.py`` says on stderr. Values in them are
wildcards.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

from comfy_xdit_patch import errors
from comfy_xdit_patch.report import troubleshooting

REPO = Path(__file__).resolve().parents[2]
PACKAGE = REPO / "comfy_xdit_patch"
DOCS = REPO / "docs"
TROUBLESHOOTING = DOCS / "troubleshooting.md"

EXCEPTIONS = {
    name for name, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, Exception)
}
LOG_LEVELS = ("info", "warning", "error", "exception")
# Functions that make a text which somebody else raises, logs or quotes.
TEXT_FUNCTIONS = (
    "_advice",
    "_check_tree",
    "death_text",
    "fault_of",
    "failure_text",
    "hang_text",
    "exit_text",
    "tail_of",
    "why_no_fork",
    "misfit",
)
VALUE = "\0"


@dataclass(frozen=True)
class Text:
    """One text of the package; ``VALUE`` stands for what is filled in."""

    place: str
    template: str
    is_refusal: bool
    lasts: str

    def explains(self, entry: str) -> bool:
        """Whether an entry of the page is this text."""
        parts = [re.escape(part) for part in self.template.split(VALUE)]
        return re.fullmatch(".+?".join(parts), entry) is not None


def templates(node: ast.expr | None) -> list[str]:
    """Every text that an expression of literals can be."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        return [
            "".join(str(v.value) if isinstance(v, ast.Constant) else VALUE for v in node.values)
        ]
    if isinstance(node, ast.IfExp):
        return [*templates(node.body), *templates(node.orelse)]
    if isinstance(node, ast.BoolOp):
        return [text for value in node.values for text in templates(value)]
    return []


def is_user_text(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    is_logged = isinstance(call.func, ast.Attribute) and call.func.attr in LOG_LEVELS
    return bool(call.args) and (
        name in ("Refusal", "self._fail")
        or name in EXCEPTIONS
        or (is_logged and "log" in name)
        or (name == "print" and "file" in [keyword.arg for keyword in call.keywords])
    )


def collect() -> list[Text]:
    found = []
    for path in (*sorted(PACKAGE.rglob("*.py")), REPO / "__init__.py", REPO / "install.py"):
        tree = ast.parse(path.read_text())
        expressions: list[tuple[ast.expr | None, bool, str]] = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and is_user_text(node):
                rest = " ".join(ast.unparse(arg) for arg in node.args[1:])
                lasts = "step" if "Scope.STEP" in rest else "run"
                expressions.append((node.args[0], ast.unparse(node.func) == "Refusal", lasts))
            if isinstance(node, ast.FunctionDef) and node.name in TEXT_FUNCTIONS:
                returns = [n.value for n in ast.walk(node) if isinstance(n, ast.Return)]
                expressions += [(value, False, "") for value in returns]
        for expression, is_refusal, lasts in expressions:
            for raw in templates(expression):
                text = re.sub(r"%(\.\d)?[sdfg]", VALUE, " ".join(raw.split()))
                if re.search(r"[a-z]{3}", text.replace("xDiT: ", "")):  # more than a frame
                    place = path.relative_to(REPO).as_posix()
                    found.append(Text(place, text, is_refusal, lasts))
    return found


TEXTS = collect()
ROWS = troubleshooting.rows()
ENTRIES = [entry for row in ROWS for entry in row.entries]


def rows_of(text: Text) -> list[troubleshooting.Row]:
    """The rows with an entry that is this text, word for word where there is such a one."""
    exact = [row for row in ROWS if text.template in map(as_template, row.entries)]
    return exact or [row for row in ROWS if any(map(text.explains, row.entries))]


def as_template(entry: str) -> str:
    return re.sub("<[^<>]+>", VALUE, entry)


@pytest.mark.parametrize("name", ["settings.md", "patch-points.md", "compatibility.md"])
def test_pages_made_from_code_are_there(name):
    assert "Made by docs/generate.py" in (DOCS / name).read_text()


def test_pages_made_from_code_are_what_the_code_says():
    command = [sys.executable, str(DOCS / "generate.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_texts_are_found_in_every_part_of_the_package():
    assert sum(text.is_refusal for text in TEXTS) >= 30
    assert len(TEXTS) >= 60
    parts = {part for text in TEXTS for part in text.place.split("/")}
    assert parts >= {"host", "planning", "settings.py", "wire", "worker", "install.py"}


def test_every_text_has_an_entry_in_one_row():
    misfits = [
        f"{text.place} can say {text.template.replace(VALUE, '<...>')!r}: {len(found)} rows"
        for text, found in ((text, rows_of(text)) for text in TEXTS)
        if len(found) != 1
    ]
    assert misfits == [], "docs/troubleshooting.md explains each text in one row"


def test_the_package_brings_the_page_and_finds_the_row_of_every_text_on_it():
    shipped = Path(troubleshooting.__file__).with_name(TROUBLESHOOTING.name)
    assert shipped.read_text() == TROUBLESHOOTING.read_text()
    said = [
        (row, as_template(entry).replace(VALUE, "a b")) for row in ROWS for entry in row.entries
    ]
    assert [text for row, text in said if troubleshooting.row_of(text) is not row] == []
    assert troubleshooting.remedy_of("nobody says this") is None
    assert "](" not in "".join(troubleshooting.remedy_of(entry) or "" for entry in ENTRIES)


def test_every_entry_is_a_text_of_the_package():
    assert len(ENTRIES) >= 200
    unknown = [entry for entry in ENTRIES if not any(text.explains(entry) for text in TEXTS)]
    assert unknown == [], "no text of the package is like these"
    assert [entry for entry in ENTRIES if ENTRIES.count(entry) > 1] == []


def test_every_row_has_a_cause_and_a_remedy():
    bare = [row.entries for row in ROWS if min(len(row.cause), len(row.remedy)) <= 3]
    assert bare == []
    assert [row.entries for row in ROWS if "as above" in (row.cause + row.remedy).lower()] == []


def test_texts_of_a_table_with_one_remedy_share_a_row():
    seen = [(row.section, row.lasts, row.remedy) for row in ROWS]
    assert [key for key in seen if seen.count(key) > 1] == []
    assert len(ROWS) <= 130, "the page is to be read, not only searched"


def test_an_entry_says_how_long_a_refusal_lasts():
    refusals = [
        (entry, row.lasts) for row in ROWS if row.lasts is not None for entry in row.entries
    ]
    lasts = [
        (entry, {text.lasts for text in TEXTS if text.is_refusal and text.explains(entry)})
        for entry, _ in refusals
    ]
    assert lasts == [(entry, {said}) for entry, said in refusals]
    assert len(refusals) >= 30


def test_every_reason_on_the_page_of_what_runs_in_parallel_is_a_text_of_the_package():
    sections = json.loads((DOCS / "compatibility.json").read_text())
    reasons = {
        reason
        for section in sections.values()
        for row in section.values()
        for runs in row["found"].values()
        for run in runs.values()
        for reason in (*run["reasons"], *run["gather_reasons"], *run["controls_alone"])
    }
    assert len(reasons) >= 10
    unknown = [reason for reason in reasons if not any(text.explains(reason) for text in TEXTS)]
    assert unknown == [], "no text of the package is like these: have the tests write the page"


def links() -> list[tuple[str, str]]:
    pages = [*DOCS.rglob("*.md"), REPO / "README.md", REPO / "CHANGELOG.md"]
    return [
        (page.relative_to(REPO).as_posix(), target)
        for page in pages
        if page.exists()
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    ]


def test_every_link_between_pages_leads_somewhere():
    broken = [
        (page, target)
        for page, target in links()
        if not (REPO / page).parent.joinpath(target).exists()
    ]
    assert len(links()) > 10
    assert broken == []


def named_files(page: Path) -> set[str]:
    """The files that a page names in code marks; those of the package with or without its name."""
    rooms = "|".join(sorted(path.name for path in PACKAGE.iterdir() if path.is_dir()))
    text = page.read_text()
    short = re.findall(rf"`((?:{rooms})/[\w/]+\.py)`", text)
    whole = re.findall(r"`((?:comfy_xdit_patch|tests|docs)/[\w./-]+)`", text)
    return {*whole, *(f"{PACKAGE.name}/{name}" for name in short)}


def test_every_file_that_the_docs_name_exists():
    named = {(page.name, name) for page in DOCS.rglob("*.md") for name in named_files(page)}
    assert len(named) > 100
    assert [pair for pair in named if not (REPO / pair[1]).exists()] == []


@pytest.mark.parametrize(
    "name", ["host/step/step.py", "host/step/call_plans.py", "worker/calls.py", "worker/forward.py"]
)
def test_the_page_on_one_step_names_every_file_that_a_step_enters(name):
    tree = ast.parse((PACKAGE / name).read_text())
    modules = [
        path
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE.name)
        for path in (
            f"{node.module}".replace(".", "/") + ".py",
            *(f"{node.module}.{alias.name}".replace(".", "/") + ".py" for alias in node.names),
        )
        if (REPO / path).exists()
    ]
    page = DOCS / "how-it-works.md"
    assert len(modules) > 5
    text = page.read_text()
    assert [path for path in modules if path.removeprefix(f"{PACKAGE.name}/") not in text] == []


def test_systemd_reads_the_unit_of_the_page_on_operating(tmp_path):
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed")
    page = (DOCS / "operating.md").read_text()
    unit = textwrap.dedent(page.split("<!-- unit -->")[1].split("<!-- /unit -->")[0])
    path = tmp_path / "comfyui.service"
    path.write_text(re.sub(r"(?<=ExecStart=)\S+", sys.executable, unit))
    done = subprocess.run([program, "verify", str(path)], capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if path.name in line]
    assert (done.returncode, said) == (0, []), done.stderr
