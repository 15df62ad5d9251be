"""A server of a tiny model, asked by OpenAI's own client and by others that mean no good."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest
from builders.extras import needs

needs("uvicorn")
needs("fastapi")
needs("prometheus_client")
openai = needs("openai")

from builders.serving import CONTEXT_TOKENS, asked, refused, sent, served, write_served  # noqa: E402

from nirvana_deploy.base.child import KEY_VARIABLE  # noqa: E402
from nirvana_deploy.base.errors import NirvanaError  # noqa: E402
from nirvana_deploy.base.progress import SilentProgress  # noqa: E402
from nirvana_deploy.runtime.onnxruntime.decoder import OrtDecoder  # noqa: E402
from nirvana_deploy.runtime.runner import greedy_tokens  # noqa: E402
from nirvana_deploy.runtime.text import load_text_side  # noqa: E402
from nirvana_deploy.serve import connections  # noqa: E402
from nirvana_deploy.serve import model as models  # noqa: E402
from nirvana_deploy.serve import server as servers  # noqa: E402
from nirvana_deploy.serve.batch import Batch  # noqa: E402
from nirvana_deploy.serve.model import ServedModel  # noqa: E402
from nirvana_deploy.serve.server import Server  # noqa: E402

pytestmark = pytest.mark.integration
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Tell me something."}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_served(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with served(folder, slots=4, queue=64, max_new_tokens=200) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=120) as made:
        yield made


def alone(folder: Path, prompt: str, new_tokens: int) -> str:
    """What a single greedy run writes."""
    tokenizer, stops = load_text_side(folder)
    with OrtDecoder(folder, threads=1) as runner:
        prompt_ids = np.array([tokenizer(prompt)["input_ids"]])
        ids = greedy_tokens(runner, prompt_ids, max_new_tokens=new_tokens, eos_token_ids=stops)
    return str(tokenizer.decode([one for one in ids if one not in stops], skip_special_tokens=True))


@pytest.mark.consumer(
    "openai (Python client)",
    artifact="ONNX folder, served",
    proof="32 clients on 4 slots get the greedy answers of single runs, in one piece and streamed",
    package="openai",
)
def test_thirty_two_clients_on_four_slots_get_their_own_answers(server: Server, folder: Path) -> None:
    prompts = {f"Client {number} asks for {'more ' * (number % 7)}" for number in range(32)}
    found: dict[str, str] = {}

    async def ask(client: Any, prompt: str, *, stream: bool) -> None:
        options: dict[str, Any] = {"model": "tiny", "prompt": prompt, "max_tokens": 24, "temperature": 0}
        if not stream:
            found[prompt] = (await client.completions.create(**options)).choices[0].text
            return
        pieces = [
            part.choices[0].text async for part in await client.completions.create(**options, stream=True)
        ]
        found[prompt] = "".join(pieces)

    async def all_of_them() -> None:
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
            await asyncio.gather(
                *(ask(client, one, stream=place % 2 == 0) for place, one in enumerate(prompts))
            )

    asyncio.run(all_of_them())
    assert found == {prompt: alone(folder, prompt, 24) for prompt in prompts}


def test_a_chat_is_rendered_and_counted(client: Any, server: Server, folder: Path) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "system", "content": "Be brief."}, *MESSAGES], max_tokens=9, seed=1
    )
    prompt = "<s>system: Be brief.\n<s>user: Tell me something.\nassistant: "
    tokenizer, _ = load_text_side(folder)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    with OrtDecoder(folder, threads=1) as runner:
        new = greedy_tokens(runner, np.array([ids]), max_new_tokens=9, eos_token_ids=frozenset({2}))
    assert answer.choices[0].message.content == tokenizer.decode(new, skip_special_tokens=True)
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.prompt_tokens == len(ids) and answer.usage.completion_tokens == len(new)
    assert answer.choices[0].finish_reason == ("stop" if new[-1] == 2 else "length")
    assert (answer.object, answer.model) == ("chat.completion", "tiny")


def test_an_answer_may_be_sent_back_as_it_came(client: Any) -> None:
    first = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=5).choices[0].message
    asked_again = {"role": "user", "content": "And then?"}
    answers = [
        client.chat.completions.create(
            model="tiny", messages=[*MESSAGES, turn, asked_again], max_tokens=9, temperature=0
        )
        for turn in (first, first.model_dump(), {"role": "assistant", "content": first.content})
    ]
    assert len({answer.choices[0].message.content for answer in answers}) == 1
    assert len({answer.usage.prompt_tokens for answer in answers}) == 1


def test_a_streamed_chat_is_the_unstreamed_one(client: Any) -> None:
    options: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 30}
    options |= {"temperature": 1.2, "seed": 5, "extra_body": {"top_k": 40}}
    whole = client.chat.completions.create(**options)
    parts = list(
        client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == whole.choices[0].message.content
    assert parts[0].choices[0].delta.role == "assistant"
    assert [part.choices[0].finish_reason for part in parts if part.choices][-1] == whole.choices[
        0
    ].finish_reason
    assert parts[-1].usage == whole.usage and len({part.id for part in parts}) == 1


def test_an_answer_ends_before_a_stop_text(client: Any, folder: Path) -> None:
    text = alone(folder, "Stop it.", 40)
    stop = text[5:8]
    for stream in (False, True):
        options: dict[str, Any] = {
            "model": "tiny",
            "prompt": "Stop it.",
            "max_tokens": 40,
            "stop": ["never", stop],
        }
        answer = client.completions.create(**options, temperature=0, stream=stream)
        choices = [part.choices[0] for part in answer] if stream else answer.choices
        assert "".join(choice.text for choice in choices) == text[: text.index(stop)]
        assert choices[-1].finish_reason == "stop"


def test_a_prompt_may_be_tokens(client: Any, folder: Path) -> None:
    tokenizer, _ = load_text_side(folder)
    ids = tokenizer("As ids")["input_ids"]
    for prompt in (ids, ["As ids"]):
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=8, temperature=0)
        assert answer.choices[0].text == alone(folder, "As ids", 8)


def test_a_stop_token_that_is_ignored_ends_nothing_and_shows_nowhere(folder: Path) -> None:
    """Every token is a stop token here; each is an event with the counts so far, also without text."""
    with served(folder, slots=1) as running:
        service = running._service
        object.__setattr__(service.model, "stops", frozenset(range(service.model.runner.vocab_size)))
        body = {"prompt": [5, 6, 7], "max_tokens": 6, "temperature": 0}
        status, _, brief = asked(running, "POST", COMPLETIONS, body)
        assert (status, brief["usage"]["completion_tokens"]) == (200, 1)
        counted = {"include_usage": True, "continuous_usage_stats": True}
        streamed = body | {"ignore_eos": True, "stream": True, "stream_options": counted}
        _, _, text = asked(running, "POST", COMPLETIONS, streamed)
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert [one["usage"]["completion_tokens"] for one in events] == [0, 1, 2, 3, 4, 5, 6, 6, 6]
    assert {one["usage"]["prompt_tokens"] for one in events} == {3}
    assert {one["choices"][0]["text"] for one in events[:-1]} == {""}
    assert events[-2]["choices"][0]["finish_reason"] == "length" and events[-1]["choices"] == []


def test_models_are_listed(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").context_tokens == CONTEXT_TOKENS
    with pytest.raises(openai.NotFoundError, match="The model 'gpt' is not served; there is 'tiny'"):
        client.models.retrieve("gpt")


def test_health_and_metrics_say_what_happens(server: Server) -> None:
    before = _metric(server, "nirvana_deploy_new_tokens_total")
    asked(server, "POST", COMPLETIONS, {"prompt": "Count", "max_tokens": 7, "temperature": 0})
    assert 0 < _metric(server, "nirvana_deploy_new_tokens_total") - before <= 7
    status, _, health = asked(server, "GET", "/health")
    assert health.pop("peak_rss_bytes") > 1e7
    assert (status, health) == (
        200,
        {"status": "ok", "model": "tiny", "slots": 4, "active": 0, "waiting": 0},
    )
    assert _metric(server, 'nirvana_deploy_requests_total{route="/health",status="200"}') >= 1
    assert _metric(server, "nirvana_deploy_first_token_seconds_count") >= 1


def _metric(server: Server, name: str) -> float:
    _, _, text = asked(server, "GET", "/metrics")
    lines = dict(line.rpartition(" ")[::2] for line in text.splitlines() if not line.startswith("#"))
    return float(lines[name])


ASKED: dict[str, Any] = {"prompt": "Hello"}
BAD_REQUESTS: list[tuple[str, Any, int, str | None, str]] = [
    (COMPLETIONS, b'{"prompt": ', 400, None, "The body is not JSON"),
    (COMPLETIONS, b"\xff\xfe", 400, None, "The body is not JSON"),
    (COMPLETIONS, b"[" * 100_000, 400, None, "The body"),
    (COMPLETIONS, [1, 2], 400, None, "must be a JSON object"),
    (COMPLETIONS, b"", 400, None, "must be a JSON object"),
    (COMPLETIONS, {}, 400, "prompt", "'prompt' is missing"),
    (COMPLETIONS, {"prompt": ""}, 400, "prompt", "has no tokens"),
    (COMPLETIONS, {"prompt": []}, 400, "prompt", "prompt"),
    (COMPLETIONS, {"prompt": ["a", "b"]}, 400, "prompt", "One prompt per request"),
    (COMPLETIONS, {"prompt": [5, 99999]}, 400, "prompt", "Token 99999 is not in the vocabulary of 272"),
    (COMPLETIONS, {"prompt": [-1]}, 400, "prompt", "prompt"),
    (COMPLETIONS, {"prompt": "\ud800"}, 400, "prompt", "half a character"),
    (
        COMPLETIONS,
        ASKED | {"model": "gpt-4"},
        404,
        "model",
        "The model 'gpt-4' is not served; there is 'tiny'",
    ),
    (COMPLETIONS, ASKED | {"temperature": -1}, 400, "temperature", "greater than or equal to 0, got -1"),
    (COMPLETIONS, ASKED | {"temperature": 1e9}, 400, "temperature", "less than or equal to 2"),
    (COMPLETIONS, ASKED | {"temperature": "hot"}, 400, "temperature", "got 'hot'"),
    (COMPLETIONS, b'{"prompt": "a", "temperature": NaN}', 400, "temperature", "got nan"),
    (COMPLETIONS, ASKED | {"temperature": True}, 400, "temperature", "got True"),
    (COMPLETIONS, ASKED | {"top_p": 0}, 400, "top_p", "greater than 0, got 0"),
    (COMPLETIONS, ASKED | {"top_k": -5}, 400, "top_k", "greater than or equal to -1, got -5"),
    (
        COMPLETIONS,
        ASKED | {"repetition_penalty": 0},
        400,
        "repetition_penalty",
        "greater than or equal to 0.1, got 0",
    ),
    (COMPLETIONS, ASKED | {"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1, got 0"),
    (COMPLETIONS, ASKED | {"max_tokens": 1.5}, 400, "max_tokens", "got 1.5"),
    (COMPLETIONS, ASKED | {"max_tokens": 201}, 400, "max_tokens", "writes at most 200 per answer"),
    (
        COMPLETIONS,
        {"prompt": "a" * 500, "max_tokens": 20},
        400,
        None,
        "context is 512 tokens; the prompt has 500",
    ),
    (COMPLETIONS, {"prompt": "a" * 600}, 400, None, "context is 512 tokens; the prompt has 600"),
    (COMPLETIONS, ASKED | {"stop": 7}, 400, "stop", "stop"),
    (COMPLETIONS, ASKED | {"stop": [""]}, 400, "stop.0", "should have at least 1 character"),
    (COMPLETIONS, ASKED | {"stop": ["x"] * 17}, 400, "stop", "stop"),
    (COMPLETIONS, ASKED | {"n": 2}, 400, "n", "'n' is not supported"),
    (COMPLETIONS, ASKED | {"logprobs": 5}, 400, "logprobs", "'logprobs' is not supported"),
    (COMPLETIONS, ASKED | {"logprobs": 0}, 400, "logprobs", "'logprobs' is not supported"),
    (COMPLETIONS, ASKED | {"echo": True}, 400, "echo", "'echo' is not supported"),
    (COMPLETIONS, ASKED | {"max_token": 5}, 400, "max_token", "Did you mean 'max_tokens'"),
    (COMPLETIONS, ASKED | {"stream": "yes"}, 400, "stream", "got 'yes'"),
    (COMPLETIONS, ASKED | {"seed": 2**70}, 400, "seed", "seed"),
    (COMPLETIONS, ASKED | {"ignore_eos": 1}, 400, "ignore_eos", "got 1"),
    (
        COMPLETIONS,
        ASKED | {"stream_options": {"continuous_usage_stat": True}},
        400,
        "stream_options.continuous_usage_stat",
        "Did you mean 'continuous_usage_stats'",
    ),
    (CHAT, {"messages": []}, 400, "messages", "at least 1 item"),
    (CHAT, {"messages": "Hello"}, 400, "messages", "got 'Hello'"),
    (CHAT, {"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages.0.role", "got 'wizard'"),
    (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role", "got 'tool'"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, 400, "messages.0.content", "is missing"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "messages.0.content", "is missing"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, None, "image_url"),
    (CHAT, {"messages": MESSAGES, "tools": [{"type": "function"}]}, 400, "tools", "'tools' is not supported"),
    (CHAT, {"messages": MESSAGES, "logprobs": True}, 400, "logprobs", "'logprobs' is not supported"),
    (
        CHAT,
        {"messages": MESSAGES, "response_format": {"type": "json_object"}},
        400,
        "response_format",
        "not supported",
    ),
    (
        CHAT,
        {"messages": MESSAGES, "max_tokens": 5, "max_completion_tokens": 6},
        400,
        "max_tokens",
        "two things",
    ),
    (CHAT, {"messages": [{"role": "user", "content": "refuse"}]}, 400, "messages", "I was asked to"),
]


@pytest.mark.parametrize(("path", "body", "status", "param", "said"), BAD_REQUESTS)
def test_a_bad_request_is_told_what_is_wrong(
    server: Server, path: str, body: Any, status: int, param: str | None, said: str
) -> None:
    found, error = refused(server, path, body)
    assert (found, error["type"]) == (status, "not_found_error" if status == 404 else "invalid_request_error")
    assert said in error["message"] and (param is None or error["param"] == param), error
    assert asked(server, "GET", "/health")[0] == 200


def test_what_asks_for_nothing_is_taken(server: Server) -> None:
    neutral = {"n": 1, "logprobs": None, "tools": None, "echo": False, "user": "me", "logit_bias": {}}
    status, _, answer = asked(server, "POST", COMPLETIONS, ASKED | neutral | {"stop": None, "stream": False})
    assert asked(server, "POST", CHAT, {"messages": MESSAGES, "logprobs": False, "max_tokens": 1})[0] == 200
    assert status == 200 and answer["usage"]["completion_tokens"] <= 16


def test_a_completion_that_names_no_length_takes_what_there_is(server: Server, folder: Path) -> None:
    long = {"prompt": "a" * (CONTEXT_TOKENS - 3), "temperature": 0}
    status, _, answer = asked(server, "POST", COMPLETIONS, long)
    assert status == 200 and 1 <= answer["usage"]["completion_tokens"] <= 3
    with served(folder, slots=1, max_new_tokens=8) as brief:
        status, _, answer = asked(brief, "POST", COMPLETIONS, ASKED)
        assert status == 200 and answer["usage"]["completion_tokens"] <= 8


def test_other_places_and_methods_are_refused(server: Server) -> None:
    status, _, answer = asked(server, "GET", "/v1/embeddings")
    assert status == 404 and "/v1/chat/completions" in answer["error"]["message"]
    status, _, answer = asked(server, "GET", CHAT)
    assert status == 405 and "takes POST, not GET" in answer["error"]["message"]
    status, error = refused(server, CHAT, b"{}", {"Content-Type": "text/plain"})
    assert status == 400 and "application/json" in error["message"]


def test_a_dawdling_chat_template_is_ended(server: Server) -> None:
    status, error = refused(server, CHAT, {"messages": [{"role": "user", "content": "dawdle"}]})
    assert status == 400 and "CPU time" in error["message"]
    assert asked(server, "POST", CHAT, {"messages": MESSAGES, "max_tokens": 2})[0] == 200


def test_a_body_of_100_mb_is_refused_before_it_is_sent(server: Server) -> None:
    place = urlsplit(server.url)
    with closing(socket.create_connection((place.hostname, place.port), timeout=60)) as sock:
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100000000"
        )
        sock.sendall(f"{head}\r\n\r\n".encode())
        assert b" 413 " in sock.recv(4096).partition(b"\r\n")[0]


def test_a_body_without_length_is_refused_when_it_is_too_long(server: Server) -> None:
    place = urlsplit(server.url)
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    with closing(socket.create_connection((place.hostname, place.port), timeout=60)) as sock:
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked"
        )
        sock.sendall(f"{head}\r\n\r\n".encode() + chunk * 20)
        answer = b""
        while b"}}" not in answer:
            answer += sock.recv(4096)
    assert b" 413 " in answer.partition(b"\r\n")[0] and b"larger than" in answer


@pytest.fixture
def go_on(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Once set, answers go on; until then they stand at their first token, on any machine."""
    event, write = threading.Event(), Batch._write

    def held(batch: Batch, argument: None) -> None:
        assert event.wait(60)
        write(batch, argument)

    monkeypatch.setattr(Batch, "_write", held)
    return event


