"""The process that keeps a gateway alive: a script on the standard library alone, so that it holds
no more memory than Python itself.

`supervise.py LISTENER LOCK COMMAND...`: both are open files. COMMAND, a gateway, inherits them; one
that is killed, or ends in an error of its own, is started again behind the same listening socket:
clients that connect meanwhile wait in its queue. So is one that then fails to start, as its
database or its store may be away for a while; only the first one's failure is final. SIGTERM and
SIGINT are passed on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from types import FrameType

CRASHED, FAILED = 70, 1
"""What a gateway exits with when an error that isn't ours ended it (EX_SOFTWARE), and when it could
not start or go on for want of something else."""
FILES = "OPENMINT_GATEWAY_FILES"
"""Variable that tells the gateway its listening socket, and a pipe that ends with this process."""
RESTART_SECONDS, MAX_RESTART_SECONDS = 0.1, 10.0
SOUND_SECONDS = 3.0
"""A gateway that ran for as long is started again at once."""
STOPPERS = (signal.SIGTERM, signal.SIGINT)


class Supervisor:
    """Runs a command again and again until it ends by itself."""

    def __init__(self, listener: int, command: list[str]) -> None:
        self._listener, self._command = listener, command
        self._child = 0
        self._is_stopping = self._has_restarted = False

    def keep_running(self) -> int:
        """The exit code of the gateway that ended for good, or after a signal to stop."""
        for number in STOPPERS:
            signal.signal(number, self._pass_on)
        pause_seconds = RESTART_SECONDS
        while not self._is_stopping:
            started_at = time.monotonic()
            status = self._run_gateway()
            if self._is_final(status):
                return status
            self._has_restarted = True
            if time.monotonic() - started_at > SOUND_SECONDS:
                pause_seconds = RESTART_SECONDS
            sys.stderr.write(
                f"openmint: the gateway ended ({_named(status)}); "
                f"starting it again in {pause_seconds:g} s\n"
            )
            sys.stderr.flush()
            self._pause(pause_seconds)
            pause_seconds = min(2 * pause_seconds, MAX_RESTART_SECONDS)
        return 0

    def _is_final(self, status: int) -> bool:
        """Whether another gateway would end in the same way, or none is wanted."""
        may_pass = self._has_restarted and not self._is_stopping
        return status >= 0 and status != CRASHED and not (status == FAILED and may_pass)

    def _pause(self, seconds: float) -> None:
        """For so long, unless it is told to stop meanwhile."""
        until = time.monotonic() + seconds
        while not self._is_stopping and time.monotonic() < until:
            time.sleep(RESTART_SECONDS)

    def _run_gateway(self) -> int:
        """Its exit code, or the negative number of the signal that ended it."""
        theirs, ours = os.pipe()
        os.set_inheritable(theirs, True)
        environ = {**os.environ, FILES: f"{self._listener},{theirs}"}
        # A signal must find either no gateway or its number.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPERS)
        # In a group of its own: a Ctrl-C in a terminal reaches this process, which passes it on.
        self._child = os.posix_spawn(
            self._command[0],
            self._command,
            environ,
            setpgroup=0,
            setsigdef=STOPPERS,
            setsigmask=(),
        )
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPERS)
        os.close(theirs)
        _, status = os.waitpid(self._child, 0)
        self._child = 0
        os.close(ours)
        return os.waitstatus_to_exitcode(status)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._is_stopping = True
        if self._child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child, signal.SIGTERM)


def _named(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit code {status}"


if __name__ == "__main__":
    sys.exit(Supervisor(int(sys.argv[1]), sys.argv[3:]).keep_running())
