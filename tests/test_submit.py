"""A command on a cluster that is already there: joined by its address, or submitted to its head, followed and cancelled."""

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, replace
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import pytest

from tests.conftest import command, start_command
from tests.jobs import make_inputs, shard_hashes

# Random, so that where one of them turns up it is no coincidence.
SECRETS = {"HF_TOKEN": f"hf_{secrets.token_hex(16)}", "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20)}


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@dataclass
class Head:
    """On this machine, and asking for a token."""

    address: str
    jobs: str  # the address that takes them
    files: Path  # Ray's own: logs, what was shipped
    environment: dict[str, str]  # of its users

    def start(self, *arguments: str) -> subprocess.Popen:
        return start_command(*arguments, env=self.environment, cwd=self.files)

    def run(self, *arguments: str) -> subprocess.CompletedProcess:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=240)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def told(self) -> str:
        """All that Ray tells of its jobs."""
        script = ("from ray.job_submission import JobSubmissionClient\nimport sys\nclient = JobSubmissionClient(sys.argv[1])\n"
                  "for job in client.list_jobs():\n    print(job, client.get_job_info(job.submission_id) if job.submission_id else '')\n"
                  "    print(client.get_job_logs(job.submission_id) if job.submission_id else '')")
        return subprocess.run([sys.executable, "-c", script, self.jobs], capture_output=True, text=True, check=True, env=self.environment).stdout


