"""The command line: what goes where, how it ends, and what each command prints."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import pytest

from gptx import __version__
from gptx.backends import TABLE
from gptx.cli import gptx as group
from gptx.cli import main
from gptx.errors import DeviceOutOfMemory
from gptx.generation import Model
from gptx.results import Result

GENERATE = ("generate", "-m", "shakespeare")
ENDLESS = (*GENERATE, "ROMEO:", "-n", "100000", "--overflow", "slide", "--ignore-eos")
STATISTICS = re.compile(
    r"\[prompt: \d+ tokens, [\d,]+ tokens per second \| output: \d+ tokens, .* \| "
    r"peak memory: .* \| seed: \d+ \| finish: (\w+)\]"
)
posix = pytest.mark.skipif(sys.platform == "win32", reason="signals and pipes of POSIX")


class Done(NamedTuple):
    """How a command ended."""

    code: Any
    out: str
    err: str


def run(*args: str, stdin: bytes = b"") -> Done:
    """Run `gptx args` in this process."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", newline="") for _ in range(2))
    with (
        mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), "utf-8")),
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as end,
    ):
        main(args)
    texts = []
    for stream in (out, err):
        stream.flush()
        stream.seek(0)
        texts.append(stream.read())
    return Done(end.value.code, *texts)


# A shell may start its background jobs with SIGINT ignored, which children inherit.
PROGRAM = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "from gptx.cli import main\n"
    "main()"
)


def start(
    *args: str | bytes, program: str = PROGRAM, stdout: int = subprocess.PIPE, **env: str
) -> subprocess.Popen[bytes]:
    """Start `gptx args` in a process of its own, with unbuffered pipes."""
    return subprocess.Popen(
        [sys.executable, "-c", program, *args],
        bufsize=0,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        env=os.environ | env,
    )


def read(process: subprocess.Popen[bytes], n: int) -> bytes:
    """`n` bytes of its standard output, as soon as they are there."""
    assert process.stdout is not None
    data = b""
    while len(data) < n:
        new = process.stdout.read(n - len(data))
        assert new, f"standard output ended after {data!r}"
        data += new
    return data


def error_lines(err: bytes) -> list[bytes]:
    assert b"Traceback" not in err
    assert b"Exception ignored" not in err
    return [line for line in err.splitlines() if line]


# gptx generate: the text and the figures


def test_standard_output_has_the_text_alone(shakespeare: Model) -> None:
    done = run(*GENERATE, "-n", "12", "ROMEO:")
    assert done.code == 0
    assert done.out == f"{shakespeare.generate('ROMEO:', max_tokens=12).text}\n"
    found = STATISTICS.fullmatch(done.err.strip())
    assert found
    assert found[1] == "length"


def test_quiet_says_nothing_on_standard_error() -> None:
    done = run(*GENERATE, "-n", "2", "-q", "ROMEO:")
    assert (done.code, done.err) == (0, "")
    assert done.out


def test_a_line_end_is_not_doubled(shakespeare: Model) -> None:
    assert shakespeare.generate("ROMEO:", max_tokens=1).text == "\n"
    assert run(*GENERATE, "-n", "1", "ROMEO:").out == "\n"


@pytest.mark.parametrize(
    ("args", "stdin"),
    [
        (("ROMEO:",), b""),
        (("-p", "ROMEO:"), b""),
        (("--prompt", "ROMEO:"), b""),
        (("--prompt=ROMEO:",), b""),
        (("-",), b"ROMEO:"),
        (("-",), b"ROMEO:\n"),
    ],
)
def test_ways_to_give_a_prompt(args: tuple[str, ...], stdin: bytes) -> None:
    done = run(*GENERATE, "-n", "1", "--json", *args, stdin=stdin)
    assert done.code == 0
    assert json.loads(done.out)["prompt"] == "ROMEO:"


