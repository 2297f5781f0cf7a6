"""Builds the stand-in for CUDA devices with g++, once per version of its sources and of torch."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

NATIVE = Path(__file__).resolve().parent / "native"
_LIBRARY = "libcuda.so.1"  # one library takes the place of driver, runtime and cuBLAS
_FLAGS = ("-O1", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-w")
_TAKEN = re.compile(r"^(__cuda\w+|cuda[A-Z]\w+|cublas\w+|cu[A-Z]\w+)$")
_OTHERS = ("cuTensorMapEncodeTiled", "cuTensorMapEncodeIm2col")  # looked up by name at run time
_PRODUCT = re.compile(
    r"gem[mv]|Gem[mv]|dot", re.ASCII
)  # cublasLtMatmul has its source; its descriptors' functions launch nothing


@cache
def unavailable() -> str:
    """Why the stand-in cannot be built here; empty if it can."""
    missing = [tool for tool in ("g++", "nm") if shutil.which(tool) is None]
    if missing:
        return f"the stand-in for CUDA devices needs {' and '.join(missing)}"
    if not (_torch() / "libtorch_cuda.so").exists():
        return "the stand-in for CUDA devices needs a torch that was built for CUDA"
    if _include() is None:
        return "the stand-in for CUDA devices needs CUDA's headers, of a toolkit or of torch's own packages"
    return ""


def build() -> Path:
    """Folder of the library, built if it is not there yet.

    Raises:
        RuntimeError: the compiler's message.
    """
    sources = sorted(path for path in NATIVE.rglob("*") if path.is_file())
    key = hashlib.blake2b(digest_size=8)
    for part in (*(path.read_bytes() for path in sources), Path(__file__).read_bytes(), str(_torch()).encode()):
        key.update(part)
    key.update(str((_torch() / "libtorch_cuda.so").stat().st_mtime_ns).encode())
    folder = _cache() / key.hexdigest()
    if (folder / _LIBRARY).exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        _compile(Path(name), [path for path in sources if path.suffix == ".cpp"])
        made = Path(name) / "made"
        made.mkdir()
        (Path(name) / _LIBRARY).rename(made / _LIBRARY)
        (made / "libcuda.so").symlink_to(_LIBRARY)
        try:
            made.rename(folder)
        except OSError:  # another process was faster
            if not (folder / _LIBRARY).exists():
                raise
    return folder


def environment(*, devices: int = 8) -> dict[str, str]:
    """Variables under which a new process sees stand-in devices."""
    folder = build()
    return {
        "LD_PRELOAD": str(folder / _LIBRARY),
        "LD_LIBRARY_PATH": str(folder),
        "STANDIN_LIBRARY": str(folder / _LIBRARY),
        "STANDIN_DEVICES": str(devices),
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "OMP_NUM_THREADS": "1",
    }


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fovea-tests" / "standin"


def _torch() -> Path:
    spec = find_spec("torch")
    return Path(str(spec.origin)).parent / "lib" if spec else Path("/nonexistent")


def _include() -> Path | None:
    """The folder of CUDA's headers: of torch's own packages if they are there, since they have its version."""
    packages = _torch().parents[1] / "nvidia"
    for folder in (*sorted(packages.glob("*/include")), *sorted(Path("/usr/local").glob("cuda*/include"), reverse=True)):
        if (folder / "cuda_runtime_api.h").exists() and (folder / "cuda.h").exists():
            return folder
    return None


def _compile(folder: Path, sources: list[Path]) -> None:
    includes = [f"-I{_include()}", f"-idirafter{NATIVE / 'fallback'}"]
    objects = []
    for source in sources:
        objects.append(folder / f"{source.stem}.o")
        _run("g++", *_FLAGS, *includes, "-c", str(source), "-o", str(objects[-1]))
    own = {name for made in objects for name in _symbols("--defined-only", made)}
    needed = {name for library in sorted(_torch().glob("*.so")) for name in _symbols("-D", "--undefined-only", library)}
    generated = folder / "generated.cpp"
    generated.write_text(_entry_points(sorted({*needed, *_OTHERS} - own)))
    _run("g++", *_FLAGS, f"-I{NATIVE}", "-c", str(generated), "-o", str(folder / "generated.o"))
    parts = [str(path) for path in (*objects, folder / "generated.o")]
    _run("g++", "-shared", f"-Wl,-soname,{_LIBRARY}", *parts, "-ldl", "-o", str(folder / _LIBRARY))


def _symbols(*arguments: str | Path) -> list[str]:
    lines = _run("nm", *(str(argument) for argument in arguments)).splitlines()
    names = (line.split()[-1].partition("@")[0] for line in lines if line.strip())
    return [name for name in names if _TAKEN.match(name)]


def _entry_points(names: list[str]) -> str:
    """Sources of the entry points that torch needs and no source defines: products are recorded, the rest does nothing."""
    head = '#include "record.h"\nnamespace standin { int product(const char*, void*); }\n'
    lines = []
    for name in names:
        act = f'return standin::product("{name}", handle);' if _PRODUCT.search(name) else "return 0;"
        if not name.startswith(("__cuda", "cublas")):
            act = f'standin::count(standin::UNMODELLED, "{name}"); return 0;'
        lines.append(f"EXPORT int {name}(void* handle) {{ {act} }}")
    return head + "\n".join(lines) + "\n"


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout
