"""What may be pushed: ids, bodies, routing fields, and how the router reads entries."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import given as hypothesis_given
from hypothesis import strategies as st

from rsm.broker import InvalidRequest
from rsm.broker.client.request import build, check_request, estimate_tokens
from rsm.broker.protocol import codec
from rsm.broker.protocol.ids import RESERVED_ENDS, check_id, check_model, is_id, new_id, shorten
from rsm.broker.protocol.keys import Keys
from rsm.broker.protocol.models import KINDS, CallRequest
from rsm.broker.protocol.transitions import RawCall, Rejection
from rsm.router.intake import Arrival, read_entry

LIMIT = 4096


def given(*strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Without hypothesis's deadline, because the machine may be busy."""
    relaxed = settings(deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
    return lambda test: relaxed(hypothesis_given(*strategies)(test))


def refusal(action: Callable[[], Any]) -> str:
    """The message of an InvalidRequest; "" if none was raised."""
    try:
        action()
    except InvalidRequest as e:
        return str(e)
    return ""


scalars = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=20)
)
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=8), v, max_size=4), max_leaves=12
)
bodies = st.dictionaries(st.text(max_size=12), values, max_size=5)
formats: st.SearchStrategy[codec.Format] = st.sampled_from(["json", "body"])


def encode(body: Any, fmt: codec.Format) -> bytes:
    packed: bytes = json.dumps(body).encode() if fmt == "json" else msgpack.packb(body)
    return packed


# -- codec


@given(bodies, formats)
def test_what_is_encoded_is_decoded(body: dict[str, Any], fmt: codec.Format) -> None:
    assert codec.decode(codec.encode(body, fmt), fmt) == body


@given(st.binary(max_size=200), formats)
def test_decode_refuses_random_bytes(data: bytes, fmt: codec.Format) -> None:
    says = refusal(lambda: codec.decode(data, fmt))
    assert says.endswith(".") if says else all(isinstance(k, str) for k in codec.decode(data, fmt))


