"""Compiles the C++ operators for this machine's instructions once, and loads them.

The source is plain C++ with no header of torch's, so that a compiler is done in seconds, and every
function has C linkage and takes pointers and sizes: `ctypes` calls it in about a microsecond, and
lets other Python threads run meanwhile. What is compiled is kept in the user's cache, under a name
that tells sources, compiler and instruction set apart.

PAGED_ENGINE_KERNELS chooses, before the first use: `native`, all that this processor has (the
default); `sse2`, `avx2`, `avx512` or `neon`, those instructions and no wider ones; `torch`, no
compiled operators, and on a GPU no kernel of Triton's. CXX names the compiler, in a shell's words:
a wrapper before it and flags after it are kept (`ccache g++ -m64`).
"""

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from distlab.errors import UsageError
from distlab.files import atomic_write, cache_dir

COMPILE_LIMIT_S = 120
MACROS = ("-dM", "-E", "-x", "c++", os.devnull)  # prints them, with the instructions among them
COMMON_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math"),
    "-falign-loops=64",  # a tile's short loop that begins within a line of code is 3 to 25 % slower
)
MACHINE_FLAGS = (  # the first that the compiler takes; Apple's has no OpenMP: one thread
    ("-march=native", "-fopenmp"),
    ("-mcpu=native", "-fopenmp"),
    ("-march=native",),
    (),
)
VARIABLE = "PAGED_ENGINE_KERNELS"
WIDTHS = {  # what the compiler says of a processor that has it, and the flags for no more than that
    "sse2": ("__SSE2__", ("-march=x86-64",)),
    "avx2": ("__AVX2__", ("-march=x86-64", "-mavx2", "-mfma")),
    "avx512": (
        "__AVX512F__",
        ("-march=x86-64", "-mfma", *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl"))),
    ),
    "neon": ("__ARM_NEON", ("-march=armv8-a",)),
}
CHOICES = ("native", *WIDTHS, "torch")

POINTER, LONG, INT, FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
LINEAR = [POINTER] * 4 + [LONG] * 3 + [INT]
ATTENTION = [POINTER] * 6 + [LONG] * 7 + [FLOAT, INT]
ROTATE = [POINTER] * 6 + [LONG] * 5 + [INT]
SIGNATURES: dict[str, list] = {
    "linear_float32": LINEAR,
    "linear_bfloat16": LINEAR,
    "attention_float32": ATTENTION,
    "attention_bfloat16": ATTENTION,
    "rotate_and_store_float32": ROTATE,
    "rotate_and_store_bfloat16": ROTATE,
    "rms_norm": [POINTER] * 4 + [LONG] * 2 + [FLOAT, INT],
    "silu_mul": [POINTER] * 2 + [LONG] * 2 + [INT],
    "decoder_layers": [POINTER, LONG, POINTER],
}


class BuildError(Exception):
    """Why there are no compiled operators, in one line."""


@dataclass(frozen=True)
class Native:
    """The compiled operators, and how they were compiled."""

    library: ctypes.CDLL
    flags: tuple[str, ...]
    columns: int  # of a packed weight's panel: two vectors of float32

    def __str__(self) -> str:
        threads = "OpenMP" if "-fopenmp" in self.flags else "one thread"
        return f"compiled C++ (vectors of {self.columns // 2} float32, {threads})"


@functools.cache
def native() -> tuple[Native | None, str]:
    """The operators and their description, or None and why there are none.

    Raises `UsageError` if PAGED_ENGINE_KERNELS asks for what is not there.
    """
    if choice() == "torch":
        return None, f"{VARIABLE}=torch"
    try:
        built = load()
    except (BuildError, OSError) as error:
        return None, str(error).splitlines()[0]
    return built, str(built)


def choice() -> str:
    """What PAGED_ENGINE_KERNELS asks for."""
    chosen = os.environ.get(VARIABLE) or "native"
    if chosen not in CHOICES:
        raise UsageError(f"{VARIABLE}={chosen} is unknown; use one of {', '.join(CHOICES)}")
    return chosen


def available() -> list[str]:
    """The choices that there are for this processor and its compiler."""
    try:
        _, instructions = _machine_flags(_compiler())
    except BuildError:
        return ["torch"]
    widths = [name for name, (macro, _) in WIDTHS.items() if f"#define {macro} " in instructions]
    return ["native", *widths, "torch"]


def load() -> Native:
    compiler = _compiler()
    flags, instructions = _machine_flags(compiler)
    if choice() in WIDTHS:
        if choice() not in available():
            raise UsageError(
                f"{VARIABLE}={choice()}: this processor has no such instructions; "
                f"use one of {', '.join(available())}"
            )
        flags = (*WIDTHS[choice()][1], *(flag for flag in flags if flag == "-fopenmp"))
        instructions = _run([*compiler, *flags, *MACROS])
    sources = sorted(Path(__file__).parent.joinpath("cpp").glob("*.[ch]*"))
    if not sources:
        raise BuildError("the package came without its C++ sources")
    words = [*compiler[1:], *COMMON_FLAGS, *flags]
    digest = hashlib.sha256(" ".join([*words, instructions]).encode())
    for source in sources:
        digest.update(source.read_bytes())
    path = cache_dir() / "kernels" / f"{digest.hexdigest()[:32]}.so"
    if not path.exists():
        with atomic_write(path) as temporary:
            code = [str(source) for source in sources if source.suffix == ".cpp"]
            _run([*compiler, *COMMON_FLAGS, *flags, *code, "-o", str(temporary)])
    return _bind(ctypes.CDLL(str(path)), flags)


def _compiler() -> list[str]:
    """The compiler's command: its program, and what stands after that in CXX."""
    named = os.environ.get("CXX", "").strip()
    for command in _commands(named) if named else [["c++"], ["g++"], ["clang++"]]:
        if found := shutil.which(command[0]):
            return [found, *command[1:]]
    raise BuildError(f"no C++ compiler ({named or 'c++, g++, clang++'}) is there")


def _commands(named: str) -> list[list[str]]:
    """What CXX may mean: a program, also one with an unquoted space in its path, or a command."""
    try:
        return [[named], shlex.split(named)]
    except ValueError as error:
        raise BuildError(f"CXX={named} cannot be read: {error}") from error


def _machine_flags(compiler: list[str]) -> tuple[tuple[str, ...], str]:
    """The best flags that `compiler` takes, and the macros by which it tells its instructions."""
    for flags in MACHINE_FLAGS:
        try:
            return flags, _run([*compiler, *flags, *MACROS])
        except BuildError as error:
            refused = error
    raise refused


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=COMPILE_LIMIT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} took longer than {COMPILE_LIMIT_S} s") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise BuildError(f"{command[0]} fails: {lines[0]}")
    return done.stdout


def _bind(library: ctypes.CDLL, flags: tuple[str, ...]) -> Native:
    for name, types in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, None
    library.attention_takes.argtypes = [LONG]
    return Native(library, flags, library.panel_columns())
