"""Who runs a playbook, and whether the run that holds a lock still lives."""

from __future__ import annotations

import os
import subprocess

from lookup import ragrack_controller as controller


def test_a_run_that_goes_on_is_alive_and_one_that_ended_is_dead() -> None:
    child = subprocess.Popen(["sleep", "60"])
    holder = controller.identity() | {"pid": child.pid, "pid_started": controller.started(child.pid)}
    assert controller.state(holder) == "alive"
    child.kill()
    child.wait()
    assert controller.state(holder) == "dead"


def test_a_later_process_of_the_same_number_is_another_run() -> None:
    holder = controller.identity() | {"pid": os.getpid(), "pid_started": "1"}
    assert controller.state(holder) == "dead"


def test_a_run_before_a_reboot_is_dead() -> None:
    assert controller.state(controller.identity() | {"boot": "another"}) == "dead"


def test_what_runs_on_another_control_node_is_not_ours_to_judge() -> None:
    assert controller.state(controller.identity() | {"controller": "elsewhere"}) == "unknown"
    assert controller.state(controller.identity() | {"machine": "another of the same name"}) == "unknown"
    assert controller.state({}) == "unknown"
