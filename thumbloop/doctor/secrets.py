"""Files that strangers must not read or change: TLS keys, settings."""

import ssl
import stat

from thumbloop.doctor.findings import Finding, Subject, ok, warning, wrong


def tls(subject: Subject) -> Finding:
    """Look whether key and certificate can be read, fit, and are nobody else's to read."""
    where = subject.server.listen
    certificate, key = where.tls_certificate, where.tls_key
    if certificate is None or key is None:
        return ok("TLS", "not set")
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        if where.tls_client_ca is not None:
            context.load_verify_locations(where.tls_client_ca)
    except (OSError, ValueError) as error:  # SSLError is an OSError
        return wrong("TLS", str(error), "PEM files of a certificate and of its own key")
    if key.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO) & ~stat.S_IRGRP:
        return wrong("TLS", f"others may read or write {key}", f"chmod 600 {key}")
    if key.stat().st_mode & stat.S_IRGRP:
        return warning("TLS", f"its group may read {key}", f"chmod 600 {key}, unless that is meant")
    return ok("TLS", "certificate and key fit")


def settings_files(subject: Subject) -> Finding:
    """Look whether anybody may change what the settings say."""
    loose = [str(f) for f in subject.files if f.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)]
    if loose:
        found = f"others may write {', '.join(loose)}"
        return wrong(
            "settings' files", found, "chmod go-w; whoever writes there chooses who may call"
        )
    return ok("settings' files", "nobody else may write them" if subject.files else "none")


def tokens(subject: Subject) -> Finding:
    """Tell whether callers need a token."""
    count = len(subject.server.access.tokens)
    return ok(
        "tokens",
        f"{count} known by their digests" if count else "none: whoever reaches a port may call",
    )
