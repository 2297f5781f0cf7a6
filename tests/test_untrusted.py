"""Names, addresses and text from outside."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import CheckpointError, DataError
from pipeline.untrusted import has_password, hide_secrets, inside, parse_json, plain_name, printable, read_bytes, read_json


@given(st.text(st.characters(), max_size=60))
def test_printable_text_has_no_control_characters_and_encodes(text: str) -> None:
    clean = printable(text)
    clean.encode("utf-8")
    assert not any(ord(c) < 32 or 0x7F <= ord(c) < 0xA0 or c in "\u2028\u2029\u202e\u2066" for c in clean)


def test_printable_shows_what_it_escapes() -> None:
    assert printable("a\x1b[2J\r\n\x9b\u202e\udce9\ud83dé猫") == r"a\x1b[2J\x0d\x0a\x9b\u202e\xe9\ud83dé猫"
    assert printable("x" * 50, limit=10) == "x" * 9 + "…"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("http://u:p@h:9/x", "http://***@h:9/x"),
        ("http://u:p@x@h/x", "http://***@h/x"),
        ("postgresql://u@h/db", "postgresql://***@h/db"),
        ("https://h/a.tar?X-Amz-Signature=abc&X-Amz-Date=1", "https://h/a.tar?X-Amz-Signature=***&X-Amz-Date=***"),
        ("az://c/a.tar?sv=1;sig=zzz#f", "az://c/a.tar?sv=***#f"),  # a value may hold semicolons
        ("cannot reach 'http://u:p@h/' and s3://b/k", "cannot reach 'http://***@h/' and s3://b/k"),
        ("nothing here", "nothing here"),
    ],
)
def test_addresses_lose_user_names_and_query_values(text: str, clean: str) -> None:
    assert hide_secrets(text) == clean
    assert hide_secrets(clean) == clean


def test_a_password_in_an_address_is_recognised() -> None:
    assert has_password("http://u:p@h/x") and has_password("http://u@h")
    assert not has_password("http://h/a@b") and not has_password("sqlite:///a@b.db")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "/a", "a\\b", "a\0", "a\nb", "\x1b[2J", "x" * 256, "é" * 128, 7, None, "\ud83d"]
)
def test_only_plain_names_pass(name: object) -> None:
    with pytest.raises(CheckpointError, match="plain file name"):
        plain_name(name, where="manifest.json", error=CheckpointError)


def test_a_plain_name_passes() -> None:
    assert plain_name("rank-0.safetensors", where="m") == "rank-0.safetensors"
    assert plain_name("été 1.tar", where="m") == "été 1.tar"


def test_paths_stay_inside(tmp_path: Path) -> None:
    root = tmp_path / "run"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "secret").write_text("x")
    os.symlink("../secret", root / "link")
    os.symlink(root, tmp_path / "alias")
    assert inside("sub/x", root, where="j") == (root / "sub/x").resolve()
    assert inside(tmp_path / "alias" / "sub", root, where="j") == (root / "sub").resolve()
    for path in ("link", "../secret", "/etc/passwd", "sub/../../secret", "a\0b"):
        with pytest.raises(DataError, match="outside"):
            inside(path, root, where="j")


def test_devices_pipes_and_large_files_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(DataError, match="regular file"):
            read_bytes(path, limit=10)
    (tmp_path / "large").write_bytes(b"x" * 11)
    with pytest.raises(DataError, match="larger"):
        read_bytes(tmp_path / "large", limit=10)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b"1" * 5000, b'{"a": nul}'])
def test_bad_json_is_one_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="must be JSON"):
        read_json(tmp_path / "x.json", error=CheckpointError)


@pytest.mark.parametrize("text", ['{"a":' * 65 + "1" + "}" * 65, "[" * 65 + "]" * 65, "[" * 20_000])
def test_json_that_is_nested_too_deeply_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match="nested too deeply"):
        read_json(tmp_path / "a.json")


def test_json_of_64_levels_is_read() -> None:
    assert parse_json("[" * 63 + '{"a": "[[[["}' + "]" * 63)
