"""judging/client.py against a server on this machine that misbehaves."""

import asyncio
import email.utils
import json
import logging
import time
import traceback

import pytest
from starlette.responses import HTMLResponse, JSONResponse, Response

from rlpr_jax.errors import InputError
from rlpr_jax.judging.client import Cache, Client, ClientError, Endpoint, ReplyFormat, Unanswered, ask_all
from tests.chat_server import completion, serving

HELLO = [{"role": "user", "content": "Hello?"}]
KEY = "sk-very/secret+0123456789"


def endpoint(server, **settings):
  return Endpoint(server.url, "m", **{"pause": 0.01, "time_limit": 5.0, **settings})


def chat(client, messages=HELLO, **arguments):
  async def run():
    async with client:
      return await client.chat(messages, **arguments)

  return asyncio.run(run())


def failing(status, headers=None, message="no"):
  return JSONResponse({"error": {"message": message, "code": None}}, status, headers)


def test_a_reply_and_what_it_cost():
  with serving(lambda body, _: completion("one", prompt_tokens=1000, completion_tokens=300)) as server:
    client = Client(endpoint(server, price_in=2.0, price_out=8.0, max_tokens=7, top_p=0.9))
    reply = chat(client, seed=3)
  assert reply == (("one",), ("stop",), 1000, 300)
  assert server.bodies == [
    {"model": "m", "messages": HELLO, "seed": 3, "temperature": 0.0, "top_p": 0.9, "max_tokens": 7}
  ]
  assert (client.usage.requests, client.usage.retries) == (1, 0)
  assert client.usage.cost == pytest.approx((2.0 * 1000 + 8.0 * 300) / 1e6)


def test_a_reply_that_says_no_more_than_it_must():
  with serving(lambda *_: JSONResponse({"choices": [{"message": {"content": None}}]})) as server:
    reply = chat(Client(endpoint(server)))
  assert (reply.texts, reply.prompt_tokens, reply.completion_tokens) == (("",), 0, 0)


def test_settings_that_are_none_are_not_sent():
  with serving(lambda body, _: "ok") as server:
    chat(Client(endpoint(server, temperature=None, max_tokens=None)))
  assert server.bodies == [{"model": "m", "messages": HELLO}]


def test_a_client_can_be_opened_again_in_another_loop():
  with serving(lambda body, _: "ok") as server:
    client = Client(endpoint(server))
    assert [chat(client).texts for _ in range(3)] == [("ok",)] * 3


@pytest.mark.parametrize(
  "trouble",
  [
    failing(500),
    failing(503),
    failing(408),
    HTMLResponse("<html>Bad gateway</html>"),
    Response('{"choices": [', media_type="application/json"),
    Response("", media_type="application/json"),
    JSONResponse({"choices": None}),
    JSONResponse({"choices": [None]}),
    JSONResponse({"choices": ["text"]}),
    JSONResponse({"choices": [{}]}),
    JSONResponse({"choices": [{"message": None}]}),
    JSONResponse({"choices": [{"message": "text"}]}),
    JSONResponse({"choices": [{"message": {"content": {"a": 1}}}]}),
    JSONResponse(["what"]),
    9.0,
  ],
  ids=lambda trouble: getattr(trouble, "body", trouble),
)
def test_trouble_that_may_pass_is_tried_again(trouble):
  with serving(lambda body, number: "fine" if number == 3 else trouble) as server:
    client = Client(endpoint(server, time_limit=0.3))
    assert chat(client).texts == ("fine",)
  assert (client.usage.requests, client.usage.retries, client.usage.completion_tokens) == (3, 2, 5)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_a_refused_request_is_not_tried_again(status):
  with serving(lambda body, _: failing(status, message="not so")) as server:
    with pytest.raises(ClientError, match=rf"m at {server.url}.*{status}.*not so") as raised:
      chat(Client(endpoint(server)))
    # Another conversation is refused as well: it is how it is asked. Of the others the status says so.
    expected = (2, "settings") if status in (400, 413, 422) else (1, "")
    assert (server.requests, raised.value.refused) == expected
  assert "\n" not in str(raised.value)


