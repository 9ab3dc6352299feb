"""Root cause over symptom: of a story that several detectors see, the cause is told."""

from __future__ import annotations

from collections.abc import Sequence

from gradwatch.health.finding import Finding, Severity

# A loss that does not move has a reason, whenever either was noticed.
ALWAYS = frozenset({"plateau", "learning_rate_too_low"})
STUCK = ALWAYS | {"oscillation"}
# What each kind brings about, and so makes needless to tell. In order of precedence: of kinds that
# may bring about each other and begin at the same step the upper one is the cause.
FOLLOWS: dict[str, frozenset[str]] = {
    "missing_zero_grad": STUCK
    | {
        "exploding",
        "learning_rate_too_high",
        "divergence",
        "dead_units",
        "vanishing",
        "saturation",
        "loss_spike",
    },
    "loss_spike": frozenset({"learning_rate_too_high", "oscillation"}),
    "exploding": STUCK
    | {
        "learning_rate_too_high",
        "divergence",
        "loss_spike",
        "dead_units",
        "vanishing",
        "saturation",
    },
    "dead_units": STUCK | {"saturation", "vanishing"},
    "weights_shrinking": STUCK | {"vanishing", "dead_units", "learning_rate_too_high"},
    "saturation": STUCK | {"vanishing", "dead_units"},
    "vanishing": STUCK | {"saturation", "dead_units"},
    "learning_rate_too_high": STUCK
    | {"dead_units", "vanishing", "saturation", "divergence", "loss_spike", "exploding"},
    "oscillation": frozenset(
        {"plateau", "dead_units", "vanishing", "saturation", "divergence", "loss_spike"}
    ),
    "divergence": STUCK | {"dead_units", "loss_spike"},
    "underflow": STUCK | {"dead_units", "vanishing", "never_updated", "saturation"},
    "clipping": STUCK | {"never_updated"},
    "rank_drift": frozenset({"never_updated"}),
    "never_updated": STUCK | {"exploding", "disconnected", "saturation"},
    "disconnected": STUCK,
    "symmetric_units": STUCK | {"poor_initialisation", "vanishing", "saturation"},
    "learning_rate_too_low": frozenset({"plateau"}),
    "poor_initialisation": frozenset({"plateau", "learning_rate_too_low"}),
}
PRECEDENCE = {kind: place for place, kind in enumerate(FOLLOWS)}
# Two detectors may see the same beginning a few frames apart.
SLACK_STEPS = 20
# Steps after which a beginning shows: a loss is known at the step after the change of the weights,
# and a unit counts as dead once it was silent on five frames.
LAG_STEPS = {"loss_spike": 1, "dead_units": 5}


def root_causes(findings: Sequence[Finding]) -> list[Finding]:
    """The findings that do not follow from another one that is told.

    Of two kinds that may bring about each other, the one that began first is the cause.
    """
    left, told = list(findings), list[Finding]()
    while left:
        roots = (f for f in left if not any(_brings_about(cause, f) for cause in left))
        root = next(roots, left[0])
        told.append(root)
        left = [f for f in left if f is not root and not _brings_about(root, f)]
    return told


def _brings_about(cause: Finding, symptom: Finding) -> bool:
    if symptom.kind not in FOLLOWS.get(cause.kind, frozenset()):
        return False
    if symptom.kind in ALWAYS:
        # Where units are left that carry the signal, dead ones are no reason to learn nothing.
        return cause.kind != "dead_units" or cause.severity is Severity.CRITICAL
    if cause.kind in FOLLOWS.get(symptom.kind, frozenset()):
        # Gradients that are large before the first update cannot come from updates.
        return _beginning(cause) < _beginning(symptom)
    if symptom.kind == "loss_spike" and cause.kind == "exploding":
        # A gradient is that of its step's loss, and changes the next one at the earliest.
        return cause.first_step < symptom.first_step
    return cause.first_step <= symptom.first_step + SLACK_STEPS


def _beginning(finding: Finding) -> tuple[int, int]:
    return finding.first_step - LAG_STEPS.get(finding.kind, 0), PRECEDENCE[finding.kind]
