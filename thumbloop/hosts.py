"""Who can reach what listens on a host."""

import ipaddress


def is_loopback(host: str) -> bool:
    """Say whether a host can mean nothing but this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False  # a name may mean anything
