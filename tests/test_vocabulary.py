"""Retired words, read from the sources: names, settings, help texts, docstrings and comments use the field's standard terms."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.sources import kept, parsed, source

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted([*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "launch").rglob("*.py")])

# Names that say nothing about what they hold, as a whole or as a part between underscores.
VAGUE = {"found", "told", "wanted", "words", "place", "asked", "given", "mine", "whole", "said", "thing", "things"}
RETIRED_NAMES = {
    "judge",
    "judged",
    "verdict",
    "picture",
    "pictures",
    "mend",
    "recipe",
    "lane",
    "lanes",
    "aside",
    "asides",
    "slope",
    "slopes",
}
RETIRED_CLASSES = {
    *("Telling", "Asked", "Told", "Peer", "Silent", "Lines", "Live", "Kept", "Clocked", "Lasting", "Attendant", "Ending"),
    *(
        "Vitals",
        "Portions",
        "Portion",
        "Judgement",
        "Judged",
        "Subject",
        "Whole",
        "Flat",
        "Partitioned",
        "StorageAway",
        "NotThere",
    ),
}
RETIRED_FUNCTIONS = {
    "hasty",
    "remember",
    "share_of",
    "lanes_of",
    "cause_of",
    "remedy",
    "illness",
    "undisturbed",
    "together",
    "summed",
}
# Words of prose: docstrings, comments, help texts, descriptions of settings.
RETIRED_PROSE = {
    r"judg(e|es|ed|ing|ement)": "evaluate, evaluator",
    r"pictures?": "image",
    r"mend(s|ed)?": "hint",
    r"recipes?": "method",
    r"lanes?": "stream",
    r"slopes?": "gradient",
    r"anew": "again",
    r"(no|some)body": "name the process or the user",
}
# Keys of settings by their last part; vocabulary of the first version.
RETIRED_KEYS = {
    *("recipe", "judge", "judge_from", "gram_from", "gram_refresh", "gram_refreshes", "koleo_group", "koleo_neighbours"),
    *("logit_rows", "chunk", "undecayed", "embed", "init_scale", "max_scale", "accumulation", "repel", "granularity", "targets"),
    *("hue", "timm", "positions", "position_resampling", "local_norm", "drop_path_mode", "lanes", "block", "damaged", "crc"),
    *("bad_budget", "bad_window", "grace", "part_mb", "trust", "lr_rule", "micro_batch", "global_batch", "zero", "recompute"),
    *("graphs", "max_nonfinite", "most_failures", "asynchronous", "copy_to", "hold_out", "pictures", "whole", "health"),
    *("lead", "after", "pass_on", "hang"),
}

# (file, word): why it stays.
ALLOWED = {
    ("pipeline/config/upgrade.py", "*"): "reads the settings of earlier versions by their names",
    ("pipeline/checkpoint/manifest_types.py", "judged"): "a key of manifests on disk",
    ("pipeline/data/inspect/stats.py", "pictures"): "a key of the report on disk",
    ("pipeline/models/captions.py", "picture"): "the name of a module in state dicts, and its argument",
    ("pipeline/tracking/mlflow_servers.py", "remember"): "stores a server's address; the retired function was a cache",
    ("pipeline/runtime/run_directory.py", "pictures"): "the name of a folder on disk",
    ("pipeline/methods/distill/method.py", "judge"): "the name of a module in the tensors of checkpoints",
    ("pipeline/methods/shared/two_views.py", "judge"): "as above, and the loss term of that module",
    ("pipeline/methods/byol/method.py", "judge"): "that loss term",
    ("pipeline/methods/dino/method.py", "judge"): "that loss term",
    ("pipeline/methods/lejepa/method.py", "judge"): "that loss term",
    ("pipeline/methods/mocov2/method.py", "judge"): "that loss term",
    ("pipeline/methods/mocov3/method.py", "judge"): "that loss term",
    ("pipeline/data/pack/synthetic.py", "slope"): "of a line, not of a loss",
}


@dataclass(frozen=True)
class Use:
    """A word in a file."""

    file: str
    line: int
    word: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.word} in {self.text!r}"

    @property
    def allowed(self) -> bool:
        return (self.file, "*") in ALLOWED or (self.file, self.word) in ALLOWED


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@kept
def definitions(path: Path) -> Iterator[tuple[str, int, str]]:
    """Names that a file binds: (kind, line, name)."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield "function", node.lineno, node.name
        elif isinstance(node, ast.ClassDef):
            yield "class", node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield "name", node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield "name", node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield "name", node.lineno, node.attr


@kept
def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Comments, docstrings, and all strings of more than one word, which include help texts and descriptions."""
    for token in tokenize.generate_tokens(io.StringIO(source(path)).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip():
            for number, line in enumerate(node.value.splitlines()):
                yield node.lineno + number, line


def report(uses: list[Use]) -> None:
    wrong = [use for use in uses if not use.allowed]
    assert not wrong, "\n".join(map(str, wrong))


def test_names_say_what_they_hold() -> None:
    uses = []
    for path in FILES:
        for kind, line, name in definitions(path):
            parts = {name.strip("_").lower()} if kind == "name" else {name.strip("_").lower(), *name.lower().split("_")}
            uses += [Use(shown(path), line, word, name) for word in parts & VAGUE]
    report(uses)


def test_names_use_the_standard_terms() -> None:
    uses = []
    for path in FILES:
        for kind, line, name in definitions(path):
            parts = set(re.findall(r"[a-z]+", re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()))
            uses += [Use(shown(path), line, word, name) for word in parts & RETIRED_NAMES]
            retired = RETIRED_CLASSES if kind == "class" else RETIRED_FUNCTIONS if kind == "function" else set()
            if name.strip("_") in retired:
                uses.append(Use(shown(path), line, name.strip("_"), name))
    report(uses)


@pytest.mark.parametrize("word", RETIRED_PROSE)
def test_prose_uses_the_standard_terms(word: str) -> None:
    pattern = re.compile(rf"\b{word}\b", re.IGNORECASE)
    report(
        [
            Use(shown(path), line, match[0].lower(), text.strip())
            for path in FILES
            for line, text in prose(path)
            if (match := pattern.search(text))
        ]
    )


def test_settings_use_the_standard_terms() -> None:
    from pipeline.config.load import schema

    keys = {key for method in ("dinov2", "clip") for key in schema(method)}
    assert len(keys) > 100
    assert not [key for key in sorted(keys) if RETIRED_KEYS & set(key.split(".")[-1:])]
    sections = {key.partition(".")[0] for key in keys}
    assert not sections & {"recipe", "health"}


def test_each_exception_is_needed() -> None:
    """An entry of the allow-list whose word is gone has to go, too."""
    for file, word in ALLOWED:
        path = ROOT / file
        names = {name for _, _, name in definitions(path)}
        assert word == "*" or any(word in name for name in names) or any(word in text for _, text in prose(path)), (file, word)
