"""The official OpenAI client against a running blockplane.

    BLOCKPLANE_URL=http://127.0.0.1:8000 python -m pytest tests/python/test_openai_client.py

Needs the packages openai and pytest. Makes no assumption about what the model says: it may be a
random one. BLOCKPLANE_MODEL picks the model where several are served.
"""

import asyncio
import json
import os
import urllib.error
import urllib.request

import openai
import pytest

URL = os.environ.get("BLOCKPLANE_URL", "http://127.0.0.1:8000").rstrip("/")
MESSAGES = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "Name three colours, please."},
]
PROMPT = "The quick brown fox jumps over"


@pytest.fixture(scope="module")
def client():
    return openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def model(client):
    return os.environ.get("BLOCKPLANE_MODEL") or client.models.list().data[0].id


def chat(client, model, **options):
    options = {"max_tokens": 16, "temperature": 0, "messages": MESSAGES} | options
    return client.chat.completions.create(model=model, **options)


def complete(client, model, **options):
    options = {"max_tokens": 16, "temperature": 0, "prompt": PROMPT} | options
    return client.completions.create(model=model, **options)


def get(path):
    with urllib.request.urlopen(URL + path, timeout=30) as response:
        return response.status, response.read().decode()


def stop_inside(text):
    """A piece of `text` that first occurs after its start, to be used as a stop string."""
    for start in range(1, len(text) - 1):
        piece = text[start : start + 2]
        if text.find(piece) == start and piece.strip():
            return piece
    pytest.skip(f"no piece of {text!r} can be a stop string")


def test_models(client, model):
    listed = client.models.list()
    assert listed.object == "list"
    assert model in [entry.id for entry in listed.data]
    found = client.models.retrieve(model)
    assert found.id == model
    assert found.object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no-such-model")


def test_chat(client, model):
    answer = chat(client, model)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == model
    assert answer.system_fingerprint
    [choice] = answer.choices
    assert choice.index == 0
    assert choice.finish_reason in ("stop", "length")
    assert choice.message.role == "assistant"
    assert isinstance(choice.message.content, str)
    usage = answer.usage
    assert usage.prompt_tokens > 0
    assert 0 < usage.completion_tokens <= 16
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 <= usage.prompt_tokens_details.cached_tokens <= usage.prompt_tokens


def test_chat_stream_says_the_same(client, model):
    whole = chat(client, model)
    chunks = list(chat(client, model, stream=True, stream_options={"include_usage": True}))
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    *others, last = chunks
    assert last.choices == []
    assert all(chunk.usage is None for chunk in others)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in others)
    assert text == whole.choices[0].message.content
    reasons = [chunk.choices[0].finish_reason for chunk in others]
    assert reasons[:-1] == [None] * (len(reasons) - 1)
    assert reasons[-1] == whole.choices[0].finish_reason
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens
    assert last.usage.completion_tokens == whole.usage.completion_tokens


def test_chat_content_parts(client, model):
    parts = [{"type": "text", "text": MESSAGES[1]["content"]}]
    messages = [MESSAGES[0], {"role": "user", "content": parts}]
    whole = chat(client, model)
    assert chat(client, model, messages=messages).choices[0].message.content == (
        whole.choices[0].message.content
    )


