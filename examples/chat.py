"""Ask, rate, compare and stream with our own client, which needs neither torch nor vllm."""

import os

from thumbloop.client import Client, GenerateOptions

address = os.environ.get("THUMBLOOP_ADDRESS", "127.0.0.1:50051")

with Client(address, token=os.environ.get("THUMBLOOP_TOKEN", "")) as client:
    reply = client.generate("What did you think of the film?", user_id="ann")
    print(f"version {reply.policy_version}: {reply.text}")
    client.rate(reply.response_id, up=True, user_id="ann")

    two = client.generate(
        "Is the food any good?",
        user_id="ann",
        options=GenerateOptions(num_candidates=2, include_candidates=True),
    )
    print([candidate.text for candidate in two.candidates])
    client.prefer(two.response_id, better=1, worse=0, user_id="ann")

    for text in client.stream("And the service?", user_id="ann"):
        print(text, end="", flush=True)
    print()
