"""The command: quick help, one message for each mistake, and configs by name."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from launch.cli.main import main
from pipeline.config.load import load
from pipeline.errors import FoveaError, TrainingError

ROOT = Path(__file__).resolve().parents[3]
NAME = "dinov2/cifar10_vit_tiny"


def fovea(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1", "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, "-m", "launch.cli.main", *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
    )


def leaves(words: list[str]) -> int:
    with pytest.raises(SystemExit) as caught:
        main(words)
    return int(caught.value.code or 0)


def test_help_names_every_verb_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from launch.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'numpy', 'nvidia', 'deepspeed', 'mlflow', 'timm', 'pydantic') if m in sys.modules])\n"
        "print(len(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600, check=True)
    *page, heavy, modules = done.stdout.strip().splitlines()
    assert heavy == "[]"
    assert int(modules) < 500, "something heavy is imported that is not in the list"
    for verb in ("train", "demo", "eval", "shards", "config"):
        assert any(f" {verb} " in line for line in page), verb
    assert "data.shards=" in done.stdout


@pytest.mark.parametrize(
    "words",
    [
        ["train"],
        ["demo"],
        ["eval"],
        ["shards", "index"],
        ["shards", "verify"],
        ["shards", "pack"],
        ["shards", "stats"],
        ["shards", "preview"],
        ["shards", "ls"],
        ["config", "show"],
        ["config", "check"],
    ],
)
def test_every_verb_teaches_by_an_example(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert leaves([*words, "--help"]) == 0
    page = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"fovea {' '.join(words)}" in page.split("Example", 1)[1]


def test_a_mistake_is_one_message_on_stderr_and_code_2() -> None:
    done = fovea("config", "check", NAME, "train.lr=1e-3")
    assert done.returncode == 2 and done.stdout == ""
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1
    assert "unknown key 'train.lr'; did you mean 'schedule.lr.peak'?" in done.stderr


def test_debug_shows_where_a_mistake_was_found(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--debug", "config", "check", "no_such"], ["config", "check", "no_such", "--debug"]):
        assert leaves(words) == 2
        assert "Traceback" in capsys.readouterr().err
    assert leaves(["config", "check", "no_such"]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(("error", "code"), [(FoveaError("[x] = 3", where="a.yaml:1:2", hint="Do."), 2), (TrainingError("y"), 1)])
def test_the_exit_code_is_the_errors_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: FoveaError, code: int
) -> None:
    def fail(name: str, overrides: object = ()) -> None:
        raise error

    monkeypatch.setattr("pipeline.config.load.load", fail)
    assert leaves(["config", "check", NAME]) == code
    assert capsys.readouterr().err == f"fovea: {error}\n"


def test_config_show_without_a_name_lists_names_with_their_headlines(capsys: pytest.CaptureFixture[str]) -> None:
    assert leaves(["config", "show"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"{NAME} ") and len(line.split()) > 5 for line in lines)
    assert not any(line.startswith("base") for line in lines)


def test_what_config_show_prints_is_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert leaves(["config", "show", NAME, "schedule.lr.peak=1e-3"]) == 0
    saved = tmp_path / "mine.yaml"
    saved.write_text(capsys.readouterr().out)
    assert load(saved).config == load(NAME, ["schedule.lr.peak=1e-3"]).config
    assert "# command line" in saved.read_text()


def test_an_unknown_method_is_refused_before_anything_is_drawn(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert leaves(["demo", "--method", "dinov9", "--directory", str(tmp_path / "demo")]) == 2
    assert "dinov2" in capsys.readouterr().err and not (tmp_path / "demo").exists()


def test_eval_of_something_else_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert leaves(["eval", str(tmp_path)]) == 2
    assert "must be a run directory" in capsys.readouterr().err


def test_shards_index_counts_samples_and_names_reasons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    picture = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 30, 90)).save(picture, "PNG")
    with tarfile.open(tmp_path / "train-0.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in (
            ("a.png", picture.getvalue()),
            ("a.cls", b"3"),
            ("b.png", b"no picture"),
            ("c.txt", b"no picture either"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert leaves(["shards", "index", str(tmp_path / "train-*.tar"), "--index", str(tmp_path / "index")]) == 0
    assert "1 samples in 1 shards, 4 classes" in capsys.readouterr().out
    assert leaves(["shards", "index", str(tmp_path / "none-*.tar"), "--index", str(tmp_path / "index")]) == 2
    assert "none-*.tar" in capsys.readouterr().err


def test_help_loads_nothing_that_is_slow() -> None:
    slow = ("torch", "numpy", "deepspeed", "mlflow", "nvidia")
    told = f"import sys; import launch.cli.main; print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", told], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("script", ["launch/demo.sh", "tests/run.sh", "launch/setup.sh"])
def test_scripts_explain_themselves_without_installing(script: str, tmp_path: Path) -> None:
    environment = os.environ | {"FOVEA_VENV": str(tmp_path / "venv")}
    done = subprocess.run(
        ["bash", str(ROOT / script), "--help"], env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 0 and "FOVEA_VENV" in done.stdout and not (tmp_path / "venv").exists()


def test_setup_without_a_python_says_what_to_install(tmp_path: Path) -> None:
    for tool in ("bash", "dirname", "cat", "sha256sum", "cut", "env"):
        (tmp_path / tool).symlink_to(next(p for d in ("/usr/bin", "/bin") if (p := Path(d) / tool).exists()))
    environment = {"PATH": str(tmp_path), "FOVEA_VENV": str(tmp_path / "venv"), "HOME": str(tmp_path)}
    done = subprocess.run(
        ["/bin/bash", str(ROOT / "launch/setup.sh")], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1 and "apt install python3" in done.stderr and not (tmp_path / "venv").exists()


def checkout_with_pip(tmp_path: Path, pip: str) -> tuple[Path, dict[str, str]]:
    """A checkout's setup, and an environment whose python answers ``-m pip`` by a shell snippet."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "setup.sh").write_text((ROOT / "launch" / "setup.sh").read_text())
    (tmp_path / "pyproject.toml").write_text("one")
    venv = tmp_path / "my venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "pyvenv.cfg").write_text("version = 3.11.0\n")
    python = venv / "bin" / "python"
    python.write_text(f'#!/bin/bash\nif [ "$1" = -c ]; then exit 0; fi\necho "$@" >>"{tmp_path}/calls"\n{pip}\n')
    python.chmod(0o755)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FOVEA_")}  # tests/run.sh sets some
    return tmp_path, inherited | {"FOVEA_VENV": str(venv)}


