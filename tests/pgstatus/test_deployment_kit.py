"""The files of `deploy/pgstatus`: the names in them exist, and the programs that they are for accept them."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from tests.support.dashboards import assert_panels_do_not_overlap, expressions_of, needs
from tests.support.server import http_client
from tests.support.sidecar import app_of_hosts, cluster, dead, master, replica, serve_sidecar
from tests.support.sidecar_process import running, variables_of

from ctxdb_core.testing.postgres import find_free_port
from ctxdb_pgstatus.sidecar.metrics import render
from ctxdb_pgstatus.sidecar.settings import VARIABLES, Settings
from ctxdb_pgstatus.testing import EmbeddedPostgres

KIT = Path(__file__).parents[2] / "deploy" / "pgstatus"
DASHBOARD = KIT / "grafana" / "dashboard.json"
RULES = KIT / "prometheus" / "rules.yaml"
METRIC = re.compile(r"\b(?:ctxdb_pgstatus|process)_\w+")


def names_of_metrics() -> set[str]:
    content = render(cluster(master("n1"), replica("n2"), dead("n3")), changes=1).decode()
    return {line.partition("{")[0].partition(" ")[0] for line in content.splitlines() if not line.startswith("#")}


def expressions() -> Iterator[str]:
    """Yield every expression of the alerts and of the dashboard."""
    for group in yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]:
        for rule in group["rules"]:
            yield rule["expr"]
    yield from expressions_of(DASHBOARD)


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


@pytest.fixture
def server(postgres_server: EmbeddedPostgres) -> dict[str, str]:
    """The variables, without their prefix, of a sidecar that asks a real server."""
    # With this time-out, a host that is slow to answer on a loaded machine does not count as dead.
    return {**variables_of(postgres_server), "query_timeout_ms": "20000"}


def prefixed(variables: dict[str, str]) -> dict[str, str]:
    return {f"pg_status__{name}": value for name, value in variables.items()}


def containers(path: Path) -> list[dict[str, Any]]:
    """Return the containers of the sidecar in a manifest."""
    found = []
    for document in documents(path):
        if document["kind"] == "Deployment":
            spec = document["spec"]["template"]["spec"]
            found += [
                each for each in [*spec.get("initContainers", []), *spec["containers"]] if each["name"] == "pgstatus"
            ]
    return found


# --- Prometheus and Grafana -------------------------------------------------------------------------------------------


def test_every_metric_that_alerts_and_dashboard_name_exists() -> None:
    named = {name for expression in expressions() for name in METRIC.findall(expression)}
    assert len(named) > 10
    assert named - names_of_metrics() == set()


def test_every_alert_says_how_bad_it_is_and_what_has_happened() -> None:
    (group,) = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]:
        assert rule["labels"]["severity"] in {"critical", "warning"}, rule["alert"]
        assert rule["annotations"]["summary"], rule["alert"]


def test_the_panels_of_the_dashboard_are_told_apart_and_do_not_overlap() -> None:
    assert_panels_do_not_overlap(DASHBOARD)


def test_prometheus_accepts_rules_and_configuration() -> None:
    promtool = needs("promtool")
    subprocess.run([promtool, "check", "rules", str(RULES)], check=True, capture_output=True)
    subprocess.run(
        [promtool, "check", "config", str(KIT / "prometheus" / "scrape.yaml")], check=True, capture_output=True
    )


RULES_TEST = KIT / "prometheus" / "rules_test.yaml"


def test_the_alerts_fire_when_they_are_to_and_not_otherwise() -> None:
    subprocess.run([needs("promtool"), "test", "rules", str(RULES_TEST)], check=True, capture_output=True)


def test_every_alert_has_a_test_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    alerts = {rule["alert"] for group in yaml.safe_load(RULES.read_text("utf-8"))["groups"] for rule in group["rules"]}
    tests = [
        each for test in yaml.safe_load(RULES_TEST.read_text("utf-8"))["tests"] for each in test["alert_rule_test"]
    ]
    assert {each["alertname"] for each in tests if each.get("exp_alerts")} == alerts
    assert {each["alertname"] for each in tests if not each.get("exp_alerts")} == alerts


def test_prometheus_accepts_the_metrics() -> None:
    content = render(cluster(master("n1"), replica("n2"), dead("n3")), changes=1)
    subprocess.run([needs("promtool"), "check", "metrics"], input=content, check=True, capture_output=True)


# --- the image --------------------------------------------------------------------------------------------------------

DOCKERFILE = KIT / "Dockerfile"
ROOT = KIT.parents[1]


def stages() -> list[list[tuple[str, str]]]:
    """Return the stages of the Dockerfile: for each instruction, its name and its arguments on one line."""
    lines = [line for line in DOCKERFILE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    found: list[list[tuple[str, str]]] = []
    for line in "\n".join(lines).replace("\\\n", "").splitlines():
        name, _, arguments = line.partition(" ")
        if name == "FROM":
            found.append([])
        if name:
            found[-1].append((name, arguments.strip()))
    return found


def arguments_of(stage: list[tuple[str, str]], name: str) -> list[str]:
    return [arguments for each, arguments in stage if each == name]


def health_check() -> list[str]:
    (check,) = arguments_of(stages()[-1], "HEALTHCHECK")
    command: list[str] = json.loads(check.partition(" CMD ")[2])
    return command


def test_the_image_passes_the_linter() -> None:
    subprocess.run([needs("hadolint"), "--failure-threshold", "style", str(DOCKERFILE)], check=True)


def test_the_image_runs_without_root_and_is_told_to_stop_by_a_signal_that_the_sidecar_knows() -> None:
    last = stages()[-1]
    assert arguments_of(last, "USER") == ["65532:65532"]
    assert arguments_of(last, "ENTRYPOINT") == ['["ctxdb-pgstatus"]']
    assert arguments_of(last, "STOPSIGNAL") == ["SIGTERM"]
    for stage in stages():
        (base,) = arguments_of(stage, "FROM")
        assert re.fullmatch(r"python:3\.\d+-slim-\w+( AS \w+)?", base), base


def test_the_image_copies_what_is_there_and_not_ignored() -> None:
    copied = [arguments.split()[0] for arguments in arguments_of(stages()[0], "COPY")]
    ignored = (KIT / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert copied
    for folder in copied:
        assert (ROOT / folder / "pyproject.toml").is_file()
        assert f"!{folder}" in ignored


def test_an_engine_builds_the_image() -> None:
    (base,) = arguments_of(stages()[-1], "FROM")
    for engine in ("docker", "podman", "buildah"):
        # A test must not download the base image from a registry: the engine has to have it.
        command = shutil.which(engine)
        if (
            command is not None
            and subprocess.run([command, "inspect", base], check=False, capture_output=True).returncode == 0
        ):
            break
    else:
        pytest.skip(f"there is no engine for images that has {base}")
    tag = f"localhost/ctxdb-pgstatus-test:{os.getpid()}"
    try:
        subprocess.run([command, "build", "-f", str(DOCKERFILE), "-t", tag, str(ROOT)], check=True, capture_output=True)
    finally:
        subprocess.run([command, "rmi", tag], check=False, capture_output=True)


def without_root() -> list[str]:
    """Return a prefix by which root runs a command as the user of the image; an empty one for other users."""
    if os.geteuid() != 0:
        return []
    (user,) = arguments_of(stages()[-1], "USER")
    uid, gid = user.split(":")
    interpreter = Path(sys.base_exec_prefix)
    may_read = all(folder.stat().st_mode & stat.S_IXOTH for folder in (interpreter, *interpreter.parents))
    # The interpreter of the tests may be in a folder that only root can read.
    capabilities = "-all" if may_read else "-all,+dac_read_search"
    return [
        needs("setpriv"),
        *(f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--no-new-privs"),
        *(f"--{kind}={capabilities}" for kind in ("inh-caps", "ambient-caps", "bounding-set")),
    ]


@pytest.fixture
def root_folder() -> Iterator[Path]:
    """A folder that other users can read, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


