"""How the demo's people talk to the server: in turns, or in plain text where a model knows no turns."""

from thumbloop.client import AsyncClient, GenerateOptions
from thumbloop.v1 import feedback_pb2, policy_pb2


class Speaker:
    """A client for people who only ever say one thing."""

    def __init__(self, client: AsyncClient, *, is_text: bool) -> None:
        self._client = client
        self._is_text = is_text

    async def generate(
        self, prompt: str, *, user_id: str, options: GenerateOptions | None = None
    ) -> policy_pb2.GenerateResponse:
        """Ask; see AsyncClient."""
        return await self._client.generate(
            prompt, is_text=self._is_text, user_id=user_id, options=options or GenerateOptions()
        )

    async def rate(
        self, response_id: str, *, up: bool, user_id: str, request_id: str
    ) -> feedback_pb2.SubmitFeedbackResponse:
        """Rate; see AsyncClient."""
        return await self._client.rate(response_id, up=up, user_id=user_id, request_id=request_id)