def test_setup_installs_once_until_the_dependencies_change(tmp_path: Path) -> None:
    folder, environment = checkout_with_pip(tmp_path, "exit 0")

    def setup(extra: str = "") -> tuple[int, int]:
        done = subprocess.run(
            ["bash", str(folder / "launch/setup.sh"), extra], env=environment, capture_output=True, text=True, timeout=300
        )
        return done.returncode, len((folder / "calls").read_text().splitlines())

    assert setup() == (0, 1)
    assert setup() == (0, 1)
    assert setup("test") == (0, 2)
    assert setup("test") == setup() == (0, 2)
    (folder / "pyproject.toml").write_text("two")
    assert setup() == (0, 3)
    assert "-e" in (folder / "calls").read_text()


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        (
            "NewConnectionError: Failed to establish a new connection: Temporary failure in name resolution",
            "package index cannot be reached",
        ),
        ("ERROR: No matching distribution found for nvidia-dali-cuda130>=2.4", "nvidia-dali-cuda130"),
        ("something odd", "install.log"),
    ],
)
def test_a_failed_installation_is_explained_and_tried_again(tmp_path: Path, words: str, hint: str) -> None:
    folder, environment = checkout_with_pip(tmp_path, f"echo '{words}' >&2; exit 1")
    for _ in range(2):
        done = subprocess.run(
            ["bash", str(folder / "launch/setup.sh")], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 1 and hint in done.stderr.splitlines()[-1]
    assert len((folder / "calls").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "words", [["eval"], ["report"], ["status"], ["checkpoint", "list"], ["mlflow", "sync"], ["shards", "pack"]]
)
def test_a_path_that_the_system_refuses_is_one_message(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert leaves([*words, "a" * 5000, *(["out"] if words[-1] == "pack" else [])]) == 1
    assert "File name too long" in capsys.readouterr().err