@pytest.mark.parametrize(
    ("args", "stdin", "prompt"),
    [
        (("-",), b"one\n\n", "one\n"),
        (("-",), "ROMÉO\n".encode(), "ROMÉO"),
        (("-p", "-"), b"not read", "-"),
        (("--", "-n"), b"", "-n"),
    ],
)
def test_a_prompt_is_taken_to_the_letter(args: Any, stdin: bytes, prompt: str) -> None:
    assert json.loads(run(*GENERATE, "--json", "-n1", *args, stdin=stdin).out)["prompt"] == prompt


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        ((), "there is no prompt"),
        (("a", "-p", "b"), "the prompt is given twice"),
        (("-", "-p", "b"), "the prompt is given twice"),
        (("a", "b"), "unexpected extra argument"),
    ],
)
def test_one_prompt_is_expected(args: tuple[str, ...], problem: str) -> None:
    done = run(*GENERATE, *args)
    assert (done.code, done.out) == (2, "")
    assert problem in done.err


def test_json_is_one_object_with_the_whole_result(shakespeare: Model) -> None:
    done = run(*GENERATE, "-n", "5", "--json", "ROMÉO:")
    assert done.out.count("\n") == 1
    data = json.loads(done.out)
    assert set(data) == {"model", "backend", "dtype"} | {field.name for field in fields(Result)}
    expected = shakespeare.generate("ROMÉO:", max_tokens=5)
    for name in ("prompt", "text", "tokens", "finish_reason", "prompt_tokens", "logprobs"):
        assert data[name] == getattr(expected, name)
    about = ("shakespeare", "numpy", "float32")
    assert (data["model"], data["backend"], data["dtype"]) == about
    assert STATISTICS.fullmatch(done.err.strip())


def test_stop_strings(shakespeare: Model) -> None:
    whole = shakespeare.generate("ROMEO:", max_tokens=60).text
    assert whole is not None
    assert " of" in whole
    done = run(*GENERATE, "-n", "60", "--stop", "zzz", "--stop", " of", "ROMEO:")
    assert done.out == whole[: whole.find(" of")] + "\n"
    assert "finish: stop" in done.err


def test_a_seed_repeats_its_text() -> None:
    def text(seed: int) -> str:
        return run(*GENERATE, "-n", "20", "--temperature", "1", "-s", str(seed), "-q", "O").out

    assert text(3) == text(3)
    assert text(3) != text(4)


def test_the_seed_that_was_taken_repeats_the_text() -> None:
    first = json.loads(run(*GENERATE, "--temperature", "1.5", "--json", "-n", "20", "O").out)
    seed = str(first["seed"])
    again = run(*GENERATE, "--temperature", "1.5", "--seed", seed, "--json", "-n", "20", "O")
    assert json.loads(again.out)["tokens"] == first["tokens"]


def test_top_k_above_the_vocabulary_is_all_of_it() -> None:
    outs = {
        run(*GENERATE, "-n", "20", "--temperature", "1", "-s", "1", "--top-k", k, "O").out
        for k in ("0", "1024", "1000000")
    }
    assert len(outs) == 1


@pytest.mark.parametrize(
    ("args", "options"),
    [
        (("--threads", "1"), {}),
        (("-t", "1"), {}),
        (("--temperature", "1", "-s", "2", "--top-k", "3"), {"temperature": 1, "top_k": 3}),
        (("--temperature", "1", "-s", "2", "--top-p", "0.3"), {"temperature": 1, "top_p": 0.3}),
        (("--temperature", "1", "-s", "2", "--min-p", "0.2"), {"temperature": 1, "min_p": 0.2}),
        (("--repetition-penalty", "1.5"), {"repetition_penalty": 1.5}),
    ],
)
def test_options_mean_what_they_mean_in_python(
    shakespeare: Model, args: tuple[str, ...], options: Any
) -> None:
    done = run(*GENERATE, "-n", "20", "-q", *args, "O")
    assert done.code == 0
    assert done.out == f"{shakespeare.generate('O', max_tokens=20, seed=2, **options).text}\n"


@pytest.mark.parametrize(("backend", "dtype"), [("numpy", "float64"), ("mlx", "float16")])
def test_backend_and_dtype(shakespeare: Model, backend: str, dtype: str) -> None:
    if backend == "mlx":
        pytest.importorskip("mlx.core")
    done = run(*GENERATE, "-n", "3", "-b", backend, "--dtype", dtype, "--json", "ROMEO:")
    data = json.loads(done.out)
    assert (data["backend"], data["dtype"]) == (backend, dtype)
    assert data["text"] == shakespeare.generate("ROMEO:", max_tokens=3).text