def test_what_is_refused_is_found_out_once():
  """A conversation, while another one with the same settings is answered."""
  with serving(lambda body, _: failing(400, message="filtered") if "bad" in str(body["messages"]) else "ok") as server:
    client = Client(endpoint(server))
    for _ in range(3):
      with pytest.raises(ClientError, match="filtered") as raised:
        chat(client, [{"role": "user", "content": "bad"}])
      assert raised.value.refused == "conversation"
    assert server.requests == 3 + 1
    assert [body["temperature"] for body in server.bodies] == [0.0] * 4


def test_what_is_refused_is_not_known_while_the_endpoint_is_not_well():
  def reply(_, number):
    return failing(400 if number == 1 else 500)

  with serving(reply) as server, pytest.raises(ClientError) as raised:
    chat(Client(endpoint(server, attempts=2)))
  assert (raised.value.refused, server.requests) == ("", 3)


# What OpenAI's reasoning models, Mistral's endpoints and Gemini's say; the words are theirs as far as they matter.
@pytest.mark.parametrize(
  ("said", "field", "other"),
  [
    ("Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
     "max_tokens", "max_completion_tokens"),
    ('[{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]', "seed", None),
    ('Invalid JSON payload received. Unknown name "seed": Cannot find field.', "seed", None),
  ],
)  # fmt: skip
def test_fields_are_adapted_where_the_meaning_stays(said, field, other):
  told = []
  with serving(lambda body, _: failing(400, message=said) if field in body else "ok") as server:
    client = Client(endpoint(server, max_tokens=7), told.append)
    assert [chat(client, seed=3).texts for _ in range(2)] == [("ok",)] * 2
    assert server.requests == 3
    assert field not in server.bodies[-1]
    assert other is None or server.bodies[-1][other] == 7
  does = f"is sent as {other}" if other else "is left out"
  assert told == [f"m at {server.url}: {field} {does}, as the endpoint wants it"]


def test_both_are_adapted_and_nothing_else():
  def reply(body, _):
    for field, said in (("max_tokens", "use max_completion_tokens"), ("seed", "no seed"), ("temperature", "only 1")):
      if field in body:
        return failing(400, message=f"Unsupported value: '{field}': {said}")
    return "ok"

  told = []
  with serving(reply) as server, pytest.raises(ClientError, match="'temperature': only 1") as raised:
    chat(Client(endpoint(server), told.append), seed=1)
  assert raised.value.refused == "settings"
  assert not told  # nothing came of it


FORM = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}


def test_a_response_format_is_sent_where_it_is_wanted():
  with serving(lambda *_: "ok") as server:
    chat(Client(endpoint(server)), response_format=FORM)
    chat(Client(endpoint(server, response_format="text")), response_format=FORM)
    chat(Client(endpoint(server)))
  assert [body.get("response_format") for body in server.bodies] == [FORM, None, None]


# What is said of it by our server, Pydantic, Gemini's endpoint, DeepSeek's, and by one that says nothing of it at all.
@pytest.mark.parametrize(
  "said",
  [
    "response_format: llguidance: not installed",
    '[{"type": "extra_forbidden", "loc": ["body", "response_format"], "msg": "Extra inputs are not permitted"}]',
    'Invalid JSON payload received. Unknown name "responseFormat": Cannot find field.',
    "This response_format type is unavailable now",
    "bad request",
  ],
)
def test_an_endpoint_that_refuses_response_format_is_asked_without(said):
  told = []
  with serving(lambda body, _: failing(400, message=said) if "response_format" in body else "ok") as server:
    client = Client(endpoint(server), told.append)
    assert [chat(client, response_format=FORM).texts for _ in range(3)] == [("ok",)] * 3
    assert server.requests == 4
    assert client.request(HELLO, response_format=FORM) == server.bodies[-1]  # by which a reply is kept
  assert told == [f"m at {server.url}: response_format is left out, as the endpoint wants it"]


