import sys

from streamlit.web import cli

from gradwatch_dashboard import command
from gradwatch_dashboard.launch import DEFAULT_URL, OPTIONS, collector_url


def test_the_command_serves_the_app_on_loopback_for_one_collector() -> None:
    argv = command("http://127.0.0.1:9999", 8601)
    assert argv[:4] == [sys.executable, "-m", "streamlit", "run"]
    assert argv[argv.index("--server.port") + 1] == "8601"
    assert argv[argv.index("--server.address") + 1] == "127.0.0.1"
    assert collector_url(argv, {}) == "http://127.0.0.1:9999"


def test_streamlit_knows_every_option() -> None:
    known = {name for param in cli.main_run.params for name in param.opts}
    assert {f"--{name}" for name in OPTIONS} <= known


def test_the_collector_comes_from_the_environment_without_a_flag() -> None:
    assert collector_url(["app.py"], {"GRADWATCH_URL": "http://there"}) == "http://there"
    assert collector_url(["app.py"], {"GRADWATCH_URL": ""}) == DEFAULT_URL