def test_completion(client, model):
    answer = complete(client, model)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    [choice] = answer.choices
    assert choice.finish_reason in ("stop", "length")
    assert choice.logprobs is None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_completion_stream_says_the_same(client, model):
    whole = complete(client, model)
    chunks = list(complete(client, model, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_echo_and_forms_of_prompts(client, model):
    whole = complete(client, model).choices[0].text
    assert complete(client, model, prompt=[PROMPT]).choices[0].text == whole
    assert complete(client, model, echo=True).choices[0].text == PROMPT + whole
    tokens = complete(client, model, prompt=[5, 6, 7, 8])
    assert tokens.usage.prompt_tokens == 4
    assert complete(client, model, prompt=[[5, 6, 7, 8]]).choices[0].text == tokens.choices[0].text


def test_max_tokens_is_reached_when_the_end_is_ignored(client, model):
    for limit in (1, 7, 24):
        answer = chat(client, model, max_tokens=limit, extra_body={"ignore_eos": True})
        assert answer.usage.completion_tokens == limit
        assert answer.choices[0].finish_reason == "length"
    answer = chat(
        client,
        model,
        max_tokens=openai.NOT_GIVEN,
        max_completion_tokens=5,
        extra_body={"ignore_eos": True},
    )
    assert answer.usage.completion_tokens == 5


def test_stop(client, model):
    ignore = {"ignore_eos": True}
    text = complete(client, model, max_tokens=24, extra_body=ignore).choices[0].text
    stop = stop_inside(text)
    expected = text[: text.find(stop)]
    for options in ({"stop": stop}, {"stop": ["\u2603 never", stop]}):
        answer = complete(client, model, max_tokens=24, extra_body=ignore, **options)
        assert answer.choices[0].text == expected
        assert answer.choices[0].finish_reason == "stop"
        chunks = list(complete(client, model, max_tokens=24, stream=True, extra_body=ignore, **options))
        assert "".join(chunk.choices[0].text for chunk in chunks) == expected
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_seed(client, model):
    def sample(seed):
        options = {"temperature": 2.0, "top_p": 0.99, "max_tokens": 24}
        return complete(client, model, seed=seed, **options).choices[0].text

    assert sample(11) == sample(11)
    assert len({sample(seed) for seed in range(6)}) > 1


def test_sampling_parameters_are_taken(client, model):
    answer = chat(
        client,
        model,
        temperature=0.7,
        top_p=0.9,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"5": -100},
        seed=1,
        user="someone",
        extra_body={"top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1},
    )
    assert answer.usage.completion_tokens > 0


def test_logit_bias_decides(client, model):
    answer = complete(client, model, max_tokens=4, logit_bias={"42": 100}, logprobs=0, extra_body={"ignore_eos": True})
    tokens = answer.choices[0].logprobs.tokens
    assert len(set(tokens)) == 1, tokens


def test_chat_logprobs(client, model):
    answer = chat(client, model, logprobs=True, top_logprobs=3)
    [choice] = answer.choices
    entries = choice.logprobs.content
    # Special tokens are reported and do not show; end tokens are neither.
    joined = b"".join(bytes(entry.bytes) for entry in entries).decode(errors="replace")
    assert len(choice.message.content) <= len(joined)
    assert 0 < len(entries) <= answer.usage.completion_tokens
    for entry in entries:
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == 3
        values = [other.logprob for other in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
        # Greedy: nothing is likelier than the chosen token.
        assert entry.logprob == pytest.approx(values[0], abs=1e-3)
    chunks = list(chat(client, model, logprobs=True, top_logprobs=3, stream=True))
    streamed = [
        entry
        for chunk in chunks
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in entries]


def test_completion_logprobs(client, model):
    [choice] = complete(client, model, logprobs=2).choices
    logprobs = choice.logprobs
    count = len(logprobs.tokens)
    assert len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == len(logprobs.text_offset) == count
    assert all(2 <= len(top) <= 3 for top in logprobs.top_logprobs)
    assert all(value <= 0 for value in logprobs.token_logprobs)
    assert logprobs.text_offset[0] == 0
    assert logprobs.text_offset == sorted(logprobs.text_offset)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"top_p": -1}, "top_p"),
        ({"n": 2}, "n"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"stop": ""}, "stop"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "word " * 400_000}]}, "messages"),
    ],
)
def test_bad_requests_name_their_parameter(client, model, options, param):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, model, **options)
    error = caught.value
    assert error.status_code == 400
    assert error.param == param
    assert error.type == "invalid_request_error"
    assert error.code
    assert error.body["message"]


def test_unknown_model(client):
    with pytest.raises(openai.NotFoundError) as caught:
        chat(client, "no-such-model")
    assert caught.value.code == "model_not_found"


def test_broken_json():
    request = urllib.request.Request(
        f"{URL}/v1/chat/completions",
        data=b'{"model": ',
        headers={"Content-Type": "application/json"},
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=30)
    assert caught.value.code == 400
    assert set(json.load(caught.value)["error"]) == {"message", "type", "param", "code"}


def test_request_ids(client, model):
    raw = client.chat.completions.with_raw_response.create(
        model=model, messages=MESSAGES, max_tokens=1, extra_headers={"X-Request-Id": "mine-1"}
    )
    assert raw.headers["x-request-id"] == "mine-1"
    assert raw.parse().choices


def test_a_closed_stream_leaves_the_server_well(client, model):
    for _ in range(3):
        stream = chat(client, model, stream=True, max_tokens=200, extra_body={"ignore_eos": True})
        next(iter(stream))
        stream.close()
    assert chat(client, model, max_tokens=2).choices


def test_concurrent_requests_do_not_mix(model):
    prompts = [f"{PROMPT} number {index}" for index in range(8)]

    async def run():
        async with openai.AsyncOpenAI(
            base_url=f"{URL}/v1", api_key="none", max_retries=0, timeout=120
        ) as client:

            async def one(prompt):
                text = ""
                async for chunk in await client.completions.create(
                    model=model, prompt=prompt, max_tokens=12, temperature=0, stream=True
                ):
                    text += chunk.choices[0].text
                return text

            together = await asyncio.gather(*map(one, prompts))
            alone = [await one(prompt) for prompt in prompts]
            return together, alone

    together, alone = asyncio.run(run())
    assert together == alone


def test_health_and_metrics(client, model):
    chat(client, model, max_tokens=1)
    status, body = get("/health")
    assert status == 200
    assert json.loads(body)["status"] == "ready"
    assert get("/live")[0] == 200
    _, metrics = get("/metrics")
    for name in (
        "dynamo_frontend_requests_total",
        "dynamo_frontend_time_to_first_token_seconds_bucket",
        "dynamo_frontend_output_tokens_total",
        "blockplane_ready 1",
    ):
        assert name in metrics