def test_a_refused_conversation_is_no_reason_to_leave_out_the_response_format():
  """Neither where it is refused in either form, nor where the endpoint has taken that of others."""

  def reply(body, _):
    said, formed = body["messages"][0]["content"], "response_format" in body
    return failing(400, message="no") if said == "bad" or (said == "worse" and formed) else "ok"

  told = []
  with serving(reply) as server:
    client = Client(endpoint(server), told.append)
    for content, formed in (
      ("bad", [True, False, False]),
      ("fine", [True]),
      ("worse", [True, False]),
      ("fine", [True]),
    ):
      server.bodies.clear()
      messages = [{"role": "user", "content": content}]
      if content == "bad":
        with pytest.raises(ClientError) as raised:
          chat(client, messages, response_format=FORM)
        assert raised.value.refused == "conversation"
      else:
        assert chat(client, messages, response_format=FORM).texts == ("ok",)
      assert ["response_format" in body for body in server.bodies] == formed
  assert not told


def test_response_formats_that_cannot_be():
  with pytest.raises(InputError, match="response_format 'xml', expected json_schema or text"):
    Client(Endpoint("http://x/v1", "m", response_format="xml"))


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_a_reply_that_is_all_thought_is_read(name):
  with serving(lambda *_: {"choices": [{"message": {"content": None, name: "so it is 5"}}]}) as server:
    assert chat(Client(endpoint(server))).texts == ("so it is 5",)
  with serving(lambda *_: {"choices": [{"message": {"content": "5", name: "so it is"}}]}) as server:
    assert chat(Client(endpoint(server))).texts == ("5",)


def test_out_of_money_is_not_tried_again():
  body = {"error": {"message": "pay", "code": "insufficient_quota"}}
  with serving(lambda *_: JSONResponse(body, 429)) as server, pytest.raises(ClientError, match="pay"):
    chat(Client(endpoint(server)))
  assert server.requests == 1


def test_attempts_end():
  with serving(lambda *_: failing(500)) as server:
    client = Client(endpoint(server, attempts=3))
    with pytest.raises(ClientError, match="500") as raised:
      chat(client)
  assert not raised.value.refused
  assert (server.requests, client.usage.retries) == (3, 2)


def test_no_server_at_all():
  with serving(lambda *_: "x") as server:
    pass
  with pytest.raises(ClientError, match="no connection"):
    chat(Client(endpoint(server, attempts=2)))


def test_the_time_limit_is_of_the_whole_reply():
  async def trickle(scope, receive, send):
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    while True:
      await send({"type": "http.response.body", "body": b" ", "more_body": True})
      await asyncio.sleep(0.05)

  with serving(lambda *_: trickle) as server:
    start = time.monotonic()
    with pytest.raises(ClientError, match=r"no reply within 0\.4s"):
      chat(Client(endpoint(server, time_limit=0.4, attempts=1)))
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_kept(form):
  times = []

  def reply(body, number):
    times.append(time.time())
    # A date has whole seconds: two ahead are at least one.
    wait = "1" if form == "seconds" else email.utils.formatdate(time.time() + 2, usegmt=True)
    return "ok" if number == 2 else failing(429, {"Retry-After": wait})

  with serving(reply) as server:
    assert chat(Client(endpoint(server))).texts == ("ok",)
  assert times[1] - times[0] >= 0.99


def test_a_day_of_waiting_is_no_passing_trouble():
  with serving(lambda *_: failing(429, {"Retry-After": "86400"})) as server, pytest.raises(ClientError, match="429"):
    chat(Client(endpoint(server)))
  assert server.requests == 1


def test_more_choices_than_asked_for():
  reply = completion("a", "b")
  with serving(lambda *_: reply) as server, pytest.raises(ClientError, match="expected 1 choice, found 2"):
    chat(Client(endpoint(server)))
  assert server.requests == 1


def test_the_limit_of_concurrency_is_held():
  async def run(client):
    async with client:
      await asyncio.gather(*(client.chat(HELLO, seed=i) for i in range(40)))

  with serving(lambda *_: "ok") as server:
    server.delay = 0.02
    asyncio.run(run(Client(endpoint(server, concurrency=5))))
  assert (server.requests, server.most_at_once) == (40, 5)


