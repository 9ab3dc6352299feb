"""HTML of the parts that repeat: pills, the facts of a run, the card of a finding.

Whatever a training job named itself is escaped here, and nowhere else is HTML made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from gradwatch.health.score import DEFINITION
from gradwatch.wire.api import FindingView, RunView
from gradwatch_dashboard.formats import ABSENT, age, count, number, steps
from gradwatch_dashboard.verdicts import SEVERITIES, STATES, STATUSES, VERDICTS, Look, look

MAX_LAYERS = 4  # named on a card; the others are counted

STYLE = """<style>
.gw-pill { display: inline-block; border-radius: 999px; padding: 0.1rem 0.65rem; color: #fff;
  font-size: 0.8rem; font-weight: 600; white-space: nowrap; line-height: 1.45; }
.gw-line { font-size: 0.86rem; font-weight: 600; white-space: nowrap; }
.gw-quiet { opacity: 0.72; }
.gw-small { font-size: 0.86rem; }
.gw-facts { display: flex; flex-wrap: wrap; gap: 0.3rem 2.4rem; }
.gw-row .gw-facts { display: grid; gap: 0.3rem 0.5rem; font-size: 0.92rem;
  grid-template-columns: 5.6rem minmax(4.6rem, 1fr) minmax(5.4rem, 1fr) minmax(5.2rem, 1fr); }
.gw-fact { font-variant-numeric: tabular-nums; white-space: nowrap; }
.gw-fact span:first-child { display: block; font-size: 0.75rem; opacity: 0.72; }
.gw-card { border: 1px solid rgba(128,128,128,0.35); border-left-width: 5px; border-radius: 6px;
  padding: 0.9rem 1.2rem 1rem; }
.gw-card h4 { margin: 0; padding: 0; font-size: 1.08rem; font-weight: 650; }
.gw-head { display: flex; flex-wrap: wrap; align-items: center; gap: 0.7rem;
  margin-bottom: 0.5rem; }
.gw-head .gw-right { margin-left: auto; }
.gw-body { display: grid; grid-template-columns: minmax(0, 3fr) minmax(0, 2fr); gap: 1rem 2rem; }
.gw-body p { margin: 0 0 0.5rem; }
.gw-body h5 { margin: 0.6rem 0 0.1rem; padding: 0; font-size: 0.86rem; font-weight: 650; }
.gw-table { border-collapse: collapse; width: 100%; font-size: 0.88rem; }
.gw-table td, .gw-table th { border: 0; border-bottom: 1px solid rgba(128,128,128,0.25);
  padding: 0.25rem 0.2rem; text-align: left; font-weight: 400; vertical-align: top; }
.gw-table td:last-child { text-align: right; font-variant-numeric: tabular-nums;
  font-weight: 600; }
.gw-name { font-family: "Source Code Pro", ui-monospace, monospace; font-size: 0.84em;
  overflow-wrap: anywhere; }