@given(bodies, formats, st.data())
def test_decode_refuses_damaged_bodies(body: dict[str, Any], fmt: codec.Format, data: st.DataObject) -> None:
    whole = codec.encode(body, fmt)
    at = data.draw(st.integers(0, len(whole)))
    for damaged in (whole[:at], whole[:at] + data.draw(st.binary(max_size=4)) + whole[at:]):
        refusal(lambda data=damaged: codec.decode(data, fmt))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("data", "fmt", "says"),
    [
        (b"", "json", "not valid JSON"),
        (b"{", "json", "not valid JSON"),
        (b"[1]", "json", "must be a map"),
        (b'"hi"', "json", "must be a map"),
        (b"null", "json", "must be a map"),
        (b'{"prompt":"\xff"}', "json", "not valid JSON"),
        (b'{"prompt":"\\ud800"}', "json", "not valid JSON"),
        (b"[" * 100_000, "json", "not valid JSON"),
        (b'{"n":' + b"9" * 5000 + b"}", "json", "not valid JSON"),
        (b"", "body", "not valid msgpack"),
        (b"\x81\xa6prompt", "body", "not valid msgpack"),
        (b"\x93\x01\x02\x03", "body", "must be a map"),
        (b"\x81\x01\x02", "body", "text keys"),
        (b"\x81\xc4\x01a\x02", "body", "text keys"),
        (b"\x81\x90\x02", "body", "not valid msgpack"),
        (b"\x81\xa1a\x81\x90\x02", "body", "not valid msgpack"),
        (b"\x80\x80", "body", "not valid msgpack"),
        (b"\x81\xa1a\xa1\xff", "body", "not valid msgpack"),
        (b"\x91" * 100_000, "body", "not valid msgpack"),
        (b"\xdf\xff\xff\xff\xff", "body", "not valid msgpack"),
        (msgpack.packb({"a": msgpack.ExtType(5, b"x")}), "body", "not valid msgpack"),
    ],
)
def test_what_decode_refuses(data: bytes, fmt: codec.Format, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        codec.decode(data, fmt)


def test_inner_maps_may_have_numbers_as_keys() -> None:
    """vLLM's logit_bias has token ids."""
    call = build("hi", max_body_bytes=LIMIT, params={"logit_bias": {50256: -100.0}})
    assert codec.decode(call.body)["logit_bias"] == {50256: -100.0}


def test_refusals_never_quote_the_body() -> None:
    for data in (b'{"prompt": "secret"', b'["secret"]'):
        with pytest.raises(InvalidRequest) as refused:
            codec.decode(data, "json")
        assert "secret" not in str(refused.value)


def test_a_digest_tells_calls_apart() -> None:
    digests = {codec.digest(k, m, d) for k in KINDS for m in ("", "m") for d in (b"", b"a", b"b")}
    assert len(digests) == len(KINDS) * 2 * 3
    assert codec.digest("generate", "m", b"a") == codec.digest("generate", "m", b"a")


@pytest.mark.parametrize(
    ("raw", "number"), [(None, 7), (b"", 7), (b"5", 5), ("5", 5), (b"5.9", 5), (b"1e3", 1000), (b"-3", -3)]
)
def test_numbers_from_redis(raw: bytes | str | None, number: int) -> None:
    assert codec.number(raw, 7) == number


def test_text_from_redis() -> None:
    assert [codec.text(r) for r in (None, "a", b"a", b"\xff")] == ["", "a", "a", "�"]


# -- ids


@given(st.from_regex(r"[A-Za-z0-9._:-]{1,128}", fullmatch=True))
def test_what_may_be_an_id(value: str) -> None:
    if value.endswith(RESERVED_ENDS):
        with pytest.raises(InvalidRequest, match="must not end"):
            check_id(value, "id")
    else:
        assert check_id(value, "id") == value
    assert is_id(value) is not value.endswith(RESERVED_ENDS)


@given(st.text(max_size=140))
def test_what_may_not_be_an_id(value: str) -> None:
    allowed = set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._:-")
    if value and len(value) <= 128 and set(value) <= allowed:
        return
    assert not is_id(value)
    with pytest.raises(InvalidRequest, match="id must be 1 to 128 characters"):
        check_id(value, "id")


@given(st.from_regex(r"[a-c:]{1,9}", fullmatch=True), st.from_regex(r"[a-c:]{1,9}", fullmatch=True))
def test_no_two_things_share_a_key(one: str, other: str) -> None:
    """A call "c:events" would share its key with the log of call "c", and so on."""
    assert_apart(one, other)
    for end in RESERVED_ENDS:
        assert not is_id(one + end)


def assert_apart(one: str, other: str) -> None:
    k = Keys()
    makers = [
        k.call, k.events, k.inbox, k.engine, k.queue, k.running, k.bell, k.control, k.session, k.session_calls,
        k.session_recent, k.affinity, k.parked, k.residents, k.residency, k.held, k.held_starving,
    ]  # fmt: skip
    names = [make(i) for make in makers for i in {one, other}]
    names += [k.calls, k.engines, k.dead, k.deadlines, k.stats]
    assert len(set(names)) == len(names)


def test_every_key_with_a_tail_is_reserved() -> None:
    k = Keys()
    tails = {make("x").split(":x")[1] for make in (k.events, k.queue, k.running, k.bell, k.control)}
    tails |= {make("x").split(":x")[1] for make in (k.work, k.starving, k.residents)}
    tails |= {make("x").split(":x")[1] for make in (k.session_calls, k.session_recent, k.session_children)}
    assert tails == set(RESERVED_ENDS)


def test_new_ids() -> None:
    ids = [new_id() for _ in range(1000)]
    assert len(set(ids)) == 1000
    assert ids == sorted(ids), "ids of one process sort by age"
    assert all(is_id(i) for i in ids)


def test_namespaces_are_ids() -> None:
    assert Keys("a").calls == "{a}:calls"
    for bad in ("", "a}", "a b"):
        with pytest.raises(InvalidRequest):
            Keys(bad)


def test_model_names() -> None:
    for good in ("meta-llama/Llama-3.1-8B-Instruct", "/models/a_b@rev=1", "x" * 256):
        assert check_model(good) == good
    for bad in ("", "a b", "{m}", "x" * 257, "é"):
        with pytest.raises(InvalidRequest, match="model must be"):
            check_model(bad)


def test_values_in_messages_are_short() -> None:
    assert shorten("abc") == "abc"
    assert len(shorten("x" * 1000)) == 40


# -- building


@given(st.text(max_size=8) | st.lists(st.integers(-1, 5), max_size=4) | bodies, st.sampled_from(KINDS), bodies)
def test_build_gives_a_call_or_says_why_not(prompt: Any, kind: str, params: dict[str, Any]) -> None:
    says = refusal(lambda: build(prompt, max_body_bytes=LIMIT, kind=kind, params=params))
    if says:
        assert says.endswith(".")
        return
    call = build(prompt, max_body_bytes=LIMIT, kind=kind, params=params)
    assert len(call.body) <= LIMIT
    assert call.request.prompt_tokens > 0
    assert codec.decode(call.body).keys() >= params.keys()


@pytest.mark.parametrize("prompt", [None, 5, b"bytes", bytearray(b"bytes"), {1, 2}, object()])
def test_an_invalid_prompt(prompt: Any) -> None:
    with pytest.raises(InvalidRequest, match="The prompt must be text, token ids or a request body; got"):
        build(prompt, max_body_bytes=LIMIT)


def test_a_call_has_its_own_session_by_default() -> None:
    call = build("hi", max_body_bytes=LIMIT)
    assert call.request.session == call.request.id
    assert build("hi", max_body_bytes=LIMIT, session="s").request.session == "s"


def test_equal_calls_have_equal_digests() -> None:
    one, same, other = (build("hi", max_body_bytes=LIMIT, params={"n": n}) for n in (1, 1, 2))
    assert one.digest == same.digest != other.digest


@pytest.mark.parametrize(
    ("body", "size", "tokens"),
    [
        ({"prompt_token_ids": [1, 2, 3]}, 999, 3),
        ({"prompt": "x" * 40}, 999, 10),
        ({"prompt": "x"}, 999, 1),
        ({"messages": []}, 400, 100),
        ({"prompt": ["a", "b"]}, 400, 100),
    ],
)
def test_tokens_are_estimated(body: dict[str, Any], size: int, tokens: int) -> None:
    assert estimate_tokens(body, size) == tokens


def test_the_producers_count_counts() -> None:
    assert build("hi", max_body_bytes=LIMIT, prompt_tokens=77).request.prompt_tokens == 77
    assert build("hi", max_body_bytes=LIMIT, prompt_tokens=0).request.prompt_tokens == 0


def test_each_fault_is_named() -> None:
    with pytest.raises(InvalidRequest) as refused:
        check_request(id="a b", session="", kind="images", priority=500)
    for name in ("id must be", "session must be", "kind", "priority"):
        assert name in str(refused.value)
    assert "\n" not in str(refused.value)


# -- the router's reading

names = st.sampled_from(
    [b"id", b"session", b"kind", b"json", b"body", b"priority", b"deadline_ms", b"stream", b"inbox", b"model",
     b"prompt_tokens", b"traceparent", b"ref", b"gen"]
) | st.binary(max_size=6)  # fmt: skip
fragments = (
    st.binary(max_size=30)
    | st.text(max_size=20).map(str.encode)
    | st.integers().map(lambda n: str(n).encode())
    | bodies.map(lambda b: encode(b, "json"))
    | bodies.map(lambda b: encode(b, "body"))
    | st.sampled_from(
        [*(k.encode() for k in KINDS), b"1", b"c1", b'{"prompt":"hi"}', b"\x81\xa6prompt\xa2hi", b"9" * 5000]
    )
)


@given(st.dictionaries(names, fragments, max_size=8))
def test_reading_an_entry_never_raises(fields: dict[bytes, bytes]) -> None:
    check_reading(read_entry("5-1", fields, LIMIT), fields)


@given(st.dictionaries(names, fragments, max_size=5), bodies, formats)
def test_reading_a_good_body_with_random_fields_never_raises(
    fields: dict[bytes, bytes], body: dict[str, Any], fmt: codec.Format
) -> None:
    fields[fmt.encode()] = encode({**body, "prompt": "hi"}, fmt)
    check_reading(read_entry("5-1", fields, LIMIT), fields)


def check_reading(read: Arrival | Rejection, fields: dict[bytes, bytes]) -> None:
    """Whatever is read from an entry is valid for the scripts."""
    assert read.entry == "5-1"
    if isinstance(read, Rejection):
        assert read.call_id == "" or is_id(read.call_id)
        assert read.session == "" or is_id(read.session)
        assert read.inbox == "" or is_id(read.inbox)
        assert read.error_code == "invalid_request"
        assert read.error.endswith(".")
        assert len(read.error) < 1000
        return
    assert is_id(read.call_id)
    assert is_id(read.view.session)
    assert 0 <= read.view.prompt_tokens <= 100_000_000
    if read.raw is not None:
        assert read.raw.body_field.encode() in fields
        assert CallRequest(**read.raw.request.model_dump()) == read.raw.request


def read(**fields: str | bytes) -> Arrival | Rejection:
    return read_entry("5-1", {k.encode(): v.encode() if isinstance(v, str) else v for k, v in fields.items()}, LIMIT)


def test_the_defaults_of_a_raw_entry() -> None:
    arrival = read(json='{"prompt":"0123456789ab"}')
    assert isinstance(arrival, Arrival)
    assert isinstance(arrival.raw, RawCall)
    assert (arrival.call_id, arrival.gen, arrival.raw.body_field) == ("5-1", "", "json")
    assert arrival.raw.request == CallRequest(id="5-1", session="5-1", prompt_tokens=3)


def test_every_field_of_a_raw_entry() -> None:
    arrival = read(
        id="c1", session="s", kind="chat.completions", body=msgpack.packb({"messages": []}), priority="-5",
        deadline_ms="123", stream="1", inbox="box", model="m", prompt_tokens="9", traceparent="00-ab",
        on_engine_loss="restart",
    )  # fmt: skip
    assert isinstance(arrival, Arrival)
    assert arrival.raw is not None
    assert arrival.raw.body_field == "body"
    assert arrival.raw.request == CallRequest(
        id="c1", session="s", kind="chat.completions", model="m", priority=-5, prompt_tokens=9, deadline_ms=123,
        stream=True, inbox="box", traceparent="00-ab", on_engine_loss="restart",
    )  # fmt: skip


def test_client_and_raw_push_of_the_same_call_agree() -> None:
    call = build("hi", max_body_bytes=LIMIT, id="c1")
    arrival = read(id="c1", body=call.body)
    assert isinstance(arrival, Arrival)
    assert arrival.raw is not None
    assert (arrival.raw.digest, arrival.raw.request) == (call.digest, call.request)


def test_a_reference_needs_no_body() -> None:
    arrival = read(id="c1", session="s", model="m", prompt_tokens="9", ref="1")
    assert isinstance(arrival, Arrival)
    assert (arrival.call_id, arrival.gen, arrival.raw) == ("c1", "", None)
    assert (arrival.view.session, arrival.view.model, arrival.view.prompt_tokens) == ("s", "m", 9)
    again = read(id="c1", gen="4-0", session="s", model="")
    assert isinstance(again, Arrival)
    assert again.gen == "4-0"


@pytest.mark.parametrize("count", ["9" * 30, "-5", "100000001"])
def test_a_reference_cannot_overflow_a_counter(count: str) -> None:
    arrival = read(id="c1", ref="1", prompt_tokens=count)
    assert isinstance(arrival, Arrival)
    assert arrival.view.prompt_tokens in (0, 100_000_000)


def test_a_refusal_keeps_what_is_usable() -> None:
    refused = read(id="c1", session="s", inbox="box", json="{")
    assert isinstance(refused, Rejection)
    assert refused[1:5] == ("c1", "", "s", "box")
    nameless = read(json="{", inbox="b x")
    assert isinstance(nameless, Rejection)
    assert nameless[1:5] == ("5-1", "", "5-1", "")
    unusable = read(id="c 1", session="s", inbox="box", json="{}")
    assert isinstance(unusable, Rejection)
    assert unusable[1:5] == ("", "", "s", "box")
