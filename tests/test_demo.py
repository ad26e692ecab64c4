"""The demo comes out right, run as its users run it, and leaves nothing behind. See test_demo_summary too."""

import asyncio
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from retry_scheduler.demo import rabbitmq_home, show
from retry_scheduler.demo.processes import ServerMissing
from tests.servers import skip_or_fail
from tests.test_private_servers import processes_of
from tests.waiting import eventually

PROJECT = Path(__file__).parents[1]

# Of the story: 46 invoices, of which 14 fail at least once.
COUNTS = {
    "invoices sent": 46,
    "succeeded at once": 32,
    "recovered after 1 retry": 6,
    "recovered after 2 retries": 3,
    "recovered after 3 retries": 2,
    "in manual review": 2,
    "quarantined": 1,
    "lost": 0,
    "duplicates": 0,
    "changed bodies": 0,
    "retries that came back": 24,
}


def test_without_rabbitmq_the_demo_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(rabbitmq_home, "SCRIPTS", tmp_path / "nowhere")

    code = show.run_demo(keep=False)

    shown = capsys.readouterr()
    assert code == 69
    assert "apt-get install --no-install-recommends rabbitmq-server" in shown.err
    assert not folder_in(shown.out).exists()


@pytest.mark.usefixtures("rabbitmq_is_installed")
async def test_the_demo_comes_out_right_beside_one_that_stays_and_takes_our_own_request(
    tmp_path: Path,
) -> None:
    output, kept_output = tmp_path / "alone", tmp_path / "kept"

    with demo(output) as alone, demo(kept_output, "--keep") as kept:
        code = await ended(alone, within=timedelta(seconds=90))
        await said(kept_output, "; echo\n\n", within=timedelta(seconds=60))
        command = re.findall(r"^curl -s -u .*?; echo$", kept_output.read_text(), re.DOTALL | re.MULTILINE)[0]
        answer = await asyncio.to_thread(subprocess.check_output, ["sh", "-c", command])
        await said(kept_output, "back on `orders`", "comes back as retry 1", "and succeeds")
        kept.send_signal(signal.SIGINT)
        kept_code = await ended(kept)

    assert (code, kept_code) == (0, 0), output.read_text()
    assert answer == b'{"routed":true}\n'
    for text in (output.read_text(), kept_output.read_text()):
        assert counts_in(text) == COUNTS
        assert re.search(r"lateness +p50 [\d.]+ ms, p99 [\d.]+ ms, never early", text)
        assert "Right: each invoice has come to one end" in text
        assert not re.search(r"[^\n -~]", text), "a control character, or one beyond ASCII"
        assert_nothing_is_left(text)


@pytest.mark.usefixtures("rabbitmq_is_installed")
@pytest.mark.parametrize(
    ("moment", "number"), [("PostgreSQL is up", signal.SIGTERM), ("comes back as retry 1", signal.SIGINT)]
)
async def test_a_signal_ends_the_demo_and_leaves_nothing(
    moment: str, number: signal.Signals, tmp_path: Path
) -> None:
    with demo(tmp_path / "output") as process:
        await said(tmp_path / "output", moment)

        process.send_signal(number)

        assert await ended(process) == 128 + number
        assert_nothing_is_left((tmp_path / "output").read_text())


@pytest.mark.usefixtures("rabbitmq_is_installed")
async def test_not_even_a_killed_demo_leaves_anything(tmp_path: Path) -> None:
    with demo(tmp_path / "output") as process:
        await said(tmp_path / "output", "stored in PostgreSQL")

        process.kill()

        folder = folder_in((tmp_path / "output").read_text())
        await eventually(
            lambda: not processes_of(folder) and not folder.exists(), within=timedelta(seconds=20)
        )


@pytest.fixture(scope="module")
def rabbitmq_is_installed() -> None:
    """Skip without RabbitMQ. The demo starts servers of its own, so the shared ones are not needed."""
    try:
        rabbitmq_home.find_program("rabbitmq-server")
    except ServerMissing as missing:
        skip_or_fail(missing)


@contextmanager
def demo(output: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run the demo without a terminal; what it says goes to the file `output`."""
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "retry_scheduler", "demo", *options],
            cwd=PROJECT,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait(timeout=10)


async def ended(process: "subprocess.Popen[bytes]", within: timedelta = timedelta(seconds=40)) -> int:
    """Return the exit code once the process has ended by itself."""
    await eventually(lambda: process.poll() is not None, within=within)
    return process.returncode


async def said(output: Path, *texts: str, within: timedelta = timedelta(seconds=40)) -> None:
    """Wait until the demo has said each of these, in this order."""
    pattern = re.compile(".*?".join(re.escape(text) for text in texts), re.DOTALL)
    await eventually(lambda: pattern.search(output.read_text()) is not None, within=within)


def folder_in(output: str) -> Path:
    """Return the temporary folder that the demo has named."""
    return Path(output.splitlines()[0].removeprefix("Starting private servers in "))


def assert_nothing_is_left(output: str) -> None:
    """Fail if a process of the demo still runs, or its folder is there."""
    folder = folder_in(output)
    assert folder.parent == Path(tempfile.gettempdir())
    assert processes_of(folder) == []
    assert not folder.exists()


def counts_in(output: str) -> dict[str, int]:
    """Return the counts of the summary."""
    lines = output.partition("Summary, counted from")[2].splitlines()
    found = (re.fullmatch(r"  ([a-z].*?) +(\d+)(   .*)?", line) for line in lines)
    return {match[1]: int(match[2]) for match in found if match}
