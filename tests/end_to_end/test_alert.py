"""A NaN in training, all the way to the person who is told of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

from service import ROOT, Service, Webhook, wait_until

# No line of this knows of gradwatch. The model's loss takes the logarithm of 0 at step 60.
LOG_OF_ZERO = """
import time, torch
from torch import nn
torch.manual_seed(0)
torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
for step in range(1, 101):
    output = model(torch.randn(32, 8)).square().mean() + 1
    if step == 60:
        output = output - output.detach()
        print(time.time(), flush=True)
    optimizer.zero_grad()
    torch.log(output).backward()
    optimizer.step()
    time.sleep(0.01)
"""


def test_a_nan_in_an_unchanged_script_reaches_the_webhook_once(
    service: Service,
    webhook: Webhook,
    train: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    trained = train(LOG_OF_ZERO, "log-of-zero")

    _, message = webhook.received.get(timeout=20)
    assert "Non-finite values in log-of-zero" in message["title"]
    text = message["message"]
    run = next(run for run in service.client.runs().runs if run.info.name == "log-of-zero")
    for part in (run.info.id[:8], "2.weight", "first 60", "What to try", service.dashboard):
        assert part in text
    (finding,) = run.findings
    assert finding.kind == "non_finite"
    assert finding.first_step == 60
    # Storing must not wait for the script's end; benchmarks/alert_latency.py has the figures.
    assert finding.opened_at - float(trained.stdout) < 5
    wait_until(lambda: service.client.run(run.info.id).judged, 20)
    assert webhook.received.empty(), "the same finding was told twice"


def test_a_healthy_script_raises_nothing(
    service: Service,
    webhook: Webhook,
    train: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    train(LOG_OF_ZERO.replace("step == 60", "False"), "healthy")

    def run() -> object:
        found = next(run for run in service.client.runs().runs if run.info.name == "healthy")
        return found if found.judged and found.status == "finished" else None

    judged = wait_until(run, 20)
    assert judged.verdict == "healthy"
    assert judged.findings == []
    assert webhook.received.empty()


def test_the_example_trains_and_is_judged_healthy(service: Service) -> None:
    script = ROOT / "examples" / "digits.py"
    environ = {**os.environ, "GRADWATCH_URL": service.collector}
    trained = subprocess.run(
        [sys.executable, str(script)],
        env=environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "accuracy 0.9" in trained.stdout
    run = next(run for run in service.client.runs().runs if run.info.name == "digits")
    assert run.info.config == {"epochs": 20}
    judged = wait_until(lambda: (seen := service.client.run(run.info.id)).judged and seen, 20)
    assert (judged.status, judged.verdict) == ("finished", "healthy")
    assert judged.loss is not None
    assert judged.last_step == 20 * 29