/* plotly's own ink is too pale to read; take the page's, which follows its theme. */
.js-plotly-plot text:not(.hoverlayer text):not(.textpoint text) { fill: currentColor !important; }
.stMainBlockContainer { padding-top: 4.4rem; padding-bottom: 4rem; }
@media (max-width: 900px) { .gw-body { grid-template-columns: minmax(0, 1fr); } }
</style>"""


def pill(shown: Look, *, title: str = "") -> str:
    """A coloured pill with a sign and a word."""
    return (
        f'<span class="gw-pill" style="background:{shown.colour}" title="{escape(title)}">'
        f"{shown.sign}&ensp;{escape(shown.word)}</span>"
    )


def plain(shown: Look) -> str:
    """A sign and a word without colour, for what matters less."""
    return f'<span class="gw-line gw-quiet">{shown.sign}&ensp;{escape(shown.word)}</span>'


def facts(pairs: Mapping[str, str]) -> str:
    """Named values side by side. The values are HTML."""
    inner = "".join(
        f'<div class="gw-fact"><span>{escape(name)}</span>{value}</div>'
        for name, value in pairs.items()
    )
    return f'<div class="gw-facts">{inner}</div>'


def table(rows: Mapping[str, str]) -> str:
    """A small table of names and values. The values are HTML."""
    inner = "".join(
        f"<tr><th>{escape(name)}</th><td>{value}</td></tr>" for name, value in rows.items()
    )
    return f'<table class="gw-table">{inner}</table>'


def value(given: object) -> str:
    """A number of a configuration or of evidence as people read it; anything else as text."""
    if given is None:
        return "not finite"
    if isinstance(given, bool):
        return "yes" if given else "no"
    if isinstance(given, float | int):
        return number(given)
    return escape(str(given))


def named(layers: Sequence[str]) -> str:
    """The first layers by name and the number of the others."""
    shown = ", ".join(
        f'<span class="gw-name">{escape(name)}</span>' for name in layers[:MAX_LAYERS]
    )
    hidden = len(layers) - MAX_LAYERS
    return f"{shown} and {count(hidden, 'more layer')}" if hidden > 0 else shown


def top_finding(run: RunView) -> FindingView | None:
    """The finding to name when there is room for one: open before resolved, worst first."""
    order = list(SEVERITIES)
    return max(
        (finding for finding in run.findings if finding.state == "open"),
        key=lambda finding: (
            order.index(finding.severity) if finding.severity in order else -1,
            -finding.first_step,
        ),
        default=None,
    )


def loss_of(run: RunView) -> str:
    """The loss that was logged last."""
    return "NaN or Inf" if run.loss_nonfinite else number(run.loss)


def run_facts(run: RunView, now: float) -> str:
    """Status, step, loss and age of a run, for its row in the list."""
    told = facts(
        {
            "status": plain(look(STATUSES, run.status)),
            "step": number(run.last_step) if run.optimizers else ABSENT,
            "loss": loss_of(run),
            "started": age(now - run.info.started_at),
        }
    )
    return f'<div class="gw-row">{told}</div>'


def run_summary(run: RunView) -> str:
    """The worst open finding of a run in one sentence, or why there is none."""
    finding = top_finding(run)
    if finding is None:
        told = {
            "waiting": "Waiting for the first frames.",
            "healthy": "No problem found.",
        }.get(run.verdict, "")
        return f'<div class="gw-small gw-quiet">{told}</div>'
    others = sum(other.state == "open" for other in run.findings) - 1
    more = f' <span class="gw-quiet">(+{count(others, "other finding")})</span>' if others else ""
    return (
        f'<div class="gw-small"><b>{escape(finding.title)}</b>{more}'
        f"<br>{escape(finding.summary)}</div>"
    )


def run_header(run: RunView, now: float) -> str:
    """Verdict, status and progress of one run, for the head of its page."""
    last_frame = ABSENT if run.last_frame_at is None else age(now - run.last_frame_at)
    shown = {
        "health": _score(run),
        "status": plain(look(STATUSES, run.status)),
        "last step": number(run.last_step) if run.optimizers else ABSENT,
        "last frame": last_frame,
        "loss": loss_of(run),
        "started": age(now - run.info.started_at),
        "host": escape(run.info.host) or ABSENT,
        "dropped frames": number(sum(run.dropped.values())),
    }
    if run.info.world_size > 1:
        shown["ranks"] = number(run.info.world_size)
    return (
        f'<div class="gw-head">{pill(look(VERDICTS, run.verdict))}'
        f'<span class="gw-quiet">{escape(run.info.project)}</span></div>{facts(shown)}'
    )


def _score(run: RunView) -> str:
    """The health score, with its definition for the pointer."""
    if run.score is None:
        return ABSENT
    return f'<span title="{escape(DEFINITION)}">{run.score:.0f} of 100</span>'


def finding_card(finding: FindingView) -> str:
    """One finding: what, where, since when, the numbers, why it happens, what to try."""
    severity = look(SEVERITIES, finding.severity)
    state = look(STATES, finding.state)
    evidence = {name: value(given) for name, given in finding.evidence.items()}
    when = steps(finding.first_step, finding.last_step)
    return (
        f'<div class="gw-card" style="border-left-color:{severity.colour}">'
        f'<div class="gw-head">{pill(severity)}<h4>{escape(finding.title)}</h4>'
        f'<span class="gw-quiet gw-small">{when}</span>'
        f'<span class="gw-right">{plain(state)}</span></div>'
        f'<div class="gw-body"><div><p>{escape(finding.summary)}</p>'
        f'<p class="gw-small"><span class="gw-quiet">layers</span> {named(finding.layers)}</p>'
        f'<div class="gw-small"><h5>Why it happens</h5>{escape(finding.explanation)}'
        f"<h5>What to try</h5>{escape(finding.action)}</div></div>"
        f"<div>{table(evidence)}</div></div></div>"
    )


def flattened(config: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """A nested configuration as dotted names with values as HTML."""
    flat: dict[str, str] = {}
    for name, held in config.items():
        if isinstance(held, dict) and held:
            inner = {str(key): item for key, item in held.items()}
            flat |= flattened(inner, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value(held)
    return flat
