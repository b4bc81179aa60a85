"""gunicorn's configuration: `python -m gunicorn --config python:ragrack.gunicorn_conf "ragrack.api:create_app()"`.

READY=1 is sent by gunicorn itself when it listens, before its workers have loaded; whether they can answer is what
/readyz on the socket says. `max_requests` stays off: it would cut answers in flight.
"""

import os
import shutil
import sys
from typing import Any

from ragrack import logging as ragrack_logging
from ragrack import preload
from ragrack.auth import write_gate_key
from ragrack.settings import SettingsError, load

try:
    _settings = load()
except SettingsError as error:
    sys.exit(str(error))
# Read by prometheus_client as it is imported, in the workers.
os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(_settings.runtime_dir / "metrics")

bind = f"unix:{_settings.socket}"
# The socket is for its owner and its group, in which nginx is.
umask = 0o117
workers = _settings.workers
worker_class = {"uvicorn": "uvicorn_worker.UvicornWorker", "asgi": "asgi"}[_settings.worker_class]
# Workers open indexes, models and clients themselves: neither threads nor an event loop survive a fork.
preload_app = False
# A worker that has not come back to its loop for so long hangs, and is replaced.
timeout = 60
graceful_timeout = _settings.graceful_timeout
# nginx keeps no connection to the socket open, so that moving `current` moves its next request. For others, briefly.
keepalive = 1
backlog = 2048
# Only nginx reaches the socket; what it says about the client is to be believed.
forwarded_allow_ips = "*"
worker_tmp_dir = "/dev/shm"  # noqa: S108 - a file that only gunicorn's master and worker share, unlinked when made
# gunicornc could reload or scale past systemd, which knows nothing of it.
control_socket_disable = True
proc_name = f"ragrack@{_settings.release}"
accesslog = None
errorlog = "-"
logconfig_dict = ragrack_logging.config(_settings)


def on_starting(_: object) -> None:
    """Before the workers are forked: they find the key that the gate will show, and count from nothing."""
    write_gate_key(_settings.gate_key_file)
    metrics = _settings.runtime_dir / "metrics"
    shutil.rmtree(metrics, ignore_errors=True)
    metrics.mkdir()
    preload.import_all(_settings)


def child_exit(_: object, worker: Any) -> None:
    """What the worker was, as the state of its breakers, is no more; what it counted stays."""
    from prometheus_client.multiprocess import mark_process_dead

    mark_process_dead(worker.pid)
