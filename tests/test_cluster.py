"""A Ray cluster that is already there: joined by its address, and a job submitted to it."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, start_command
from tests.jobs import make_inputs, shard_hashes

RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.fixture(scope="module")
def head():
    """A head on this machine that asks for a token: its port, the port of its dashboard, which takes jobs, and the environment of its users."""
    port, dashboard = free_port(), free_port()
    environment = {**os.environ, "RAY_ADDRESS": "", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    command = [RAY, "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=2", "--disable-usage-stats",
               f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    for line in process.stdout:
        if "Ray runtime started" in line:
            break
    else:
        pytest.fail("no Ray head could be started")
    yield port, dashboard, environment
    process.terminate()
    process.communicate(timeout=60)


def test_address_and_submitted_job(head, tmp_path):
    """By --address from outside, and by ray job submit from the checkout: two ways to the same shards."""
    port, dashboard, environment = head
    options = [str(option) for option in make_inputs(tmp_path)]
    outside = start_command("run", *options, "--output-dir", tmp_path / "outside", "--address", f"127.0.0.1:{port}", "--json", cwd=tmp_path, env=environment)
    out, err = outside.communicate(timeout=200)
    assert outside.returncode == 0, err
    # As a fresh clone is: what a developer keeps in dotted folders (.venv, caches) is not part of it, and uploads are limited.
    shutil.copytree(ROOT, tmp_path / "clone", ignore=shutil.ignore_patterns(".*", "runs", "build", "dist", "__pycache__"))
    submitted = subprocess.run(
        [RAY, "job", "submit", "--address", f"http://127.0.0.1:{dashboard}", "--working-dir", str(tmp_path / "clone"), "--",
         sys.executable, "cli.py", "run", *options, "--output-dir", str(tmp_path / "submitted"), "--json"],
        capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    result = json.loads(next(line for line in submitted.stdout.splitlines() if line.startswith("{")))
    assert result["perplexity"] == json.loads(out.splitlines()[-1])["perplexity"]
    assert shard_hashes(tmp_path / "outside") == shard_hashes(tmp_path / "submitted")


def test_cluster_yaml_fits_rays_schema():
    import jsonschema
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    jsonschema.validate(cluster, schema)
    assert cluster["head_node_type"] in cluster["available_node_types"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(cluster | {"min_workers": 1}, schema)