def test_ignoring_the_end_of_a_text(folder: Callable[..., Path], shakespeare: Model) -> None:
    path = copy_of_shakespeare(shakespeare, folder())
    config = json.loads((path / "config.json").read_text())
    first = shakespeare.generate("ROMEO:", max_tokens=1).tokens[0]
    (path / "config.json").write_text(json.dumps(config | {"eos_token_id": first}))
    args = ("generate", "-m", str(path), "-n", "4", "--json", "ROMEO:")
    ended, ignored = (json.loads(run(*args, *more).out) for more in ((), ("--ignore-eos",)))
    assert (ended["finish_reason"], ended["tokens"]) == ("stop", [])
    assert (ignored["finish_reason"], len(ignored["tokens"])) == ("length", 4)


def copy_of_shakespeare(model: Model, folder: Path) -> Path:
    for path in model.files.folder.glob("*.*"):
        if path.suffix != ".py":
            shutil.copy(path, folder)
    return folder


# Processes of their own: pipes, signals, full disks


@posix
def test_text_comes_before_the_end(shakespeare: Model) -> None:
    expected = str(shakespeare.generate("ROMEO:", max_tokens=30)).encode()[:20]
    with start(*ENDLESS) as process:
        assert read(process, 20) == expected
        assert process.poll() is None
        process.kill()


@posix
def test_ctrl_c_keeps_the_text(shakespeare: Model) -> None:
    expected = str(shakespeare.generate("ROMEO:", max_tokens=30)).encode()[:20]
    with start(*ENDLESS) as process:
        text = read(process, 20)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert (text + out).startswith(expected)
    assert error_lines(err)[-1] == b"Interrupted"


# The signal comes after four tokens, wherever the process is by then.
INTERRUPTED = """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from gptx.engine import Generation
steps = Generation.__iter__
def interrupted(self):
    for n, step in enumerate(steps(self)):
        if n == 4:
            os.kill(os.getpid(), signal.SIGINT)
        yield step
Generation.__iter__ = interrupted
from gptx.cli import main
main()
"""


@posix
def test_ctrl_c_keeps_the_json(shakespeare: Model) -> None:
    whole = shakespeare.generate("ROMEO:", max_tokens=5)
    with start(*ENDLESS, "--json", program=INTERRUPTED) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    data = json.loads(out)
    assert data["finish_reason"] == "interrupted"
    assert len(data["tokens"]) in (4, 5)
    assert data["tokens"] == whole.tokens[: len(data["tokens"])]
    assert data["text"]
    assert str(whole).startswith(data["text"])
    statistics, last = error_lines(err)
    assert STATISTICS.fullmatch(statistics.decode())
    assert last == b"Interrupted"


