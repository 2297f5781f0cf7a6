"""Forks processes that have already imported what ranks and commands import; see ``client.c``."""

from __future__ import annotations

import array
import contextlib
import fcntl
import gc
import importlib
import os
import random
import resource
import runpy
import select
import signal
import socket
import struct
import sys
import tempfile
import threading
import types
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

PRELOADED = (
    "launch.cli.main",
    "launch.cli.train",
    "launch.rank_main",
    "pipeline.training.build",
    "pipeline.training.trainer",
    "pipeline.evaluation.runner",
    "pipeline.data.augment.dali",
    "pipeline.data.augment.decode",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # loaded by the first engine; it loads the compiler
)
# Variables that packages read when they are imported: a process with other values starts anew. The Hugging Face and torch hubs
# read XDG_CACHE_HOME too, for weights that they download, which no test does.
READ_AT_IMPORT = (
    *("PYTHON", "LD_", "LANG", "LC_", "TZ", "CUDA", "NVIDIA", "NCCL", "TORCH", "PYTORCH", "DS_", "DEEPSPEED", "TRITON"),
    *("MKL_", "OPENBLAS", "GOTO_", "KMP_", "OMP_P", "OMP_S", "HF_", "HUGGINGFACE", "TRANSFORMERS", "MLFLOW", "DALI_"),
    *("FOVEA_KERNELS", "FOVEA_CACHE", "ACCELERATE", "HOME", "NO_COLOR", "FORCE_COLOR", "TERM", "STANDIN_"),
)
HANDLED = {"PYTHONSAFEPATH", "PYTHONDONTWRITEBYTECODE", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE"}
INSTALLED = bool(os.environ.pop("FOVEA_WARM_INSTALLED", ""))  # without PYTHONPATH the same packages are found
_HEAD = struct.Struct("=IIIQ")
_MOST = 64  # files that a client passes on

# Directory, words, environment, files by the number that they shall have, ignored signals.
_Request = tuple[str, list[str], dict[str, str], dict[int, int], int]


def main(path: str, owner: int, kind: str) -> None:
    """Serve on a socket until another process has ended; what is forked by a server of the kind ``standin`` has begun as such."""
    ended = os.pidfd_open(owner)
    before = dict(os.environ)
    standin = kind == "standin"
    with importlib.import_module("tests.helpers.standin.process").begun_to_be_forked() if standin else contextlib.nullcontext():
        for name in PRELOADED:
            importlib.import_module(name)
        _convert_graphs()
    set_by_imports = {name: value for name, value in os.environ.items() if before.get(name) != value}
    own = _relevant(before)
    gc.collect()
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(f"{path}.new")
    listener.listen(64)
    Path(f"{path}.new").rename(path)  # found only when it answers
    wake, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    children: dict[int, tuple[socket.socket, str]] = {}
    spent: dict[str, tuple[int, float]] = {}  # ended processes and their CPU seconds, by the test worker that had them started
    while True:
        ready, _, _ = select.select([listener, wake, ended], [], [])
        if ended in ready:
            os._exit(0)
        if wake in ready:
            os.read(wake, 4096)
            while children:
                try:
                    pid, status, usage = os.wait4(-1, os.WNOHANG)
                except ChildProcessError:
                    break
                if pid == 0:
                    break
                if pid in children:
                    client, worker = children.pop(pid)
                    count, seconds = spent.get(worker, (0, 0.0))
                    spent[worker] = count + 1, seconds + usage.ru_utime + usage.ru_stime
                    Path(path).with_name(f"cpu-{worker}").write_text("{} {:.3f}".format(*spent[worker]))
                    with contextlib.suppress(OSError):
                        client.sendall(struct.pack("=i", status))
                    client.close()
        if listener in ready:
            client, _ = listener.accept()
            with contextlib.suppress(OSError, EOFError, ValueError):
                request = _receive(client)
                peer = _peer(client)
                ours = {
                    listener.fileno(),
                    wake,
                    waker,
                    ended,
                    client.fileno(),
                    *(other.fileno() for other, _ in children.values()),
                }
                if request is None or not _alike(peer) or not _fits(request, own, set_by_imports) or _taken(request[3], ours):
                    for file in request[3].values() if request else ():
                        os.close(file)
                    client.sendall(struct.pack("=i", 0))
                    client.close()
                    continue
                pid = os.fork()
                if pid == 0:
                    others = [other for other, _ in children.values()]
                    _become(request, client, peer, [listener, *others], (wake, waker, ended), set_by_imports)
                for file in request[3].values():
                    os.close(file)
                children[pid] = client, request[2].get("PYTEST_XDIST_WORKER", "main")
                client.sendall(struct.pack("=i", pid))


def _convert_graphs() -> None:
    """Has DALI convert the functions of our graphs, which it then remembers; no thread is started."""
    from pipeline.data.augment.dali import _graph, _Inputs
    from pipeline.data.augment.operators import Augment
    from pipeline.data.augment.view_groups import groups_of
    from pipeline.data.augment.views import ViewSpec

    full = Augment(jitter_probability=1.0, gray_probability=1.0, blur_probability=1.0, solarize_probability=1.0)
    for hue in ("hsv", "yiq"):
        for group in groups_of((ViewSpec("all", 32, 1, (0.1, 1.0), augment=(full,)),)):
            _graph(group, _Inputs(hue, "cpu", read=[]), batch_size=1, num_threads=1, device_id=None, exec_dynamic=True)


def _relevant(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that have been read by what is imported; MLflow is not, as long as nothing needs it."""
    unread = () if "mlflow" in sys.modules else ("MLFLOW",)
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(READ_AT_IMPORT) and name not in HANDLED and not (unread and name.startswith(unread))
    }


def _peer(client: socket.socket) -> int:
    """Process number of the other end."""
    number, _, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return int(number)


def _alike(peer: int) -> bool:
    """Whether the client is the same user in the same namespaces, so that a fork of this process can stand in for it."""
    try:
        words = [Path(f"/proc/{who}/status").read_text().split("Uid:")[1].splitlines()[:2] for who in (peer, "self")]
        spaces = [{n.name: n.readlink() for n in Path(f"/proc/{who}/ns").iterdir()} for who in (peer, "self")]
    except (OSError, IndexError):
        return False
    return words[0] == words[1] and spaces[0] == spaces[1]


def _inherit(peer: int) -> None:
    """Take over what a child of the client would have: limits, mask of new files, niceness and cores."""
    for name in dir(resource):
        if name.startswith("RLIMIT_"):
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(getattr(resource, name), resource.prlimit(peer, getattr(resource, name)))
    mask = Path(f"/proc/{peer}/status").read_text().partition("Umask:")[2].split()[0]
    os.umask(int(mask, 8))
    os.sched_setaffinity(0, os.sched_getaffinity(peer))
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, peer))


def _taken(files: dict[int, int], ours: set[int]) -> bool:
    """Whether a number that a file shall have is that of one which imports have opened; a fork closes ours."""
    others = set(files) - {0, 1, 2} - ours - set(files.values())
    return any(os.path.lexists(f"/proc/self/fd/{number}") for number in others)


def _fits(request: _Request, own: dict[str, str], set_by_imports: dict[str, str]) -> bool:
    """Whether a new process would have imported the same: nothing that imports read is another, and nothing lies in their way."""
    cwd, words, environment, _, _ = request
    theirs = {n: v for n, v in _relevant(environment).items() if set_by_imports.get(n) != v}
    if theirs.get("CUDA_VISIBLE_DEVICES") == "" and not Path("/dev/nvidiactl").exists():
        del theirs["CUDA_VISIBLE_DEVICES"]  # there is none to hide
    if INSTALLED:
        theirs.setdefault("PYTHONPATH", own["PYTHONPATH"])
    if theirs != own:
        return False
    if _safe(words, environment) or cwd == own["PYTHONPATH"]:
        return True
    loaded = {name.partition(".")[0] for name in sys.modules}
    return not any(name.removesuffix(".py") in loaded for name in os.listdir(cwd))


def _safe(words: list[str], environment: Mapping[str, str]) -> bool:
    return "-P" in words or bool(environment.get("PYTHONSAFEPATH"))


def _receive(client: socket.socket) -> _Request | None:
    files = array.array("i")
    head, ancillary, _, _ = client.recvmsg(_HEAD.size, socket.CMSG_SPACE(_MOST * files.itemsize))
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            files.frombytes(data[: len(data) - len(data) % files.itemsize])
    if len(head) < _HEAD.size or len(files) < 3:
        return None
    size, words, _, ignored = _HEAD.unpack(head)
    body = b""
    while len(body) < size:
        part = client.recv(size - len(body))
        if not part:
            return None
        body += part
    cwd, numbers, *texts = [os.fsdecode(part) for part in body.split(b"\0")[:-1]]
    environment = dict(text.split("=", 1) for text in texts[words:])
    named = zip((0, 1, 2, *map(int, numbers.split())), files, strict=True)
    return cwd, texts[:words], environment, dict(named), ignored


def _become(
    request: _Request,
    client: socket.socket,
    peer: int,
    sockets: list[socket.socket],
    pipes: tuple[int, ...],
    set_by_imports: dict[str, str],
) -> NoReturn:
    """In the forked process: run the command, and end."""
    cwd, words, environment, files, ignored = request
    signal.set_wakeup_fd(-1)
    for number in range(1, 32):
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            default = signal.SIG_IGN if ignored >> number & 1 else signal.SIG_DFL
            with contextlib.suppress(OSError, ValueError):
                signal.signal(number, default)
    if not ignored >> signal.SIGINT & 1:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # as the interpreter itself does
        signal.signal(number, signal.SIG_IGN)
    for other in sockets:
        other.close()
    for pipe in pipes:
        os.close(pipe)
    _inherit(peer)
    os.setsid()
    free = max(files) + 1  # from here on nothing is in the way of the numbers that the files shall have
    moved = {number: fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, free) for number, file in files.items()}
    held = socket.socket(fileno=fcntl.fcntl(client, fcntl.F_DUPFD_CLOEXEC, free))
    threading.Thread(target=_follow, args=(held,), daemon=True).start()
    for file in (*files.values(), client.detach()):
        os.close(file)
    for number, file in moved.items():
        os.dup2(file, number)
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(set_by_imports | environment)
    sys.executable = str(Path(sys.argv[1]).with_name("python"))
    sys.dont_write_bytecode = bool(environment.get("PYTHONDONTWRITEBYTECODE"))
    tempfile.tempdir = None  # read again from this environment
    import numpy as np
    import torch

    from pipeline.runtime.interpreter import end_process, exit_code

    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    random.seed()
    np.random.seed()
    code = 1
    try:
        _run(words)
        code = 0
    except SystemExit as stop:
        code = exit_code(stop)
    except Exception as error:  # an interruption ends the process by its signal
        sys.excepthook(type(error), error, error.__traceback__)
    end_process(code)


def _follow(client: socket.socket) -> None:
    """Ends this process when its client dies, however that dies."""
    client.recv(1)
    os.kill(os.getpid(), signal.SIGKILL)


def _run(words: list[str]) -> None:
    path = [part for part in sys.path if part]
    safe = _safe(words, os.environ)
    while words and words[0].startswith("-") and words[0] not in ("-m", "-c"):
        if words[0] == "-u":
            sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
        words = words[1:]
    kind, text, *arguments = words
    main_module = types.ModuleType("__main__")
    sys.modules["__main__"] = main_module
    for name in {"launch.rank_main", "launch.cli.main", *words}:  # run again as the main module
        sys.modules.pop(name, None)
    if kind == "-m":
        sys.argv = [text, *arguments]
        sys.path[:] = path if safe else [os.getcwd(), *path]
        runpy.run_module(text, run_name="__main__", alter_sys=True)
    else:
        sys.argv = ["-c", *arguments]
        sys.path[:] = path if safe else ["", *path]
        exec(compile(text, "<string>", "exec"), main_module.__dict__)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