@pytest.mark.parametrize(("status", "before"), [(401, 9), (500, 9), (401, 318), (401, 325)])  # where it is cut, too
def test_the_key_is_sent_and_shown_nowhere(status, before, monkeypatch, caplog, capfd):
  monkeypatch.setenv("MY_KEY", KEY)
  caplog.set_level(logging.DEBUG)

  def reply(body, _):
    given = server.headers[-1]["authorization"]
    return failing(status, message=f"{'x' * before} {given} {given} {KEY!r} sk-very%2Fsecret%2B0123456789")

  with serving(reply) as server:
    client = Client(endpoint(server, key_variable="MY_KEY", attempts=2))
    with pytest.raises(ClientError) as raised:
      chat(client)
  assert server.headers[0]["authorization"] == f"Bearer {KEY}"
  error = raised.value
  assert error.__cause__ is error.__context__ is None
  shown = [str(error), repr(error), *traceback.format_exception(error), repr(client), repr(client.endpoint)]
  shown += [repr(vars(client).keys()), caplog.text, *capfd.readouterr()]
  for text in shown:
    assert "secret" not in text
    assert "sk-" not in text
  assert "Bearer [" in str(error)


@pytest.mark.parametrize(
  "said",
  [
    "cannot reach https://up.example/v1/chat?api_key=0123secret456&model=m",
    "POST https://me:0123secret456@up.example/v1: refused",
    "upstream got {'Authorization': 'Bearer 0123secret456'}",
    "upstream got x-api-key: 0123secret456",
    'wrong "api_key": "0123secret456"',
    "Incorrect API key provided: sk-0123secret456.",
  ],
)
def test_keys_of_others_are_not_shown_either(said):
  """A gateway may say what it has sent to those whom it asks."""
  with serving(lambda *_: failing(401, message=said)) as server, pytest.raises(ClientError) as raised:
    chat(Client(endpoint(server)))
  assert "secret" not in str(raised.value)
  assert "[key]" in str(raised.value)


def test_what_is_no_key_is_shown():
  said = "no api key given; a bearer of news at https://up.example/v1?model=m says: max_tokens is too large: 4096"
  with serving(lambda *_: failing(400, message=said)) as server, pytest.raises(ClientError) as raised:
    chat(Client(endpoint(server)))
  assert said in str(raised.value)


@pytest.mark.parametrize("variable", ["sk-0123secret456", "0secret", "MY KEY"])
def test_a_key_in_the_place_of_its_variable_is_not_shown(variable):
  with pytest.raises(InputError, match="expected the name of an environment variable") as raised:
    Client(Endpoint("http://x/v1", "m", variable))
  assert variable not in str(raised.value)


def test_an_echo_of_the_key_does_not_reach_the_cache(monkeypatch, tmp_path):
  monkeypatch.setenv("MY_KEY", KEY)
  with serving(lambda *_: f"your key is {KEY}") as server:
    client = Client(endpoint(server, key_variable="MY_KEY"))
    assert gather(client, [HELLO], cache=Cache(tmp_path)) == ["your key is [key]"]
  assert "secret" not in "".join(path.read_text() for path in tmp_path.rglob("*.json"))


def test_a_placeholder_for_a_key_does_not_change_replies(monkeypatch):
  monkeypatch.setenv("MY_KEY", "EMPTY")
  with serving(lambda *_: "the EMPTY set") as server:
    assert chat(Client(endpoint(server, key_variable="MY_KEY"))).texts == ("the EMPTY set",)


def test_no_other_key_of_the_environment_is_sent(monkeypatch):
  monkeypatch.setenv("OPENAI_API_KEY", KEY)
  monkeypatch.setenv("OPENAI_ADMIN_KEY", KEY)
  with serving(lambda *_: "ok") as server:
    chat(Client(endpoint(server)))
  assert KEY not in json.dumps(server.headers)


