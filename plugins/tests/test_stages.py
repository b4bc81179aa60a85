from __future__ import annotations

from filter.ragrack_stages import ragrack_stages


def test_hooks_are_around_their_stage() -> None:
    hooks = {"before_gate": ["/a.yml", "/b.yml"], "after_gate": ["hooks/mail.yml"], "on_failure": ["/c.yml"]}
    assert [(each["stage"], each["file"]) for each in ragrack_stages(["start", "gate"], hooks)] == [
        ("start", "start.yml"),
        ("gate", "/a.yml"),
        ("gate", "/b.yml"),
        ("gate", "gate.yml"),
        ("gate", "hooks/mail.yml"),
    ]
