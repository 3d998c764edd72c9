"""LiteLLM against a server, as provider `openai` with an address of its own."""

from __future__ import annotations

import asyncio
import json
import urllib.request

import litellm
from checks import expect, run

HELLO = [{"role": "user", "content": "Say hello."}]


def common(address: str, key: str) -> dict[str, object]:
    request = urllib.request.Request(f"{address}/v1/models", headers={"Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request) as reply:
        name = json.load(reply)["data"][0]["id"]
    return {"model": f"openai/{name}", "api_base": f"{address}/v1", "api_key": key, "num_retries": 0}


def completion(address: str, key: str) -> None:
    answer = litellm.completion(**common(address, key), messages=HELLO, max_tokens=12, temperature=0)
    expect(answer.choices[0].message.content, "an answer")
    expect(answer.usage.completion_tokens > 0, "usage")


def stream(address: str, key: str) -> None:
    asked = {**common(address, key), "messages": HELLO, "max_tokens": 12, "temperature": 0}
    whole = litellm.completion(**asked).choices[0].message.content
    chunks = list(litellm.completion(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    expect(text == whole, "the same text")


def asynchronous(address: str, key: str) -> None:
    async def main() -> None:
        asked = {**common(address, key), "messages": HELLO, "max_tokens": 8}
        answers = await asyncio.gather(*(litellm.acompletion(**asked) for _ in range(4)))
        expect(all(answer.choices[0].message.content for answer in answers), "four answers")

    asyncio.run(main())


def text(address: str, key: str) -> None:
    asked = common(address, key)
    asked["model"] = str(asked["model"]).replace("openai/", "text-completion-openai/")
    answer = litellm.text_completion(**asked, prompt="One, two,", max_tokens=6)
    expect(answer.choices[0].text, "a text")


def tools(address: str, key: str) -> None:
    parameters = {"type": "object", "properties": {}, "additionalProperties": False}
    tool = {"type": "function", "function": {"name": "now", "parameters": parameters}}
    answer = litellm.completion(
        **common(address, key), messages=HELLO, tools=[tool], tool_choice="required", max_tokens=128
    )
    expect(answer.choices[0].message.tool_calls[0].function.name == "now", "a call")


def errors(address: str, key: str) -> None:
    try:
        litellm.completion(
            **common(address, key), messages=[{"role": "user", "content": "word " * 50_000}], max_tokens=1
        )
        expect(False, "an error for a long prompt")
    except litellm.ContextWindowExceededError:
        pass
    try:
        litellm.completion(**{**common(address, key), "api_key": "wrong"}, messages=HELLO)
        expect(False, "an error for a wrong key")
    except litellm.AuthenticationError:
        pass


if __name__ == "__main__":
    run(
        "litellm",
        {
            "completion": completion,
            "completion, streamed": stream,
            "acompletion, 4 at a time": asynchronous,
            "text_completion": text,
            "tools, required": tools,
            "errors told apart": errors,
        },
    )
