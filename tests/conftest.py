"""What every test shares: quiet libraries, the command line in this process, reference data where it lies beside the repository."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

# Before anything imports them: no network is tried, progress bars of libraries stay out of the output.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

ROOT = Path(__file__).parent.parent


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        return json.loads(self.out.strip().splitlines()[-1])


def start_command(*arguments: str, **options) -> subprocess.Popen:
    """The command line in a process of its own."""
    # A suite that runs in the background ignores SIGINT, and so would its children.
    return subprocess.Popen([sys.executable, str(ROOT / "cli.py"), *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options)


def command(*arguments: str) -> Outcome:
    """The command line in this process, which saves its start."""
    from cli import app

    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)


def run_job(*arguments: str) -> dict:
    """A run that must succeed; returns what --json prints."""
    outcome = command("run", *arguments, "--json")
    assert outcome.code == 0, outcome.err
    return outcome.json


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference windows and models beside the repository; not shipped."""
    directory = ROOT.parent / "shared"
    if not (directory / "parity").is_dir():
        pytest.skip("the reference data (../shared) is not here")
    return directory


@pytest.fixture(scope="module")
def one_ray():
    """One Ray for all jobs of a module's tests in this process; each would else start its own."""
    from actors.cluster import connected

    with connected(None, verbose=False):
        yield


@pytest.fixture(scope="session")
def job(tmp_path_factory) -> list[str]:
    """The options of a small job, without --output-dir."""
    from tests.jobs import make_inputs

    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def undisturbed(job, tmp_path_factory) -> tuple[Path, dict]:
    """That job's directory when nothing went wrong, to be left as it is, and its result."""
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    return directory, run_job(*job, "--output-dir", directory)
