"""The first tab: chat, thumbs, comments, and two replies to pick from. Wiring between a browser and the server.

The browser keeps the conversation; nothing of it stays here. Every handler returns the whole view.
"""

from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from thumbloop.client import AsyncClient, GenerateOptions
from thumbloop.errors import ThumbloopError
from thumbloop.messages import CallOptions
from web.conversation import Conversation, Turn, kept, opened, turn_of
from web.refusals import in_words
from web.tables import notice
from web.transcript import DOWN, UP, Said, by_policy, by_user, thumbs, transcript

_AS_SET = GenerateOptions()  # by the server
_TWO = GenerateOptions(num_candidates=2, include_candidates=True)
_NOTHING_YET = "Ask something. Then say with a thumb whether the reply is any good."
_ORDER = ("first", "second")

View = dict[Any, Any]
"""What to change on the page: a value or an update for each component."""


class Chat:
    """The tab's components, and what happens on each event."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._kept = gr.BrowserState(storage_key="thumbloop", secret="kept by the browser alone")
        self._commenting = gr.State(None)
        self._unanswered = gr.State("")
        self._lay_out()
        self._wire()

    def _lay_out(self) -> None:
        self._said = gr.Chatbot(
            label="Conversation",
            show_label=False,
            elem_id="said",
            height="60dvh",
            buttons=[],
            layout="bubble",
            placeholder=_NOTHING_YET,
            latex_delimiters=[],
            allow_tags=False,
        )
        with gr.Row(visible=False, elem_id="pair") as self._pair:
            columns = [self._candidate(place) for place in (0, 1)]
        self._candidates, self._picks = zip(*columns, strict=True)
        self._notice = gr.HTML(elem_id="notice", padding=False)
        with gr.Row(visible=False, elem_id="remark") as self._remark:
            self._comment = gr.Textbox(
                label="Comment", show_label=False, placeholder="Why? (optional)", scale=4
            )
            self._send_comment = gr.Button("Add", scale=1, min_width=88)
        with gr.Row(elem_id="ask"):
            self._question = gr.Textbox(
                label="Message",
                show_label=False,
                placeholder="Write a message",
                lines=1,
                max_lines=6,
                autofocus=True,
                scale=4,
            )
            self._send = gr.Button("Send", variant="primary", scale=1, min_width=88)
        with gr.Row(elem_id="also"):
            self._two = gr.Checkbox(label="Show two, pick one", container=False, min_width=170)
            self._undo = gr.Button("Undo", min_width=88)
            self._anew = gr.Button("New", min_width=88)
        self._buttons = (self._send, self._undo, self._anew)

    def _candidate(self, place: int) -> tuple[gr.Markdown, gr.Button]:
        with gr.Column(min_width=240, elem_classes="candidate"):
            text = gr.Markdown(latex_delimiters=[])
            return text, gr.Button(f"Pick {_ORDER[place]}")

    def _wire(self) -> None:
        everything: list[Any] = [
            *(self._kept, self._said, self._question, self._notice, self._pair),
            *(*self._candidates, *self._picks, self._remark, self._comment, self._commenting),
            *(self._unanswered, self._send, self._undo, self._anew),
        ]
        how: dict[str, Any] = {
            "outputs": everything,
            "show_progress": "hidden",
            "api_visibility": "private",
        }
        gr.on(  # one event: whichever comes first, the other does nothing until it is over
            [self._question.submit, self._send.click],
            self._ask,
            [self._kept, self._question, self._two],
            **how,
        ).then(self._settle, [self._kept, self._question, self._unanswered], **how)
        self._said.like(self._rate, [self._kept], trigger_mode="multiple", **how)
        commented = [self._kept, self._comment, self._commenting]
        self._comment.submit(self._remark_on, commented, **how)
        self._send_comment.click(self._remark_on, commented, **how)
        for place, button in enumerate(self._picks):
            button.click(self._picker(place), [self._kept], **how)
        self._undo.click(self._take_back, [self._kept, self._question], **how)
        self._anew.click(self._begin_anew, [self._kept], **how)
        self._how = how

    def opens_with(self, page: gr.Blocks) -> None:
        """Show what the browser kept when the page is loaded."""
        page.load(self._open, [self._kept], **self._how)

    def _open(self, found: object, request: gr.Request) -> View:
        return self._view(opened(found, request.query_params.get("user")))

    async def _ask(self, found: object, question: str, two: bool) -> AsyncIterator[View]:
        """Answer a question, as it comes."""
        conversation = opened(found)
        if not question.strip():
            yield {self._notice: notice("Write a message first.")}
            return
        begun = self._view(conversation) | self._pending(conversation, question)
        yield begun | {self._question: ""}
        try:
            async for view in self._answer(conversation, question, two):
                yield view
        except ThumbloopError as error:
            said = self._view(conversation, in_words(error)) | self._waits(transcript(conversation))
            yield said | {self._unanswered: question}

    def _settle(self, found: object, typed: str, unanswered: str) -> View:
        """Let everything be pressed again, as nothing comes any more that would undo what it does.

        A question that got no reply goes back into its box, before what was typed there meanwhile.
        """
        view = self._view(opened(found))
        changes: View = {part: view[part] for part in (self._said, self._pair, *self._buttons)}
        if unanswered:  # else the box is left alone: somebody may be typing there
            lines = [words for words in (unanswered, typed) if words]
            changes[self._question] = "\n".join(lines)
        return changes | {self._unanswered: ""}

    async def _answer(
        self, conversation: Conversation, question: str, two: bool
    ) -> AsyncIterator[View]:
        messages = conversation.messages(question)
        how = CallOptions(
            user_id=conversation.user_id,
            session_id=conversation.session_id,
            options=_TWO if two else _AS_SET,
        )
        if two:
            reply = await self._client.generate(messages, **how)
        else:
            stream, text = self._client.stream(messages, **how), ""
            async for piece in stream:
                text += piece
                yield self._pending(conversation, question, text)
            assert stream.reply is not None, "a stream that did not fail ends with its reply"
            reply = stream.reply
        turn = turn_of(question, reply)
        is_alone = two and not turn.is_pair
        words = "The server had only one reply to this." if is_alone else ""
        answered = conversation.answered(turn)
        yield self._view(answered, words) | self._waits(transcript(answered))

    async def _rate(self, found: object, thumb: gr.LikeData) -> View:
        """Store a thumb; the last one counts."""
        conversation, place = opened(found), _place(thumb)
        turn = conversation.turns[place]
        if not turn.can_be_rated:
            return self._view(conversation, "You picked this one of two: that is stored already.")
        up = thumb.liked if isinstance(thumb.liked, bool) else turn.thumb
        if up is None:
            return self._view(conversation)
        try:
            if up != turn.thumb:  # else the icon was pressed again: there is nothing to take back
                await self._client.rate(turn.response_id, up=up, user_id=conversation.user_id)
        except ThumbloopError as error:
            return self._view(conversation, in_words(error))
        said = "Thumb up stored." if up else "Thumb down stored."
        return self._view(conversation.rated(place, up=up), said, commenting=place)

    async def _remark_on(self, found: object, comment: str, place: int | None) -> View:
        """Store a comment beside the thumb that was given last."""
        conversation = opened(found)
        turn = conversation.turns[place] if place is not None else None
        if turn is None or turn.thumb is None or not comment.strip():
            return {self._notice: notice("Write a comment first.")}
        try:
            await self._client.rate(
                turn.response_id, up=turn.thumb, user_id=conversation.user_id, comment=comment
            )
        except ThumbloopError as error:
            return {self._notice: notice(in_words(error))}
        return self._view(conversation, "Comment stored.")

    def _picker(self, better: int) -> Any:
        async def pick(found: object) -> View:
            """Store which of two replies is better; the last word on them counts."""
            conversation = opened(found)
            turn = conversation.turns[-1]
            indices = [reply.index for reply in turn.replies]
            try:
                await self._client.prefer(
                    turn.response_id,
                    better=indices[better],
                    worse=indices[1 - better],
                    user_id=conversation.user_id,
                )
            except ThumbloopError as error:
                return self._view(conversation, in_words(error))
            picked = conversation.picked(len(conversation.turns) - 1, better)
            return self._view(picked, "Stored. Go on, or pick the other one.")

        return pick

    def _take_back(self, found: object, typed: str) -> View:
        """Go back to before the last turn, with its question in the box unless something is typed there."""
        conversation = opened(found)
        if not conversation.turns:
            return {self._notice: notice("There is nothing to undo.")}
        before, question = conversation.undone()
        return self._view(before) | {self._question: typed or question}

    def _begin_anew(self, found: object) -> View:
        return self._view(Conversation(opened(found).user_id))

    def _pending(self, conversation: Conversation, question: str, text: str = "…") -> View:
        """Return what is shown while a reply comes: until it is whole, nothing else changes the conversation."""
        said = [*transcript(conversation, pair_is_open=False), by_user(question), by_policy(text)]
        return self._waits(said)

    def _waits(self, said: list[Said]) -> View:
        """Return what keeps all from being pressed: Gradio shows the last view of a reply once more at its end."""
        return {
            self._said: gr.update(value=said, feedback_options=None),
            self._pair: gr.update(visible=False),
            **dict.fromkeys(self._buttons, gr.update(interactive=False)),
        }

    def _view(
        self, conversation: Conversation, words: str = "", *, commenting: int | None = None
    ) -> View:
        """Return all that depends on a conversation."""
        last = conversation.turns[-1] if conversation.turns else None
        if last is not None and last.is_pair:
            words = words or f"Two replies of version {last.version}: pick the better one."
        return {
            self._kept: kept(conversation),
            self._said: gr.update(
                value=transcript(conversation),
                feedback_value=thumbs(conversation),
                feedback_options=[UP, DOWN],
            ),
            self._notice: notice(words),
            self._unanswered: "",
            **dict.fromkeys(self._buttons, gr.update(interactive=True)),
            self._remark: gr.update(visible=commenting is not None),
            self._comment: "",
            self._commenting: commenting,
            **self._pair_of(last),
        }

    def _pair_of(self, turn: Turn | None) -> View:
        if turn is None or not turn.is_pair:
            return {self._pair: gr.update(visible=False)}
        view: View = {self._pair: gr.update(visible=True)}
        for place, reply in enumerate(turn.replies):
            is_picked, which = turn.picked == place, _ORDER[place]
            view[self._candidates[place]] = reply.text
            view[self._picks[place]] = gr.update(
                value=f"✓ {which.title()} picked" if is_picked else f"Pick {which}",
                variant="primary" if is_picked else "secondary",
            )
        return view


def _place(thumb: gr.LikeData) -> int:
    """Return which turn a thumb is for: each has a question and a reply."""
    index = thumb.index if isinstance(thumb.index, int) else thumb.index[0]
    return index // 2
