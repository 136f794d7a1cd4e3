"""Who calls, and what for: bearer tokens, their scopes, and the scope that each call needs."""

import hashlib
import hmac
import ssl
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import grpc

from thumbloop.config.server import Access, Listen, ServerConfig
from thumbloop.errors import PermissionDenied, SettingsError, Unauthenticated
from thumbloop.hosts import is_loopback
from thumbloop.types import Scope, User

SCOPES: Mapping[str, Scope | None] = {
    "/thumbloop.v1.PolicyService/Generate": Scope.GENERATE,
    "/thumbloop.v1.PolicyService/StreamGenerate": Scope.GENERATE,
    "/thumbloop.v1.FeedbackService/SubmitFeedback": Scope.FEEDBACK,
    "/thumbloop.v1.FeedbackService/SubmitPreference": Scope.FEEDBACK,
    "/thumbloop.v1.FeedbackService/DeleteUserData": None,
    "/thumbloop.v1.AdminService/ListPolicyVersions": Scope.ADMIN,
    "/thumbloop.v1.AdminService/GetPolicyVersion": Scope.ADMIN,
    "/thumbloop.v1.AdminService/GetUserLineage": Scope.ADMIN,
    "/thumbloop.v1.AdminService/PromotePolicyVersion": Scope.ADMIN,
    "/thumbloop.v1.AdminService/RollbackPolicyVersion": Scope.ADMIN,
    "/thumbloop.v1.AdminService/ImportFeedback": Scope.ADMIN,
}
"""What every RPC of ours needs; None: any token, and the call itself asks whose data it is about. One that is
not here is refused to everybody."""

ROUTES: Mapping[str, Scope] = {
    "GET /v1/models": Scope.GENERATE,
    "POST /v1/completions": Scope.GENERATE,
    "POST /v1/chat/completions": Scope.GENERATE,
    "POST /v1/feedback": Scope.FEEDBACK,
}
"""The same for HTTP."""

_SCHEME = "bearer "


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever made a call: the subject of its token, and what the token is for."""

    subject: str
    scopes: frozenset[Scope]

    def require(self, scope: Scope) -> None:
        """Raise PermissionDenied where the token is not for this."""
        if scope not in self.scopes:
            raise PermissionDenied(f"this call needs a token with the scope {scope.value}")

    def user(self, user_id: str) -> User:
        """Return the user the call is for. Raises PermissionDenied: it names one and may not."""
        if user_id and Scope.ON_BEHALF not in self.scopes:
            raise PermissionDenied(
                f"user_id: naming a user needs a token with the scope {Scope.ON_BEHALF.value}"
            )
        return User(self.subject, user_id)

    def any_user(self, subject: str | None, user_id: str) -> User:
        """Return a user whose data the call is about; `subject` None is the caller's own.

        Raises PermissionDenied: another subject's, or one that it may not name.
        """
        if Scope.ADMIN in self.scopes:
            return User(self.subject if subject is None else subject, user_id)
        if subject not in (None, self.subject):
            raise PermissionDenied(
                f"subject: another's users need a token with the scope {Scope.ADMIN.value}"
            )
        return self.user(user_id)


ANYBODY = Caller("", frozenset(Scope))
"""Who calls a server that has no tokens: it listens on loopback, or was told not to ask."""

CALLER: ContextVar[Caller] = ContextVar("caller")
"""Who makes the call that the current task answers."""


class Doorkeeper:
    """Knows the tokens by their digests."""

    def __init__(self, settings: Access) -> None:
        self._known = [
            (bytes.fromhex(token.sha256), Caller(subject, frozenset(token.scopes)))
            for subject, token in settings.tokens.items()
        ]

    def identify(self, authorizations: Sequence[str]) -> Caller:
        """Return who presents these `Authorization` headers, of which there has to be one.

        Raises Unauthenticated. Every known digest is compared, each in constant time, whichever fits.
        """
        if not self._known:
            return ANYBODY
        if len(authorizations) != 1 or authorizations[0][: len(_SCHEME)].lower() != _SCHEME:
            raise Unauthenticated("send `authorization: Bearer <token>`, once")
        digest = hashlib.sha256(authorizations[0][len(_SCHEME) :].strip().encode()).digest()
        fitting = [caller for known, caller in self._known if hmac.compare_digest(known, digest)]
        if not fitting:
            raise Unauthenticated("this token is not known here")
        return fitting[0]

    def admit(self, method: str, authorizations: Sequence[str]) -> Caller:
        """Return who makes a call of `method`. Raises Unauthenticated, PermissionDenied."""
        caller = self.identify(authorizations)
        if method not in SCOPES:
            raise PermissionDenied("this call is for nobody")
        if (scope := SCOPES[method]) is not None:
            caller.require(scope)
        return caller


def refuse_strangers(config: ServerConfig) -> None:
    """Raise SettingsError where strangers could reach the server and it would not ask who they are.

    A public address needs TLS, so that nobody reads tokens on the way, and tokens or certificates that
    clients have to show; or somebody who says that something in front of it has both.
    """
    listen = config.listen
    has_identity = bool(config.access.tokens) or listen.tls_client_ca is not None
    if listen.insecure or (listen.tls_key is not None and has_identity):
        return
    hosts = [("listen.host", listen.host), ("metrics.host", config.metrics.host)]
    if config.http.enabled:
        hosts.append(("http.host", config.http.host))
    for setting, host in hosts:
        if not is_loopback(host):
            raise SettingsError(
                f"{setting}: {host} can be reached by strangers; set listen.tls_certificate,"
                " listen.tls_key and access.tokens (or listen.tls_client_ca), bind 127.0.0.1, or say"
                " --insecure where something in front of the server has both"
            )


def is_open_to_pages(config: ServerConfig) -> bool:
    """Say whether a page in a browser of this machine could pass for a caller.

    It could not where there are tokens, which it has not, or a certificate, which is not for its name.
    """
    listen = config.listen
    return not (config.access.tokens or listen.tls_key or listen.insecure)


def credentials_of(listen: Listen) -> grpc.ServerCredentials | None:
    """Return what a TLS port needs, None for one without. Raises SettingsError."""
    if listen.tls_key is None or listen.tls_certificate is None:
        return None
    certificate = _pem("listen.tls_certificate", listen.tls_certificate)
    key = _pem("listen.tls_key", listen.tls_key)
    authorities = None
    if listen.tls_client_ca is not None:
        authorities = _pem("listen.tls_client_ca", listen.tls_client_ca)
    _check_contents(listen.tls_certificate, listen.tls_key, listen.tls_client_ca)
    return grpc.ssl_server_credentials(
        [(key, certificate)],
        root_certificates=authorities,
        require_client_auth=authorities is not None,
    )


def _check_contents(certificate: Path, key: Path, authorities: Path | None) -> None:
    """Raise SettingsError for a file that does not hold what it should: gRPC would blame the port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for setting, path in (("certificate", certificate), ("client_ca", authorities)):
        try:
            context.load_verify_locations(path or certificate)
        except ssl.SSLError:
            raise SettingsError(f"listen.tls_{setting}: {path} holds no PEM certificate") from None
    try:
        context.load_cert_chain(certificate, key, password="")  # nobody is there to type one
    except ssl.SSLError:
        raise SettingsError(
            f"listen.tls_key: {key} does not hold the private key of listen.tls_certificate,"
            " in PEM and without a passphrase"
        ) from None


def _pem(setting: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{setting}: {path} cannot be read ({error.strerror})") from None
