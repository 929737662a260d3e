"""The child process: confines itself, then runs one program. It writes bytes to its pipes and never returns.

No part of the program runs before the child writes to the `ready` pipe: a byte, then its process id as /proc knows it.
A child that ends without this byte failed to confine itself, and a program cannot fake such a failure.
"""

import _multiprocessing
import _sitebuiltins
import atexit
import builtins
import contextlib
import fcntl
import gc
import importlib
import io
import json
import linecache
import math
import mmap
import os
import random
import resource
import signal
import sys
import threading
import traceback
import types
from typing import Any, NamedTuple, NoReturn

from pmd.verifiers.sandbox import clock, filesystem, kernel, landlock, seccomp
from pmd.verifiers.sandbox.mappings import PrivateMap
from pmd.verifiers.sandbox.protocol import EXIT_MEMORY, Request
from pmd.verifiers.sandbox.semaphores import ThreadSemLock

FILE_NAME = "main.py"
EXIT_ERROR = 1
RESULT, READY, RULESET = 3, 4, 5
#: Address space granted beyond the limit, because thread stacks reserve far more than they use (some programs ask for
#: half a gigabyte). Memory actually used is checked after the run.
RESERVED_BYTES = 640 << 20
STACK_BYTES, FILE_BYTES, NUM_FILES, NUM_THREADS, NUM_SIGNALS = 120 << 20, 16 << 20, 128, 256, 256
RECURSION_LIMIT = 50_000
#: Of an integer that is read or printed, as LiveCodeBench's grader allows.
MAX_INT_DIGITS = 50_000
#: Garbage collection threshold of the youngest generation; Python's default of 700 makes programs with many objects
#: five times slower.
GC_THRESHOLD = 50_000
#: With more objects than this, cycles left at exit are not collected; searching a million takes 0.05 s.
MAX_SEARCHED_OBJECTS = 1_000_000
#: Modules that LiveCodeBench's harness star-imports before every program, in its order; its starter code needs them.
STAR_IMPORTS = (
    "string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics", "itertools",
    "functools", "operator", "io", "sys", "json", "builtins", "typing",
)  # fmt: skip
ALSO_LOADED = ("array", "cmath", "dataclasses", "decimal", "enum", "fractions", "queue", "struct", "textwrap", "time")
NAMES: dict[str, Any] = {}


class Confinement(NamedTuple):
    """What every child of a zygote is confined with."""

    stdin_writer: int | None  # at level namespaces: for writing the input into the root directory
    writable: str  # path of a small writable directory; empty if there is none
    user: int | None  # user id to switch to
    reads_as_root: bool  # keep the capability to read what that user may not; Landlock still allows only what it lists
    ruleset: int | None  # descriptor of the Landlock rule set
    filter: bytes | None  # seccomp program
    proc: int | None  # descriptor of a /proc, for the zygote
    zygote: int  # process id of the parent of every child
    base_bytes: int  # address space of the interpreter before a program runs


def prepare(packages: str) -> int:
    """Import common modules before any fork; return the address space used so far, in bytes."""
    builtins.exit = builtins.quit = _sitebuiltins.Quitter("exit", "EOF")  # as the `site` module defines them
    for name in (*STAR_IMPORTS, *ALSO_LOADED):
        module = importlib.import_module(name)
        if name in STAR_IMPORTS:
            exported = getattr(module, "__all__", [n for n in vars(module) if not n.startswith("_")])
            NAMES.update({n: getattr(module, n) for n in exported})
    NAMES.update({name: sys.modules[name] for name in STAR_IMPORTS if name not in ("builtins", "typing")})
    sys.path[:] = [*filesystem.python_paths(), *([packages] if packages else [])]
    sys.path_importer_cache.clear()
    sys.argv[:] = [FILE_NAME]
    sys.setrecursionlimit(RECURSION_LIMIT)
    sys.set_int_max_str_digits(MAX_INT_DIGITS)
    os.environ.clear()
    os.putenv("OPENBLAS_NUM_THREADS", "1")  # visible to C only; one thread per core would use up the CPU limit
    _multiprocessing.SemLock = ThreadSemLock  # type: ignore[misc]
    mmap.mmap = PrivateMap  # type: ignore[misc]
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def main(request: Request, stdin: int, ready: int, confinement: Confinement, offsets: tuple[int, ...]) -> NoReturn:
    """Confine this process and run the program."""
    files = request.files
    try:
        code, payload = _read(files.code), _read(files.payload) if request.entry else b""
        pid = clock.own_pid(confinement.proc)
        _arrange_descriptors((stdin, files.stdout, files.stderr, files.result, ready), confinement.ruleset)
        _confine(request, confinement, offsets)
        os.write(READY, f"!{pid}".encode())
        os.close(READY)
    except BaseException as error:
        os.write(2, f"the sandbox could not be set up: {error!r}".encode())
        os._exit(EXIT_ERROR)
    _run(code.decode(errors="replace"), request.entry, payload)


