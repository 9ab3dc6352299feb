"""Celery: scheduled judgement, delivery of alerts, folding and retention of what is stored.

What is to be done stands in the database, with leases, so every task may run twice, late or never:
the next tick finds what is due. Messages only say "look now".
"""

from __future__ import annotations

import logging
import time
from functools import cache
from typing import Any

from celery import Celery
from celery.signals import (
    setup_logging,
    task_failure,
    task_postrun,
    task_prerun,
    worker_process_init,
    worker_process_shutdown,
    worker_shutting_down,
)
from kombu.exceptions import OperationalError
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from gradwatch_server import alerts, folding, judging, logs, redis_broker, retention, stalls
from gradwatch_server.database import open_database
from gradwatch_server.file_broker import POLL_S, SCHEME
from gradwatch_server.frame_cache import FrameCache
from gradwatch_server.rules import Rules, load_rules
from gradwatch_server.settings import Settings
from gradwatch_server.task_counts import TaskCounts

log = logging.getLogger(__name__)

# Looks for alerts whose wake-up was lost or whose retry is due.
DELIVER_EVERY_S = 2.0
FOLD_EVERY_S = 5.0
RETAIN_EVERY_S = 60.0
# A worker that has one process for everything must get back to judging.
BUDGET_S = 0.5
TASK_LIMIT_S = 120
BROKER_TIMEOUT_S = 3.0
RESTORE_EVERY_S = 10


def make_celery(settings: Settings) -> Celery:
    """The Celery application for these settings."""
    redis_broker.install()
    app = Celery("gradwatch", broker=settings.broker_url or f"{SCHEME}://")
    app.conf.update(
        task_ignore_result=True,
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        # Below Redis' visibility timeout, so that no task runs twice at once.
        task_time_limit=TASK_LIMIT_S,
        worker_prefetch_multiplier=1,
        worker_hijack_root_logger=False,
        broker_connection_retry_on_startup=True,
        # A broker may be away for a night.
        broker_connection_max_retries=None,
        beat_schedule={
            "judge": {
                "task": "gradwatch.judge",
                "schedule": settings.judge_every_s,
                # A tick that nobody took by the next one is worth nothing.
                "options": {"expires": settings.judge_every_s},
            },
            "deliver": {
                "task": "gradwatch.deliver",
                "schedule": DELIVER_EVERY_S,
                "options": {"expires": DELIVER_EVERY_S},
            },
            "fold": {
                "task": "gradwatch.fold",
                "schedule": FOLD_EVERY_S,
                "options": {"expires": FOLD_EVERY_S},
            },
            "retain": {
                "task": "gradwatch.retain",
                "schedule": RETAIN_EVERY_S,
                "options": {"expires": RETAIN_EVERY_S},
            },
        },
    )
    if not settings.broker_url:
        app.conf.broker_transport_options = {
            "folder": str(settings.broker_folder),
            "polling_interval": POLL_S,
        }
    else:
        app.conf.broker_transport_options = {
            "visibility_timeout": 2 * TASK_LIMIT_S,
            # By default the unacknowledged are looked for at every tenth look, 100 s apart.
            "unacked_restore_interval": RESTORE_EVERY_S,
            "unacked_restore_throttle": 1,
            # A broker that is gone must not hold up the collector's writer, which wakes workers.
            "socket_connect_timeout": BROKER_TIMEOUT_S,
            "socket_timeout": BROKER_TIMEOUT_S,
        }
    return app


celery_app = make_celery(Settings.load())


@cache
def _settings() -> Settings:
    return Settings.load()


@cache
def _engine() -> Engine:
    """One engine a worker process: connections must not be shared over a fork."""
    return open_database(_settings().database)


@cache
def _rules() -> Rules:
    return load_rules(_settings().thresholds)


@cache
def _frames() -> FrameCache:
    return FrameCache()


@cache
def _counts() -> TaskCounts:
    return TaskCounts()


@worker_process_init.connect
def _start_afresh(**_: Any) -> None:  # pyright: ignore[reportUnusedFunction]
    _engine.cache_clear()
    _counts.cache_clear()
    _frames.cache_clear()


@worker_process_shutdown.connect
@worker_shutting_down.connect
def _close(**_: Any) -> None:  # pyright: ignore[reportUnusedFunction]
    if _engine.cache_info().currsize:
        _write_counts(at_once=True)
        _engine().dispose()


@setup_logging.connect
def _configure_logs(loglevel: int | str, **_: Any) -> None:  # pyright: ignore[reportUnusedFunction]
    logs.configure(_settings().log_format, loglevel)


@task_prerun.connect
def _begin(task_id: str, task: Any, **_: Any) -> None:  # pyright: ignore[reportUnusedFunction]
    logs.AT.set({"task_id": task_id})
    task.request.began = time.perf_counter()


@task_failure.connect
def _fail(sender: Any, **_: Any) -> None:  # pyright: ignore[reportUnusedFunction]
    sender.request.failed = True


@task_postrun.connect
def _end(task: Any, **_: Any) -> None:  # pyright: ignore[reportUnusedFunction]
    request = task.request
    seconds = time.perf_counter() - request.began
    _counts().add(task.name, seconds, getattr(request, "failed", False))
    _write_counts()
    logs.AT.set({})


def _write_counts(at_once: bool = False) -> None:
    try:
        _counts().write(_engine(), at_once)
    except SQLAlchemyError as error:
        log.warning("counts of tasks are lost: %s", error)


@celery_app.task(name="gradwatch.judge")  # pyright: ignore[reportUntypedFunctionDecorator]
def judge() -> None:
    """Judge the runs that changed, and those that have fallen silent."""
    engine, channels, rules = _engine(), _settings().channels, _rules()
    alerted = judging.judge_due(engine, channels, rules, _frames())
    if stalls.judge_silence(engine, channels, rules) or alerted:
        deliver()


@celery_app.task(name="gradwatch.deliver")  # pyright: ignore[reportUntypedFunctionDecorator]
def deliver() -> None:
    """Send the alerts that are due."""
    settings = _settings()
    local = settings.notify_local == "allow"
    while alerts.deliver_due(_engine(), settings.channels, settings.dashboard_url, local):
        pass


@celery_app.task(name="gradwatch.fold")  # pyright: ignore[reportUntypedFunctionDecorator]
def fold() -> None:
    """Fold stretches that are over into tiers; go on behind what else is waiting."""
    if folding.fold_due(_engine(), BUDGET_S):
        celery_app.send_task("gradwatch.fold", retry=False, expires=FOLD_EVERY_S)


@celery_app.task(name="gradwatch.retain")  # pyright: ignore[reportUntypedFunctionDecorator]
def retain() -> None:
    """Free what is not kept any more; go on behind what else is waiting."""
    settings = _settings()
    keep = retention.Keep(
        settings.keep_frames_days,
        settings.keep_histograms_days,
        settings.keep_runs_days,
        settings.keep_rank_steps,
    )
    if retention.retain(_engine(), keep, BUDGET_S):
        celery_app.send_task("gradwatch.retain", retry=False, expires=RETAIN_EVERY_S)


def wake_delivery(settings: Settings) -> None:
    """Tell a worker that alerts wait. Never raises: the schedule finds them without it."""
    try:
        celery_app.send_task("gradwatch.deliver", retry=False, expires=DELIVER_EVERY_S)
    except (OperationalError, OSError) as error:
        log.warning("no worker could be woken: %s", error)
