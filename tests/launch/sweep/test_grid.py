"""Members of a sweep: grids, ranges, lists, and what is neither."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.sweep.grid import MOST, members, read_list, values
from pipeline.errors import ConfigError


def test_a_grid_is_the_product_of_its_axes_and_its_last_key_changes_fastest() -> None:
    assert members(["a.b=[1e-3,2e-3]", "c=x", "run.seed=range(2)"]) == [
        ("a.b=1e-3", "c=x", "run.seed=0"),
        ("a.b=1e-3", "c=x", "run.seed=1"),
        ("a.b=2e-3", "c=x", "run.seed=0"),
        ("a.b=2e-3", "c=x", "run.seed=1"),
    ]
    assert members(["a=1"]) == [("a=1",)] and members([]) == [()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("range(3)", ["0", "1", "2"]),
        ("range(2, 8, 3)", ["2", "5"]),
        ("[[10,20]]", ["[10,20]"]),
        ("[[10, 20], [5]]", ["[10, 20]", "[5]"]),
        ("['8 steps', \"1,5 epochs\"]", ["'8 steps'", '"1,5 epochs"']),
        ("[{00..09}.tar, b.tar]", ["{00..09}.tar", "b.tar"]),
        ("plain", ["plain"]),
        ("", [""]),
    ],
)
def test_values_are_kept_as_written(text: str, expected: list[str]) -> None:
    assert values(text) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["a=[1,,2]"], "is not a list of values"),
        (["a=[]"], "is not a list of values"),
        (["a=[(1]"], "is not a list of values"),
        (["a=['1]"], "is not a list of values"),
        (["a"], "must be KEY=VALUE"),
        (["a=1", "a=[2,3]"], "is set twice"),
        (["run.name=x"], "is set by the sweep"),
        (["train.pause_at='3 steps'"], "is set by the sweep"),
        (["a=range(0)"], "0 members"),
        (["a=range(0,5,0)"], "step of 0"),
        (["a=range(999999999)"], "values are too many"),
        (["a=range(100)", "b=range(100)"], f"must be between 1 and {MOST}"),
    ],
)
def test_what_is_no_grid_is_refused(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        members(settings)


def test_a_list_has_a_member_on_each_line_and_is_combined_with_the_grid(tmp_path: Path) -> None:
    file = tmp_path / "members.txt"
    file.write_text("# two\na=1 'b=x y'\n\na=2 # with a comment\n")
    lines = read_list(file)
    assert lines == [("a=1", "b=x y"), ("a=2",)]
    assert members(["s=range(2)"], lines) == [("a=1", "b=x y", "s=0"), ("a=1", "b=x y", "s=1"), ("a=2", "s=0"), ("a=2", "s=1")]
    with pytest.raises(ConfigError, match="is set twice"):
        members(["a=3"], lines)
    for content, message in (
        ("a='1\n", "no closing quotation"),
        ("# nothing\n", "names no member"),
        ("\udcff", "cannot be read"),
    ):
        file.write_bytes(content.encode("utf-8", "surrogateescape"))
        with pytest.raises(ConfigError, match=message):
            read_list(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_list(tmp_path / "none.txt")
