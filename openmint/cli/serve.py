"""`openmint serve`: one process that keeps the port, the data folder and a gateway alive.

The gateway is a child, forked before anything heavy is loaded. One that is killed, or ends in an
error of its own, is started again behind the same listening socket: clients that connect meanwhile
wait in its queue. SIGTERM and SIGINT are passed on, and the gateway stops in order.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType

import structlog

from openmint.cli.data_folder import sole_server
from openmint.cli.open_files import allow_open_files
from openmint.cli.output import err_console, exit_code_of
from openmint.config import Settings
from openmint.errors import OpenMintError, ServiceError
from openmint.observe.logs import configure_logs

log = structlog.get_logger(__name__)

CRASHED = 70
"""What a gateway exits with when an error that isn't ours ended it (EX_SOFTWARE)."""
RESTART_SECONDS, MAX_RESTART_SECONDS = 0.1, 10.0
SOUND_SECONDS = 3.0
"""A gateway that ran for as long is started again at once."""


def serve(settings: Settings) -> None:
    """Serve until a signal, then exit with what the gateway exits with. Raises Conflict when the
    folder is in use, ServiceError when the port is taken.
    """
    configure_logs()
    allow_open_files()
    with sole_server(settings.data), bound_socket(settings) as listener:

        def run() -> None:
            from openmint.cli.gateway import run_gateway  # loads the web stack, in the child alone

            run_gateway(settings, listener)

        code = Supervisor(run).keep_running()
    sys.exit(code)


class Supervisor:
    """Runs a function in a child process, again and again until it ends by itself."""

    def __init__(self, run: Callable[[], None]) -> None:
        self._run = run
        self._child = 0
        self._is_stopping = False

    def keep_running(self) -> int:
        """The exit code of the child that ended by itself, or after a signal to stop."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._pass_on)
        pause_seconds = RESTART_SECONDS
        while not self._is_stopping:
            started_at = time.monotonic()
            status = self._run_child()
            if status >= 0 and status != CRASHED:
                return status
            if time.monotonic() - started_at > SOUND_SECONDS:
                pause_seconds = RESTART_SECONDS
            log.error("gateway_died", status=status, restart_in_seconds=pause_seconds)
            time.sleep(pause_seconds)
            pause_seconds = min(2 * pause_seconds, MAX_RESTART_SECONDS)
        return 0

    def _run_child(self) -> int:
        """Its exit code, or the negative number of the signal that ended it."""
        ours, theirs = os.pipe()
        # A signal must find either no child or its number.
        masked = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
        self._child = os.fork()
        if self._child == 0:
            os.close(theirs)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, masked)
            os._exit(self._be_child(ours))
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)
        os.close(ours)
        _, status = os.waitpid(self._child, 0)
        self._child = 0
        os.close(theirs)
        return os.waitstatus_to_exitcode(status)

    def _be_child(self, lifeline: int) -> int:
        """Run the function; what to exit with."""
        os.setpgid(0, 0)  # a Ctrl-C in a terminal reaches the parent, which passes it on, once
        threading.Thread(target=_end_without_parent, args=(lifeline,), daemon=True).start()
        try:
            self._run()
            return 0
        except OpenMintError as error:
            err_console.print("error:", error.message, style=None, markup=False)
            return exit_code_of(error)
        except BaseException:  # the process's edge
            traceback.print_exc()
            return CRASHED
        finally:
            sys.stdout.flush()
            sys.stderr.flush()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._is_stopping = True
        if self._child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child, signal.SIGTERM)


def _end_without_parent(lifeline: int) -> None:
    """Nobody would start this process again, or free its port: it ends as if it had crashed."""
    os.read(lifeline, 1)
    os._exit(1)


@contextlib.contextmanager
def bound_socket(settings: Settings) -> Iterator[socket.socket]:
    """A listening socket. Raises ServiceError when the address can't be had."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # Only sockets that say TCP are sent from without delay by asyncio; else the second packet of
    # an answer waits for the client's delayed acknowledgement, 40 ms on Linux.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((settings.host, settings.port))
        except OSError as error:
            raise ServiceError(
                f"can't listen on {settings.host}:{settings.port}: {error.strerror}; give another "
                "--port (0 takes a free one)"
            ) from None
        listener.listen(2048)
        listener.setblocking(False)
        yield listener
