"""As much of Slack as the bot meets: its Web API over HTTP on loopback, and events that are signed as Slack signs them."""

import hashlib
import hmac
import itertools
import json
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx2

BOT = "U0BOT"
SECRET = "the-signing-secret"
TOKEN = "xoxb-token"


@dataclass
class Workspace:
    """Messages by channel and time stamp, with their reactions."""

    url: str = ""
    messages: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    _stamps: Iterator[str] = field(default_factory=lambda: (f"{n}.0" for n in itertools.count(1)))
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def call(self, method: str, given: dict[str, Any]) -> dict[str, Any]:
        """Answer a call of the Web API; what a test does not expect is an error as Slack says it."""
        match method:
            case "auth.test":
                return {"user_id": BOT, "bot_id": "B0BOT", "team_id": "T1", "user": "thumbloop"}
            case "chat.postMessage":
                return {"ts": self._post(given)}
            case "conversations.history":
                assert given["oldest"] == given["latest"], "one message is looked for"
                found = self.messages.get((given["channel"], given["latest"]))
                return {"messages": [found] if found else []}
        return {"ok": False, "error": "unknown_method"}

    def _post(self, given: dict[str, Any]) -> str:
        message = {"user": BOT, "text": given["text"], "ts": next(self._stamps), "reactions": []}
        message["metadata"] = given["metadata"]
        with self._changed:
            self.messages[given["channel"], message["ts"]] = message
            self._changed.notify_all()
        return str(message["ts"])

    def wait_for_posts(self, count: int) -> list[dict[str, Any]]:
        """Return the bot's messages, once there are so many."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.messages) >= count, timeout=30)
            return list(self.messages.values())


@contextmanager
def slack() -> Iterator[Workspace]:
    """Run a workspace as long as the block lasts."""
    workspace = Workspace()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"] or 0)).decode()
            is_json = "json" in self.headers.get("content-type", "")
            given = json.loads(body) if is_json else dict(urllib.parse.parse_qsl(body))
            assert self.headers["authorization"] == f"Bearer {TOKEN}"
            answer = {"ok": True} | workspace.call(self.path.removeprefix("/api/"), given)
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_arguments: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        workspace.url = f"http://127.0.0.1:{server.server_port}/api/"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield workspace
        finally:
            server.shutdown()
            thread.join()


_event_ids = (f"Ev{n}" for n in itertools.count(1))


def signed(body: dict[str, Any], *, secret: str = SECRET, age_s: float = 0) -> dict[str, Any]:
    """Return a request as Slack signs it: HMAC-SHA256 of version, time and body."""
    text, stamp = json.dumps(body), str(int(time.time() - age_s))
    digest = hmac.new(secret.encode(), f"v0:{stamp}:{text}".encode(), hashlib.sha256).hexdigest()
    headers = {
        "content-type": "application/json",
        "x-slack-request-timestamp": stamp,
        "x-slack-signature": f"v0={digest}",
    }
    return {"content": text, "headers": headers}


async def send(bot: str, event: dict[str, Any], event_id: str = "", **how: Any) -> int:
    """Send an event to the bot; return the status it answers with."""
    body = {
        "type": "event_callback",
        "team_id": "T1",
        "event_id": event_id or next(_event_ids),
        "event": event,
    }
    async with httpx2.AsyncClient() as client:
        return (await client.post(f"{bot}/slack/events", **signed(body, **how))).status_code
