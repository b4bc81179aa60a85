"""Preflight: all that is wrong with a host, each with its mend."""

from __future__ import annotations

from pathlib import Path

from modules import ragrack_preflight as preflight


def test_all_missing_files_are_named_in_one_problem(tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    paths = {str(tmp_path / name): f"role {name}" for name in ("there", "uv", "app")}
    [problem] = preflight.missing_paths(paths)
    assert f"{tmp_path}/uv (role uv), {tmp_path}/app (role app) missing" in problem
    assert "playbooks/site.yml" in problem
    assert preflight.missing_paths({str(tmp_path / "there"): "role there"}) == []


def test_a_link_that_points_nowhere_counts_as_there(tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to("gone")
    assert preflight.missing_paths({str(tmp_path / "current"): "role release"}) == []


def test_space_is_measured_where_the_directory_will_be(tmp_path: Path) -> None:
    assert preflight.missing_space({str(tmp_path / "not/yet/there"): 1}) == []
    [problem] = preflight.missing_space({str(tmp_path / "not/yet/there"): 10**18})
    assert f"{tmp_path}/not/yet/there has " in problem
    assert "mend: " in problem
