"""The glossary is law: no name of the package says what its right column forbids.

Names are those of modules, classes, functions, parameters, attributes and variables. Comments and
texts are not looked at: most of these words are good English.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
PACKAGE = REPO / "comfy_xdit_patch"
GLOSSARY = REPO / "docs" / "glossary.md"

# Words that also mean something else: forbidden where a name has one of these beside it. Whether a
# shard is one of weights no name tells.
BESIDE: dict[str, set[str]] = {
    "id": {"rank", "worker"},
    "index": {"rank", "worker"},
    "dim": {"axis", "ulysses", "ring", "pipefusion"},
    "size": {"degree", "ulysses", "ring", "pipefusion"},
    "cache": {"window"},
    "prompt": {"run"},
    "shard": set(),
}

# Names that break the law, by the reason why they may.
EXCEPTIONS = {
    "the number of a message that is answered, and what brings it": {
        "request",
        "requests",
        "_request",
        "REQUEST_DEADLINE_S",
    },
    "Python's own": {"__main__", "main", "_STORE_GLOBAL"},
    "ComfyUI's configuration of a model, and its option --use-split-cross-attention": {
        "config",
        "unet_config",
        "_CONFIG_OMITS",
        "split",
        "SPLIT",
    },
    "torch's buffers of a module": {"buffer"},
    "NVIDIA's driver": {"driver", "driver_version"},
    "not the opposite of a shard: a card that has no more room": {"CardsFullError"},
    "what the model of cost is asked about; named in too many places": {
        "Job",
        "job",
        "_job",
    },
    "of the model of cost: joining a ring's parts, a tensor of all tokens, weights cut twice": {
        "MERGE_BYTES",
        "merged",
        "is_split_already",
    },
    "where a model's weights lie; to be named residency": {"Placement", "placement"},
}


def forbidden() -> dict[str, str]:
    """What the glossary says not to say, each with the term to say instead."""
    found = {}
    is_law = False
    for line in GLOSSARY.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            is_law = False
        elif cells[-1] == "do not say":
            is_law = True
        elif is_law and len(cells) == 3 and not line.startswith("|--"):
            words = re.sub(r"\([^)]*\)", "", cells[2])
            found |= {word.strip(): cells[0] for word in words.split(",")}
    return found


def names(path: Path) -> Iterator[tuple[str, int]]:
    """Every name that a file makes, with its line."""
    yield path.stem, 1
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno


def is_said(word: str, name: str) -> bool:
    """Whether a name says a word, in any of its forms."""
    parts = [part.lower() for part in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]
    if word in BESIDE and not BESIDE[word] & set(parts):
        return False
    said = word.replace("_", " ")
    return re.search(rf"(?<!\w){said}(s|es|d|ed|ing)?(?!\w)", " ".join(parts)) is not None


@cache
def broken() -> dict[str, str]:
    """Names that say what is forbidden, each with a place of it and the term to say instead."""
    places = {
        name: f"{path.relative_to(PACKAGE)}:{line}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for name, line in names(path)
    }
    return {
        name: f"{place}: {name} says {word!r}; say {term!r}"
        for word, term in forbidden().items()
        for name, place in places.items()
        if is_said(word, name)
    }


def test_words_are_read_from_the_glossary():
    words = forbidden()
    assert len(words) >= 40
    assert words["job"] in ("call", "run")
    assert words["slave"] == "worker"


def test_a_word_is_heard_in_every_form_and_in_no_other_word():
    assert is_said("slice", "sliced")
    assert is_said("job", "JobTable")
    assert is_said("n_gpus", "max_n_gpus")
    assert is_said("fork server", "ForkServer")
    assert is_said("index", "rank_index")
    assert not is_said("index", "tensor_index")
    assert not is_said("comm", "command")
    assert not is_said("main", "remaining")


def test_no_name_says_what_the_glossary_forbids():
    excepted = set().union(*EXCEPTIONS.values())
    assert [place for name, place in broken().items() if name not in excepted] == []


def test_every_exception_is_needed():
    assert sorted(set().union(*EXCEPTIONS.values()) - broken().keys()) == []


def test_words_that_also_mean_something_else_are_the_glossarys():
    assert set(BESIDE) <= forbidden().keys()