def test_overload_is_told_with_a_time_to_come_back(folder: Path, go_on: threading.Event) -> None:
    with served(folder, slots=1, queue=1) as busy:
        long = {"prompt": "Once", "max_tokens": 480, "temperature": 0, "stop": ["never"], "stream": True}
        streams = [_stream(busy, long) for _ in range(2)]
        _until(lambda: asked(busy, "GET", "/health")[2]["waiting"] == 1)
        status, headers, answer = asked(busy, "POST", COMPLETIONS, ASKED)
        assert (status, answer["error"]["type"]) == (429, "rate_limit_error")
        assert (
            int(headers["retry-after"]) >= 1
            and "1 slots are taken and 1 requests wait" in answer["error"]["message"]
        )
        for stream in streams:  # who goes away frees slot and place
            stream.close()
        go_on.set()
        _until(lambda: asked(busy, "GET", "/health")[2]["active"] == 0)
        assert asked(busy, "POST", COMPLETIONS, ASKED)[0] == 200


def test_a_client_that_goes_away_unanswered_frees_its_slot(folder: Path, go_on: threading.Event) -> None:
    with served(folder, slots=1, queue=1) as busy:
        stream = _stream(busy, {"prompt": "Once", "max_tokens": 480, "temperature": 0}, wait=False)
        _until(lambda: asked(busy, "GET", "/health")[2]["active"] == 1)
        stream.close()
        began = time.monotonic()
        go_on.set()
        assert asked(busy, "POST", COMPLETIONS, ASKED | {"max_tokens": 1})[0] == 200
        assert _metric(busy, "nirvana_deploy_new_tokens_total") < 480 or time.monotonic() - began < 1


