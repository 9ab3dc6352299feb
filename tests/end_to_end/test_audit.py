"""A job that audits itself, all the way to the person who is told of its wrong sign."""

from __future__ import annotations

import os
import subprocess
import sys

from gradwatch.wire.api import RunView
from service import ROOT, Service, Webhook, wait_until

AUDITED_STEPS = [1, 100, 200]


def run_example(service: Service, *options: str) -> tuple[str, RunView]:
    """What the example prints, and its run once all of it was judged."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "audit.py"), *options],
        env={**os.environ, "GRADWATCH_URL": service.collector},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    run = service.client.runs(name="audited digits").runs[0].info.id
    seen = wait_until(lambda: (found := service.client.run(run)).judged and found, 20)
    return done.stdout, seen


def test_a_wrong_sign_is_named_by_the_first_audit_and_told(
    service: Service, webhook: Webhook
) -> None:
    printed, run = run_example(service)
    assert printed.count("WRONG") == len(AUDITED_STEPS)
    (finding,) = run.findings
    assert (finding.kind, finding.severity, finding.state) == (
        "reference_mismatch",
        "critical",
        "open",
    )
    assert finding.layers == ["squash"]
    assert (finding.first_step, finding.last_step) == (1, 200)
    audits = service.client.audits(run.info.id, passed=False).audits
    assert [audit.step for audit in audits] == AUDITED_STEPS[::-1]
    assert finding.opened_at - audits[-1].received_at < 1, "told as it arrived"
    _, message = webhook.received.get(timeout=20)
    assert "Wrong gradients in audited digits" in message["title"]
    assert "squash" in message["message"]
    assert "relative error 1.0, 0.001 is allowed, at step 1" in message["message"]


def test_without_it_every_audit_passes_and_nothing_is_told(
    service: Service, webhook: Webhook
) -> None:
    printed, run = run_example(service, "--right")
    assert "WRONG" not in printed
    assert (run.verdict, run.findings) == ("healthy", [])
    audits = service.client.audits(run.info.id).audits
    assert len(audits) == 2 * len(AUDITED_STEPS)
    assert all(audit.passed for audit in audits)
    errors = [layer.relative_error for audit in audits for layer in audit.layers]
    assert all(error is not None and 0 < error < 1e-5 for error in errors)
    assert webhook.received.empty()
