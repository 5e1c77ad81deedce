"""The gateway process: the web service over its parts, and the workers that it keeps alive.

It is started, and started again, by `cli/supervise.py`. SIGTERM: requests in flight, workers,
catalogue. A second signal ends the process at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import logging
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import structlog
import uvicorn

from openmint import __version__
from openmint.api.app import create_app
from openmint.api.measure import Measure
from openmint.catalog.catalog import Catalog
from openmint.catalog.database import shown
from openmint.cli.data_folder import ADMIN_KEY_FILE, opened_catalog, write_admin_key
from openmint.cli.output import console
from openmint.cluster.process import WorkerProcess, start_worker
from openmint.cluster.worker_client import WorkerClient
from openmint.config import Settings
from openmint.errors import InvalidRequest, OpenMintError, ServiceError
from openmint.models.embedded import EMBEDDED_BASE, install_client_files, resolve_base
from openmint.observe.logs import configure_logs
from openmint.observe.metrics import Metrics
from openmint.service.gateway import Gateway, build_gateway
from openmint.service.orders import CODEC
from openmint.service.routing import ROUTINGS
from openmint.service.workers import Workers
from openmint.store.opening import open_store
from openmint.types import Tenant

log = structlog.get_logger(__name__)

GRACE_SECONDS = 10
"""How long requests in flight may go on after the first signal."""
RESTART_SECONDS, MAX_RESTART_SECONDS = 0.1, 60.0
WATCH_SECONDS = 1.0
DEFAULT_TENANT = Tenant("default")

Place = tuple[str, int]
"""Of a worker: its base as in the settings, and which of its workers it is."""


def run_gateway(settings: Settings, listener: socket.socket) -> None:
    """Serve until a signal. Raises InvalidRequest for settings that can't work, Conflict when
    another server uses the database, ServiceError when a base doesn't load."""
    configure_logs()
    _check_bases(settings)
    with opened_catalog(settings, create=True) as catalog:
        catalog.claim()
        key_note = ensure_key(settings, catalog)
        url = url_of(settings.host, listener)
        _say_start(settings, url, key_note)
        asyncio.run(Service(settings, catalog, listener, url).run())
    console.print("stopped")


class Service:
    """One running gateway with its workers."""

    def __init__(
        self, settings: Settings, catalog: Catalog, listener: socket.socket, url: str
    ) -> None:
        self._settings, self._listener, self._url = settings, listener, url
        self._workers = Workers(len(settings.bases), ROUTINGS[settings.service.routing])
        self._catalog = catalog
        self._clients: dict[Place, WorkerClient] = {
            (base, replica): WorkerClient(replica)
            for base in settings.bases
            for replica in range(settings.replicas)
        }
        self._processes: dict[Place, WorkerProcess] = {}
        self._expect_bases()
        self._metrics = Metrics(__version__)
        self._metrics.watch_workers(
            lambda: [(c.name, c.alive, c.stats) for c in self._workers.all()]
        )
        store = open_store(settings.store_url, settings.data)
        store.start()
        self._gateway: Gateway = build_gateway(settings, catalog, store, self._workers)
        self._gateway.probes.counter = self._metrics
        self._gateway.watching.counter = self._metrics
        self._metrics.watch_futures(self._gateway.futures.num_pending)
        self._stopping = asyncio.Event()
        self._failure: OpenMintError | None = None

    def _expect_bases(self) -> None:
        """Let clients ask bases that an earlier process had; what they ask waits."""
        for (base, _), client in self._clients.items():
            if (known := self._catalog.known_base(base)) is not None:
                client.expect(CODEC.decode(known))
                self._workers.add(client)

    async def run(self) -> None:
        """Returns after an orderly stop. Raises the error that kept a base from loading."""
        server = _uvicorn_server(self._gateway, self._metrics)
        self._catch_signals(server)
        loader = asyncio.create_task(self._load_bases(server), name="workers")
        try:
            await server.serve(sockets=[self._listener])
        except SystemExit:  # uvicorn's way to say that the application failed to start
            self._failure = ServiceError("the HTTP service didn't start; the log says why")
        self._stopping.set()
        loader.cancel()
        await asyncio.gather(loader, return_exceptions=True)
        await asyncio.gather(*(process.stop() for process in self._processes.values()))
        await self._gateway.training.close()
        if self._failure:
            raise self._failure

    def _catch_signals(self, server: uvicorn.Server) -> None:
        def stop() -> None:
            if self._stopping.is_set():
                os._exit(1)
            log.info("stopping", grace_seconds=GRACE_SECONDS)
            self._stopping.set()
            server.should_exit = True

        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop)

    async def _load_bases(self, server: uvicorn.Server) -> None:
        """Load all bases at once; then keep a worker alive behind each of them."""
        try:
            await asyncio.gather(*map(self._start, self._clients))
        except OpenMintError as error:
            self._failure = error
            server.should_exit = True
            return
        except Exception as error:  # a task's edge: without its bases the service is no use
            log.error("base_not_loaded", exc_info=error)
            self._failure = ServiceError(f"a base could not be loaded: {error}")
            server.should_exit = True
            return
        # What stays for good needn't be looked at again: a full collection took 0.06 s.
        gc.collect()
        gc.freeze()
        _say_ready(self._settings, self._url)
        watches = map(self._end_silent, self._clients)
        await asyncio.gather(*map(self._keep_alive, self._clients), *watches)

    async def _start(self, place: Place) -> None:
        started_at, (base, replica) = time.monotonic(), place
        client, num_runs = self._clients[place], 0
        process = self._processes[place] = await start_worker(base, self._settings, client)
        client.observer, client.meter = self._metrics, self._gateway.meter
        client.records = self._gateway.route_records
        info = process.base
        if replica:
            self._workers.add(client)
        else:
            install_client_files(Path(info.directory), info.name, self._settings.data / "client")
            self._workers.add(client)  # from now on the service says that it is ready
            num_runs = await self._gateway.recovery.resume(info, process.ready.logged)
            await asyncio.to_thread(self._catalog.remember_base, base, CODEC.encode(info))
        seconds = time.monotonic() - started_at
        log.info(
            "base_resident",
            base=client.name,
            digest=info.digest,
            seconds=round(seconds, 2),
            resumed_runs=num_runs,
        )
        what = f"{info.architecture}, {info.num_params / 1e6:.0f} M parameters, {info.dtype}"
        console.print(f"  resident    {client.name} ({what}, {info.device}) after {seconds:.1f} s")
        if num_runs:
            console.print(f"  resumed     {num_runs} training runs on {info.name}")

    async def _end_silent(self, place: Place) -> None:
        """Kill a worker that hangs; `_keep_alive` starts the next one.

        Silence is counted in looks, so that a gateway that was itself stopped blames nobody.
        """
        heard_at, silent_seconds = 0.0, 0.0
        while not self._stopping.is_set():
            await asyncio.sleep(WATCH_SECONDS)
            worker = self._processes[place]
            if not worker.client.alive or worker.client.heard_at_seconds != heard_at:
                heard_at, silent_seconds = worker.client.heard_at_seconds, 0.0
                continue
            silent_seconds += WATCH_SECONDS
            if silent_seconds > self._settings.service.worker_silence_seconds:
                log.error("worker_silent", base=worker.client.name, seconds=silent_seconds)
                with contextlib.suppress(ProcessLookupError):  # it ended by itself
                    worker.process.kill()

    async def _keep_alive(self, place: Place) -> None:
        pause_seconds = RESTART_SECONDS
        while True:
            code = await self._processes[place].process.wait()
            if self._stopping.is_set():
                return
            name = self._clients[place].name
            log.error("worker_died", base=name, exit_code=code, restart_in_seconds=pause_seconds)
            self._metrics.worker_restarts.labels(name).inc()
            await asyncio.sleep(pause_seconds)
            try:
                await self._start(place)
                pause_seconds = RESTART_SECONDS
            except Exception as error:  # a task's edge: whatever it was may pass
                log.error("worker_restart_failed", base=name, exc_info=error)
                pause_seconds = min(2 * pause_seconds, MAX_RESTART_SECONDS)