def _read(descriptor: int) -> bytes:
    with open(descriptor, "rb", closefd=False) as file:
        return file.read()


def _arrange_descriptors(descriptors: tuple[int, ...], ruleset: int | None) -> None:
    """Move stdin, stdout, stderr, result, ready and the rule set to descriptors 0-5; close all others."""
    sources = [*descriptors, *([] if ruleset is None else [ruleset])]
    for target, source in enumerate([fcntl.fcntl(source, fcntl.F_DUPFD, 10) for source in sources]):
        os.dup2(source, target)
    os.closerange(len(sources), os.sysconf("SC_OPEN_MAX"))


def _confine(request: Request, confinement: Confinement, offsets: tuple[int, ...]) -> None:
    """Drop privileges in an order in which each step is still allowed: session, user, capabilities, files, calls."""
    os.setsid()
    os.chdir(confinement.writable or "/")
    _set_limits(request, confinement)
    if confinement.user is not None:
        kernel.prctl(kernel.PR_SET_KEEPCAPS, 1)
        os.setgroups([])
        os.setresgid(confinement.user, confinement.user, confinement.user)
        os.setresuid(confinement.user, confinement.user, confinement.user)
    kernel.set_capabilities(kernel.CAP_DAC_READ_SEARCH if confinement.reads_as_root else 0)
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != confinement.zygote:
        raise ProcessLookupError("the zygote ended first")  # so its death did not kill this process
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    if confinement.ruleset is not None:
        landlock.restrict(RULESET)
        os.close(RULESET)
    if confinement.filter is not None:
        kernel.install_filter(seccomp.with_pid(confinement.filter, offsets, os.getpid()))


def _set_limits(request: Request, confinement: Confinement) -> None:
    limits = {
        resource.RLIMIT_AS: confinement.base_bytes + (request.memory_mb << 20) + RESERVED_BYTES,
        resource.RLIMIT_CPU: request.cpu_s,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: NUM_FILES,
        resource.RLIMIT_STACK: STACK_BYTES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_SIGPENDING: NUM_SIGNALS,
    }
    in_own_user_namespace = confinement.user is None and confinement.stdin_writer is not None
    if in_own_user_namespace or (confinement.user or 0) >= filesystem.FIRST_FREE_USER:
        limits[resource.RLIMIT_NPROC] = NUM_THREADS  # per user, and no other process runs as this user
    for which, wanted in limits.items():
        hard = resource.getrlimit(which)[1]
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        # A program with deep recursion may raise its stack limit; the address space still bounds how far it grows.
        resource.setrlimit(which, (limit, hard if which == resource.RLIMIT_STACK else limit))


def _run(source: str, entry: str, payload: bytes) -> NoReturn:
    """Run the program as `python main.py` would, or call its entry; exit with the status that Python would give."""
    code, name = 0, "solution" if entry else "__main__"
    gc.set_threshold(GC_THRESHOLD)
    gc.enable()
    try:
        _execute(source, name, entry, payload)
    except SystemExit:
        pass  # as in LiveCodeBench, a program may exit with any status
    except MemoryError:
        os._exit(EXIT_MEMORY)
    except BaseException as error:
        code = _report(error)
    os._exit(_finish(code, name))


def _execute(source: str, name: str, entry: str, payload: bytes) -> None:
    names = _new_module(name)
    _open_streams()
    names.update(stdin=sys.stdin, stdout=sys.stdout, stderr=sys.stderr)
    random.seed(0)  # the same program gets the same verdict every time
    if entry:
        _call_entry(source, names, entry, payload)
    else:
        exec(_compile(source), names)


