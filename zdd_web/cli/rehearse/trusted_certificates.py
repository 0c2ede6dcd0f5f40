"""Which servers the load of an https URL trusts, and what the user can do about one that is not trusted."""

from __future__ import annotations

import ssl

from zdd_web.cli.rehearse.client_connection import describe
from zdd_web.cli.rehearse.server import RehearsalError

#: X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH.
_FOR_ANOTHER_HOST = (62, 64)


def context(cacert: str | None, *, insecure: bool) -> ssl.SSLContext:
    """Return what checks certificates: against this machine's CAs, those in a file instead, or not at all.

    Raises `RehearsalError`.
    """
    try:
        found = ssl.create_default_context(cafile=cacert)
    except ssl.SSLError as error:
        raise RehearsalError(
            f"--cacert {cacert}: no certificate can be read there ({describe(error)}): name a file in PEM format, "
            f"which begins with -----BEGIN CERTIFICATE-----"
        ) from None
    except OSError as error:
        raise RehearsalError(f"--cacert {cacert}: {error.strerror}") from None
    if insecure:
        found.check_hostname, found.verify_mode = False, ssl.CERT_NONE
    # Without it a server that prefers HTTP/2 may choose that.
    found.set_alpn_protocols(["http/1.1"])
    return found


def explain(url: str, error: ssl.SSLError) -> RehearsalError:
    """Return the error for a URL whose server cannot be spoken to under TLS."""
    why = describe(error)
    if not isinstance(error, ssl.SSLCertVerificationError):
        return RehearsalError(f"--url {url}: {why}: where the server speaks plain HTTP, write http://")
    if error.verify_code in _FOR_ANOTHER_HOST:
        remedy = "name a host that it is for, or give --insecure to check nothing"
    else:
        remedy = "give the certificate of its CA with --cacert FILE, or --insecure to check nothing"
    return RehearsalError(f"--url {url}: {why}: {remedy}")
