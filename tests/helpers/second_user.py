"""Commands of fovea as another user of the machine runs them. Needs root."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import traceback
from pathlib import Path

NOBODY = 65534


def fovea_as(uid: int, home: Path, *words: str) -> tuple[int, str]:
    """Exit code and output of a command.

    A fork of this process, whose modules are loaded: the interpreter may lie where the other user cannot read it.

    Args:
        uid: the user; also taken as the group.
        home: an existing folder that the user may write to.
        words: arguments of ``fovea``.
    """
    import launch.cli.main
    import launch.cli.slurm
    import launch.slurm.doctor
    import launch.slurm.status
    import launch.slurm.submit
    import pipeline.data.inputs  # noqa: F401

    reading, writing = os.pipe()
    if pid := os.fork():
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            answer = pipe.read()
        os.waitpid(pid, 0)
        code, text = pickle.loads(answer)
        return int(code), str(text)
    code, output = 1, io.StringIO()
    try:
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
        os.chdir(home)
        os.environ |= {"HOME": str(home), "XDG_STATE_HOME": str(home), "USER": "nobody", "LOGNAME": "nobody"}
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                launch.cli.main.main(list(words))
                code = 0
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            except BaseException:
                traceback.print_exc()
        with os.fdopen(writing, "wb") as pipe:
            pickle.dump((code, output.getvalue()), pipe)
    finally:
        os._exit(0)
