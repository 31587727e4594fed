"""The parser against the torture messages: what it makes of each, and that nothing breaks it."""

import random
import re
from collections.abc import Iterator, Sequence

import pytest

import torture
from rating_agent_hep import (
    HepPacket,
    SipError,
    SipMessage,
    Uri,
    address_uri,
    parse_sip,
    split_messages,
)
from torture import ERROR, IGNORED, Expected

TIME = 1_700_000_000_123_456_789
ROWS = list(torture.rows())
WHOLE = [pytest.param(payload, id=name) for name, payload, _ in ROWS]
OCTETS = (b"\x00", b"\xff", b"\r", b'"', b"<")


def read(message: SipMessage, key: str) -> object:
    """The value that a key of an expected message stands for (see torture.Expected)."""
    if key.startswith("header:"):
        return message.header(key.removeprefix("header:"))
    if key == "via":
        return tuple(message.vias[0])
    if key == "vias":
        return tuple(tuple(via) for via in message.vias)
    side, _, part = key.partition("_")
    if part in ("scheme", "user", "host", "port"):
        # A Request-URI is a bare URI: in brackets its parameters stay its own (RFC 3261 20).
        text = f"<{message.request_uri}>" if side == "request" else message.header(side)[0]
        return getattr(address_uri(text), part)
    return getattr(message, key)


def parse(payload: bytes) -> SipMessage | None:
    """The message; None also stands for a SipError. Anything else is a failure of the test."""
    try:
        message = parse_sip(payload, TIME)
    except SipError as error:
        assert isinstance(error.kind, str) and error.kind
        return None
    assert message is None or type(message) is SipMessage
    return message


def use(message: SipMessage) -> None:
    """Read all that a parsed message offers."""
    calls = ("INVITE", "ACK", "BYE", "CANCEL", "UPDATE", "")
    # Of other requests those of a dialog count, but never these.
    assert message.method in calls or message.to_tag != ""
    assert message.method not in ("REGISTER", "PUBLISH")
    assert bool(message.method) != bool(message.status)
    assert message.call_id and 0 <= message.cseq < 2**32
    assert message.cseq_method == (message.method or message.cseq_method)
    assert message.method or message.cseq_method in ("INVITE", "BYE", "UPDATE")
    assert message.branch == message.vias[-1].branch and message.session_interval >= 0
    assert bool(message.way) == bool(message.method) and message.goes_no_further in (True, False)
    for name in ("from", "to", "contact", "p-asserted-identity"):
        for text in message.header(name):
            assert type(address_uri(text)) is Uri
    assert message.vias


@pytest.mark.parametrize(
    ("payload", "expected"),
    [pytest.param(payload, expected, id=name) for name, payload, expected in ROWS],
)
def test_torture_message(payload: bytes, expected: Expected) -> None:
    if expected is ERROR:
        with pytest.raises(SipError) as caught:
            parse_sip(payload)
        assert caught.value.kind
        return
    message = parse_sip(payload, TIME)
    if expected is IGNORED:
        assert message is None
        return
    assert isinstance(message, SipMessage)
    assert isinstance(expected, dict)
    assert {key: read(message, key) for key in expected} == expected
    assert message.time == TIME
    use(message)


@pytest.mark.parametrize("payload", WHOLE)
def test_every_truncation(payload: bytes) -> None:
    for end in range(len(payload)):
        message = parse(payload[:end])
        if message is not None:
            use(message)


@pytest.mark.parametrize("payload", WHOLE)
def test_every_octet_replaced(payload: bytes) -> None:
    # One of OCTETS at each place, drawn with a fixed seed; over all messages each octet meets
    # each kind of place many times. All five at every place: some 3 s more.
    draw = random.Random(4475)
    for place in range(len(payload)):
        message = parse(payload[:place] + draw.choice(OCTETS) + payload[place + 1 :])
        if message is not None:
            use(message)


def test_one_message_of_a_stream_each() -> None:
    """Behind one another in one payload each is found, as far as its own length tells."""
    # Of these it does not: it is wrong, or left out, or goes by no line of its own.
    odd = {name for name, payload, _ in ROWS if list(split(payload)) != [payload]}
    valid = [case for case in torture.VALID if case.name not in odd | {"dblreq"}]
    assert len(valid) > 10
    payloads = [case.payload for case in valid]
    assert list(split(b"".join(payloads))) == payloads
    first, second = split(next(x.payload for x in torture.VALID if x.name == "dblreq"))
    assert first.startswith(b"REGISTER ") and second.startswith(b"INVITE ")
    read_second = parse(second)
    assert read_second is not None and read_second.call_id.startswith("dblreq.")


def split(payload: bytes) -> Sequence[bytes]:
    return split_messages(HepPacket(3, TIME, 6, payload=payload))


def content_lengths() -> Iterator[tuple[str, int, int]]:
    for case in torture.VALID:
        head, _, body = case.payload.partition(b"\r\n\r\n")
        found = re.search(rb"^(?:Content-Length|L)\s*:\s*(\d+)", head, re.I | re.M)
        assert found is not None
        yield case.name, int(found[1]), len(body)


def test_the_valid_messages_are_octet_exact() -> None:
    assert [
        (name, told, there)
        for name, told, there in content_lengths()
        if told != there and name != "dblreq"  # which has a second message for a body
    ] == []


def test_the_table_is_whole() -> None:
    names = [name for name, _, _ in ROWS]
    assert len(names) == len(set(names))
    sections = [case.section for case in torture.RFC_CASES]
    for prefix, count in (("3.1.1", 13), ("3.1.2", 19), ("3.2", 1), ("3.3", 15), ("3.4", 1)):
        numbered = [f"RFC 4475 {prefix}.{number}" for number in range(1, count + 1)]
        assert [s for s in sections if s.startswith(f"RFC 4475 {prefix}.")] == numbered