# The test installs the packages of the image, which takes a quarter of a minute of CPU.
@pytest.mark.timeout(300)
@pytest.mark.skipif(find_spec("kubernetes_validate") is None, reason="the group `deployment` is not installed")
async def test_the_steps_of_the_image_make_a_sidecar_that_runs_without_root(
    root_folder: Path, server: dict[str, str]
) -> None:
    build, last = stages()
    home = str(root_folder / "ctxdb")
    for copied in arguments_of(build, "COPY"):
        source, target = copied.split()
        shutil.copytree(ROOT / source, root_folder / "src" / target, ignore=shutil.ignore_patterns("__pycache__"))
    python = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for step in arguments_of(build, "RUN"):
        command = step.replace("/opt/ctxdb", home)
        subprocess.run(
            command,
            shell=True,
            check=True,
            cwd=root_folder / "src",
            env=os.environ | {"PATH": python},
            capture_output=True,
        )
    assert not list(Path(home, "bin").glob("pip*"))
    variables = dict(each.split("=", 1) for line in arguments_of(last, "ENV") for each in shlex.split(line))
    path = variables.pop("PATH").replace("/opt/ctxdb", home).replace("$PATH", os.environ["PATH"])
    port = str(find_free_port(["127.0.0.1"]))
    environment = os.environ | {"PATH": path} | variables | prefixed(server) | {"pg_status__http_port": port}

    async def run(command: list[str]) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *without_root(), *command, cwd=root_folder, env=environment, stderr=asyncio.subprocess.DEVNULL
        )

    async def is_healthy() -> bool:
        return await (await run(health_check())).wait() == 0

    (entry,) = arguments_of(last, "ENTRYPOINT")
    sidecar = await run(json.loads(entry))
    try:
        async with asyncio.timeout(30):
            while not await is_healthy():
                assert sidecar.returncode is None
        if os.geteuid() == 0:
            assert Path(f"/proc/{sidecar.pid}").stat().st_uid == 65532
        async with http_client(f"http://127.0.0.1:{port}") as client, asyncio.timeout(30):
            while (await client.get("/ready")).status_code == 503:
                await asyncio.sleep(0.01)
            assert (await client.get("/master")).text == server["hosts"]
        (signal_name,) = arguments_of(last, "STOPSIGNAL")
        sidecar.send_signal(signal.Signals[signal_name])
        async with asyncio.timeout(20):
            assert await sidecar.wait() == 0
        assert not await is_healthy()
    finally:
        if sidecar.returncode is None:
            sidecar.kill()
            await sidecar.wait()


