"""The files of `deploy/pgstatus`: what they name is there, and the tools that they are for accept them."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.support.dashboards import assert_panels_do_not_overlap, expressions_of, needs
from tests.support.server import http_client
from tests.support.sidecar import cluster, dead, master, replica, serve_sidecar, told_app

from ctxdb_pgstatus.sidecar.metrics import render
from ctxdb_pgstatus.sidecar.settings import VARIABLES, Settings

KIT = Path(__file__).parents[2] / "deploy" / "pgstatus"
DASHBOARD = KIT / "grafana" / "dashboard.json"
RULES = KIT / "prometheus" / "rules.yaml"
METRIC = re.compile(r"\b(?:ctxdb_pgstatus|process)_\w+")


def told_metrics() -> set[str]:
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
    assert named - told_metrics() == set()


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


def test_prometheus_accepts_the_metrics() -> None:
    content = render(cluster(master("n1"), replica("n2"), dead("n3")), changes=1)
    subprocess.run([needs("promtool"), "check", "metrics"], input=content, check=True, capture_output=True)


# --- the image --------------------------------------------------------------------------------------------------------


def test_the_image_passes_the_linter() -> None:
    subprocess.run([needs("hadolint"), str(KIT / "Dockerfile")], check=True)


def test_the_image_runs_without_root_and_is_told_to_stop_by_a_signal_that_the_sidecar_knows() -> None:
    lines = (KIT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    last_stage = lines[max(number for number, line in enumerate(lines) if line.startswith("FROM ")) :]
    assert [line for line in last_stage if line.startswith("USER ")] == ["USER 65532:65532"]
    assert 'ENTRYPOINT ["ctxdb-pgstatus"]' in last_stage
    assert "STOPSIGNAL SIGTERM" in last_stage
    assert not any(line.startswith("FROM ") and ":latest" in line for line in lines)


def test_the_image_copies_what_is_there_and_not_ignored() -> None:
    copied = re.findall(r"^COPY (packages/\S+)", (KIT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    ignored = (KIT / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert copied
    for folder in copied:
        assert (KIT.parents[1] / folder / "pyproject.toml").is_file()
        assert f"!{folder}" in ignored


async def test_the_health_check_of_the_image_tells_whether_the_sidecar_runs() -> None:
    text = (KIT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", "")
    match = re.search(r"^HEALTHCHECK .*? CMD (\[.*\])$", text, re.MULTILINE)
    assert match is not None
    await assert_checks(json.loads(match[1]))


async def assert_checks(command: list[str], port: int | None = None) -> None:
    """Assert that a command succeeds beside a sidecar, and fails without one."""
    app, _ = told_app(master("n1"))
    async with serve_sidecar(app) as url:
        served = url.rpartition(":")[2]
        assert await _run(command, served, port) == 0
    assert await _run(command, served, port) != 0


async def _run(command: list[str], served: str, port: int | None) -> int:
    assert command[0] == "python"
    arguments = [argument if port is None else argument.replace(str(port), served) for argument in command[1:]]
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, env=os.environ | {"pg_status__http_port": served}, stderr=asyncio.subprocess.DEVNULL
    )
    return await process.wait()


# --- systemd ----------------------------------------------------------------------------------------------------------


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    analyze = needs("systemd-analyze")
    unit = (KIT / "systemd" / "ctxdb-pgstatus.service").read_text(encoding="utf-8")
    # It looks whether the program is there.
    copy = tmp_path / "ctxdb-pgstatus.service"
    copy.write_text(unit.replace("/opt/ctxdb-pgstatus/bin/ctxdb-pgstatus", sys.executable), encoding="utf-8")
    done = subprocess.run([analyze, "verify", "--man=no", str(copy)], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_environment_of_the_unit_is_understood() -> None:
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
def test_a_manifest_lets_its_containers_do_no_more_than_they_need(path: Path) -> None:
    (container,) = containers(path)
    context = container["securityContext"]
    assert context["runAsNonRoot"] is context["readOnlyRootFilesystem"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert set(container["resources"]) == {"requests", "limits"}


@manifests
async def test_the_probes_of_a_manifest_reach_the_sidecar(path: Path) -> None:
    (container,) = containers(path)
    variables = {each["name"]: each.get("value") for each in container["env"]}
    probes = [container[name] for name in ("startupProbe", "readinessProbe", "livenessProbe") if name in container]
    assert probes
    for probe in probes:
        if "exec" in probe:
            await assert_checks(probe["exec"]["command"], port=int(variables["pg_status__http_port"]))
            continue
        # The kubelet comes from outside of the pod.
        assert variables["pg_status__http_listen_address"] == "*"
        (port,) = container["ports"]
        assert (probe["httpGet"]["port"], port["name"]) == ("http", "http")
        assert str(port["containerPort"]) == variables["pg_status__http_port"]
        app, _ = told_app(master("n1"))
        async with serve_sidecar(app) as url, http_client(url) as client:
            assert (await client.get(probe["httpGet"]["path"])).status_code == 200


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
    """Serve the name of each server to whoever connects, and yield their ports."""
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
    """Return the name of the server that a port leads to; nothing if it leads to none."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        name = await reader.read()
        writer.close()
    except OSError:
        return ""
    return name.decode()


async def leads_to(port: int, *names: str) -> None:
    """Wait until a port leads to these servers, and to no other."""
    async with asyncio.timeout(30):
        while {await server_behind(port) for _ in range(4)} != set(names):
            await asyncio.sleep(0.05)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


async def test_haproxy_leads_to_the_primary_and_to_replicas_that_do_not_lag(tmp_path: Path) -> None:
    haproxy = needs("haproxy")
    late = replica("n3", by_time=False, lag_bytes=17 << 20)
    app, monitor = told_app(master("n1"), replica("n2"), late)
    async with serve_sidecar(app) as url, named_servers("n1", "n2", "n3") as ports:
        primary, replicas = free_port(), free_port()
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
            # No replica will do.
            await leads_to(replicas, "n2")
            monitor.status = cluster(replica("n1"), master("n2"), replica("n3"), master="n2")
            await leads_to(replicas, "n1", "n3")
            monitor.status = cluster(dead("n1"), dead("n2"), dead("n3"), master=None)
            await leads_to(primary, "")
        finally:
            process.terminate()
            await process.wait()
