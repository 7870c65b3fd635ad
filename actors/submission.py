"""A command of this program on a cluster, from outside: submitted, followed and cancelled over HTTP, by Ray's job server on the head."""

import asyncio
import contextlib
import logging
import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from actors.cluster import check_address, offer_token
from pipeline.config import Job
from pipeline.errors import UserError

ROOT = Path(__file__).parent.parent
SHIPPED = ("cli.py", "pipeline", "actors")
CONFIG = "job.yaml"
SILENCE_SECONDS = 20  # of a log before a new connection is made


def submit(address: str, command: list[str], job: Job, config: str | None) -> str:
    """Ships the code of this installation, and has the head run a command of it. Returns the submission's id.

    Raises UserError for an address where no job server answers, and for options that mean nothing on another machine.
    """
    if job.address:
        raise UserError(f"--address {job.address} is given to {command[0]} too, but a submitted job joins the cluster it is submitted to; give it to submit alone.")
    # What is relative would lie in the directory that Ray unpacks the code to, and does not outlive the job.
    if command[0] != "eval" and not Path(job.output_dir or "").is_absolute():
        raise UserError(f"--output-dir is {job.output_dir}; for a submitted job allowed is an absolute path.")
    if job.storage and "://" not in job.storage and not Path(job.storage).is_absolute():
        raise UserError(f"--storage is {job.storage}; for a submitted job allowed is an absolute path or a URL.")
    with _server(address) as server, tempfile.TemporaryDirectory() as directory:
        for name in SHIPPED:
            source, target = ROOT / name, Path(directory, name)
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__")) if source.is_dir() else shutil.copy(source, target)
        if config:
            shutil.copy(config, Path(directory, CONFIG))
            command = [*command, "--config", CONFIG]  # the last one given counts
        return server.submit_job(entrypoint=shlex.join(["python", "cli.py", *command]), runtime_env={"working_dir": directory})


def follow(address: str, submission: str, write: Callable[[str], None]) -> tuple[int, str]:
    """Writes a job's log until it ends. Returns its exit code, and a sentence where the log does not tell the end.

    Raises UserError if the job server no longer answers; the job itself goes on.
    """
    with _server(address) as server:
        ended = asyncio.run(_write_log(server, submission, write))
    if ended.status == JobStatus.STOPPED:
        return 130, f"{submission} was cancelled; what is finished stays, and the same submit goes on."
    if ended.driver_exit_code is None:
        return 1, f"{submission} could not run: {ended.message}"
    code = ended.driver_exit_code
    return (code, "") if code >= 0 else (128 - code, f"{submission} was killed by signal {-code}.")  # as a shell counts


def goes_on(address: str, submission: str) -> str:
    """What to say of a job that nobody follows any longer."""
    mode = "RAY_AUTH_MODE=token " if os.environ.get("RAY_AUTH_MODE") == "token" else ""  # of which ray job does not think by itself
    return (f"{submission} goes on. To see it: {mode}ray job logs --follow --address {address} {submission}; "
            f"to stop it: sparse-expansion cancel --address {address} {submission}")


async def _write_log(server: JobSubmissionClient, submission: str, write: Callable[[str], None]) -> JobDetails:
    """A job takes hours, and what lies between drops idle connections, often without a word. A new connection gives the log from
    its beginning: what has been written is passed over."""
    written = 0
    while True:
        seen, whole, log = 0, False, server.tail_job_logs(submission)
        with contextlib.suppress(TimeoutError, aiohttp.ClientError, RuntimeError):
            while (text := await asyncio.wait_for(anext(log, None), SILENCE_SECONDS)) is not None:
                write(text[max(0, written - seen):])
                seen += len(text)
                written = max(written, seen)
            whole = True
        details = server.get_job_info(submission)
        if whole and details.status.is_terminal():
            return details
        await asyncio.sleep(1)


def cancel(address: str, submission: str) -> str:
    """Stops a job and waits until its processes have ended. Returns a sentence. Raises UserError for a job that is not there."""
    with _server(address) as server:
        try:
            details = server.get_job_info(submission)
        except RuntimeError:
            raise UserError(f"ID is {submission!r}, but {address} has no such job; allowed is what submit printed, or ray job list shows.") from None
        if details.status.is_terminal():
            return f"{submission} had already ended: {details.status.lower()}."
        server.stop_job(submission)
        while not server.get_job_info(submission).status.is_terminal():
            time.sleep(0.2)
    return f"{submission} is cancelled; what is finished stays, and the same submit goes on."


@contextlib.contextmanager
def _server(address: str) -> Iterator[JobSubmissionClient]:
    """The job server at an address of the form http://HEAD:8265. Raises UserError if there is none, or it does not take the token."""
    where = re.fullmatch(r"https?://([^/\s]+:\d+)/?", address)
    if not where:
        raise UserError(f"--address is {address!r}; allowed is http://HEAD:8265, the dashboard of a Ray head.")
    check_address(where[1])
    offer_token()
    logging.getLogger("ray.dashboard.modules.dashboard_sdk").setLevel(logging.WARNING)  # it names each upload
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # else a RAY_ADDRESS that is set would win over what is asked for
    try:
        yield JobSubmissionClient(address)
    except (AuthenticationError, OSError, RuntimeError) as error:  # OSError: those of requests are
        raise UserError(f"--address {address} does not answer as a Ray job server: {' '.join(str(error).split())[:300]}") from None
