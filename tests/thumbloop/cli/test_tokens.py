"""Tokens and certificates of the command line."""

import asyncio
import hashlib
import os
import sys
from asyncio.subprocess import PIPE
from pathlib import Path

import pytest
import trustme
import yaml

from tests.commands import ROOT, run
from tests.papers import write
from tests.serving import running
from thumbloop.client import AsyncClient
from thumbloop.config import ServerConfig, State, load
from thumbloop.errors import PermissionDenied, Unauthenticated
from thumbloop.types import User


@pytest.mark.parametrize("subject", ["web-backend", "12", "yes", "a: b", "#x", "anna@example.org"])
async def test_a_new_token_gets_in_where_its_settings_are(
    tiny_model: Path, state: State, tmp_path: Path, subject: str
):
    done = await run("token", subject, "--scope", "generate", "--scope", "on_behalf")
    assert done.exit_code == 0, done.output
    secret = done.stdout.removesuffix("\n")
    assert len(secret) >= 32
    assert secret not in done.stderr
    assert hashlib.sha256(secret.encode()).hexdigest() in done.stderr
    file = tmp_path / "server.yaml"
    file.write_text(done.stderr)
    assert set(yaml.safe_load(done.stderr)) == {"access"}
    access = load(ServerConfig, file).access
    assert list(access.tokens) == [subject]
    async with running(tiny_model, state, access=access) as server:
        address = f"127.0.0.1:{server.port}"
        async with AsyncClient(address, token=secret) as client:
            reply = await client.generate("hello", user_id="ann")
            assert server.stored(reply.response_id).user == User(subject, "ann")
            with pytest.raises(PermissionDenied):
                await client.rate(reply.response_id, up=True, user_id="ann")
        async with AsyncClient(address, token=f"{secret}x") as client:
            with pytest.raises(Unauthenticated):
                await client.generate("hello")


async def test_no_two_tokens_are_alike():
    made = [await run("token", "ann", "--scope", "admin") for _ in range(5)]
    assert len({done.stdout for done in made}) == 5


@pytest.mark.parametrize("arguments", [("token", "ann"), ("token", "ann", "--scope", "root")])
async def test_a_token_is_for_something_that_is_known(arguments: tuple[str, ...]):
    done = await run(*arguments)
    assert done.exit_code == 2
    assert done.stdout == ""


class Papers:
    """A certificate with its key, and the authority that vouches for it, as PEM files."""

    def __init__(self, folder: Path, name: str) -> None:
        self.certificate, self.key, self.authority = (
            folder / f"{name}-{what}.pem" for what in ("certificate", "key", "authority")
        )
        authority = trustme.CA()
        write(authority.issue_cert(name), self.certificate, self.key)
        authority.cert_pem.write_to_path(self.authority)

    @property
    def listen(self) -> dict[str, Path]:
        return {"tls_certificate": self.certificate, "tls_key": self.key}


@pytest.fixture
def papers(tmp_path: Path) -> Papers:
    return Papers(tmp_path, "localhost")


async def test_the_command_shows_its_token_over_tls(tiny_model: Path, state: State, papers: Papers):
    done = await run("token", "ann", "--scope", "admin")
    secret = done.stdout.strip()
    access = yaml.safe_load(done.stderr)["access"]
    async with running(tiny_model, state, access=access, listen=papers.listen) as server:
        where = ("versions", "--address", f"localhost:{server.port}", "--ca", str(papers.authority))
        shown = await run(*where, THUMBLOOP_TOKEN=secret)
        assert shown.exit_code == 0, shown.output
        assert "current" in shown.stdout
        refused = await run(*where)
        assert refused.exit_code == 1
        assert refused.stderr == "error: send `authorization: Bearer <token>`, once\n"


async def test_the_command_shows_its_certificate(
    tiny_model: Path, state: State, tmp_path: Path, papers: Papers
):
    anns = Papers(tmp_path, "ann@example.org")
    listen = {**papers.listen, "tls_client_ca": anns.authority}
    async with running(tiny_model, state, listen=listen) as server:
        where = ("versions", "--address", f"localhost:{server.port}", "--ca", str(papers.authority))
        done = await run(*where, "--cert", str(anns.certificate), "--key", str(anns.key))
        assert done.exit_code == 0, done.output
        named = {"THUMBLOOP_CERT": str(anns.certificate), "THUMBLOOP_KEY": str(anns.key)}
        assert (await run(*where, **named)).exit_code == 0
        assert (await run(*where)).exit_code == 1


async def test_tls_without_authorities_trusts_the_public_ones(
    tiny_model: Path, state: State, papers: Papers
):
    async with running(tiny_model, state, listen=papers.listen) as server:
        command = [sys.executable, "-m", "thumbloop.cli", "versions"]
        command += ["--address", f"localhost:{server.port}"]
        public = os.environ | {"GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(papers.authority)}
        for arguments, environment in ((["--tls"], public), ([], public | {"THUMBLOOP_TLS": "1"})):
            done = await asyncio.create_subprocess_exec(
                *command, *arguments, env=environment, cwd=ROOT, stdout=PIPE, stderr=PIPE
            )
            _, said = await done.communicate()
            assert done.returncode == 0, said
