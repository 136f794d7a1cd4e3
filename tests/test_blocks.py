"""Every block of code that README and tutorial show is run, or says why it cannot be run here."""

import re
import subprocess
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.blocks import MODEL, ROOT, TAGS, Block, Shell, blocks, commands, environment
from tests.publishing import publisher_of
from tests.serving import Running, running, until
from thumbloop.config import ServerConfig, State, TrainerConfig
from thumbloop.store import reading, versions
from thumbloop.types import DEFAULT_POLICY

PAGES = ["README.md", "docs/tutorial.md"]
BLOCKS = [block for page in PAGES for block in blocks(page)]
SETTINGS = {"server.yaml": ServerConfig, "trainer.yaml": TrainerConfig}

each = pytest.mark.parametrize("block", BLOCKS, ids=str)


def test_every_block_says_how_it_is_checked():
    assert len(BLOCKS) > 15
    assert [f"{b}: ```{b.language} {b.tag}" for b in BLOCKS if b.tag not in TAGS] == []


@each
def test_a_block_can_be_read(block: Block):
    match block.language:
        case "sh":
            read = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True)
            assert (read.returncode, read.stderr) == (0, "")
        case "python":
            compile(block.text, str(block), "exec")
        case "yaml":
            SETTINGS[block.file](**yaml.safe_load(block.text))
        case _:
            pytest.fail(f"{block}: {block.language!r}: expected sh, python or yaml")


def test_the_python_of_the_readme_is_that_of_the_examples():
    shown = [block.text for block in blocks("README.md") if block.language == "python"]
    held = [(ROOT / "examples" / name).read_text() for name in ("chat.py", "openai_client.py")]
    assert shown == held


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.tag == "make"], ids=str)
def test_make_knows_its_target_and_every_variable(block: Block):
    known = set(re.findall(r"\$\(([A-Z_]+)\)", (ROOT / "Makefile").read_text()))
    files = {b.file for b in blocks(block.page) if b.language == "yaml"}
    for command in commands(block):
        make, *arguments = command.split()
        assert make == "make", f"{block}: {command}: only make is run by make"
        given = dict(word.split("=", 1) for word in arguments if "=" in word)
        assert set(given) <= known, f"{block}: {command}"
        assert given.get("CONFIG") in {None, *files}, f"{block}: {command}"
        said = subprocess.run(
            ["make", "--dry-run", *arguments], cwd=ROOT, text=True, capture_output=True
        )
        assert said.returncode == 0, said.stderr


@dataclass
class Reader:
    """Somebody who does what a page says, block by block; their server has a fake engine."""

    shell: Shell
    model: Path
    stack: AsyncExitStack
    server: Running | None = None
    state: State | None = None

    async def follow(self, block: Block) -> None:
        """Do what one block says."""
        if block.language == "yaml":
            (self.shell.folder / block.file).write_text(self.shell.said(block.text))
        if block.serves:
            await self._serve()
        if "…" in block.text and self.server is not None:
            reply = await self.server.client.generate("How was it?", user_id="ann")
            self.shell.replaced["…"] = reply.response_id
        if block.trains:
            await self._learn()
        if block.tag == "test" and block.language in ("sh", "python"):
            await self.shell.run(block)

    async def _serve(self) -> None:
        """Start a server with the settings that the reader has by now, on free ports."""
        folder = self.shell.folder
        given = yaml.safe_load((folder / "server.yaml").read_text())
        self.state = State(folder=folder / given.pop("state")["folder"])
        for name in ("model", "engine"):
            given.pop(name, None)
        for section in ("listen", "http"):
            given[section] = given.get(section, {}) | {"port": 0}
        for name in ("tls_certificate", "tls_key"):
            if name in given["listen"]:
                given["listen"][name] = folder / given["listen"][name]
        self.server = await self.stack.enter_async_context(running(self.model, self.state, **given))
        ports = {"50051": self.server.port, "8080": self.server.application.http_port}
        self.shell.replaced |= {f":{said}": f":{port}" for said, port in ports.items()}
        self.shell.environment["THUMBLOOP_ADDRESS"] = f"localhost:{self.server.port}"

    def _current(self) -> int:
        """Return which version answers, as the store has it: the server may ask for a token."""
        assert self.server is not None
        assert self.server.database is not None
        with reading(self.server.database) as connection:
            return versions.current(connection, DEFAULT_POLICY).version

    async def _learn(self) -> None:
        """Publish three versions, as the trainer would."""
        assert self.server is not None
        assert self.state is not None
        publisher = publisher_of(self.server, self.model, self.state)
        for version in (1, 2, 3):
            publisher.publish(version, parent=version - 1)
            await until(lambda version=version: self._current() == version)


@pytest.mark.timeout(600)  # a page starts a dozen processes
@pytest.mark.parametrize("page", PAGES)
async def test_a_reader_gets_through_the_page(
    page: str, tiny_model: Path, tmp_path: Path, grpcurl: Path
):
    path = f"{grpcurl.parent}:{environment()['PATH']}"
    shell = Shell(tmp_path, environment(PATH=path), {MODEL: str(tiny_model)})
    async with AsyncExitStack() as stack:
        reader = Reader(shell, tiny_model, stack)
        for block in blocks(page):
            await reader.follow(block)
    assert reader.server is not None
