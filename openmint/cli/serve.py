"""`openmint serve`: takes the data folder and the port, then becomes their keeper
(`cli/supervise.py`), which runs this command again as the gateway.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import traceback

from openmint.cli import supervise
from openmint.cli.data_folder import locked_for_server
from openmint.cli.open_files import allow_open_files
from openmint.config import Settings
from openmint.errors import OpenMintError, ServiceError
from openmint.observe.logs import configure_logs


def serve(settings: Settings) -> None:
    """Serve until a signal, then exit with what the gateway exits with. Raises Conflict when the
    folder is in use, ServiceError when the port is taken.
    """
    configure_logs()
    allow_open_files()
    if files := os.environ.pop(supervise.FILES, ""):
        listener, lifeline = map(int, files.split(","))
        _be_gateway(settings, socket.socket(fileno=listener), lifeline)
        return
    lock = locked_for_server(settings.data)
    listener = bound_socket(settings).detach()
    for file in (lock, listener):
        os.set_inheritable(file, True)
    command = [sys.executable, "-m", "openmint", *sys.argv[1:]]
    arguments = [sys.executable, supervise.__file__, str(listener), str(lock), *command]
    os.execv(sys.executable, arguments)  # noqa: S606 - there is no shell, and none is wanted


def _be_gateway(settings: Settings, listener: socket.socket, lifeline: int) -> None:
    """Run the gateway; an error that isn't ours leaves with the code that has it started again."""
    from openmint.cli.gateway import run_gateway  # loads the web stack, which `serve` doesn't need

    threading.Thread(target=_end_without_keeper, args=(lifeline,), daemon=True).start()
    try:
        run_gateway(settings, listener)
    except OpenMintError:
        raise
    except Exception:  # the process's edge
        traceback.print_exc()
        sys.exit(supervise.CRASHED)


def _end_without_keeper(lifeline: int) -> None:
    """Nobody would start this process again, or free its port: it ends as if it had crashed."""
    os.read(lifeline, 1)
    os._exit(1)


def bound_socket(settings: Settings) -> socket.socket:
    """A listening socket. Raises ServiceError when the address can't be had."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # Only sockets that say TCP are sent from without delay by asyncio; else the second packet of
    # an answer waits for the client's delayed acknowledgement, 40 ms on Linux.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise ServiceError(
            f"can't listen on {settings.host}:{settings.port}: {error.strerror}; give another "
            "--port (0 takes a free one)"
        ) from None
    listener.listen(2048)
    listener.setblocking(False)
    return listener
