"""The compiled kernel for decode steps: built once by the machine's C++ compiler and kept in the cache."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import cpp_extension

from dse.files import cache_dir

__all__ = ["KERNEL_VARIABLE", "NO_KERNEL", "has_kernel", "is_supported", "kernel_name", "kernel_problem"]

KERNEL_VARIABLE = "DSE_KERNEL"
"""Environment variable; `off` leaves all to torch's own libraries."""

NO_KERNEL = "torch"
"""The name of what computes where there is no kernel."""

_FOLDER = Path(__file__).parent
_SOURCE = _FOLDER / "kernel.cpp"
# No -ffast-math: linked into a library, it makes the whole process flush small numbers to zero.
_FLAGS = ("-std=c++20", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-fPIC", "-shared")
_BUILD_LIMIT_S = 300.0


class _UnavailableError(Exception):
    """Why there is no kernel; never leaves this module."""


def has_kernel() -> bool:
    """Whether `torch.ops.dse` holds the operators; built the first time, which takes some twenty seconds."""
    return not kernel_problem()


@functools.cache
def kernel_problem() -> str:
    """Why there is no kernel here; "" where there is one."""
    try:
        if os.environ.get(KERNEL_VARIABLE, "").lower() == "off":
            raise _UnavailableError(f"{KERNEL_VARIABLE}=off")
        torch.ops.load_library(str(_built()))  # type: ignore[no-untyped-call]
        torch.library.register_fake("dse::chains")(_chains_shape)
        torch.library.register_fake("dse::attend")(_attend_shape)
        torch.library.register_fake("dse::decoder_layers")(_layers_shape)
        torch.library.register_fake("dse::prefill_layers")(_layers_shape)
    except (_UnavailableError, OSError) as error:
        return " ".join(str(error).split())
    return ""


def kernel_name(device: torch.device, dtype: torch.dtype) -> str:
    """What computes decode steps there: a timing taken with one kernel says nothing about another."""
    return f"dse {_digest(_sources())[:12]}" if is_supported(device, dtype) and has_kernel() else NO_KERNEL


def is_supported(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel is meant for tensors of this kind; where it is not, none is built."""
    return device.type == "cpu" and dtype == torch.float32


def _sources() -> bytes:
    return b"".join(path.read_bytes() for path in sorted(_FOLDER.iterdir()) if path.suffix in (".cpp", ".h"))


def _built() -> Path:
    compiler = _compiler()
    # `native` means another thing on another processor, and homes are shared between machines; and the operators are
    # those of the torch that they were built with.
    described = [[compiler, "--version"], [compiler, "-march=native", "-Q", "--help=target"]]
    told = [subprocess.run(command, capture_output=True, check=False).stdout for command in described]
    made_of = [*told, _processor(), str(torch.__version__).encode(), " ".join(_FLAGS).encode(), _sources()]
    path = cache_dir() / "kernels" / f"dse-{_digest(bytes(1).join(made_of))[:24]}.so"
    if not path.exists():
        _build(compiler, path)
    return path


def _processor() -> bytes:
    """What the processor can do, where the system tells; compilers but GCC do not say what `native` comes to."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.processor().encode()
    return next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise _UnavailableError("no C++ compiler (g++, clang++ or $CXX) is installed")


def _build(compiler: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        made = Path(temporary) / path.name
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
        includes = [f"-I{folder}" for folder in cpp_extension.include_paths()]
        libraries = [f"-L{folder}" for folder in cpp_extension.library_paths()]
        command = [compiler, *_FLAGS, abi, *includes, str(_SOURCE), "-o", str(made), *libraries, "-ltorch_cpu", "-lc10"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_BUILD_LIMIT_S)
        except subprocess.TimeoutExpired:
            raise _UnavailableError(f"{compiler} did not finish within {_BUILD_LIMIT_S:.0f} s") from None
        if done.returncode != 0:
            raise _UnavailableError(f"{compiler} failed: {' '.join(done.stderr.split())[:200]}")
        made.replace(path)


def _chains_shape(x: Tensor, _weights: Tensor, _layout: Tensor, out_features: int, _scratch: int) -> Tensor:
    """Where nothing is computed yet: the shape of the result."""
    return x.new_empty((*x.shape[:-1], out_features))


def _attend_shape(query: Tensor, _key: Tensor, value: Tensor, _mask: Tensor, _scaling: float) -> Tensor:
    return query.new_empty((query.shape[0], 1, query.shape[1], value.shape[3]))


def _layers_shape(hidden: Tensor, *_others: object) -> Tensor:
    return hidden.new_empty(hidden.shape)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