def test_ctrl_c_while_writing_still_gives_the_figures(
    shakespeare: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two tokens is where it hits whoever reacts to what was printed."""
    pieces = [str(chunk) for chunk in shakespeare.stream("ROMEO:", max_tokens=3)]
    assert all(pieces)
    module = sys.modules["gptx.cli.generate"]
    real = module.click.echo
    written: list[str] = []

    def echo(message: str = "", **options: Any) -> None:
        real(message, **options)
        written.append(message)
        if len(written) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "click", SimpleNamespace(echo=echo))
    done = run(*GENERATE, "-n", "20", "ROMEO:")
    assert done.code == 130
    assert done.out == "".join(pieces) + "\n"
    assert "finish: interrupted" in done.err


@posix
def test_a_reader_that_leaves_ends_it_quietly() -> None:
    with start(*ENDLESS) as process:
        read(process, 5)
        assert process.stdout is not None
        process.stdout.close()
        _, err = process.communicate(timeout=120)
    assert process.returncode == 141
    assert len(error_lines(err)) <= 1


EVERY_OUTPUT = [
    (*GENERATE, "-n", "3", "-q", "O"),
    (*GENERATE, "-n", "3", "-q", "--json", "O"),
    ("info", "shakespeare"),
    ("backends", "--json"),
    ("download", "shakespeare"),
    ("--version",),
    ("--help",),
    ("generate", "--help"),
]


@posix
@pytest.mark.parametrize("args", EVERY_OUTPUT, ids=" ".join)
def test_nobody_reads(args: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with start(*args, stdout=writer) as process:
        os.close(writer)
        _, err = process.communicate(timeout=120)
    assert len(error_lines(err)) <= 1
    assert process.returncode == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("args", EVERY_OUTPUT, ids=" ".join)
def test_full_disk(args: tuple[str, ...]) -> None:
    with open("/dev/full", "wb") as full, start(*args, stdout=full.fileno()) as process:
        _, err = process.communicate(timeout=120)
    assert process.returncode == 74
    assert error_lines(err) == [b"Error: standard output: No space left on device"]


CLOSED = "import os; os.close({}); os.execv({!r}, [{!r}, '-c', {!r}, *__import__('sys').argv[1:]])"


@posix
@pytest.mark.parametrize(
    ("fd", "prompt", "codes"), [(0, "-", (65, 74)), (1, "O", (0, 74)), (2, "O", (0,))]
)
def test_a_closed_stream_is_no_traceback(fd: int, prompt: str, codes: tuple[int, ...]) -> None:
    program = CLOSED.format(fd, sys.executable, sys.executable, PROGRAM)
    with start(*GENERATE, "-n", "3", "-q", prompt, program=program) as process:
        out, err = process.communicate(timeout=120)
    assert len(error_lines(err)) <= 1
    assert process.returncode in codes
    assert bool(out) == (fd == 2)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_an_error_that_cannot_be_said_keeps_its_code() -> None:
    codes = []
    for args in (("generate",), (*GENERATE, "")):
        with open("/dev/full", "wb") as full:
            done = subprocess.run(
                [sys.executable, "-c", PROGRAM, *args], stderr=full, stdout=full, check=False
            )
        codes.append(done.returncode)
    assert codes == [2, 65]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_letters_that_the_terminal_lacks(encoding: str) -> None:
    prompt = "ROMÉO 漢"
    args = (*GENERATE, "-n", "3", "-q", "--json", "-p", prompt)
    with start(*args, PYTHONIOENCODING=encoding, PYTHONUTF8="0") as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0
    assert err == b""
    if encoding == "latin-1":
        assert json.loads(out.decode("latin-1"))["prompt"] == "ROMÉO ?"
    else:  # ASCII is what a process without a locale is told, and not what is there
        assert json.loads(out.decode())["prompt"] == prompt


def test_the_installed_command() -> None:
    command = shutil.which("gptx", path=os.path.dirname(sys.executable)) or shutil.which("gptx")
    if command is None:
        pytest.skip("the gptx command is not on the path")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"gptx, version {__version__}\n"


# gptx info, backends, download, --help


def test_info_of_the_embedded_model() -> None:
    done = run("info", "shakespeare")
    assert (done.code, done.err) == (0, "")
    assert "shakespeare: 2,915,328 parameters" in done.out
    assert re.search(r"^float32 +11\.7 MB +9\.2 kB +2\.4 MB$", done.out, re.MULTILINE)
    assert re.search(r"^h\.\*\.attn\.c_attn\.weight +\[192, 576\] +6 +663,552$", done.out, re.M)
    assert "stored as float16, all there" in done.out


def test_info_as_json(shakespeare: Model) -> None:
    data = json.loads(run("info", "shakespeare", "--json").out)
    assert data["parameters"] == 2_915_328
    assert data["weights_bytes"] == {
        "float32": 11_661_312,
        "float16": 5_830_656,
        "bfloat16": 5_830_656,
    }
    assert data["cache_bytes_per_token"]["float32"] == 2 * 6 * 192 * 4
    assert data["config"] == shakespeare.config.to_dict()
    assert data["stored"] == ["float16"]
    shapes = {name: list(shape) for name, shape in shakespeare.config.tensor_shapes().items()}
    assert data["tensors"] == shapes


def test_info_of_a_folder(folder: Callable[..., Path]) -> None:
    path = folder("untied", dtype="bfloat16", shards=2)
    done = run("info", str(path))
    assert done.code == 0
    assert str(path) in done.out
    assert "head of its own, tokenizer: none" in done.out
    assert "lm_head.weight" in done.out


def test_info_where_the_weights_are_missing(folder: Callable[..., Path]) -> None:
    path = folder()
    (path / "model.safetensors").unlink()
    done = run("info", str(path))
    assert (done.code, done.out) == (66, "")
    assert "model.safetensors is missing" in done.err


def test_info_where_the_weights_do_not_fit(folder: Callable[..., Path]) -> None:
    path = folder()
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"n_layer": 2}))
    done = run("info", str(path))
    assert (done.code, done.out) == (65, "")
    assert "h.1.ln_1.weight" in done.err


def test_backends_has_a_row_each() -> None:
    done = run("backends")
    assert done.code == 0
    rows = [line.split(maxsplit=2) for line in done.out.splitlines()]
    assert [row[0] for row in rows] == list(TABLE)
    assert {row[1] for row in rows} <= {"yes", "no"}
    assert rows[0][1] == "yes"


def test_backends_as_json() -> None:
    rows = json.loads(run("backends", "--json").out)
    assert [row["name"] for row in rows] == list(TABLE)
    assert rows[0]["available"] is True
    assert rows[0]["detail"].startswith("numpy ")


def test_backends_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gptx.backends.mlx_backend", None)
    mlx = json.loads(run("backends", "--json").out)[2]
    assert (mlx["name"], mlx["available"]) == ("mlx", False)
    assert "pip install 'mlx" in mlx["detail"]


def test_download_of_what_is_here(shakespeare: Model) -> None:
    assert run("download", "shakespeare").out == f"{shakespeare.files.folder}\n"


@pytest.mark.parametrize("command", [("download",), ("info",), ("generate", "O", "-m")])
def test_a_folder_that_does_not_exist(command: tuple[str, ...]) -> None:
    done = run(*command, "./no-such-folder")
    assert (done.code, done.out) == (66, "")
    assert "'./no-such-folder' does not exist" in done.err


@pytest.mark.parametrize("command", [("download",), ("info",), ("generate", "O", "-m")])
def test_offline_and_not_in_the_cache(command: tuple[str, ...], tmp_path: Path) -> None:
    args = (*command, "nobody/nothing")
    with start(
        *args, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path)
    ) as process:
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (66, b"")
    [line] = error_lines(err)
    assert b"gptx download nobody/nothing" in line


@pytest.mark.parametrize("args", [("download",), ("info",), ("nonsense",), ("generate", "--no")])
def test_usage_errors(args: tuple[str, ...]) -> None:
    done = run(*args)
    assert (done.code, done.out) == (2, "")
    [line] = done.err.splitlines()
    assert line.startswith("Error: ")
    assert re.search(r"\(see gptx( \w+)? --help\)$", line)


@pytest.mark.parametrize("bad", [("-n", "0"), ("--stop", ""), ("--temperature", "-1")])
def test_options_are_checked_before_a_model_is_looked_for(bad: tuple[str, ...]) -> None:
    assert run("generate", "-m", "./nowhere", "O", *bad).code == 2


def test_version() -> None:
    assert run("--version") == (0, f"gptx, version {__version__}\n", "")


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help(option: str) -> None:
    done = run(option)
    assert (done.code, done.err) == (0, "")
    for name in group.commands:
        assert re.search(rf"^  {name} ", done.out, re.MULTILINE)
    assert re.sub(r"\s+", " ", done.out).count("130 interrupted, 141 broken pipe") == 1


@pytest.mark.parametrize("name", group.commands)
def test_help_of_a_command(name: str) -> None:
    done = run(name, "--help")
    assert (done.code, done.err) == (0, "")
    assert f"Usage: gptx {name} [OPTIONS]" in done.out
    for parameter in group.commands[name].params:
        for option in parameter.opts:
            if option.startswith("-"):
                assert option in done.out


def test_without_a_command_there_is_the_help() -> None:
    done = run()
    text = done.out + done.err  # click 8.1 writes it to standard output, and ends with 0
    assert done.code in (0, 2)
    assert text.startswith("Usage: gptx")
    assert len(text.splitlines()) > 10


def test_memory_running_out_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    error = DeviceOutOfMemory("memory ran out on the numpy backend")
    module = sys.modules["gptx.cli.generate"]  # the package's attribute is the command
    monkeypatch.setattr(module, "load", mock.Mock(side_effect=error))
    assert run("generate", "-m", "shakespeare", "O") == (71, "", f"Error: {error}\n")
