"""`unetpp doctor`: is everything there that a night needs? A line for each thing, the fix where something is wrong.

Every check is a small real act: an object is written, written again, read, listed and deleted; a cluster is asked for
its version and its free CPUs; the current model is loaded.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from typing import Any, Literal, NamedTuple

import httpx
from rich.console import Console
from rich.markup import escape

from flows.config import DoctorConfig
from flows.jobs_api import RayJobs
from jobs import registry, storage
from jobs.contract import ExitCode
from jobs.models import is_there
from unetpp.errors import UnetppError

MAX_SKEW_S = 60.0
TIMEOUT_S = 20.0
FIXES = {
    "input": "mend --input, AWS_ENDPOINT_URL or the credentials, or take a place that can be read",
    "output": "mend --output, AWS_ENDPOINT_URL or the credentials, or take a place that can be written",
    "model": "mend --models, AWS_ENDPOINT_URL or the credentials",
}
STYLES = {"ok": "green", "wrong": "bold red", "not asked": "dim"}


class Finding(NamedTuple):
    """One thing looked at; `fix` says what to do where it is wrong."""

    what: str
    state: Literal["ok", "wrong", "not asked"]
    seen: str
    fix: str = ""


class _Wrong(Exception):
    """What was seen, and the fix."""


def run(config: DoctorConfig) -> int:
    """Look at everything, say what was seen, and return the exit code: 0 where nothing is wrong, else 1."""
    console, num_wrong = Console(emoji=False), 0
    for finding in examine(config):
        num_wrong += finding.state == "wrong"
        mark = f"[{STYLES[finding.state]}]{finding.state:>9}[/]"
        console.print(f"{mark}  [bold]{finding.what}[/]  {escape(finding.seen)}", highlight=False, soft_wrap=True)
        if finding.fix:
            console.print(f"           fix: {escape(finding.fix)}", highlight=False, soft_wrap=True)
    words = "nothing is wrong" if not num_wrong else f"{num_wrong} thing(s) wrong"
    console.print(f"[bold]{words}[/]")
    return int(ExitCode.OTHER if num_wrong else ExitCode.DONE)


def examine(config: DoctorConfig) -> Iterator[Finding]:
    """Look at one thing after the other."""
    address = config.ray or os.environ.get("RAY_API_SERVER_ADDRESS")
    api = config.prefect or os.environ.get("PREFECT_API_URL")
    yield _check("input", config.input, _input, "--input")
    yield _check("output", config.output, _output, "--output")
    yield _check("clock", _store_url(config), _clock, "an s3:// place")
    yield _check("disk", config.free_gb, _disk, "--free-gb")
    yield _check("model", config.models, _model, "--models")
    yield _check("ray", address, lambda at: RayJobs(at).version(), "--ray or RAY_API_SERVER_ADDRESS")
    yield _check("ray resources", address, lambda at: _resources(RayJobs(at)), "--ray or RAY_API_SERVER_ADDRESS")
    yield _check("gpus", config.gpus or None, lambda number: _gpus(number, address), "--gpus")
    yield _check("prefect", api, _prefect, "--prefect or PREFECT_API_URL")
    yield _check("work pool", api, lambda at: _work_pool(at, config.work_pool), "--prefect or PREFECT_API_URL")
    yield _check("deployments", api, lambda at: _deployments(at, config.deployments), "--prefect or PREFECT_API_URL")
    yield _check("automations", api, _automations, "--prefect or PREFECT_API_URL")


def _check(what: str, subject: Any, look: Callable[[Any], str], asked_by: str) -> Finding:
    if subject is None:
        return Finding(what, "not asked", f"give {asked_by}")
    try:
        return Finding(what, "ok", look(subject))
    except _Wrong as wrong:
        return Finding(what, "wrong", *map(str, wrong.args))
    except UnetppError as error:
        return Finding(what, "wrong", str(error), FIXES.get(what, ""))  # most of these sentences say what to do
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return Finding(
            what, "wrong", f"{subject} does not answer ({type(error).__name__})", "start it, or mend its address"
        )


# ------------------------------------------------------------------------------------------ stores and disk


def _input(uri: str) -> str:
    place = storage.canonical(uri)  # some stores have an empty object for a folder, with a slash at its end
    if (found := storage.find(place)) is not None:
        storage.read_range(place, 0, min(1, found.size_bytes), found.etag)
        return f"{uri}: found, and read, {found.size_bytes} bytes"
    for entry in storage.list_objects(place):
        content = storage.read_bytes(storage.join(place, entry.key), entry.etag)
        return f"{uri}: listed, and {entry.key} read, {len(content)} bytes"
    raise _Wrong(f"{uri} is empty", "put images there, or mend --input")


def _output(uri: str) -> str:
    root = storage.canonical(uri)
    probe, content = storage.join(root, storage.SCRATCH, f"doctor-{uuid.uuid4().hex}"), uuid.uuid4().bytes
    try:
        if not storage.refuses_overwrites(root):
            raise _Wrong(
                f"{uri}: a second put-if-absent of one name was accepted",
                "use a store that honours If-None-Match, or set predict.single_writer and start one run at a time",
            )
        storage.write_bytes(probe, content)
        if storage.read_bytes(probe) != content:
            raise _Wrong(f"{uri}: what was written is not what was read", "look after the store")
        listed = {entry.key for entry in storage.list_objects(storage.join(root, storage.SCRATCH))}
        if not any(key.endswith(probe.rpartition("/")[2]) for key in listed) and storage.is_remote(root):
            raise _Wrong(f"{uri}: a new object is not listed", "use a store with consistent listings")
    finally:
        storage.delete(probe)
    if storage.exists(probe):
        raise _Wrong(f"{uri}: an object cannot be deleted", "allow s3:DeleteObject below .tmp/")
    return f"{uri}: written, refused a second time, read, listed, deleted"


def _store_url(config: DoctorConfig) -> str | None:
    if not any(place and storage.is_remote(place) for place in (config.input, config.output, config.models)):
        return None
    named = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return named or f"https://s3.{os.environ.get('AWS_DEFAULT_REGION', 'us-east-1')}.amazonaws.com"


def _clock(url: str) -> str:
    answer = httpx.head(url, timeout=TIMEOUT_S)
    if "date" not in answer.headers:
        return f"{url} does not say what time it is"
    skew_s = time.time() - parsedate_to_datetime(answer.headers["date"]).timestamp()
    if abs(skew_s) > MAX_SKEW_S:
        raise _Wrong(
            f"this clock is {skew_s:+.0f} s from that of {url}",
            "set the clock (chrony, NTP): signed requests are refused",
        )
    return f"{skew_s:+.0f} s from that of {url}"


def _disk(wanted_gb: float) -> str:
    folder = tempfile.gettempdir()
    free_gb = shutil.disk_usage(folder).free / 1e9
    if free_gb < wanted_gb:
        raise _Wrong(
            f"{free_gb:.1f} GB are free in {folder}, wanted {wanted_gb:g}",
            "make room there, or set TMPDIR to a larger disk",
        )
    return f"{free_gb:.1f} GB are free in {folder}"


def _model(models: str) -> str:
    number, model = registry.current(storage.canonical(models))
    if model is None:
        raise _Wrong(f"{models} has no current model", "run the train deployment, or python -m flows.train")
    uri = registry.model_uri(storage.canonical(models), model.digest)
    seen = f"number {number} is {model.digest[:10]}, level L{model.level}"
    damaged = f"copy the model there again, or go back: unetpp rollback --models {models}"
    if importlib.util.find_spec("torch") is None:  # the image of the flows
        if not is_there(uri):
            raise _Wrong(f"number {number}, {uri}: it has no config.json or no weights", damaged)
        return f"{seen}; its files are there, and were not loaded, which takes torch"
    # In a process of its own: loading a model takes torch.
    done = subprocess.run([sys.executable, "-m", "jobs.check_model", uri], capture_output=True, text=True, check=False)
    if done.returncode or done.stdout.strip() != model.digest:
        said = (done.stderr.strip().splitlines() or [f"its digest is {done.stdout.strip()[:10]}"])[-1]
        if said.startswith(("ImportError", "ModuleNotFoundError")):
            raise _Wrong(f"number {number} cannot be loaded here: {said}", "install the project here again: make setup")
        raise _Wrong(f"number {number}, {uri}: {said}", damaged)
    return seen


# ------------------------------------------------------------------------------------------------- services


def _resources(cluster: RayJobs) -> str:
    usage = cluster.usage()
    if not usage.get("CPU", (0, 0))[1]:
        raise _Wrong(f"{cluster.where} has no CPUs to work with", "start a Ray node, or let the autoscaler have one")
    return ", ".join(
        f"{total - used:g} of {total:g} {name} free" for name, (used, total) in usage.items() if name in ("CPU", "GPU")
    )


def _gpus(wanted: int, address: str | None) -> str:
    if address is not None:
        there, where = int(RayJobs(address).usage().get("GPU", (0, 0))[1]), address
    else:
        where, program = "this machine", shutil.which("nvidia-smi")
        listed = subprocess.run([program, "-L"], capture_output=True, text=True, check=False).stdout if program else ""
        there = sum(line.startswith("GPU ") for line in listed.splitlines())
    if there < wanted:
        raise _Wrong(
            f"{where} has {there} GPU(s), wanted {wanted}",
            "add GPU nodes, or install the driver (nvidia-smi must list them)",
        )
    return f"{where} has {there}"


def _ask_prefect(api: str, method: str, path: str, **body: Any) -> Any:
    secret = os.environ.get("PREFECT_API_AUTH_STRING")
    key = os.environ.get("PREFECT_API_KEY")
    user, colon, password = (secret or "").partition(":")
    answer = httpx.request(
        method,
        f"{api.rstrip('/')}{path}",
        auth=(user, password) if colon else None,
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=TIMEOUT_S,
        **body,
    )
    if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        raise _Wrong(f"{api} refuses the credentials", "set PREFECT_API_AUTH_STRING to the server's user:password")
    if answer.status_code == httpx.codes.NOT_FOUND:
        return None
    if not answer.is_success:
        raise _Wrong(f"{api} answers {answer.status_code}", "look into the server's log")
    try:
        return answer.json()
    except ValueError:
        raise _Wrong(f"{api} is no Prefect API", "PREFECT_API_URL ends with /api") from None


def _prefect(api: str) -> str:
    if _ask_prefect(api, "GET", "/health") is not True:
        raise _Wrong(f"{api} is no Prefect API", "PREFECT_API_URL ends with /api")
    return f"{api}, version {_ask_prefect(api, 'GET', '/admin/version')}"


def _work_pool(api: str, name: str) -> str:
    pool = _ask_prefect(api, "GET", f"/work_pools/{name}")
    if pool is None:
        raise _Wrong(f"there is no work pool {name}", "python -m flows.deploy")
    workers = _ask_prefect(api, "POST", f"/work_pools/{name}/workers/filter", json={}) or []
    online = [worker["name"] for worker in workers if worker["status"] == "ONLINE"]
    if pool["is_paused"]:
        raise _Wrong(f"work pool {name} is paused", f"prefect work-pool resume {name}")
    if not online:
        raise _Wrong(f"no worker of work pool {name} is online", f"prefect worker start --pool {name} --type process")
    return f"{name}, {len(online)} worker(s) online"


def _deployments(api: str, wanted: tuple[str, ...]) -> str:
    found = {each["name"]: each for each in _ask_prefect(api, "POST", "/deployments/filter", json={}) or []}
    if missing := [name for name in wanted if name not in found]:
        raise _Wrong(f"missing: {', '.join(missing)}", "python -m flows.deploy")
    if paused := [name for name in wanted if found[name]["paused"]]:
        raise _Wrong(f"paused: {', '.join(paused)}", "switch it on in Prefect's page of the deployment")
    schedules = {name: found[name].get("schedules") or [] for name in wanted}
    if idle := [name for name, each in schedules.items() if each and not any(one["active"] for one in each)]:
        raise _Wrong(f"no schedule is active: {', '.join(idle)}", "python -m flows.deploy")
    return ", ".join(wanted)


def _automations(api: str) -> str:
    from flows.automations import NAMES

    found = {each["name"]: each for each in _ask_prefect(api, "POST", "/automations/filter", json={}) or []}
    if missing := [name for name in NAMES if name not in found]:
        raise _Wrong(f"missing: {', '.join(missing)}", "python -m flows.deploy")
    if off := [name for name in NAMES if not found[name]["enabled"]]:
        raise _Wrong(f"switched off: {', '.join(off)}", f"prefect automation resume {off[0]}")
    return ", ".join(NAMES)
