"""The broker of plain files: every message once, none half read, nothing left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty

import pytest
from kombu import Connection
from kombu.simple import SimpleQueue

from gradwatch_server.file_broker import SCHEME, forget_messages

OpenQueue = Callable[[], SimpleQueue]


@pytest.fixture
def open_queue(tmp_path: Path) -> Generator[OpenQueue]:
    connections: list[Connection] = []

    def open_one() -> SimpleQueue:
        options = {"folder": str(tmp_path), "polling_interval": 0.01}
        connections.append(Connection(f"{SCHEME}://", transport_options=options))
        return connections[-1].SimpleQueue("a queue/with signs")

    yield open_one
    for connection in connections:
        connection.release()


def take(queue: SimpleQueue) -> int:
    message = queue.get(timeout=0.5)
    message.ack()
    return message.payload


def test_messages_come_in_the_order_of_their_sending(open_queue):
    sender, receiver = open_queue(), open_queue()
    for number in range(20):
        sender.put(number)
    assert [take(receiver) for _ in range(20)] == list(range(20))
    with pytest.raises(Empty):
        take(receiver)


def test_what_was_taken_leaves_no_file(open_queue, tmp_path):
    queue = open_queue()
    queue.put(1)
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1
    take(queue)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_two_workers_share_the_messages_and_none_comes_twice(open_queue):
    sender = open_queue()
    for number in range(100):
        sender.put(number)
    start = threading.Barrier(2)

    def work(queue: SimpleQueue) -> list[int]:
        start.wait()
        taken: list[int] = []
        try:
            while True:
                taken.append(take(queue))
        except Empty:
            return taken

    with ThreadPoolExecutor(2) as pool:
        taken = list(pool.map(work, [open_queue(), open_queue()]))
    assert sorted(taken[0] + taken[1]) == list(range(100))


def test_a_file_that_lost_its_content_is_passed_over(open_queue, tmp_path):
    queue = open_queue()
    queue.put(1)
    (message,) = tmp_path.rglob("*.json")
    for name in ("0.json", "1.json"):
        message.with_name(name).write_text("" if name[0] == "0" else '{"half": ')
    assert take(queue) == 1


def test_a_message_that_is_being_written_is_not_seen(open_queue, tmp_path):
    queue = open_queue()
    queue.put(1)
    (message,) = tmp_path.rglob("*.json")
    message.with_name("0.part").write_text("{")
    assert take(queue) == 1
    assert queue.qsize() == 0


def test_forgetting_leaves_neither_whole_nor_half_messages(open_queue, tmp_path):
    queue = open_queue()
    queue.put(1)
    forget_messages(tmp_path)
    assert queue.qsize() == 0
    queue.put(2)
    assert take(queue) == 2
