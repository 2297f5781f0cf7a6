"""No password and no signature leaves the process: settings, errors, journals, submit files, signed shards."""

from __future__ import annotations

import http.server
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.slurm.submit import submit
from pipeline.config.load import InvalidConfig, fingerprint, load, show
from pipeline.data.index.build import build
from pipeline.data.index.fields import Fields
from pipeline.data.loader.reader import Reader
from pipeline.data.settings import StorageSettings
from pipeline.data.storage import Storage, expand, signed
from pipeline.errors import ConfigError, DataError, FoveaError
from pipeline.masking import has_password, masked, printable, shown, shown_address
from pipeline.runtime.run_directory import RunDirectory
from pipeline.tracking import Journal, server_of
from tests.helpers.limits import cpu_limit

SECRET = "SECRETCANARY"
LINK = f"https://host.example/a.tar?X-Amz-Signature={SECRET}&X-Amz-Date=1"


def settings(*overrides: str) -> Any:
    return load("clip/scenes", ["data.shards=x-train.tar", *overrides])


@pytest.mark.parametrize(
    "override",
    [
        f"tracking.uri=http://u:{SECRET}@h:5000",
        f"tracking.uri=postgresql://u:{SECRET}@h/db",
        f"data.shards=http://u:{SECRET}@h/x.tar",
        f"data.storage.endpoint=http://u:{SECRET}@h:9000",
        f"checkpoint.mirror=s3://u:{SECRET}@bucket/x",
        f"evaluation.knn.val_shards=['https://u:{SECRET}@h/x.tar']",
        f"tracking.uri=[http://u:{SECRET}@h]",
        f"no.such.key=http://u:{SECRET}@h",
    ],
)
def test_a_password_in_a_setting_is_refused_and_not_shown(override: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        settings(override)
    assert SECRET not in str(caught.value) and SECRET not in repr(caught.value.what)
    if "tracking.uri=http" in override:
        assert "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in str(caught.value)


def test_a_password_of_a_named_server_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        server_of(tmp_path, None, named=f"http://u:{SECRET}@h")
    assert SECRET not in str(caught.value)


def test_every_message_is_printable_and_masked() -> None:
    error = FoveaError(f"{LINK} \x1b[2J", where=f"http://u:{SECRET}@h", hint="line\nnext\r")
    assert SECRET not in str(error) + error.what + error.where and "\x1b" not in str(error) and "line\nnext\\x0d" in str(error)
    assert shown("abfs://container@account.dfs.core.windows.net/x") == "abfs://container@account.dfs.core.windows.net/x"
    assert masked({"a": [LINK, {"b": (LINK, 1)}]}) == {"a": [(m := shown(LINK)), {"b": [m, 1]}]}


def test_settings_with_a_signed_link_are_masked_where_shown_and_private_where_kept(tmp_path: Path) -> None:
    loaded = settings(f"data.shards={LINK}", f"run.directory={tmp_path / 'run'}")
    assert SECRET not in show(loaded) and SECRET in show(loaded, secrets=True)
    again = settings(f"data.shards={LINK.replace(SECRET, 'other')}", f"run.directory={tmp_path / 'run'}")
    assert fingerprint(loaded.config) == fingerprint(again.config)
    run = RunDirectory(tmp_path / "run")
    run.write_settings(loaded.config, show(loaded, secrets=True))
    for name in ("config.json", "config.yaml"):
        assert SECRET in (run.path / name).read_text()
        assert stat.S_IMODE((run.path / name).stat().st_mode) == 0o600
    run.write_settings(settings().config, show(settings()))
    assert stat.S_IMODE((run.path / "config.json").stat().st_mode) & 0o444, "without a secret others may read it"


def test_a_journal_holds_no_secret(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal-0000.jsonl")
    journal.params({"data.shards": [LINK], "tracking.uri": f"http://u:{SECRET}@h"})
    journal.tags({"where": LINK})
    journal.close()
    assert SECRET not in journal.path.read_text()


def test_a_submitted_command_holds_no_secret(tmp_path: Path) -> None:
    profile = Path("configs/clusters").resolve()
    from launch.slurm.profile import load as load_profile

    loaded = settings(f"run.directory={tmp_path / 'run'}")
    command = f"fovea submit clip/scenes data.shards={LINK} tracking.uri=http://u:{SECRET}@h"
    found = submit(loaded, load_profile(str(next(profile.glob("one_node*.yaml")))), dry=True, check=False, command=command)
    assert SECRET not in found.script and "X-Amz-Signature=***" in found.script


class SignedHost:
    """A web server that answers signed requests only, and no HEAD, as links signed for GET do."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.queries: set[str] = set()

        host = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path, _, query = self.path.partition("?")
                content = files.get(path)
                if query not in ("sig=good%2F1", "sig=good%2F2") or content is None:
                    self.send_response(403)
                    self.end_headers()
                    return
                host.queries.add(query)
                first, _, last = (self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")
                body = content[int(first) : int(last) + 1 if last else None]
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{int(first) + len(body) - 1}/{len(content)}")
                self.send_header("Content-Length", str(len(body)))
                self.send_header("ETag", '"1"')
                self.send_header("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT")
                self.end_headers()
                self.wfile.write(body)

            def do_HEAD(self) -> None:
                self.send_response(403)
                self.end_headers()

            def log_message(self, *arguments: object) -> None: ...

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.root = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def host(shards: str) -> Iterator[SignedHost]:
    folder = Path(shards).parent
    made = SignedHost({f"/d/{file.name}": file.read_bytes() for file in folder.glob("*train-*.tar")})
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.mark.parametrize("mode", ["range_read", "cache"])
def test_signed_links_are_read_indexed_and_resumed_without_their_signature(
    host: SignedHost, shards: str, tmp_path: Path, mode: str
) -> None:
    names = sorted(file.name for file in Path(shards).parent.glob("*train-*.tar"))
    store = Storage(StorageSettings(access=mode, cache=tmp_path / "cache", retries=0, outage_timeout=0.0))  # type: ignore[arg-type]
    urls = expand([f"{host.root}/d/{name}?sig=good%2F1" for name in names], store)
    assert urls == [f"{host.root}/d/{name}" for name in names]
    manifest = build(urls, tmp_path / "index", fields=Fields(), workers=2, store=store)
    record = Reader(manifest, wants=("image",), store=store).fetch(manifest.ids()[:1])[0]
    assert record.image
    again = build(expand([f"{host.root}/d/{name}?sig=good%2F2" for name in names], store), tmp_path / "index", store=store)
    assert again.fingerprint == manifest.fingerprint and [s.sidecar for s in again.shards] == [s.sidecar for s in manifest.shards]
    for file in (tmp_path / "index").rglob("*"):
        assert file.is_dir() or b"good" not in file.read_bytes(), file
    signed.learn({urls[0]: "sig=expired"})
    with pytest.raises(DataError, match="Sign the link again") as caught:
        store.stat(urls[0])
    assert "expired&" not in str(caught.value) and "sig=expired" not in str(caught.value)


def test_a_folder_with_brackets_in_its_name_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "set[v2]" / "a*b"
    folder.mkdir(parents=True)
    for name in ("train-0.tar", "train-1.tar", "val-0.tar"):
        (folder / name).write_bytes(bytes(1024))
    assert [Path(p).name for p in expand(f"{folder}/train-*.tar")] == ["train-0.tar", "train-1.tar"]
    assert [Path(p).name for p in expand(f"{tmp_path}/set[v2]/*/train-[1].tar")] == ["train-1.tar"]
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "x1.tar").write_bytes(bytes(1024))
    assert len(expand(f"{tmp_path}/pl[a]in/x*.tar")) == 1


@pytest.mark.parametrize("begin", ["it's", '"', "a b", "a/", "#", "?", 50 * SECRET])
def test_whatever_characters_a_password_has_it_is_refused_and_not_shown(begin: str, tmp_path: Path) -> None:
    address = f"http://u:{begin}{SECRET}@h:5000/x"
    assert SECRET not in shown_address(address, limit=200)
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        server_of(tmp_path, None, named=address)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("end", [f"?{SECRET}", f"#access_token={SECRET}", f"?a=1;{SECRET}", f"?a=1#t={SECRET}"])
def test_queries_without_names_and_fragments_are_masked(end: str) -> None:
    assert SECRET not in shown(f"see https://h/x{end} for more") and "for more" in shown(f"see https://h/x{end} for more")


@pytest.mark.parametrize(
    "plain", ["http://h:5000/a@b", "s3://bucket/a:b@c", "file:///a:b@c", "sqlite:////x/a:b@c", "x-?.tar", "s3://b/x-?.tar"]
)
def test_addresses_without_a_password_stay(plain: str) -> None:
    assert not has_password(plain) and shown_address(plain) == shown(plain) == plain


@pytest.mark.parametrize("text", ["a" * 400_000 + " ://", "http://h/" + "?a" * 400_000, "http://" + "a:" * 200_000])
def test_masking_takes_linear_time(text: str) -> None:
    """Quadratic, each takes hours; keys and names of strangers are masked before they are shown."""
    with cpu_limit(60):
        shown(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\x00\t\x1f\x7f\x80\x9f\xa0", "\\x00\\x09\\x1f\\x7f\\x80\\x9f\xa0"),
        ("\u061c\u200e\u2028\u202e\u2069\ufeff", "\\u061c\\u200e\\u2028\\u202e\\u2069\\ufeff"),
        ("\udc80\udcff", "\\x80\\xff"),  # bytes that are not UTF-8, as file names have them
        ("\udc7f\udd00\ud800", "\\udc7f\\udd00\\ud800"),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(text: str, expected: str) -> None:
    assert printable(text) == expected
    assert shown(f"{text}\n\t") == f"{expected}\n\t".replace("\\x09", "\t")


@pytest.mark.parametrize(
    ("text", "limit", "expected"),
    [("abc", 3, "abc"), ("abcd", 3, "ab…"), ("ab", 1, "…"), ("x" * 99, 3, "xx…"), ("\x1bab", 5, "\\x1b…"), ("abc", 0, "abc")],
)
def test_a_limited_text_ends_in_an_ellipsis(text: str, limit: int, expected: str) -> None:
    assert printable(text, limit=limit) == shown_address(f" {text} ", limit=limit) == expected


def test_values_of_every_kind_are_masked() -> None:
    masked_link = "https://host.example/a.tar?X-Amz-Signature=***&X-Amz-Date=***"
    value = {"link": LINK, "list": [LINK, 1, {"inner": LINK}], "pair": (LINK, None), "number": 2.5, "text": "a"}
    inner = [masked_link, 1, {"inner": masked_link}]
    assert masked(value) == {"link": masked_link, "list": inner, "pair": [masked_link, None], "number": 2.5, "text": "a"}
    assert has_password("s3://u:p@h/x") is True
