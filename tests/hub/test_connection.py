"""gptx.hub.connection: errors of HTTP libraries, as they wrap them, and the settings behind."""

from __future__ import annotations

import ssl
from itertools import pairwise
from pathlib import Path

import pytest

from gptx.hub.connection import CERTIFICATE_VARIABLES, certificate_problem, explain, reason

HUB = "https://hub.example"
VARIABLE = CERTIFICATE_VARIABLES[0]


def chained(*errors: Exception) -> Exception:
    """Return the first error, raised from the second, and so on."""
    for error, cause in pairwise(errors):
        error.__cause__ = cause
    return errors[0]


def refused(message: str = "self-signed certificate") -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError(1, f"[SSL: CERTIFICATE_VERIFY_FAILED] {message}")
    error.verify_message = message
    return error


class Wrapper(Exception):
    """An error of urllib3, which holds its cause in an attribute or an argument."""

    def __init__(self, *args: object, reason: object = None) -> None:
        super().__init__(*args)
        self.reason = reason


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*CERTIFICATE_VARIABLES, "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "error",
    [
        refused(),
        chained(Exception("x"), Exception("y"), refused()),
        Wrapper("pool", reason=Wrapper(refused())),
        Wrapper(Wrapper("pool", reason=Wrapper(refused()))),
    ],
    ids=["itself", "causes", "reason", "argument"],
)
def test_refused_certificate(error: Exception) -> None:
    fault = explain(error, HUB)
    assert fault.reason == "certificate refused: self-signed certificate"
    assert f"set {VARIABLE} to a file" in fault.remedy


def test_context_is_followed_without_a_cause() -> None:
    error = ValueError("other")
    error.__context__ = refused("certificate has expired")
    assert explain(error, HUB).reason == "certificate refused: certificate has expired"


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file"), refused(), OSError("x")])
def test_file_without_certificates(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").touch()
    for path in (tmp_path / "missing", tmp_path / "empty"):
        monkeypatch.setenv(VARIABLE, str(path))
        assert explain(error, HUB).reason == f"{VARIABLE} is {path}, which holds no certificates"


def test_file_with_certificates(monkeypatch: pytest.MonkeyPatch) -> None:
    if not (path := ssl.get_default_verify_paths().cafile):
        pytest.skip("this system has no file of certificates")
    monkeypatch.setenv(VARIABLE, path)
    assert explain(refused(), HUB).reason.startswith("certificate refused")


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(2, "No such file", "/cache/blob"),
        OSError(28, "No space left on device", "/cache/blob"),
        ConnectionRefusedError(111, "refused"),
        TimeoutError("timed out"),
    ],
)
def test_other_errors_are_not_about_certificates(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "/nonexistent")
    assert certificate_problem(error) is None


@pytest.mark.parametrize(
    ("variable", "no_proxy", "is_named"),
    [
        ("HTTPS_PROXY", "", True),
        ("https_proxy", "", True),
        ("ALL_PROXY", "", True),
        ("HTTP_PROXY", "", False),
        ("HTTPS_PROXY", "hub.example", False),
    ],
)
def test_proxy(
    monkeypatch: pytest.MonkeyPatch, variable: str, no_proxy: str, is_named: bool
) -> None:
    monkeypatch.setenv(variable, "http://user:secret@proxy")
    monkeypatch.setenv("no_proxy", no_proxy)
    fault = explain(ConnectionRefusedError(111, "Connection refused"), HUB)
    assert fault.reason == "ConnectionRefusedError: Connection refused"
    assert (f"the proxy in {variable}" in fault.remedy) == is_named
    assert "secret" not in fault.remedy


@pytest.mark.parametrize("address", ["", "hub.example", "ftp://hub.example", "http://", "http://["])
def test_address(address: str) -> None:
    assert explain(OSError("x"), address).reason == f"HF_ENDPOINT is {address!r}"


def test_reason_is_that_of_the_first_error() -> None:
    error = chained(Exception("pool"), Exception("retries"), ConnectionResetError(104, "reset"))
    assert reason(error) == "ConnectionResetError: reset"
