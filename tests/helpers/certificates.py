"""Certificates that tests make."""

from __future__ import annotations

import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class SelfSigned:
    """A certificate that is its own CA, and its key; both are PEM files."""

    certificate: Path
    key: Path

    def server(self) -> ssl.SSLContext:
        """Return what a server presents it with."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, self.key)
        return context


def self_signed(directory: Path, names: str = "DNS:localhost,IP:127.0.0.1") -> SelfSigned:
    """Make one for these names, as openssl spells them; skip the test where that is impossible."""
    made = SelfSigned(directory / "certificate.pem", directory / "key.pem")
    done = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout",
         made.key, "-out", made.certificate, "-days", "2", "-subj", "/CN=localhost",
         "-addext", f"subjectAltName={names}"],
        capture_output=True, check=False, timeout=60,
    )  # fmt: skip
    if done.returncode:
        pytest.skip("openssl cannot make a certificate here")
    return made