def _stream(server: Server, body: dict[str, Any], *, wait: bool = True) -> socket.socket:
    """A socket on which an answer begins."""
    sock = sent(server.url, COMPLETIONS, body)
    if wait:
        assert b" 200 " in sock.recv(64)
    return sock


def _until(true: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_an_answer_that_takes_too_long_is_given_up(folder: Path) -> None:
    with served(folder, slots=1, queue=8, request_seconds=1) as slow:
        streams = [_stream(slow, {"prompt": "a", "max_tokens": 500, "stream": True}) for _ in range(8)]
        status, _, answer = asked(slow, "POST", COMPLETIONS, ASKED | {"max_tokens": 500})
        late = status == 504 and "not finished within 1 s" in answer["error"]["message"]
        texts = []
        for stream in streams:
            with closing(stream):
                texts.append(b"".join(iter(lambda stream=stream: _received(stream), b"")))
        assert late or any(b"not finished within 1 s" in text for text in texts)
        _until(lambda: asked(slow, "GET", "/health")[2]["active"] == 0)


def _received(sock: socket.socket) -> bytes:
    """What comes, until the stream says that it is done."""
    sock.settimeout(3)
    try:
        return sock.recv(1 << 16)
    except TimeoutError:
        return b""


class Noted(SilentProgress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_a_fault_is_answered_and_told_and_the_server_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("by accident")

    progress = Noted()
    with served(folder, progress) as server:
        with monkeypatch.context() as patched:
            patched.setattr(ServedModel, "ids_of_text", broken)
            status, error = refused(server, COMPLETIONS, ASKED)
            assert (status, error["type"]) == (500, "server_error") and "accident" not in str(error)
        with monkeypatch.context() as patched:
            patched.setattr(OrtDecoder, "prefill", broken)
            status, error = refused(server, COMPLETIONS, ASKED)
            assert status == 500 and "The runtime failed" in error["message"]
        assert asked(server, "POST", COMPLETIONS, ASKED)[0] == 200
        _until(lambda: asked(server, "GET", "/health")[2]["active"] == 0)
    ours, runtimes = progress.notes
    assert "This is a fault of nirvana-deploy" in ours and "ZeroDivisionError: by accident" in ours
    assert runtimes == "The runtime failed: ZeroDivisionError: by accident"


def test_a_thousand_half_open_connections_keep_nobody_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "IDLE_SECONDS", 1.0)
    with served(folder, slots=2) as server:
        place = urlsplit(server.url)
        before = psutil.Process().num_fds()
        halves = []
        try:
            for number in range(1000):
                sock = socket.create_connection((place.hostname, place.port), timeout=60)
                sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x" if number % 2 else b"")
                sock.settimeout(0)
                halves.append(sock)
                if number % 250 == 249:
                    assert asked(server, "GET", "/health")[0] == 200
            assert asked(server, "POST", COMPLETIONS, ASKED)[0] == 200
        finally:
            for sock in halves:
                sock.close()
        _until(lambda: psutil.Process().num_fds() <= before + 2)


def test_there_is_a_connection_for_every_request_that_may_wait(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "MOST_CONNECTIONS", 2)
    with served(folder, slots=1, queue=5) as busy:
        long = {"prompt": "Once", "max_tokens": 480, "temperature": 0}
        streams = [_stream(busy, long, wait=False) for _ in range(6)]
        _until(lambda: asked(busy, "GET", "/health")[2]["waiting"] == 5)
        for stream in streams:
            stream.close()


def test_a_bearer_token_is_asked_for_and_never_shown(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "s3cret")
    with served(folder) as server:
        for headers, said in (({}, "is missing"), ({"Authorization": "Bearer wrong"}, "is wrong")):
            status, error = refused(server, COMPLETIONS, ASKED, headers)
            assert status == 401 and said in error["message"] and "s3cret" not in str(error)
        assert asked(server, "GET", "/health")[0] == 200
        assert asked(server, "GET", "/metrics")[0] == 401
        with openai.OpenAI(base_url=server.url, api_key="s3cret") as client:
            assert client.completions.create(model="tiny", prompt="Hi", max_tokens=1).usage.total_tokens > 1
        assert server.served.needs_key and "s3cret" not in repr(server.served)
    file = tmp_path / "key"
    file.write_text("from-a-file\n")
    assert servers.read_key(file) == "from-a-file"
    for content, said in (("", "is empty"), ("two words", "one line"), ("grün", "no header can carry")):
        file.write_text(content)
        with pytest.raises(NirvanaError, match=said):
            servers.read_key(file)
    with pytest.raises(NirvanaError, match="does not exist"):
        servers.read_key(tmp_path / "none")


def test_ending_waits_for_open_answers_and_takes_no_new_ones(folder: Path, go_on: threading.Event) -> None:
    found: list[Any] = []
    with served(folder, slots=1) as server:
        body = {"prompt": "Once", "max_tokens": 60, "temperature": 0}
        threads = [
            threading.Thread(target=lambda: found.append(asked(server, "POST", COMPLETIONS, body)))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        _until(lambda: asked(server, "GET", "/health")[2]["waiting"] == 2)
        threading.Timer(0.2, go_on.set).start()
        server.end()
        for thread in threads:
            thread.join()
        with pytest.raises(OSError, match="refused"):
            asked(server, "GET", "/health")
    assert [status for status, *_ in found] == [200] * 3


def test_a_signal_is_heard_while_the_main_thread_waits(folder: Path) -> None:
    def stuck(*_: Any) -> None:
        raise TimeoutError("The signal was never heard.")

    def ready(_: Any) -> None:
        threading.Timer(0.3, signal.pthread_kill, (threading.main_thread().ident, signal.SIGTERM)).start()

    before = signal.signal(signal.SIGALRM, stuck)
    try:
        with served(folder) as server:
            signal.alarm(20)
            server.wait(ready)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert server.served.answered == 0


def test_a_taken_port_is_said(server: Server, folder: Path) -> None:
    port = urlsplit(server.url).port
    with (
        pytest.raises(NirvanaError, match=f"Port {port} of 127.0.0.1 cannot be listened on: Address already"),
        servers.serving(folder, name="two", options=servers.Serving(port=port)),
    ):
        pass


def test_a_port_that_is_taken_while_the_model_is_loaded_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(socket.socket()) as rival:
        rival.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        rival.bind(("127.0.0.1", 0))
        port = rival.getsockname()[1]

        opened = models.opened

        def overtaken(*given: Any, **options: Any) -> Any:
            rival.listen()
            return opened(*given, **options)

        monkeypatch.setattr(models, "opened", overtaken)
        server = servers.serving(folder, name="two", options=servers.Serving(port=port), threads=1)
        with pytest.raises(NirvanaError, match=f"Port {port} of 127.0.0.1 cannot be listened on"), server:
            pass


def test_an_address_that_is_nobodys_is_said(folder: Path) -> None:
    said = r"takes an IP address of this machine|cannot be listened on|beyond the last one"
    for options in ({"host": "nowhere.invalid"}, {"port": 70000}, {"host": "203.0.113.7"}):
        server = servers.serving(folder, name="two", options=servers.Serving(**options))
        with pytest.raises(NirvanaError, match=said), server:
            pass


def test_a_model_without_chat_template_answers_completions_alone(folder: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(folder, tmp_path / "plain", ignore=shutil.ignore_patterns("chat_template.jinja"))
    with served(tmp_path / "plain") as server:
        status, error = refused(server, CHAT, {"messages": MESSAGES})
        assert (
            status == 400 and "no chat template" in error["message"] and "/v1/completions" in error["message"]
        )
        assert asked(server, "POST", COMPLETIONS, ASKED)[0] == 200
