"""Log lines are JSON, and no key gets into one."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from openmint.observe.logs import configure_logs, redact_text

KEY = "tml-om_0a1b2c_verysecretpart"


@pytest.fixture
def json_logs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("OPENMINT_LOG_FORMAT", "json")
    handlers, level = logging.root.handlers[:], logging.root.level
    configure_logs()
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    structlog.reset_defaults()


@pytest.mark.usefixtures("json_logs")
def test_a_line_is_json_with_level_time_and_fields(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs()
    structlog.get_logger("room").warning("something_happened", request_id="r-1")
    line = json.loads(capsys.readouterr().err)
    assert line["event"] == "something_happened"
    assert (line["level"], line["request_id"]) == ("warning", "r-1")
    assert line["timestamp"].endswith("Z")


@pytest.mark.usefixtures("json_logs")
def test_keys_are_redacted_wherever_they_stand(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs()
    log = structlog.get_logger("room")
    log.info("fields", api_key=KEY, nested={"Authorization": KEY}, text=f"sent {KEY}", many=[KEY])
    try:
        raise ValueError(f"refused {KEY}")
    except ValueError as error:
        log.error("failed", exc_info=error)
    logging.getLogger("library").warning("Bearer %s", KEY)
    written = capsys.readouterr().err
    assert "verysecretpart" not in written
    assert len(written.splitlines()) == 3


def test_a_redacted_key_keeps_its_public_id() -> None:
    assert redact_text(KEY) == "tml-om_0a1b2c_[redacted]"


def test_an_unknown_level_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENMINT_LOG_LEVEL", "chatty")
    with pytest.raises(ValueError, match="OPENMINT_LOG_LEVEL"):
        configure_logs()
