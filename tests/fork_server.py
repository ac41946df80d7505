"""Python processes that start in a tenth of a second: forked from one that has imported torch, DeepSpeed and this project.

`Popen` and `run` work like those of `subprocess`, for command lines that begin with this Python:
`[sys.executable, "-m", MODULE, ...]`, `[sys.executable, "-c", CODE, ...]` or `[sys.executable, FILE, ...]`. The process has
its own memory, arguments, environment, working folder and streams, and exits as Python does. It differs from a new process
in three ways:

- its modules were imported by the server,
- all forked processes share one hash seed,
- OMP's variables no longer have an effect.

Tests of imports, of real launchers and of threads use `subprocess`.
"""

from __future__ import annotations

import array
import atexit
import faulthandler
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
import types
from contextlib import suppress
from functools import cache
from pathlib import Path

PROJECT = Path(__file__).parents[1]
LARGEST_REQUEST = 2**20
LONGEST_FORK = 120.0  # seconds; the first one waits for the imports
PRELOADED = (
    "launcher.training.accelerator",  # before DeepSpeed
    "deepspeed.runtime.zero.stage3", "deepspeed.runtime.zero.stage_1_and_2", "torch._dynamo", "train",
    "data_pipeline.checking.verification", "data_pipeline.preparation.prepare", "launcher.tools.evaluation.evaluation",
    "launcher.tools.export.export", "launcher.training.preflight.nodes", "launcher.tools.serving.server",
)  # fmt: skip


class Popen(subprocess.Popen):
    """A `subprocess.Popen` whose child is forked by the server; the server sends the exit code over a pipe."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags,
                       shell, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, restore_signals, gid, gids, uid,
                       umask, start_new_session, *rest) -> None:  # fmt: skip
        args = [os.fspath(part) for part in args]
        assert args[0] == sys.executable and not (shell or preexec_fn), args
        self._ended, tells_end = os.pipe()
        streams = [own if own != -1 else shared for own, shared in ((p2cread, 0), (c2pwrite, 1), (errwrite, 2))]
        request = {
            "arguments": args[1:],
            "environment": dict(os.environ if env is None else env),
            "folder": os.fspath(cwd or os.getcwd()),
            "new_session": start_new_session,
        }
        try:
            self.pid = _server().fork(request, [*streams, tells_end])
        finally:
            os.close(tells_end)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)

    def _internal_poll(self, _deadstate=None, **_) -> int | None:
        if self.returncode is None and select.select([self._ended], [], [], 0)[0]:
            self._read_exit_code()
        return self.returncode

    def _wait(self, timeout) -> int:
        if self.returncode is None:
            if not select.select([self._ended], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self._read_exit_code()
        return self.returncode

    def _read_exit_code(self) -> None:
        told = os.read(self._ended, array.array("i").itemsize)
        os.close(self._ended)
        assert told, "the fork server has ended"
        self.returncode = array.array("i", told)[0]


def run(command: list[str], *, timeout: float | None = None, check: bool = False, capture_output: bool = False,
        input: str | None = None, **options) -> subprocess.CompletedProcess:  # fmt: skip
    """Run a command as `subprocess.run` does."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if input is not None:
        options["stdin"] = subprocess.PIPE
    with Popen(command, **options) as process:
        try:
            stdout, stderr = process.communicate(input, timeout)
        except BaseException:
            process.kill()
            raise
    result = subprocess.CompletedProcess(command, process.returncode, stdout, stderr)
    if check:
        result.check_returncode()
    return result


class _Client:
    """The connection of the tests' process to the server: one request at a time, over a socket."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for side in (self._socket, theirs):
            side.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LARGEST_REQUEST)
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server", str(theirs.fileno())],
            cwd=PROJECT,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(PROJECT)},
        )
        theirs.close()

    def fork(self, request: dict, descriptors: list[int]) -> int:
        with self._lock:
            socket.send_fds(self._socket, [json.dumps(request).encode()], descriptors)
            self._socket.settimeout(LONGEST_FORK)
            return int(self._socket.recv(64))

    def close(self) -> None:
        """End the server, which kills all processes that it has forked."""
        self._socket.close()
        self._process.wait()


@cache
def _server() -> _Client:
    client = _Client()
    atexit.register(client.close)
    return client


def serve(connection: socket.socket) -> None:
    """Fork a process for each request until the tests' process closes its end; then kill those that still run."""
    waking, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakes)
    running: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([connection, waking], [], [])
        if waking in ready:
            os.read(waking, 4096)
            for pid in list(running):
                _tell_if_ended(pid, running)
        if connection in ready:
            message, descriptors, _, _ = socket.recv_fds(connection, LARGEST_REQUEST, 4)
            if not message:
                break
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                for descriptor in (waking, wakes, *running.values()):
                    os.close(descriptor)
                connection.close()
                _become(json.loads(message), descriptors)
            for descriptor in descriptors[:3]:
                os.close(descriptor)
            running[pid] = descriptors[3]
            connection.send(str(pid).encode())
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def _tell_if_ended(pid: int, running: dict[int, int]) -> None:
    # Send the code before reaping the process, or the tests might signal another process that got its number.
    if (ended := os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)) is None:
        return
    code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
    descriptor = running.pop(pid)
    with suppress(BrokenPipeError):  # nobody waits for it any more
        os.write(descriptor, array.array("i", [code]).tobytes())
    os.close(descriptor)
    os.waitpid(pid, 0)


def _become(request: dict, descriptors: list[int]) -> None:
    """Turn this fork into the requested process, run it and exit with its code. Does not return."""
    for own, descriptor in enumerate(descriptors[:3]):
        os.dup2(descriptor, own)
    for descriptor in descriptors:
        os.close(descriptor)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request["new_session"]:
        os.setsid()
    accelerator = os.environ.get("DS_ACCELERATOR")
    os.environ.clear()
    os.environ.update({"DS_ACCELERATOR": accelerator} if accelerator else {})
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    _open_streams()
    code = _exit_code_of(request["arguments"])
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if code == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code)


def _open_streams() -> None:
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", buffering=1 if os.isatty(1) or unbuffered else -1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    if os.environ.get("PYTHONFAULTHANDLER"):
        faulthandler.enable()


def _exit_code_of(arguments: list[str]) -> int:
    """Run a module, code or a file as `__main__`, and return the exit code that Python would end with."""
    random.seed()
    kind = arguments[0]
    sys.argv = arguments[1:] if kind in ("-m", "-c") else arguments
    first = {"-m": os.getcwd(), "-c": ""}.get(kind, str(Path(kind).resolve().parent))
    added = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[:] = [first, *added, *(folder for folder in sys.path if folder not in ("", str(PROJECT)))]
    try:
        if kind == "-m":
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            sys.argv = ["-c", *arguments[2:]]
            exec(compile(arguments[1], "<string>", "exec"), main.__dict__)
        else:
            runpy.run_path(kind, run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        traceback.print_exc()
        return -signal.SIGINT
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    """Import what the tests' processes need, then serve."""
    for name in PRELOADED:
        importlib.import_module(name)
    with sys.modules["launcher.training.engine"].muon_not_compiled():
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    gc.freeze()  # otherwise a garbage collection in a child copies the memory pages that all of them share
    serve(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    main()