# --- systemd ----------------------------------------------------------------------------------------------------------


UNIT = KIT / "systemd" / "ctxdb-pgstatus.service"


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    analyze = needs("systemd-analyze")
    unit = UNIT.read_text(encoding="utf-8")
    # systemd-analyze checks that the program exists.
    copy = tmp_path / "ctxdb-pgstatus.service"
    copy.write_text(unit.replace("/opt/ctxdb-pgstatus/bin/ctxdb-pgstatus", sys.executable), encoding="utf-8")
    done = subprocess.run([analyze, "verify", "--man=no", str(copy)], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_systemd_rates_the_exposure_of_the_unit_as_low() -> None:
    # The threshold is the exposure from 0 to 100 as systemd-analyze rates it: 96 for a unit without any restrictions.
    command = [needs("systemd-analyze"), "security", "--offline=yes", "--threshold=20", "--no-pager", str(UNIT)]
    subprocess.run(command, check=True, capture_output=True)


def test_the_unit_restarts_always_unless_its_settings_are_wrong() -> None:
    lines = UNIT.read_text(encoding="utf-8").splitlines()
    # The tests of the command assert that it ends with 2 for wrong settings.
    assert {"Restart=always", "RestartPreventExitStatus=2", "DynamicUser=yes"} <= set(lines)


def test_the_environment_file_of_the_unit_has_known_variables_only() -> None:
    lines = (KIT / "systemd" / "ctxdb-pgstatus.env").read_text(encoding="utf-8").splitlines()
    environment = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    settings = Settings.from_environment(environment)
    assert settings.warnings == ()
    assert [host.name for host in settings.hosts] == ["n1", "n2", "n3"]


# --- Kubernetes -------------------------------------------------------------------------------------------------------

MANIFESTS = sorted((KIT / "kubernetes").glob("*.yaml"))
manifests = pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)


