"""Certificates of a day."""

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trustme

from thumbloop.client import Tls


@dataclass(frozen=True)
class Papers:
    """Certificates: the server's, and those that clients may show."""

    server_ca: trustme.CA
    client_ca: trustme.CA
    certificate: Path
    key: Path
    client_authorities: Path

    @property
    def listen(self) -> dict[str, Any]:
        return {"tls_certificate": self.certificate, "tls_key": self.key}

    @property
    def mutual(self) -> dict[str, Any]:
        return {**self.listen, "tls_client_ca": self.client_authorities}

    @property
    def authorities(self) -> bytes:
        return self.server_ca.cert_pem.bytes()

    def tls(self, shown: trustme.LeafCert | None = None) -> Tls:
        """Return how a gRPC client reaches the server, with this certificate to show."""
        if shown is None:
            return Tls(self.authorities)
        chain = b"".join(blob.bytes() for blob in shown.cert_chain_pems)
        return Tls(self.authorities, chain, shown.private_key_pem.bytes())

    def context(self, shown: trustme.LeafCert | None = None) -> ssl.SSLContext:
        """Return the same for HTTP."""
        context = ssl.create_default_context(cadata=self.authorities.decode())
        if shown is not None:
            shown.configure_cert(context)
        return context


def write(issued: trustme.LeafCert, certificate: Path, key: Path) -> None:
    """Write a certificate with its chain, and its key."""
    certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(key)
