"""Ask with OpenAI's client, and rate: the id of a completion is what a thumb is for."""

import os

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8080/v1"),
    api_key=os.environ.get("THUMBLOOP_TOKEN", "none"),
)
reply = client.chat.completions.create(
    model="default",  # default:best_of_n chooses the guidance, and so does extra_body
    messages=[{"role": "user", "content": "What did you think of the film?"}],
    user="ann",
    extra_body={"guidance": {"strategy": "best_of_n", "num_candidates": 8}},
)
print(reply.choices[0].message.content)
thumb = {"response_id": reply.id, "thumb": "up", "user": "ann"}
print(client.post("/feedback", body=thumb, cast_to=object))
