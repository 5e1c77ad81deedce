"""Commands that talk to a running server: where it is, which key to use, what its errors mean."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from openmint import errors
from openmint.cli.output import fail

TIMEOUT_SECONDS = 600.0
PAGE_ITEMS = 200
ERROR_OF_STATUS: dict[int, type[errors.OpenMintError]] = {
    400: errors.InvalidRequest,
    401: errors.Unauthenticated,
    403: errors.Forbidden,
    404: errors.NotFound,
    409: errors.Conflict,
    410: errors.Gone,
    412: errors.Conflict,
    413: errors.TooLarge,
    415: errors.UnsupportedFormat,
    422: errors.InvalidRequest,
    429: errors.LimitReached,
}

UrlOption = Annotated[
    str, typer.Option("--url", envvar="OPENMINT_URL", help="Address of the server.")
]
KeyOption = Annotated[
    str,
    typer.Option(
        "--key",
        envvar=["OPENMINT_API_KEY", "TINKER_API_KEY"],
        help="API key; otherwise the one in DATA/admin.key.",
        show_envvar=True,
        show_default=False,
    ),
]
DataOption = Annotated[
    Path, typer.Option("--data", envvar="OPENMINT_DATA", help="Data folder of the server.")
]
FolderOption = Annotated[
    Path | None, typer.Option("--data", help="Data folder of the server; default openmint-data.")
]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", exists=True, dir_okay=False, help="Settings file (TOML).")
]
"""Of commands that read the settings, as `serve` does: the folder may stand there too."""
DEFAULT_URL, DEFAULT_DATA = "http://127.0.0.1:8411", Path("openmint-data")


@dataclass(frozen=True, slots=True)
class Remote:
    """Calls of one server with one key."""

    client: httpx.Client
    data: Path
    """The server's data folder, if it is on this machine."""

    def get(self, path: str, **params: Any) -> Any:
        return self.send("GET", path, params=_present(params))

    def take(self, path: str, limit: int, **params: Any) -> list[Any]:
        """The first `limit` items of a paged list."""
        items: list[Any] = []
        cursor: str | None = None
        while len(items) < limit:
            size = min(limit - len(items), PAGE_ITEMS)
            page = self.get(path, **params, limit=size, cursor=cursor)
            items += page["items"]
            cursor = page["next_cursor"]
            if not cursor:
                break
        return items

    def post(self, path: str, body: dict[str, Any], *, if_match: int | None = None) -> Any:
        return self._send_body("POST", path, body, if_match)

    def put(self, path: str, body: dict[str, Any], *, if_match: int | None = None) -> Any:
        return self._send_body("PUT", path, body, if_match)

    def send(self, method: str, path: str, **options: Any) -> Any:
        """The JSON answer, or None. Raises the error of `openmint.errors` that the status stands
        for."""
        response = self.client.request(method, path, **options)
        check(response)
        return response.json() if response.content else None

    def _send_body(self, method: str, path: str, body: dict[str, Any], if_match: int | None) -> Any:
        headers = {} if if_match is None else {"If-Match": f'"{if_match}"'}
        return self.send(method, path, json=_present(body), headers=headers)


def check(response: httpx.Response) -> None:
    """Raises unless the answer is a success; the message is the server's own."""
    if response.is_success:
        return
    response.read()
    kind = ERROR_OF_STATUS.get(response.status_code, errors.ServiceError)
    raise kind(_message_of(response))


@contextmanager
def connect(
    url: UrlOption = DEFAULT_URL, key: KeyOption = "", data: DataOption = DEFAULT_DATA
) -> Iterator[Remote]:
    """A connection to the server. Leaves with exit code 1 when nothing answers there."""
    headers = {"Authorization": f"Bearer {key or key_in(data)}"}
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT_SECONDS) as client:
            yield Remote(client, data)
    except httpx.TransportError as error:
        fail(f"no answer from {url} ({error}); start it with `openmint serve`, or give --url")


def with_remote(command: Callable[..., None]) -> Callable[..., None]:
    """The command with options that say where its server is and which key to use, at the end of its
    own; it gets the connection before all else."""
    signature = inspect.signature(command, eval_str=True)
    _, *own = signature.parameters.values()
    places = inspect.signature(connect, eval_str=True).parameters.values()

    @wraps(command)
    def connected(**given: Any) -> None:
        where = {place.name: given.pop(place.name) for place in places}
        with connect(**where) as remote:
            command(remote, **given)

    parameters = [*own, *places]
    connected.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    connected.__annotations__ = {each.name: each.annotation for each in parameters}
    return connected


def key_in(data: Path) -> str:
    """The key that the first start of a local server wrote. Raises Unauthenticated without one."""
    path = data / "admin.key"
    try:
        return path.read_text().strip()
    except OSError:
        raise errors.Unauthenticated(
            f"no API key: give --key or set OPENMINT_API_KEY; there is no {path} to read one from"
        ) from None


def _message_of(response: httpx.Response) -> str:
    try:
        body = response.json()
    except ValueError:
        return f"{response.status_code} from {response.url}"
    error = body.get("error")
    message = error.get("message") if isinstance(error, dict) else body.get("detail")
    return str(message or f"{response.status_code} from {response.url}")


def _present(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
