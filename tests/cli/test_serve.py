"""`gptx serve`: options and errors before the server listens."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gptx.server.settings import Settings
from tests.support.cli import run


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["-m", "shakespeare", "--timeout", "-1"], 2, "--timeout is -1.0"),
        (["-m", "shakespeare", "--budget", "0"], 2, "--budget is 0.0"),
        (["-m", "shakespeare", "--send-timeout", "nan"], 2, "--send-timeout is nan"),
        (["-m", "shakespeare", "--api-key", ""], 2, "--api-key is empty"),
        (["-m", "shakespeare", "--api-key-file", "absent"], 66, "absent does not exist"),
        (["-m", "shakespeare", "--port", "70000"], 2, "70000"),
        (["-m", "/no/such/model"], 66, "/no/such/model"),
    ],
)
def test_errors_before_the_server_listens(args: list[str], code: int, message: str) -> None:
    result = run("serve", *args)
    assert result.code == code
    assert message in result.err


@pytest.mark.parametrize(
    ("args", "hosts"),
    [
        ([], ("127.0.0.1",)),
        (["--host", "localhost", "--allowed-host", "a.example"], ("localhost", "a.example")),
        (["--api-key", "k"], ()),
        (["--host", "0.0.0.0"], ()),
        (["--host", "0.0.0.0", "--allowed-host", "a.example"], ("0.0.0.0", "a.example")),
    ],
)
def test_hosts_are_checked_on_loopback_without_a_key(
    monkeypatch: pytest.MonkeyPatch, args: list[str], hosts: tuple[str, ...]
) -> None:
    def stop(gate: object, settings: Settings, **address: object) -> None:
        found.append(settings.hosts)
        raise KeyboardInterrupt

    found: list[tuple[str, ...]] = []
    monkeypatch.setattr("gptx.server.listener.make_listener", stop)
    run("serve", "-m", "shakespeare", *args)
    assert found == [hosts]


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("gptx.server.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    result = run("serve", "-m", "shakespeare")
    assert result.code == 2
    assert "pip install '.[serve]'" in result.err


def test_an_empty_file_of_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# none\n")
    result = run("serve", "-m", "shakespeare", "--api-key-file", str(file))
    assert result.code == 2
    assert "has no key" in result.err