@pytest.fixture(scope="module")
def head():
    port, dashboard = free_port(), free_port()
    binaries = Path(sys.executable).parent
    files = Path(tempfile.mkdtemp(prefix="head"))  # short: a socket's path has 107 characters at most
    environment = {**os.environ, **SECRETS, "RAY_ADDRESS": "", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32),
                   "PATH": f"{binaries}:{os.environ['PATH']}"}  # as in an active virtual environment
    process = subprocess.Popen(
        [binaries / "ray", "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=2", "--disable-usage-stats",
         f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}", f"--temp-dir={files}"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    for line in process.stdout:
        if "Ray runtime started" in line:
            break
    else:
        pytest.fail("no Ray head could be started")
    yield Head(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", files, environment)
    process.terminate()
    process.communicate(timeout=60)
    shutil.rmtree(files)


@pytest.fixture
def dropping(head):
    """An address of the head through which the first connection that follows a log falls silent, as a router's does that forgets it;
    and those connections."""
    target = int(head.jobs.rpartition(":")[2])
    tails: list[socket.socket] = []

    def relay(source: socket.socket, sink: socket.socket) -> None:
        silent = False
        with source, sink, contextlib.suppress(OSError):
            while data := source.recv(65536):
                if b"/logs/tail" in data:
                    tails.append(sink)
                if not silent:
                    sink.sendall(data)
                silent |= source in tails[:1] and b"Running entrypoint" in data

    def serve(server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                inner, outer = server.accept()[0], socket.create_connection(("127.0.0.1", target))
                for pair in ((inner, outer), (outer, inner)):
                    threading.Thread(target=relay, args=pair, daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, args=(server,), daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", tails


def test_submit_interrupt_cancel_and_submit_again(head, dropping, tmp_path):
    """By --address from outside, and submitted, with all that can happen to a submitted job in between: the same shards."""
    options = make_inputs(tmp_path)
    outside = head.run("run", *options, "--output-dir", tmp_path / "outside", "--address", head.address, "--json")
    assert outside.returncode == 0, outside.stderr
    (tmp_path / "job.yaml").write_text("seed: 0\n")
    job = ["run", *options, "--output-dir", tmp_path / "submitted", "--config", tmp_path / "job.yaml", "--json"]

    interrupted = head.start("submit", "--address", head.jobs, "--", *job)
    submitted = interrupted.stdout.readline().strip()
    assert re.fullmatch("raysubmit_[A-Za-z0-9]+", submitted)
    for line in interrupted.stdout:
        if line.startswith("["):  # the time and the job's first stage
            break
    interrupted.send_signal(signal.SIGINT)
    _, err = interrupted.communicate(timeout=60)
    assert interrupted.returncode == 130 and "Traceback" not in err
    assert f"{submitted} goes on." in err and f"sparse-expansion cancel --address {head.jobs} {submitted}" in err
    shown = re.search(r"To see it: RAY_AUTH_MODE=token (ray job logs .*);", err)[1]
    assert "Set here, but not shipped: AWS_SECRET_ACCESS_KEY, HF_TOKEN." in err
    cancelled = head.run("cancel", "--address", head.jobs, submitted)
    assert "Running entrypoint" in subprocess.run(shown.split(), capture_output=True, text=True, timeout=60, env=head.environment).stdout
    assert cancelled.returncode == 0 and f"{submitted} is cancelled; what is finished stays" in cancelled.stdout, cancelled.stderr

    address, tails = dropping
    again = head.run("submit", "--address", address, *job)
    assert again.returncode == 0, again.stdout + again.stderr
    assert len(tails) > 1, "the log's connection was not lost"
    lines = again.stdout.splitlines()
    assert lines[0].startswith("raysubmit_") and sum("Running entrypoint" in line for line in lines) == 1
    assert json.loads(lines[-1])["perplexity"] == json.loads(outside.stdout.splitlines()[-1])["perplexity"]
    assert shard_hashes(tmp_path / "outside") == shard_hashes(tmp_path / "submitted")

    shipped = {entry.name for package in head.files.glob("session_*/runtime_resources/working_dir_files/_ray_pkg_*") if package.is_dir() for entry in package.iterdir()}
    assert shipped - {"__pycache__"} == {"cli.py", "pipeline", "actors", "job.yaml"}
    seen = {"submit": err + again.stdout + again.stderr, "Ray's jobs": head.told()}
    assert submitted in seen["Ray's jobs"] and "Running entrypoint" in seen["Ray's jobs"]
    kept = [file for directory in (head.files, tmp_path) for file in directory.rglob("*") if file.is_file() and not file.is_symlink()]
    assert any(file.name.startswith("job-driver-") for file in kept)
    for name, secret in SECRETS.items():
        assert not [where for where, text in seen.items() if secret in text], f"{name} is told"
        assert not [file for file in kept if secret.encode() in file.read_bytes()], f"{name} is written"


@pytest.mark.slow
def test_exit_codes(head):
    """What the job itself finds wrong is its exit code; a job that is left alone, or has ended, can be cancelled."""
    failed = head.run("submit", "--address", head.jobs, "--", "eval", "--model", "/only/there", "--eval-dataset", "self")
    assert failed.returncode == 2, failed.stdout + failed.stderr
    assert "Error: --model /only/there is no directory" in failed.stdout
    left = head.run("submit", "--no-wait", "--address", head.jobs, "--", "eval", "--model", "/only/there", "--eval-dataset", "self")
    assert left.returncode == 0 and len(left.stdout.splitlines()) == 1
    for submitted, said in ((failed.stdout.splitlines()[0], "had already ended: failed."), (left.stdout.strip(), "")):
        cancelled = head.run("cancel", "--address", head.jobs, submitted)
        assert cancelled.returncode == 0 and submitted in cancelled.stdout and said in cancelled.stdout
    # The address given is the one that counts.
    unknown = replace(head, environment=head.environment | {"RAY_ADDRESS": "http://127.0.0.1:9"}).run("cancel", "--address", head.jobs, "raysubmit_none")
    assert unknown.returncode == 2 and "Error: ID is 'raysubmit_none', but" in unknown.stderr and len(unknown.stderr.splitlines()) == 1
    refused = replace(head, environment=head.environment | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}).run("cancel", "--address", head.jobs, "raysubmit_none")
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
    assert f"Error: --address {head.jobs} does not answer as a Ray job server: Authentication failed" in refused.stderr


RUN = "run --model /only/there --output-dir /shared/run"
CASES = {
    "no http": (f"--address 127.0.0.1:6379 {RUN}", "--address is '127.0.0.1:6379'; allowed is http://HEAD:8265"),
    "no port": (f"--address http://head {RUN}", "--address is 'http://head'; allowed is http://HEAD:8265"),
    "nobody there": (f"--address http://127.0.0.1:9 {RUN}", "--address 127.0.0.1:9 cannot be reached"),
    "no head": (f"--address {{server}} {RUN}", "--address {server} does not answer as a Ray job server"),
    "option's value": ("--address http://127.0.0.1:9 -- run --model demo --sparsity 2", "--sparsity is '2'; allowed is a fraction"),
    "option's name": (f"--address http://127.0.0.1:9 {RUN} --sparsety 0.5", "No such option: --sparsety"),
    "no such config": (f"--address http://127.0.0.1:9 {RUN} --config no.yaml", "--config no.yaml is no file on this machine"),
    "demo": ("--address http://127.0.0.1:9 demo", "'demo' cannot be submitted; allowed is run or plan or eval or sweep"),
    "relative output": ("--address http://127.0.0.1:9 run --model demo --output-dir a", "--output-dir is a; for a submitted job allowed is an absolute path"),
    "output elsewhere": ("--address http://127.0.0.1:9 run --model demo --output-dir s3://a/b", "--output-dir is s3://a/b; for a submitted job"),
    "default output": ("--address http://127.0.0.1:9 run --model demo", "--output-dir is None; for a submitted job allowed is an absolute path"),
    "relative storage": (f"--address http://127.0.0.1:9 {RUN} --storage a", "--storage is a; for a submitted job allowed is an absolute path"),
    "address twice": (f"--address http://127.0.0.1:9 {RUN} --address auto", "--address auto is given to run too"),
}


@pytest.fixture(scope="module")
def no_head():
    """Where another server answers."""
    with HTTPServer(("127.0.0.1", 0), type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_shipped(case, no_head, monkeypatch):
    """What can be found wrong here is: one sentence, exit code 2."""
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # which submit sets
    arguments, message = (text.replace("{server}", no_head) for text in CASES[case])
    outcome = command("submit", *arguments.split())
    assert outcome.code == 2 and message in outcome.err and outcome.out == ""
    assert "Traceback" not in outcome.err and ("Usage:" in outcome.err or len(outcome.err.splitlines()) == 1)


def test_what_is_a_secret(monkeypatch):
    from actors.secrets import secrets_here

    for name in list(secrets_here()):
        monkeypatch.delenv(name)
    given = SECRETS | {"HUGGING_FACE_HUB_TOKEN": "a", "AZURE_STORAGE_KEY": "b", "GOOGLE_APPLICATION_CREDENTIALS": "/c", "FSSPEC_S3_SECRET": "d"}
    for name, value in (given | {"AWS_PROFILE": "", "AWS_CA_BUNDLE": "/e", "HF_HOME": "/f"}).items():
        monkeypatch.setenv(name, value)
    assert secrets_here() == given