@manifests
def test_a_manifest_sets_variables_that_the_sidecar_knows(path: Path) -> None:
    (container,) = containers(path)
    variables = {each["name"]: each.get("value", "secret") for each in container["env"]}
    assert {name.removeprefix("pg_status__") for name in variables} <= set(VARIABLES)
    assert Settings.from_environment(variables).warnings == ()


@manifests
def test_the_containers_of_a_manifest_run_with_least_privileges(path: Path) -> None:
    (container,) = containers(path)
    context = container["securityContext"]
    assert context["runAsNonRoot"] is context["readOnlyRootFilesystem"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert set(container["resources"]) == {"requests", "limits"}


@manifests
@pytest.mark.parametrize("version", ["1.29", "newest"])
def test_kubernetes_knows_every_field_of_a_manifest(path: Path, version: str) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for document in documents(path):
        wanted = kubernetes_validate.latest_version() if version == "newest" else version
        kubernetes_validate.validate(document, wanted, strict=True)


def test_labels_and_ports_that_the_manifests_select_exist() -> None:
    for path in MANIFESTS:
        by_kind = {each["kind"]: each for each in documents(path)}
        template = by_kind["Deployment"]["spec"]["template"]
        labels = template["metadata"]["labels"].items()
        assert by_kind["Deployment"]["spec"]["selector"]["matchLabels"].items() <= labels
        if "Service" in by_kind:
            service = by_kind["Service"]["spec"]
            assert service["selector"].items() <= labels
            names = {port["name"] for each in template["spec"]["containers"] for port in each["ports"]}
            assert {port["targetPort"] for port in service["ports"]} <= names
        if "PodDisruptionBudget" in by_kind:
            assert by_kind["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"].items() <= labels


def environment_of(path: Path) -> dict[str, str]:
    """Return the environment variables of a manifest's sidecar, with the values of secrets, without their prefix."""
    (container,) = containers(path)
    secrets = {each["metadata"]["name"]: each["stringData"] for each in documents(path) if each["kind"] == "Secret"}
    variables = {}
    for each in container["env"]:
        of_secret = each.get("valueFrom", {}).get("secretKeyRef")
        value = each["value"] if of_secret is None else secrets[of_secret["name"]][of_secret["key"]]
        variables[each["name"].removeprefix("pg_status__")] = value
    return variables


@manifests
async def test_the_probes_of_a_manifest_reach_a_sidecar_with_the_environment_of_the_manifest(
    path: Path, server: dict[str, str]
) -> None:
    (container,) = containers(path)
    variables = environment_of(path)
    port = variables.pop("http_port")
    probes = [container[name] for name in ("startupProbe", "readinessProbe", "livenessProbe") if name in container]
    assert probes
    # The kubelet connects to the pod's address from outside of the pod. Here, another address of the loopback interface
    # stands for it than the one on which containers of a pod talk to each other.
    pod = "127.0.0.2"

    async def answers(served: str, path: str) -> bool:
        try:
            async with http_client(f"http://{pod}:{served}") as client:
                return (await client.get(path)).status_code == 200
        except httpx.ConnectError:
            return False

    async def succeeds(probe: dict[str, Any], served: str) -> bool:
        if "exec" in probe:
            command = [argument.replace(port, served) for argument in probe["exec"]["command"]]
            process = await asyncio.create_subprocess_exec(
                sys.executable, *command[1:], stderr=asyncio.subprocess.DEVNULL
            )
            return await process.wait() == 0
        (named,) = container["ports"]
        assert (probe["httpGet"]["port"], str(named["containerPort"])) == (named["name"], port)
        return await answers(served, probe["httpGet"]["path"])

    async with running("script", **variables | {"hosts": server["hosts"]}) as sidecar:
        served = (await sidecar.ready()).rpartition(":")[2]
        for probe in probes:
            assert await succeeds(probe, served)
        # From outside of the pod, a sidecar is reached only if it listens on all addresses, as the manifests say.
        assert await answers(served, "/live") == (variables["http_listen_address"] == "*")
        assert await sidecar.stop() == 0
    for probe in probes:
        assert not await succeeds(probe, served)


@manifests
def test_secrets_that_a_manifest_refers_to_are_in_the_manifest(path: Path) -> None:
    kinds = {(each["kind"], each["metadata"]["name"]) for each in documents(path)}
    (container,) = containers(path)
    for variable in container["env"]:
        if "valueFrom" in variable:
            assert ("Secret", variable["valueFrom"]["secretKeyRef"]["name"]) in kinds


# --- HAProxy ----------------------------------------------------------------------------------------------------------

HAPROXY = KIT / "haproxy" / "haproxy.cfg"


def test_haproxy_accepts_its_configuration() -> None:
    subprocess.run([needs("haproxy"), "-c", "-q", "-f", str(HAPROXY)], check=True)


@asynccontextmanager
async def named_servers(*names: str) -> AsyncIterator[dict[str, int]]:
    """Start servers that send their own names to each client, and yield their ports."""
    async with AsyncExitStack() as stack:
        ports = {}
        for name in names:

            async def tell(_: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str = name) -> None:
                writer.write(name.encode())
                writer.close()

            server = await stack.enter_async_context(await asyncio.start_server(tell, "127.0.0.1", 0))
            ports[name] = server.sockets[0].getsockname()[1]
        yield ports


async def server_behind(port: int) -> str:
    """Return the name of the server that a port leads to; an empty one if it leads to no server."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        name = await reader.read()
        writer.close()
    except OSError:
        return ""
    return name.decode()


async def leads_to(port: int, *names: str) -> None:
    """Wait until a port leads to the servers of these names, and to no other server."""
    async with asyncio.timeout(30):
        while {await server_behind(port) for _ in range(4)} != set(names):
            await asyncio.sleep(0.05)


async def test_haproxy_leads_to_the_primary_and_to_replicas_that_do_not_lag(tmp_path: Path) -> None:
    haproxy = needs("haproxy")
    late = replica("n3", by_time=False, lag_bytes=17 << 20)
    app, monitor = app_of_hosts(master("n1"), replica("n2"), late)
    async with serve_sidecar(app) as url, named_servers("n1", "n2", "n3") as ports:
        primary, replicas = find_free_port(["127.0.0.1"]), find_free_port(["127.0.0.1"])
        config = HAPROXY.read_text(encoding="utf-8")
        for old, new in {
            "port 8000": f"port {url.rpartition(':')[2]}",
            ":5000": f":{primary}",
            ":5001": f":{replicas}",
            **{f"{name}:5432": f"127.0.0.1:{port}" for name, port in ports.items()},
        }.items():
            assert old in config
            config = config.replace(old, new)
        (tmp_path / "haproxy.cfg").write_text(config, encoding="utf-8")
        process = await asyncio.create_subprocess_exec(haproxy, "-q", "-db", "-f", str(tmp_path / "haproxy.cfg"))
        try:
            await leads_to(primary, "n1")
            await leads_to(replicas, "n2")
            monitor.status = cluster(dead("n1"), master("n2"), late, master="n2")
            await leads_to(primary, "n2")
            # Without a replica that does not lag, readers go to the primary.
            await leads_to(replicas, "n2")
            monitor.status = cluster(replica("n1"), master("n2"), replica("n3"), master="n2")
            await leads_to(replicas, "n1", "n3")
            monitor.status = cluster(dead("n1"), dead("n2"), dead("n3"), master=None)
            await leads_to(primary, "")
        finally:
            process.terminate()
            await process.wait()