def ensure_key(settings: Settings, catalog: Catalog) -> str:
    """Where a key can be found; on a loopback address the first start makes an admin key.

    Raises InvalidRequest when there is no key and the address can be reached from elsewhere.
    """
    path = settings.data / ADMIN_KEY_FILE
    if catalog.has_keys():
        return str(path) if path.is_file() else "(made with `openmint keys create`)"
    if not is_loopback(settings.host):
        raise InvalidRequest(
            f"{settings.host} can be reached from other machines and no API key exists; first run "
            f"`openmint keys create --data {settings.data} --tenant NAME --role admin`"
        )
    key, _ = catalog.create_key(DEFAULT_TENANT, "admin", note="made by the first start")
    return f"{write_admin_key(settings.data, key)} (new)"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Server(uvicorn.Server):
    """Leaves signals to `Service`, which stops the workers too."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _uvicorn_server(gateway: Gateway, metrics: Metrics) -> uvicorn.Server:
    app = create_app(gateway)
    app.state.metrics = metrics
    config = uvicorn.Config(
        Measure(app, metrics),
        http="httptools",  # the strictest parser of those that uvicorn can use
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
        timeout_keep_alive=75,
    )
    # A request cut off by the grace period is what the operator asked for, not an error.
    logging.getLogger("uvicorn.error").addFilter(_as_warning)
    return _Server(config)


def _as_warning(record: logging.LogRecord) -> bool:
    if "graceful shutdown exceeded" in record.msg:
        record.levelno, record.levelname = logging.WARNING, "WARNING"
    return True


def _check_bases(settings: Settings) -> None:
    """Refuse folders that can't be bases before anything starts. Converts nothing."""
    if not settings.bases:
        raise InvalidRequest("give at least one --base")
    names = [
        base if base == EMBEDDED_BASE else resolve_base(base, settings.data).name
        for base in settings.bases
    ]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise InvalidRequest(
            f"two bases are called {twice[0]!r}, the name that clients ask for; rename a folder"
        )


def url_of(host: str, listener: socket.socket) -> str:
    port = listener.getsockname()[1]
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host  # noqa: S104 - compared, not bound
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


def _say_start(settings: Settings, url: str, key_note: str) -> None:
    console.print(f"[bold]OpenMinT {__version__}[/bold]")
    console.print(f"  listening   {url}")
    console.print(f"  data        {settings.data.resolve()}")
    if settings.database_url:
        console.print(f"  catalogue   {shown(settings.database_url)}")
    if settings.store_url:
        console.print(f"  store       {settings.store_url}")
    console.print(f"  API key     {key_note}")
    for base in settings.bases:
        first = base == EMBEDDED_BASE and not (settings.data / "bases" / base).exists()
        note = " (first start: it is converted once, about half a minute)" if first else ""
        console.print(f"  loading     {base}{note}")


def _say_ready(settings: Settings, url: str) -> None:
    key_file = settings.data.resolve() / ADMIN_KEY_FILE
    key = f"$(cat {key_file})" if key_file.is_file() else "<your key>"
    console.print("[green]ready[/green]; in another terminal:")
    console.print(f"  export TINKER_BASE_URL={url} TINKER_API_KEY={key}")
    console.print(f"  export OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY=$TINKER_API_KEY")
    console.print(f"  cd {settings.data.resolve() / 'client'}   # tokenizers by name, offline")
