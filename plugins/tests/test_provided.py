"""A certificate that was made elsewhere: what is wrong with it is said in words, all of it at once."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from module_utils.certificate_set import CertificateError
from modules.ragrack_provided import problems, text_of

NAMES = ["rag.example.org", "192.0.2.10"]


def openssl(*arguments: str, cwd: Path) -> None:
    subprocess.run(["openssl", *arguments], cwd=cwd, check=True, capture_output=True)


class Made:
    """A root, one between, and a leaf of it (PEM)."""

    def __init__(self, path: Path, days: int) -> None:
        new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        (path / "ca.ext").write_text("basicConstraints=critical,CA:true\n")
        (path / "leaf.ext").write_text("subjectAltName=DNS:*.example.org,IP:192.0.2.10\n")
        root = ["-x509", "-subj", "/CN=root", "-days", "90", "-addext", "keyUsage=critical,keyCertSign"]
        openssl("req", *new, *root, "-keyout", "root.key", "-out", "root.pem", cwd=path)
        for name, by, extensions, lasts in [("between", "root", "ca.ext", 90), ("leaf", "between", "leaf.ext", days)]:
            openssl("req", *new, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr", cwd=path)
            ca = ["-CA", f"{by}.pem", "-CAkey", f"{by}.key", "-CAcreateserial", "-days", str(lasts)]
            openssl("x509", "-req", "-in", f"{name}.csr", *ca, "-extfile", extensions, "-out", f"{name}.pem", cwd=path)
        texts = ("root.pem", "between.pem", "leaf.pem", "leaf.key", "between.key")
        self.root, self.between, self.leaf, self.key, self.other = ((path / name).read_text() for name in texts)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("pki"), days=30)


def test_what_is_right_is_taken(made: Made) -> None:
    assert problems(made.leaf + made.between, made.key, made.root, NAMES) == []


def test_another_key_is_refused(made: Made) -> None:
    [said] = problems(made.leaf + made.between, made.other, made.root, NAMES)
    assert "tls_key" in said


def test_names_that_it_does_not_cover_are_named(made: Made) -> None:
    said = problems(made.leaf + made.between, made.key, made.root, [*NAMES, "rag.example.com", "192.0.2.11"])
    assert [name in one for name, one in zip(["rag.example.com", "192.0.2.11"], said, strict=True)] == [True, True]


def test_a_chain_with_a_gap_is_refused(made: Made) -> None:
    [said] = problems(made.leaf, made.key, made.root, NAMES)
    assert "does not lead to tls_ca" in said


def test_a_root_of_ones_own_has_to_be_given(made: Made) -> None:
    [said] = problems(made.leaf + made.between, made.key, "", NAMES)
    assert "a root that the system trusts" in said


def test_one_that_ends_is_refused(tmp_path: Path) -> None:
    made = Made(tmp_path, days=1)
    [said] = problems(made.leaf + made.between, made.key, made.root, NAMES)
    assert "ends within a day" in said


def test_all_that_is_wrong_is_said_at_once(made: Made) -> None:
    assert len(problems(made.leaf, made.other, made.root, ["rag.example.com"])) == 3


def test_a_value_is_pem_or_a_path(tmp_path: Path, made: Made) -> None:
    path = tmp_path / "leaf.pem"
    path.write_text(made.leaf)
    assert text_of("tls_certificate", str(path)) == text_of("tls_certificate", made.leaf.rstrip())
    for value, said in [("", "is empty"), (str(tmp_path / "none"), "cannot be read")]:
        with pytest.raises(CertificateError, match=f"tls_certificate.*{said}"):
            text_of("tls_certificate", value)
    path.write_bytes(b"\x30\x82")
    with pytest.raises(CertificateError, match="tls_certificate"):
        text_of("tls_certificate", str(path))
