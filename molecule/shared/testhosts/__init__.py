"""Debian machines to deploy to, made by systemd-nspawn on the machine that runs the tests or the demo."""