@pytest.mark.parametrize("value", [None, "", "  ", "sk secret", "sk-sécret", "sk\nsecret"])
def test_keys_that_cannot_be(monkeypatch, value):
  monkeypatch.delenv("MY_KEY", raising=False)
  if value is not None:
    monkeypatch.setenv("MY_KEY", value)
  with pytest.raises(InputError, match="environment variable MY_KEY") as raised:
    Client(Endpoint("http://x/v1", "m", "MY_KEY"))
  assert "cret" not in str(raised.value)


def test_a_newline_after_the_key_is_no_part_of_it(monkeypatch):
  monkeypatch.setenv("MY_KEY", f"{KEY}\n")
  with serving(lambda *_: "ok") as server:
    chat(Client(endpoint(server, key_variable="MY_KEY")))
  assert server.headers[0]["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(
  "url",
  [
    "",
    "localhost:8000",
    "ftp://x",
    "http://",
    "http://[",
    "http://x:y/v1",
    "https://me:secret@x/v1",
    "https://x/v1?api_key=secret",
    "https://x/v1#secret",
    "https://x/v1?",
    "https://x/v1#",
  ],
)
def test_urls_that_cannot_be(url):
  with pytest.raises(InputError, match="expected a URL") as raised:
    Client(Endpoint(url, "m"))
  assert "secret" not in str(raised.value)


@pytest.mark.parametrize("field", ["concurrency", "attempts", "time_limit"])
def test_settings_that_cannot_be(field):
  with pytest.raises(InputError, match=f"{field} 0, expected more than 0"):
    Client(Endpoint("http://x/v1", "m", **{field: 0}))


def test_text_that_no_utf_8_holds():
  with serving(lambda *_: "ok") as server, pytest.raises(ClientError):
    chat(Client(endpoint(server)), [{"role": "user", "content": "\ud800"}])


# ---- many conversations ----


def understand(text):
  return None if "?" in text else text


def gather(client, conversations, parse=understand, **arguments):
  async def run():
    async with client:
      return await ask_all(conversations, ReplyFormat(parse, "REMINDER"), client, **arguments)

  return asyncio.run(run())


def about(*numbers):
  return [[{"role": "user", "content": str(number)}] for number in numbers]


def echo(body, _):
  return body["messages"][-1]["content"]


def test_all_are_asked_once_and_answered_in_order(tmp_path):
  calls = []
  with serving(echo) as server:
    client = Client(endpoint(server, concurrency=4))
    numbers = [3, 1, 3, 2, 1, *range(20)]
    assert gather(client, about(*numbers), progress=lambda *call: calls.append(call)) == [str(n) for n in numbers]
    assert server.requests == 20
  assert [call[:2] for call in calls] == [(done, 20) for done in range(1, 21)]
  assert gather(client, []) == []


def test_a_second_call_asks_nothing(tmp_path):
  with serving(echo) as server:
    first = gather(Client(endpoint(server)), about(*range(9)), cache=Cache(tmp_path))
  client = Client(endpoint(server))  # the server is gone
  assert gather(client, about(*range(9)), cache=Cache(tmp_path)) == first
  assert (client.usage.requests, client.usage.cached) == (0, 9)


def test_other_settings_are_other_requests(tmp_path):
  with serving(echo) as server:
    for settings in ({}, {"temperature": 0.5}, {"max_tokens": 9}, {"model": "other"}):
      settings = {"model": "m", "pause": 0.01, **settings}
      gather(Client(Endpoint(server.url, **settings)), about(1), cache=Cache(tmp_path))
    assert server.requests == 4
  # Where the model is does not matter.
  assert gather(Client(Endpoint("http://elsewhere/v1", "m")), about(1), cache=Cache(tmp_path)) == ["1"]


@pytest.mark.parametrize(
  "damage", [b"", b"{", b"[]", b'{"reply": 1}', b'{"reply": {"texts": [1], "finish_reasons": [], "prompt_tokens": 1}}',
             b"\xff\xfe"],
)  # fmt: skip
def test_damaged_entries_are_ignored_and_written_again(tmp_path, damage):
  with serving(echo) as server:
    gather(Client(endpoint(server)), about(1), cache=Cache(tmp_path))
    (file,) = tmp_path.rglob("*.json")
    whole = file.read_bytes()
    file.write_bytes(damage)
    assert gather(Client(endpoint(server)), about(1), cache=Cache(tmp_path)) == ["1"]
    assert server.requests == 2
  assert file.read_bytes() == whole


