"""deploy/: the very commands of its compose file, run as processes, on services of the tests' own.

What a container would bring is put in place: hosts become loopback, ports are free ones, and
`python` and `celery` are those of this environment.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack
from importlib.metadata import requires
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import urllib3
import yaml
from packaging.requirements import Requirement
from sqlalchemy.engine import make_url

from gradwatch.client import Client
from service import Webhook, wait_until

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
PROGRAMS = {"python": [sys.executable], "celery": [sys.executable, "-m", "celery"]}
TOKEN = "a-long-random-text-of-letters-0123456789"
VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")
# Anything on 127.0.0.0/8 is this machine; what listens on 127.0.0.1 alone is not reached here.
ELSEWHERE = "127.0.0.2"

# Ten sigmoid layers lose the gradient on its way to the input.
SCRIPT = """
import torch
from torch import nn
torch.manual_seed(0)
torch.set_num_threads(1)
layers = [part for _ in range(10) for part in (nn.Linear(64, 64), nn.Sigmoid())]
model = nn.Sequential(*layers, nn.Linear(64, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for _ in range(120):
    optimizer.zero_grad()
    labels = torch.randint(10, (128,))
    nn.functional.cross_entropy(model(torch.rand(128, 64)), labels).backward()
    optimizer.step()
"""


def filled(text: str, values: Mapping[str, str]) -> str:
    """A text with its ${VARIABLES} as compose fills them in."""

    def value(match: re.Match[str]) -> str:
        name, how, otherwise = match.groups()
        if values.get(name):
            return values[name]
        assert how == "-", f"{name} must be set: {otherwise}"
        return otherwise

    return VARIABLE.sub(value, text)


def variables(service: str, values: Mapping[str, str]) -> dict[str, str]:
    return {name: filled(text, values) for name, text in SERVICES[service]["environment"].items()}


def arguments(service: str, *more: str) -> list[str]:
    program, *rest = SERVICES[service]["command"]
    return [*PROGRAMS[program], *rest, *more]


class Stack:
    """The services of the compose file, each a process of this machine."""

    def __init__(self, folder: Path, environ: Mapping[str, str], ports: Mapping[str, int]) -> None:
        self.ports = ports
        self.url = f"http://127.0.0.1:{ports['collector']}"
        self.client = Client(self.url, TOKEN)
        self.processes: dict[str, list[subprocess.Popen[bytes]]] = {}
        self._folder = folder
        self._environ = environ

    def environ(self, service: str) -> dict[str, str]:
        values = {"POSTGRES_PASSWORD": "unused", "GRADWATCH_SERVER_TOKEN": TOKEN, **self._environ}
        own = variables(service, values)
        if "GRADWATCH_DATABASE_URL" in own:
            there = make_url(self._environ["database"])
            asked = make_url(own["GRADWATCH_DATABASE_URL"])
            assert (asked.host, asked.database) == ("postgres", "gradwatch")
            here = asked.set(host=there.host, port=there.port, database=there.database)
            own["GRADWATCH_DATABASE_URL"] = here.render_as_string(hide_password=False)
            own["GRADWATCH_BROKER_URL"] = own["GRADWATCH_BROKER_URL"].replace(
                "redis://redis:6379", self._environ["redis"].rsplit("/", 1)[0]
            )
        if "GRADWATCH_URL" in own:
            own["GRADWATCH_URL"] = own["GRADWATCH_URL"].replace("http://collector:8470", self.url)
        # What a container does not have, it must not need.
        kept = {name: text for name, text in os.environ.items() if "GRADWATCH" not in name}
        return kept | own | {"OMP_NUM_THREADS": "1", "HOME": str(self._folder)}

    def migrate(self) -> str:
        done = subprocess.run(
            arguments("migrate"), env=self.environ("migrate"), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start(self, service: str) -> None:
        port = self.ports.get(service)
        more = ["--port", str(port)] if port else []
        with self.log(service).open("ab") as output:
            process = subprocess.Popen(
                arguments(service, *more),
                env=self.environ(service),
                cwd=self._folder,
                stdout=output,
                stderr=output,
                # Its children must end with it.
                start_new_session=True,
            )
        self.processes.setdefault(service, []).append(process)

    def stop(self) -> None:
        everything = [process for group in self.processes.values() for process in group]
        for process in everything:
            process.terminate()
        for process in everything:
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def log(self, service: str) -> Path:
        return self._folder / f"{service}.log"

    def tail(self, service: str) -> str:
        return self.log(service).read_text()[-4000:]

    def answers(self, service: str, path: str, host: str = ELSEWHERE) -> int:
        """Status of a request from beyond loopback's own address; 0 when nobody listens."""
        url = f"http://{host}:{self.ports[service]}{path}"
        try:
            return urllib3.request("GET", url, retries=False, timeout=5).status
        except urllib3.exceptions.HTTPError:
            return 0


@pytest.fixture
def stack(
    tmp_path: Path, postgres: Any, redis: Any, free_port: Callable[[], int]
) -> Generator[tuple[Stack, Webhook]]:
    hook = Webhook()
    ports = {"collector": free_port(), "dashboard": free_port()}
    environ = {
        "database": postgres.new_database(),
        "redis": redis.url,
        "GRADWATCH_NOTIFY": hook.url,
        "GRADWATCH_NOTIFY_LOCAL": "allow",
        "GRADWATCH_DASHBOARD_URL": "https://gradwatch.example",
    }
    made = Stack(tmp_path, environ, ports)
    with ExitStack() as closing:
        closing.callback(hook.server.shutdown)
        closing.callback(made.stop)
        yield made, hook


@pytest.mark.slow
def test_its_commands_take_frames_judge_alert_and_are_scraped(
    stack: tuple[Stack, Webhook], tmp_path: Path, start_prometheus: Callable[[Path], str]
) -> None:
    running, hook = stack
    assert "revision" in running.migrate()
    for service in ("collector", "worker", "beat", "dashboard"):
        for _ in range(SERVICES[service].get("deploy", {}).get("replicas", 1)):
            running.start(service)
    for service, path in (("collector", "/readyz"), ("dashboard", "/_stcore/health")):
        wait_until(
            lambda service=service, path=path: running.answers(service, path) == 200,
            60,
            lambda service=service: running.tail(service),
        )
    assert running.answers("collector", "/api/v1/runs") == 401
    assert running.answers("collector", "/metrics") == 401

    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    job = [sys.executable, "-m", "gradwatch", "run", "--name", "sigmoids", str(script)]
    environ = {"GRADWATCH_URL": running.url, "GRADWATCH_TOKEN": TOKEN}
    trained = subprocess.run(
        job,
        env=os.environ | environ | {"GRADWATCH_OVERHEAD_BUDGET": "0"},
        capture_output=True,
        text=True,
    )
    assert trained.returncode == 0, trained.stderr
    (run,) = running.client.runs().runs
    found = wait_until(
        lambda: running.client.findings(run.info.id),
        30,
        lambda: running.tail("worker") + running.tail("beat"),
    )
    assert [finding.kind for finding in found] == ["vanishing"]
    _, message = hook.received.get(timeout=20)
    assert "Vanishing" in message["title"]
    assert f"https://gradwatch.example/?run={run.info.id}" in message["message"]

    prometheus = start_prometheus(_scraping(running.url, tmp_path))
    wait_until(lambda: _ask(prometheus, 'up{job="gradwatch"} == 1'), 30)
    assert _ask(prometheus, 'gradwatch_alerts{state="sent"} > 0')
    rules = json.loads(urllib3.request("GET", f"{prometheus}/api/v1/rules").data)["data"]
    assert {rule["health"] for group in rules["groups"] for rule in group["rules"]} <= {
        "ok",
        "unknown",
    }
    logs = "".join(running.log(service).read_text() for service in running.processes)
    assert TOKEN not in logs


def _scraping(collector: str, folder: Path) -> Path:
    """The configuration that compose mounts, with its target here."""
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(PROMETHEUS / name) for name in config["rule_files"]]
    (job,) = config["scrape_configs"]
    secret = job["authorization"]["credentials_file"]
    assert Path(secret).name in SERVICES["prometheus"]["secrets"]
    (folder / "token").write_text(TOKEN)
    job["authorization"]["credentials_file"] = str(folder / "token")
    assert job["static_configs"] == [{"targets": ["collector:8470"]}]
    job["static_configs"] = [{"targets": [collector.removeprefix("http://")]}]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    return path


def _ask(prometheus: str, query: str) -> list[Any]:
    answer = urllib3.request("GET", f"{prometheus}/api/v1/query?query={quote(query)}")
    return json.loads(answer.data)["data"]["result"]


@pytest.mark.parametrize(
    "check",
    [
        ("check", "config", "--syntax-only", "prometheus.yml"),
        ("check", "rules", "rules.yml"),
        ("test", "rules", "rules_test.yml"),
    ],
    ids=" ".join,
)
def test_promtool_accepts_what_prometheus_is_given(promtool: str, check: tuple[str, ...]) -> None:
    done = subprocess.run([promtool, *check], cwd=PROMETHEUS, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_example_sets_each_variable_that_compose_reads_and_no_other() -> None:
    asked = {match[1] for match in VARIABLE.finditer((DEPLOY / "compose.yaml").read_text())}
    lines = (DEPLOY / "env.example").read_text().splitlines()
    given = {line.partition("=")[0] for line in lines if line and not line.startswith("#")}
    assert given == asked


def test_without_a_password_and_a_token_nothing_starts() -> None:
    for service in ("postgres", "collector", "dashboard"):
        with pytest.raises(AssertionError, match="must be set"):
            variables(service, {})


def test_each_service_waits_for_those_it_needs_and_all_but_migration_come_back() -> None:
    for name, service in SERVICES.items():
        for other, how in service.get("depends_on", {}).items():
            ends = how["condition"] == "service_completed_successfully"
            assert ends == (other == "migrate"), (name, other)
            assert ends or "healthcheck" in SERVICES[other], f"{name} waits for {other} forever"
        assert service["restart"] == ("on-failure" if name == "migrate" else "unless-stopped")


def test_ports_are_published_on_loopback_unless_asked() -> None:
    for name, service in SERVICES.items():
        for port in service.get("ports", []):
            assert filled(port, {}).startswith("127.0.0.1:"), name
    assert "ports" not in SERVICES["postgres"]
    assert "ports" not in SERVICES["redis"]


def test_the_image_copies_what_exists_and_targets_what_compose_asks_for() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    for source in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        for path in source.split():
            assert (ROOT / path).exists(), path
    targets = set(re.findall(r"^FROM \S+ AS (\w+)$", text, re.MULTILINE))
    built = {service["build"]["target"] for service in SERVICES.values() if "build" in service}
    assert built <= targets
    # A container must not run as root, and an image must not carry what its ignore file left out.
    assert text.count("\nUSER gradwatch\n") == len(built)
    allowed = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    copied = " ".join(re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE)).split()
    assert {f"!{path}" for path in copied} <= set(allowed)


@pytest.mark.parametrize("extra", ["server", "dashboard"])
def test_an_image_brings_no_torch(extra: str) -> None:
    assert not _brought("gradwatch", extra) & {"torch", "torchvision"}


def _brought(package: str, extra: str = "", seen: set[str] | None = None) -> set[str]:
    """Names of all packages that an install brings."""
    names = seen if seen is not None else set()
    for text in requires(package) or []:
        needed = Requirement(text)
        if needed.marker and not needed.marker.evaluate({"extra": extra}):
            continue
        name = needed.name.lower()
        if name not in names:
            names.add(name)
            for inner in needed.extras or {""}:
                _brought(name, inner, names)
    return names


def test_docker_accepts_the_file() -> None:
    docker = shutil.which("docker")
    if not docker or subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        pytest.skip("docker compose is not installed")
    environ = os.environ | {"POSTGRES_PASSWORD": "p", "GRADWATCH_SERVER_TOKEN": TOKEN}
    done = subprocess.run(
        [docker, "compose", "--file", str(DEPLOY / "compose.yaml"), "config", "--quiet"],
        env=environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