def _finish(code: int, name: str) -> int:
    """Shut down like an interpreter: wait for threads, run exit handlers, flush, run destructors."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        _flush()
        _drop_module(name)
        _flush()
    except MemoryError:
        return EXIT_MEMORY
    except SystemExit:
        return code
    except BaseException as error:
        return _report(error)
    return code


def _drop_module(name: str) -> None:
    """Drop the program's module and everything only it refers to, and flush files that were left open."""
    module = sys.modules.pop(name, None)
    names = {} if module is None else vars(module)  # the program may have removed it
    for key in [key for key, value in names.items() if hasattr(type(value), "__del__")]:
        names[key] = None
    del module, names
    if sys.getallocatedblocks() < MAX_SEARCHED_OBJECTS:
        _flush_open_files()
        gc.collect()


def _flush_open_files() -> None:
    for kind in (io.TextIOWrapper, io.BufferedWriter):  # in this order: a text file writes to a buffered one
        for file in [found for found in gc.get_objects() if issubclass(type(found), kind)]:
            with contextlib.suppress(OSError, ValueError):  # closed, or broken
                file.flush()


def _report(error: BaseException) -> int:
    try:
        frame = error.__traceback__
        while frame and frame.tb_frame.f_code.co_filename != FILE_NAME:
            frame = frame.tb_next  # hide the sandbox's own frames
        error.__traceback__ = frame
        _flush()
        text = "".join(traceback.format_exception(error, limit=-8))
        os.write(2, text.encode(errors="replace")[-8000:])
    except MemoryError:
        return EXIT_MEMORY
    except BaseException:
        os.write(2, type(error).__name__.encode(errors="replace"))
    return EXIT_ERROR


def _flush() -> None:
    """Flush stdout, unless the program closed it or replaced it with something that cannot be flushed."""
    out = sys.stdout
    if out is not None and hasattr(out, "flush") and not getattr(out, "closed", False):
        out.flush()


def _open_streams() -> None:
    """Open Python's standard streams on this child's descriptors, as a fresh interpreter would."""
    files: list[Any] = [io.FileIO(number, mode, closefd=False) for number, mode in enumerate("rww")]
    sys.stdin = io.TextIOWrapper(io.BufferedReader(files[0]), "utf-8", newline="\n")
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(files[1]), "utf-8")
    sys.stderr = io.TextIOWrapper(files[2], "utf-8", "backslashreplace", write_through=True)
    for file, name in zip(files, ("<stdin>", "<stdout>", "<stderr>"), strict=True):
        file.name = name
    sys.stdin.mode, sys.stdout.mode, sys.stderr.mode = "rww"  # type: ignore[misc]
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]


def _compile(source: str) -> types.CodeType:
    linecache.cache[FILE_NAME] = (len(source), None, source.splitlines(keepends=True), FILE_NAME)
    try:
        return compile(source, FILE_NAME, "exec", dont_inherit=True)
    except MemoryError:  # the parser's stack, not the machine's memory
        raise SyntaxError("the program is nested too deeply") from None


def _new_module(name: str) -> dict[str, Any]:
    module = types.ModuleType(name)
    module.__dict__.update(NAMES)
    module.__dict__.update(__name__=name, __file__=FILE_NAME, __builtins__=builtins)
    sys.modules[name] = module
    return module.__dict__


def _call_entry(source: str, names: dict[str, Any], entry: str, payload: bytes) -> None:
    """Call the function, or the method of that name of `Solution`, and write its result as JSON."""
    arguments = json.loads(payload)
    names.pop(entry, None)  # a star import may have put a function of that name there
    exec(_compile(source), names)
    solution = names.get("Solution")
    if isinstance(solution, type) and hasattr(solution, entry):
        function = getattr(solution(), entry)
    else:
        function = names.get(entry)
    if not callable(function):
        raise NameError(f"the program defines neither a function {entry!r} nor a method Solution.{entry}")
    value = function(*arguments)
    # As in LiveCodeBench, a tuple counts as a list at the top level only.
    text = json.dumps(_plain(list(value) if isinstance(value, tuple) else value))
    with open(RESULT, "wb", closefd=False) as file:
        file.write(text.encode())


def _plain(value: Any) -> Any:
    """Convert a value to JSON's types; one with no JSON equivalent becomes an object that equals no expected value."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if not math.isnan(value) else math.nan
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(item) for key, item in value.items()}
    item = getattr(value, "item", None)
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == () and item:
        return _plain(item())
    return {"no JSON value": repr(value)[:200]}