def test_what_is_not_understood_is_asked_once_more_with_another_seed(tmp_path):
  def reply(body, _):
    return "understood" if "seed" in body else "what?"

  with serving(reply) as server:
    assert gather(Client(endpoint(server)), about(1), cache=Cache(tmp_path)) == ["understood"]
    assert [body.get("seed") for body in server.bodies] == [None, 1]
    assert server.bodies[1]["messages"][0]["content"] == "1\n\nREMINDER"
    client = Client(endpoint(server))
    assert gather(client, about(1), cache=Cache(tmp_path)) == ["understood"]
    assert (client.usage.requests, client.usage.cached) == (0, 1)


def test_what_is_never_understood_is_asked_again_by_the_next_call(tmp_path):
  with serving(lambda *_: "what?") as server:
    (answer,) = gather(Client(endpoint(server)), about(1), cache=Cache(tmp_path))
    assert answer == Unanswered("m: reply not understood, it ends 'what?'", True)
    server.reply = echo
    assert gather(Client(endpoint(server)), about(1), cache=Cache(tmp_path)) == ["1"]
    assert server.requests == 3


def test_a_reply_that_was_cut_off_is_not_understood():
  with serving(lambda *_: completion("fine", finish_reason="length")) as server:
    (answer,) = gather(Client(endpoint(server)), about(1))
  assert isinstance(answer, Unanswered)


def test_a_dead_endpoint_is_given_up():
  with serving(lambda *_: failing(500)) as server:
    client = Client(endpoint(server, attempts=2, concurrency=4))
    answers = gather(client, about(*range(200)), give_up_after=6)
    assert server.requests <= 2 * (6 + 4)
  assert all(isinstance(answer, Unanswered) for answer in answers)
  assert 6 <= sum(answer.asked for answer in answers) <= 10  # some may end at the same time
  assert "not asked, as 6 in a row came to nothing: m at http" in answers[-1].why


def test_giving_up_does_not_wait_for_those_that_hang():
  def reply(body, _):
    return 30.0 if int(body["messages"][0]["content"]) < 3 else failing(403)

  with serving(reply) as server:
    start = time.monotonic()
    answers = gather(Client(endpoint(server, concurrency=4, time_limit=20)), about(*range(50)), give_up_after=5)
    assert time.monotonic() - start < 5
  assert sum(answer.asked for answer in answers) == 5


def test_failures_that_are_not_in_a_row_are_no_reason_to_give_up():
  with serving(lambda body, number: "what?" if int(body["messages"][0]["content"][:2]) % 3 else "ok") as server:
    answers = gather(Client(endpoint(server, concurrency=1)), about(*range(10, 70)), give_up_after=3)
  assert [answer == "ok" for answer in answers] == [n % 3 == 0 for n in range(10, 70)]


def test_what_is_cached_is_found_though_the_endpoint_is_dead(tmp_path):
  with serving(echo) as server:
    gather(Client(endpoint(server)), about(8, 9), cache=Cache(tmp_path))
  client = Client(endpoint(server, attempts=1, concurrency=1))
  answers = gather(client, about(*range(10)), cache=Cache(tmp_path), give_up_after=2)
  assert answers[8:] == ["8", "9"]
  assert [answer.asked for answer in answers[:8]] == [True, True, *[False] * 6]


def test_a_cache_that_cannot_be_written(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(InputError, match="cannot be made"):
    Cache(tmp_path / "file" / "cache")
  cache = Cache(tmp_path / "cache")
  (tmp_path / "cache").rmdir()
  (tmp_path / "cache").touch()
  with serving(echo) as server, pytest.raises(InputError, match="cannot be written"):
    gather(Client(endpoint(server)), about(1), cache=cache)
