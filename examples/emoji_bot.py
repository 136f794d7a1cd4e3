"""A Slack bot: answers who mentions it or writes to it alone, and takes their emoji reactions as thumbs.

Slack's Events API calls it over HTTP. It keeps nothing: which reply of the server a message shows is written into
the message's own metadata. Events to subscribe to: app_mention, message.im, reaction_added, reaction_removed.
Scopes: app_mentions:read, im:history, channels:history, groups:history, reactions:read, chat:write.

    SLACK_BOT_TOKEN=xoxb-… SLACK_SIGNING_SECRET=… .venv/bin/python examples/emoji_bot.py --port 3000

and what Slack reaches as https://…/slack/events has to lead to that port.
"""

import logging
import re
from typing import Annotated, Any

import typer
import uvicorn
from slack_bolt import App
from slack_bolt.adapter.starlette import SlackRequestHandler
from slack_sdk import WebClient
from starlette.applications import Starlette
from starlette.routing import Route

from thumbloop.client import DEFAULT_ADDRESS, Client
from thumbloop.connecting import Address, Authorities, Certificate, Key, Token, WithTls, server
from thumbloop.errors import FeedbackTooLate, NotFound

THUMBS = {
    **dict.fromkeys(["+1", "thumbsup", "heart", "tada", "100", "white_check_mark"], True),
    **dict.fromkeys(["-1", "thumbsdown", "x", "confused", "rage"], False),
}
"""What emoji say of a reply; others say nothing."""

log = logging.getLogger("emoji_bot")

Event = dict[str, Any]


def thumb_of(emoji: str) -> bool | None:
    """Return what an emoji says, in whatever skin tone."""
    return THUMBS.get(emoji.partition("::")[0])


class Bot:
    """Between one Slack workspace and one server."""

    def __init__(self, client: Client, slack: WebClient) -> None:
        self._client = client
        self._slack = slack

    def answer(self, event: Event, body: Event) -> None:
        """Reply to a message, in its channel."""
        is_said_by_a_person = "subtype" not in event and "bot_id" not in event
        is_for_us = event["type"] == "app_mention" or event.get("channel_type") == "im"
        if not (is_said_by_a_person and is_for_us):
            return
        reply = self._client.generate(
            re.sub(r"<@\w+>", "", event["text"]).strip(),
            user_id=event["user"],
            session_id=event["channel"],
            request_id=body["event_id"],  # an event that Slack sends again is answered alike
        )
        # Not into a thread: conversations.history, by which a reaction finds its reply, has none of them.
        self._slack.chat_postMessage(
            channel=event["channel"],
            text=reply.text,
            metadata={
                "event_type": "thumbloop_reply",
                "event_payload": {"response_id": reply.response_id},
            },
        )

    def rate(self, event: Event, body: Event) -> None:
        """Give the thumb that a reaction, or what is left when one is taken away, stands for."""
        message = self._message(event["item"])
        response_id = message.get("metadata", {}).get("event_payload", {}).get("response_id")
        thumb = _thumb_after(event, message)
        if response_id is None or thumb is None:
            return
        try:
            self._client.rate(
                response_id, up=thumb, user_id=event["user"], request_id=body["event_id"]
            )
        except (NotFound, FeedbackTooLate) as refused:  # somebody else than who asked, or long ago
            log.info("the reaction of %s is no thumb: %s", event["user"], refused)

    def _message(self, item: Event) -> Event:
        """Return the message that was reacted to; nothing where it is none, or is in a thread."""
        if item["type"] != "message":
            return {}
        found = self._slack.conversations_history(
            channel=item["channel"],
            latest=item["ts"],
            oldest=item["ts"],
            inclusive=True,
            limit=1,
            include_all_metadata=True,
        )
        messages: list[Event] = found["messages"]
        return messages[0] if messages else {}


def _thumb_after(event: Event, message: Event) -> bool | None:
    """Return what its user says of a message now: a thumb can be changed, but not taken back."""
    if event["type"] == "reaction_added":
        return thumb_of(event["reaction"])
    if thumb_of(event["reaction"]) is None:
        return None
    reactions = message.get("reactions", [])
    left = {thumb_of(r["name"]) for r in reactions if event["user"] in r["users"]} - {None}
    return left.pop() if len(left) == 1 else None


def web(bot: Bot, slack: WebClient, signing_secret: str) -> Starlette:
    """Return what Slack calls. Its signature is checked, and its first question answered, by Bolt."""
    app = App(client=slack, signing_secret=signing_secret)
    for name in ("app_mention", "message"):
        app.event(name)(bot.answer)
    for name in ("reaction_added", "reaction_removed"):
        app.event(name)(bot.rate)
    handler = SlackRequestHandler(app)
    return Starlette(routes=[Route("/slack/events", handler.handle, methods=["POST"])])


def main(
    *,
    slack_token: Annotated[str, typer.Option(envvar="SLACK_BOT_TOKEN", help="xoxb-…")],
    signing_secret: Annotated[str, typer.Option(envvar="SLACK_SIGNING_SECRET")],
    slack_url: Annotated[str, typer.Option(envvar="SLACK_API_URL")] = WebClient.BASE_URL,
    port: Annotated[int, typer.Option(help="Where Slack's events arrive, on loopback.")] = 3000,
    address: Address = DEFAULT_ADDRESS,
    token: Token = "",
    ca: Authorities = None,
    cert: Certificate = None,
    key: Key = None,
    tls: WithTls = False,
) -> None:
    """Serve Slack's events at /slack/events."""
    logging.basicConfig(level=logging.INFO)
    slack = WebClient(token=slack_token, base_url=slack_url)
    with server(address, token, ca, cert, key, tls) as client:
        uvicorn.run(web(Bot(client, slack), slack, signing_secret), port=port, log_level="warning")


if __name__ == "__main__":
    typer.run(main)
