"""Python programs that need not import torch and Triton once more: forked from a process that has, and did no more.

A program finds what `python` would give it: its arguments, its folder, its environment and paths, a `__main__` of its
own, and what the interpreter does at its end. TRITON_INTERPRET is not set, so that Triton compiles.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

SUPPORT = Path(__file__).resolve().parent
ROOT = SUPPORT.parents[1]


def run_python(
    *command: object,
    folder: Path = ROOT,
    ready: tuple[str, ...] = ("torch",),
    limit_s: int = 280,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Run Python on a script, with -c on code or with -m on a module.

    Args:
        command: what follows ``python``; modules in this folder can be imported.
        folder: the working directory.
        ready: the modules that need not be imported any more.
        limit_s: after how many seconds it is ended.
        variables: of the environment, on top of this process' own.
    """
    environment = _without_interpreter() | variables
    environment["PYTHONPATH"] = os.pathsep.join([str(SUPPORT), *filter(None, [environment.get("PYTHONPATH")])])
    words, server = [str(word) for word in command], _server(ready, threading.get_ident())
    with _file_of_output() as out, _file_of_output() as err:
        request = {"command": words, "folder": str(folder), "environment": environment, "limit_s": limit_s}
        request |= {"files": [out.name, err.name]}
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(words, code, out.read(), err.read())


run_with_compiler = partial(run_python, ready=("torch", "triton", "triton.compiler", "triton.backends.nvidia.compiler"))
"""`run_python` for programs in which Triton compiles."""


def _file_of_output() -> Any:
    return tempfile.NamedTemporaryFile("r", errors="replace")  # a program may name a file that is no UTF-8


def _without_interpreter() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@cache
def _server(modules: tuple[str, ...], thread: int) -> Any:
    """Start the process that forks, for one child at a time of one thread; it ends when this one does."""
    command = [sys.executable, __file__, *modules]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=_without_interpreter(), **pipes)


def _next_child() -> dict[str, Any]:
    """Fork for each request, and say how the child ended; return in the child alone, with what it is to run."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    sys.exit()


def _become(command: list[str], folder: str, environment: dict[str, str], limit_s: int, files: list[str]) -> None:
    """Be ``python`` with these words; the files are for the standard output and for errors."""
    signal.alarm(limit_s)
    for number, (path, flags) in enumerate([(os.devnull, os.O_RDONLY), *((file, os.O_WRONLY) for file in files)]):
        os.dup2(os.open(path, flags), number)
    os.chdir(folder)
    inherited = {sys.path[0], *os.environ.get("PYTHONPATH", "").split(os.pathsep)}
    os.environ.clear()
    os.environ.update(environment)
    sys.dont_write_bytecode = bool(environment.get("PYTHONDONTWRITEBYTECODE"))
    given = environment["PYTHONPATH"].split(os.pathsep)
    place = "" if command[0] in ("-c", "-m") else str(Path(command[0]).resolve().parent)
    places = [] if environment.get("PYTHONSAFEPATH") else [place]
    sys.path[:] = [*places, *given, *(path for path in sys.path if path not in inherited)]
    first, *rest = command
    sys.argv[:] = command if first != "-m" else rest
    if first == "-m":
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        code, *sys.argv[1:] = rest
        sys.modules["__main__"] = main = ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), vars(main))
    else:
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    for module in sys.argv[1:]:
        if importlib.util.find_spec(module.partition(".")[0]):
            importlib.import_module(module)
    gc.freeze()  # or a child would look through all of it, and copy it, when it ends
    _become(**_next_child())
