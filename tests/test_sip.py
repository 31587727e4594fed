"""SIP messages, addresses and URIs, and the texts made of them."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import harness
import rating_agent_hep as agent
from hep_replay import frames, read_capture
from hepbuild import sip_reply, sip_request

TIME = 1_790_000_000_123_456
latin_1 = st.text(st.characters(max_codepoint=0xFF))


def invite(
    headers: dict[str, str] | None = None,
    *,
    start: str = "INVITE sip:2001@sip.canyan.io SIP/2.0",
    end: str = "\r\n",
    blank: bool = True,
) -> bytes:
    """An INVITE in which `headers` stand instead of, or after, those that it needs."""
    fields = {
        "Via": "SIP/2.0/UDP 127.0.0.20:5070;branch=z9hG4bK1",
        "From": "<sip:2000@sip.canyan.io>;tag=a",
        "To": "<sip:2001@sip.canyan.io>",
        "Call-ID": "1@h",
        "CSeq": "1 INVITE",
        **(headers or {}),
    }
    lines = [start, *(f"{name}: {value}" for name, value in fields.items())]
    text = end.join(lines) + end + (end if blank else "")
    return text.encode("latin-1")


def parse(payload: bytes) -> agent.SipMessage:
    message = agent.parse_sip(payload, TIME)
    assert message is not None
    return message


def refused(payload: bytes) -> str:
    """The kind of error with which a message is refused."""
    with pytest.raises(agent.SipError) as caught:
        agent.parse_sip(payload, TIME)
    assert "\n" not in str(caught.value)
    return caught.value.kind


def uri(text: str) -> agent.Uri:
    return agent.parse_uri(text)


def wire(text: str) -> str:
    """Text as a message with UTF-8 in it is decoded: octet for octet."""
    return text.encode().decode("latin-1")


@cache
def real_messages() -> tuple[bytes, ...]:
    """SIP as servers mirrored it: one payload of each length and first line's start."""
    chosen: dict[tuple[str, bytes, int], bytes] = {}
    folder = harness.captures_folder()
    for path in sorted(folder.rglob("*.hepl")):
        for _, data in frames(read_capture(str(path))):
            payload = agent.decode_hep(data, TIME).payload
            key = (path.relative_to(folder).parts[0], payload[:9], len(payload) // 100)
            chosen.setdefault(key, payload)
    assert len(chosen) > 50
    return tuple(chosen.values())


# Whole messages


def test_request():
    message = parse(
        sip_request(
            "BYE",
            "sip:2001@127.0.0.30:5080;transport=udp",
            call_id="1-32402@127.0.0.20",
            from_tag="32402c",
            to_tag="9-7",
            cseq=2,
            branch="z9hG4bK-1",
            headers=[("Reason", 'Q.850;cause=16;text="a, b"')],
            body=b"Call-ID: of-the-body\r\n",
        )
    )
    assert (message.method, message.status) == ("BYE", 0)
    assert message.request_uri == "sip:2001@127.0.0.30:5080;transport=udp"
    assert (message.call_id, message.from_tag, message.to_tag) == (
        "1-32402@127.0.0.20",
        "32402c",
        "9-7",
    )
    assert (message.cseq, message.cseq_method, message.time) == (2, "BYE", TIME)
    assert message.vias == (agent.Via("z9hG4bK-1", "127.0.0.20:5070"),)
    assert message.header("reason") == ['Q.850;cause=16;text="a, b"']
    assert message.header("call-id") == ["1-32402@127.0.0.20"]


@pytest.mark.parametrize("method", ["INVITE", "UPDATE", "BYE"])
@pytest.mark.parametrize("status", [100, 180, 200, 299, 302, 487, 503, 603, 699])
def test_reply(status, method):
    message = parse(
        sip_reply(
            status, call_id="c", from_tag="a", to_tag="b", cseq=7, cseq_method=method, branch="z"
        )
    )
    assert (message.method, message.status, message.request_uri) == ("", status, "")
    assert (message.cseq, message.cseq_method) == (7, method)
    assert (message.from_tag, message.to_tag) == ("a", "b")


@pytest.mark.parametrize(
    "line", ["SIP/2.0 200", "SIP/2.0 200 ", "SIP/2.0 200 Ça va", "sip/2.0 200 OK"]
)
def test_reason_phrase_is_free(line):
    assert parse(invite(start=line)).status == 200


@pytest.mark.parametrize("method", ["INVITE", "ACK", "BYE", "CANCEL", "UPDATE"])
def test_methods_that_matter(method):
    message = parse(invite({"CSeq": f"1 {method}"}, start=f"{method} sip:a@b SIP/2.0"))
    assert (message.method, message.cseq_method) == (method, method)


IGNORED = "OPTIONS REGISTER SUBSCRIBE NOTIFY PUBLISH PRACK INFO MESSAGE REFER".split()


@pytest.mark.parametrize("method", IGNORED)
@pytest.mark.parametrize(
    "rest",
    ["sip:a@b SIP/2.0\r\n\r\n", "\xff\0 garbage", 'sip:a@b SIP/2.0\r\nFrom: "open\r\n:::\r\n', ""],
)
@pytest.mark.parametrize("before", ["", "\r\n\r\n"])
def test_ignored_requests_are_not_parsed(method, rest, before):
    assert agent.parse_sip(f"{before}{method} {rest}".encode("latin-1")) is None


def test_unknown_method_with_a_sip_line_is_ignored():
    assert agent.parse_sip(b"NEWTHING sip:a@b SIP/2.0\r\n\r\n") is None


ELSEWHERE = ("REGISTER", "PUBLISH")
IN_DIALOG = [*(method for method in IGNORED if method not in ELSEWHERE), "NEWTHING"]


def other(method: str, to: str, name: str = "To") -> agent.SipMessage | None:
    """A request of another method with this To header."""
    fields = {"To": "", name: to, "CSeq": f"7 {method}"}
    if name != "To":
        del fields["To"]
    payload = invite(fields, start=f"{method} sip:a@b SIP/2.0")
    if name != "To":
        payload = payload.replace(b"To: <sip:2001@sip.canyan.io>\r\n", b"")
    return agent.parse_sip(payload, TIME)


@pytest.mark.parametrize("method", IN_DIALOG)
@pytest.mark.parametrize("name", ["To", "t", "TO ", "T\t"])
@pytest.mark.parametrize(
    "to",
    [
        "<sip:a@b>;tag=x",
        "sip:a@b;tag=x",
        '"A;b" <sip:a@b;c> ; Tag = x;d',
        # A caller must not be able to hide the CSeq of a request behind a fold.
        "<sip:a@b>\r\n ;tag=x",
        "<sip:a@b>;\r\n\ttag\r\n =\r\n x",
        '\r\n "A\n  B"\n <sip:a@b>;tag=x',
    ],
)
def test_any_request_of_a_dialog_is_parsed_for_its_cseq(method, name, to):
    """RFC 3261 section 12.2.2: its CSeq counts in the dialog."""
    message = other(method, to, name)
    assert message is not None
    assert (message.method, message.cseq_method, message.cseq) == (method, method, 7)
    assert (message.call_id, message.from_tag, message.to_tag) == ("1@h", "a", "x")


@pytest.mark.parametrize("method", IN_DIALOG)
@pytest.mark.parametrize(
    "to",
    ["<sip:a@b>", "<sip:a@b;tag=x>", '"a;tag=x" <sip:a@b>', "<sip:a@b>;tagged=x", "<sip:a@b>;tag="],
)
def test_other_requests_outside_a_dialog_are_ignored(method, to):
    assert other(method, to) is None
    # The tag of another header is none of To.
    assert other(method, f"{to}\r\nX-To: <sip:a@b>;tag=x") is None


@pytest.mark.parametrize("method", ELSEWHERE)
def test_requests_of_no_call_are_ignored_with_a_tag_as_well(method):
    assert other(method, "<sip:a@b>;tag=x") is None


def test_a_tag_behind_the_headers_does_not_count():
    payload = invite({"CSeq": "7 INFO"}, start="INFO sip:a@b SIP/2.0")
    assert agent.parse_sip(payload + b"\r\nTo: <sip:a@b>;tag=x\r\n\r\n") is None


@pytest.mark.parametrize("method", ["CANCEL", "ACK", *IGNORED, "NEWTHING"])
@pytest.mark.parametrize(
    "header", ["CSeq: 1 {}", "cseq :1\t {}", "CSEQ:\r\n  1\r\n {}", "CSeq: 99999999999 {}"]
)
def test_ignored_replies_are_not_parsed(method, header):
    text = 'SIP/2.0 200 OK\r\nFrom: "open\r\n' + header.format(method) + "\r\n\xff\0 garbage"
    assert agent.parse_sip(text.encode("latin-1")) is None


def test_cseq_of_the_body_does_not_count():
    """The body of a 200 to an INVITE may be a message itself (message/sip)."""
    body = b"BYE sip:a@b SIP/2.0\r\nCSeq: 9 BYE\r\n\r\n"
    head = invite({"CSeq": "1 INVITE"}, start="SIP/2.0 200 OK")
    assert parse(head + body).cseq_method == "INVITE"
    # Without a CSeq of its own the message is at fault, not silently ignored.
    lines = [line for line in head.split(b"\r\n") if not line.startswith(b"CSeq")]
    assert refused(b"\r\n".join(lines) + body) == "missing"


# Lines


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("end", ["\r\n", "\n"])
def test_leading_empty_lines(count, end):
    """RFC 3261 section 7.5: keep-alives before a message on a stream."""
    assert parse((end * count).encode() + invite()).call_id == "1@h"


@pytest.mark.parametrize("blank", [True, False])
def test_bare_line_feeds(blank):
    message = parse(invite({"X-A": "1", "X-B": "2"}, end="\n", blank=blank))
    assert (message.call_id, message.to_tag, message.cseq) == ("1@h", "", 1)
    # Without the empty line a fold of the last one may be missing.
    assert (message.header("x-a"), message.header("x-b")) == (["1"], ["2"] if blank else [])


@pytest.mark.parametrize("blank", [b"\r\n", b"\n"])
@pytest.mark.parametrize("seed", range(5))
def test_mixed_line_ends(blank, seed):
    chance = random.Random(seed)
    lines = invite({"X-A": "1"}, blank=False).split(b"\r\n")[:-1]
    head = b"".join(line + chance.choice([b"\r\n", b"\n"]) for line in lines)
    message = parse(head + blank + b"X-A: body\r\n")
    assert (message.call_id, message.from_tag, message.header("X-A")) == ("1@h", "a", ["1"])


def test_headers_end_at_the_first_empty_line():
    message = parse(invite() + b"X-A: 1\r\n\r\nX-B: 2\n\n")
    assert (message.header("x-a"), message.header("x-b")) == ([], [])


def test_cut_message_whole_lines_count():
    """Without the empty line a message is cut, and so may be its last line."""
    whole = invite({"X-A": "1234"}, blank=False)
    assert parse(whole).header("x-a") == []
    assert parse(whole + b"X").header("x-a") == ["1234"]
    for cut in range(1, len("X-A: 1234\r\n")):
        message = parse(whole[:-cut])
        assert message.call_id == "1@h"
        assert message.header("x-a") == []


def test_cut_message_never_gives_part_of_a_value():
    whole = invite({"To": "<sip:2001@sip.canyan.io>;tag=callee"})
    for end in range(len(whole)):
        try:
            message = agent.parse_sip(whole[:end])
        except agent.SipError as error:
            assert error.kind in ("start-line", "missing")
            continue
        assert message is not None
        assert (message.call_id, message.from_tag, message.to_tag) == ("1@h", "a", "callee")


@pytest.mark.parametrize("fold", ["\r\n ", "\r\n\t", "\n ", "\r\n  \t ", "\r\n \r\n "])
def test_folding(fold):
    """RFC 3261 section 7.3.1: a line that begins with white space goes on with the last one."""
    message = parse(
        invite(
            {
                "From": f'"A{fold}B"{fold}<sip:2000@sip.canyan.io>{fold};{fold}tag{fold}={fold}a',
                "Call-ID": f"{fold}1@h",
                "CSeq": f"{fold}1{fold}INVITE",
                "Via": f"SIP/2.0/UDP{fold}h:5060{fold};branch=z1,{fold}SIP/2.0/TCP i;branch=b",
                "Subject": f"I know{fold}you're there",
            }
        )
    )
    assert (message.call_id, message.from_tag, message.cseq) == ("1@h", "a", 1)
    assert message.vias == (agent.Via("z1", "h:5060"), agent.Via("b", "i"))
    assert message.header("subject")[0].split() == ["I", "know", "you're", "there"]


COMPACT = {
    "Via": "v",
    "From": "f",
    "To": "t",
    "Call-ID": "i",
    "Contact": "m",
    "Supported": "k",
    "Subject": "s",
    "Session-Expires": "x",
    "Content-Length": "l",
    "Content-Type": "c",
    "Referred-By": "b",
    "Event": "o",
    "Refer-To": "r",
}


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("change", [str, str.upper, str.lower])
@pytest.mark.parametrize("colon", [":", ": ", " :", " \t: \t"])
def test_header_names(compact, change, colon):
    """Names compare without case, have compact forms, and may be followed by white space."""
    values = {
        **{name: name.encode().hex() for name in COMPACT},
        "Via": "SIP/2.0/UDP h;branch=z",
        "From": "<sip:a@b>;tag=1",
        "To": "<sip:c@d>;tag=2",
        "CSeq": "1 INVITE",
    }
    written = {
        change(COMPACT.get(name, name) if compact else name): values[name] for name in values
    }
    lines = ["INVITE sip:c@d SIP/2.0", *(f"{n}{colon}{v}" for n, v in written.items()), "", ""]
    message = parse("\r\n".join(lines).encode())
    assert message.call_id == values["Call-ID"]
    assert (message.from_tag, message.to_tag, message.vias[0].branch) == ("1", "2", "z")
    for name, value in values.items():
        for alias in {name, name.lower(), name.upper(), COMPACT.get(name, name)}:
            assert message.header(alias) == [value]


def test_header_that_is_not_there():
    assert parse(invite()).header("X-None") == []


def test_header_line_without_a_name_is_none():
    # An option that names no header is "": a caller must not be able to fill it.
    assert parse(invite({"": "<sip:victim@sip.canyan.io>"})).header("") == []


def test_several_lines_of_one_header_in_order():
    payload = (
        invite()[:-2] + b"History-Info: <sip:a@h>\r\nhistory-info:<sip:b@h>, <sip:c@h>\r\n\r\n"
    )
    assert parse(payload).header("History-Info") == ["<sip:a@h>", "<sip:b@h>, <sip:c@h>"]


@pytest.mark.parametrize("line", ["no colon here", "\xff\xfe: \0", "===", ": x", "-:-"])
def test_odd_lines_do_not_matter(line):
    payload = invite()[:-2] + line.encode("latin-1") + b"\r\nX-After: 1\r\n\r\n"
    message = parse(payload)
    assert (message.call_id, message.header("x-after")) == ("1@h", ["1"])


# Octets that are no ASCII


@pytest.mark.parametrize("octet", range(0x80, 0x100))
def test_call_ids_of_other_octets_stay_different(octet):
    """No octet is lost at the end, the begin or within, not even those Unicode calls space."""
    odd = chr(octet)
    for call_id in (f"{odd}x", f"x{odd}", f"x{odd}x", odd):
        assert parse(invite({"Call-ID": call_id})).call_id == call_id


@given(latin_1, latin_1)
@settings(max_examples=300, deadline=None)
def test_printable_id_keeps_different_ids_apart(one, other):
    first, second = agent.printable_id(one), agent.printable_id(other)
    assert (first == second) == (one == other)
    assert all("!" <= character <= "~" for character in first)


@given(latin_1.filter(bool), st.integers(0), st.sampled_from(["^", "^5e", "^^", "%", " ", "\xa0"]))
@settings(max_examples=200, deadline=None)
def test_printable_id_of_its_own_output(text, position, insert):
    """What could collide: escapes written by the sender itself."""
    position %= len(text) + 1
    changed = text[:position] + insert + text[position:]
    ids = {text, changed, agent.printable_id(text), agent.printable_id(changed)}
    assert len({agent.printable_id(each) for each in ids}) == len(ids)


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("1-32402@127.0.0.20", "1-32402@127.0.0.20"),
        ("%Z%45", "%Z%45"),
        ('w<>:\\"/[]?{}(x', 'w<>:\\"/[]?{}(x'),
        ("a b", "a^20b"),
        ("a^b", "a^5eb"),
        ("\x00\x7f\xff", "^00^7f^ff"),
        ("", ""),
    ],
)
def test_printable_id(text, printed):
    assert agent.printable_id(text) == printed


def test_utf_8_does_not_break_a_message():
    message = parse(
        invite(
            {"From": wire('"Jörg à Å" <sip:jörg@sip.canyan.io>;tag=à'), "Subject": wire("à")},
            start=wire("INVITE sip:josé-à@h SIP/2.0"),
        )
    )
    assert message.request_uri == wire("sip:josé-à@h")
    assert message.from_tag == wire("à")
    assert message.header("subject") == [wire("à")]


# Errors


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\r\n\r\n",
        b"\0\0\0\0",
        b"INVITE",
        b"INVITE ",
        b"SIP/2.0",
        b"HTTP/1.1 200 OK\r\nServer: x\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"xlog: a call begins\n",
        b'{"json": 1}',
        b"INVITE sip:a@b\r\n\r\n",
        b" INVITE sip:a@b SIP/2.0\r\n\r\n",
        invite(start="INVITE sip:a@b SIP/3.0"),
        invite(start="INVITE  SIP/2.0"),
        invite(start="INVITE sip:a@b SIP/2.0 more"),
        invite(start="INVITE <sip:a@b> SIP/2.0"),
        invite(start="INVITE sip:a b@c SIP/2.0"),
        invite(start="SIP/2.0 20 OK"),
        invite(start="SIP/2.0 2000 OK"),
        invite(start="SIP/2.0 700 x"),
        invite(start="SIP/2.0 099 x"),
        invite(start="SIP/3.0 200 OK"),
        invite(start="SIP/2.0 OK 200"),
    ],
)
def test_start_line_errors(payload):
    assert refused(payload) == "start-line"


@pytest.mark.parametrize("name", ["From", "To", "Call-ID", "CSeq"])
def test_missing_headers(name):
    lines = invite().split(b"\r\n")
    without = [line for line in lines if not line.startswith(name.encode())]
    assert len(without) == len(lines) - 1
    assert refused(b"\r\n".join(without)) == "missing"
    assert refused(invite({name: ""})) == "missing"
    assert refused(invite({name: " \r\n "})) == "missing"


@pytest.mark.parametrize(
    ("name", "compact", "other"),
    [
        ("From", "f", "<sip:eve@h>;tag=e"),
        ("To", "t", "<sip:eve@h>"),
        ("Call-ID", "i", "2@h"),
        ("CSeq", "cseq", "2 INVITE"),
    ],
)
def test_doubled_headers(name, compact, other):
    """Two that differ leave open which call this is; the same twice does not."""
    head, value = invite()[:-2], parse(invite()).header(name)[0]
    assert refused(head + f"{compact}: {other}\r\n\r\n".encode()) == "duplicate"
    assert parse(head + f"{compact}: {value}\r\n\r\n".encode()).call_id == "1@h"


@pytest.mark.parametrize(
    "cseq",
    [
        "INVITE",
        "1",
        "-1 INVITE",
        "1INVITE",
        "1.5 INVITE",
        "0x1 INVITE",
        "4294967296 INVITE",
        "36893488147419103232 INVITE",
        "1 BYE",
        "1 invite",
        "1 INVITE x",
        "\xb2 INVITE",
        "one INVITE",
    ],
)
def test_cseq_errors(cseq):
    assert refused(invite({"CSeq": cseq})) == "cseq"


@pytest.mark.parametrize(
    ("cseq", "number"),
    [
        ("0 INVITE", 0),
        ("2147483647 INVITE", 2**31 - 1),
        # RFC 3261 section 8.1.1.5 ends here; what a proxy forwards all the same is a call.
        ("2147483648 INVITE", 2**31),
        ("4294967295 INVITE", 2**32 - 1),
        ("0009 INVITE", 9),
        ("0000000000000000000001 INVITE", 1),
        ("1 \t INVITE", 1),
    ],
)
def test_cseq(cseq, number):
    assert parse(invite({"CSeq": cseq})).cseq == number


@pytest.mark.parametrize("name", ["From", "To"])
@pytest.mark.parametrize(
    ("value", "kind"), [('"Bob <sip:a@b>;tag=1', "quote"), ("Bob <sip:a@b;tag=1", "address")]
)
def test_address_errors(name, value, kind):
    """Whose tag it is can't be told, so the message has no place in a call."""
    assert refused(invite({name: value})) == kind


# Tags


@pytest.mark.parametrize(
    ("value", "tag"),
    [
        ("<sip:a@b>", ""),
        ("<sip:a@b>;tag=x", "x"),
        ("<sip:a@b> ; Tag = x ; y=z", "x"),
        ("<sip:a@b>;y;tag=x", "x"),
        ("<sip:a@b;tag=no>", ""),
        ("<sip:a@b;tag=no>;tag=x", "x"),
        ("<sip:a;tag=no@b?tag=no>;tag=x", "x"),
        # Without brackets the parameters are the header's (RFC 3261 section 20).
        ("sip:a@b;tag=x", "x"),
        ("sip:a@b", ""),
        ("tel:+1-201;tag=x", "x"),
        ("Bob Smith <sip:a@b>;tag=x", "x"),
        ('"Bob" <sip:a@b>;tag=x', "x"),
        ('"<sip:eve@h>;tag=no" <sip:a@b>;tag=x', "x"),
        ('"a \\" ;tag=no" <sip:a@b>;tag=x', "x"),
        ('"a \\\\" <sip:a@b>;tag=x', "x"),
        ('"a, @ > b" <sip:a@b>', ""),
        ('"only a name"<sip:a@b>;tag=x', "x"),
        # A quoted parameter may hold what looks like one.
        ('<sip:a@b>;note="a;tag=no";tag=x', "x"),
        ('<sip:a@b>;note="a;tag=no"', ""),
        ('<sip:a@b>;note="a";tag="b;tag=no";x', '"b;tag=no"'),
        ("<sip:a@b>;mytag=no;tag=x", "x"),
        ("<sip:a@b>;tagged=no", ""),
        ("<sip:a@b>;tag=", ""),
        ("<sip:a@b>;tag=a~b.c!d%e*f_g+h`i'j-k", "a~b.c!d%e*f_g+h`i'j-k"),
        ("<nonsense>;tag=x", "x"),
        ('"Bob" <nonsense>;tag=x', "x"),
    ],
)
def test_tags(value, tag):
    message = parse(invite({"From": value, "To": value}))
    assert (message.from_tag, message.to_tag) == (tag, tag)


# Vias and Session-Expires


@pytest.mark.parametrize(
    ("value", "hops"),
    [
        ("SIP/2.0/UDP h:5060;branch=z9hG4bK1", [("z9hG4bK1", "h:5060")]),
        ("SIP/2.0/TCP H.Example ;rport;BRANCH = a ; received=1.2.3.4", [("a", "h.example")]),
        ("SIP / 2.0 / UDP  h : 5060 ;branch=a", [("a", "h:5060")]),
        ("SIP/2.0/TLS [2001:DB8::1]:5061;branch=a", [("a", "[2001:db8::1]:5061")]),
        ("SIP/2.0/UDP h", [("", "h")]),
        ("SIP/2.0/UDP h;branch=", [("", "h")]),
        ("SIP/2.0/UDP h;nobranch=x", [("", "h")]),
        ("SIP/2.0/UDP h;branch=a,SIP/2.0/UDP i;branch=b", [("a", "h"), ("b", "i")]),
        ("SIP/2.0/UDP h;branch=a , SIP/2.0/UDP i , ,", [("a", "h"), ("", "i")]),
        ('SIP/2.0/UDP h;x="a,b";branch=a, SIP/2.0/UDP i;branch=b', [("a", "h"), ("b", "i")]),
        ("SIP/2.0/UDP h;branch=a (a comment)", [("a", "h")]),
        ("garbage", [("", "")]),
        ("", [("", "")]),
    ],
)
def test_vias(value, hops):
    assert parse(invite({"Via": value})).vias == tuple(agent.Via(*hop) for hop in hops)


def test_vias_of_several_lines():
    payload = invite({"Via": "SIP/2.0/UDP a;branch=1, SIP/2.0/UDP b;branch=2"})[:-2]
    payload += b"v: SIP/2.0/TCP c;branch=3\r\nVIA:\r\n SIP/2.0/TCP d\r\n ;branch=4\r\n\r\n"
    assert [tuple(hop) for hop in parse(payload).vias] == [
        ("1", "a"),
        ("2", "b"),
        ("3", "c"),
        ("4", "d"),
    ]


def test_no_via_at_all():
    lines = [line for line in invite().split(b"\r\n") if not line.startswith(b"Via")]
    assert parse(b"\r\n".join(lines)).vias == (agent.Via("", ""),)


def test_via_with_an_open_quote_is_one_hop():
    message = parse(invite({"Via": 'SIP/2.0/UDP h;branch=a;x="open, SIP/2.0/UDP i;branch=b'}))
    assert message.vias == (agent.Via("a", "h"),)


@pytest.mark.parametrize("name", ["Session-Expires", "session-expires", "x", "X"])
@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("1800;refresher=uac", 1800),
        ("1800;refresher=uas", 1800),
        ("120 ; Refresher = UAS", 120),
        ("\r\n 120\r\n ;refresher=uac", 120),
        ("0000000001800;refresher=uac", 1800),
        # RFC 4028 section 5: no session interval may be shorter.
        ("90;refresher=uac", 90),
        ("89;refresher=uac", 90),
        ("0;refresher=uac", 90),
        # Without a refresher nobody refreshes, and nobody hangs up (rule 16).
        ("1800", 0),
        ("1800;x=y", 0),
        ("", 0),
        ("soon;refresher=uac", 0),
        ("-5;refresher=uac", 0),
        (";refresher=uac", 0),
        ("\xb2;refresher=uac", 0),  # a superscript two is no digit
    ],
)
def test_session_interval(name, value, seconds):
    assert parse(invite({name: value})).session_interval == seconds


def test_session_interval_absent_or_huge():
    assert parse(invite()).session_interval == 0
    huge = {"Session-Expires": "9" * 60_000 + ";refresher=uac"}
    assert parse(invite(huge)).session_interval == 999_999_999


# What a request says of its transaction and its way


@pytest.mark.parametrize(
    ("via", "branch"),
    [
        ("SIP/2.0/UDP h;branch=z1", "z1"),
        ("SIP/2.0/UDP h;branch=z1, SIP/2.0/UDP i;branch=z2", "z2"),
        ("SIP/2.0/UDP h;branch=z1\r\nVia: SIP/2.0/UDP i;rport; Branch = z2;x", "z2"),
        ("SIP/2.0/UDP h;branch=z1\r\nv: SIP/2.0/UDP i", ""),
        ("garbage", ""),
    ],
)
def test_branch_is_that_of_the_lowest_hop(via, branch):
    message = parse(invite({"Via": via}))
    assert message.branch == branch
    assert message.vias[-1].branch == branch


def test_branch_of_a_message_without_hops():
    lines = [line for line in invite().split(b"\r\n") if not line.startswith(b"Via")]
    assert parse(b"\r\n".join(lines)).branch == ""


@pytest.mark.parametrize(
    ("headers", "stays"),
    [
        ("Max-Forwards: 0", True),
        ("MAX-FORWARDS : 0", True),
        ("max-forwards:0 \t", True),
        ("Max-Forwards:\r\n 0", True),
        ("Max-Forwards: 00", True),
        ("Max-Forwards: 0000000", True),
        ("Max-Forwards: 01", False),
        ("Max-Forwards: 10", False),
        ("Max-Forwards: 70", False),
        ("Max-Forwards: 0x", False),
        ("Max-Forwards:", False),
        ("X-Max-Forwards: 0", False),
        ("Subject: Max-Forwards: 0", False),
        ("Subject: a\r\n Max-Forwards: 0", False),
        # Of several a proxy reads the first.
        ("Max-Forwards: 0\r\nMax-Forwards: 70", True),
        ("Max-Forwards: 70\r\nMax-Forwards: 0", False),
        # It has no compact form: an m is a Contact.
        ("m: 0", False),
        ("X: y", False),
    ],
)
def test_what_goes_no_further(headers, stays):
    payload = invite()[:-2] + headers.encode() + b"\r\n\r\nMax-Forwards: 0\r\n\r\n"
    assert parse(payload).goes_no_further is stays


def way(route: str = "", uri: str = "sip:b@h") -> str:
    headers = {"Route": route} if route else {}
    return parse(invite(headers, start=f"INVITE {uri} SIP/2.0")).way


def test_way_is_request_uri_and_route():
    ways = [
        way(),
        way(uri="sip:b@i"),
        way("<sip:p1;lr>"),
        way("<sip:p2;lr>"),
        way("<sip:p1;lr>\r\nRoute: <sip:p2;lr>"),
        way("<sip:p1;lr>,\r\n\t<sip:p2;lr>"),
        way("<sip:" + "p" * 60_000 + "1>"),
        way("<sip:" + "p" * 60_000 + "2>"),
    ]
    assert len(set(ways)) == len(ways)
    assert all(len(each) <= agent.MAX_COMPARED for each in ways)
    # A fold neither hides where it goes nor makes another way of it.
    assert way("<sip:p1;lr>") == way("<sip:p1;lr>") == way("\r\n <sip:p1;lr>")
    assert parse(invite({"Record-Route": "<sip:p1>", "X": "Route: a"})).way == way(
        uri="sip:2001@sip.canyan.io"
    )


def test_parties():
    message = parse(invite({"From": '"A" <sip:2000@a>;tag=a', "To": "tel:+1-201"}))
    assert message.party("from") == agent.Uri("sip", "2000", "a", None)
    assert message.party("to") == agent.Uri("tel", "+1-201", "", None, True)
    assert message.party("request-uri") == agent.Uri("sip", "2001", "sip.canyan.io", None)
    odd = parse(invite({"From": "<nobody>;tag=a", "To": "x"}, start="INVITE x SIP/2.0"))
    assert [odd.party(name) for name in ("from", "to", "request-uri")] == [agent.NO_URI] * 3
    # Once read it is kept.
    assert message.party("from") is message.party("from")


def test_head_is_start_line_and_headers():
    payload = invite({"X-A": "\xff"})
    assert parse(b"\r\n\r\n" + payload + b"body").head == payload[:-3].decode("latin-1")
    # What `pack_call` keeps of a message is enough to read it once more.
    again = parse(parse(payload).head.encode("latin-1") + b"\n\r\n")
    assert again.head == parse(payload).head
    assert (again.call_id, again.header("x-a")) == ("1@h", ["\xff"])


# Several messages in one payload


def split(payload: bytes, protocol: int = 6) -> list[bytes]:
    return list(agent.split_messages(agent.HepPacket(3, TIME, protocol, payload=payload)))


def stream(
    method: str, body: bytes = b"", length: str | None = None, name: str = "Content-Length"
) -> bytes:
    fields = {"CSeq": f"1 {method}", name: str(len(body)) if length is None else length}
    return invite(fields, start=f"{method} sip:a@b SIP/2.0") + body


REPLY = invite({"l": "0"}, start="SIP/2.0 200 OK")


@pytest.mark.parametrize("protocol", [6, 22])
@pytest.mark.parametrize("between", [b"", b"\r\n", b"\r\n\r\n", b"\n\n\n"])
@pytest.mark.parametrize("name", ["Content-Length", "content-length ", "l", "L\t"])
@pytest.mark.parametrize("body", [b"", b"v=0\r\n", b"BYE sip:a@b SIP/2.0\r\n\r\n"])
def test_messages_of_a_stream(protocol, between, name, body):
    messages = [stream("INVITE", body, name=name), REPLY, stream("NEWTHING", body), stream("BYE")]
    assert split(between + between.join(messages), protocol) == messages
    assert split(between.join(messages) + between, protocol)[:3] == messages[:3]
    assert split(messages[0], protocol) == messages[:1]


@pytest.mark.parametrize("protocol", [17, 0, 132])
def test_a_datagram_is_one_message(protocol):
    """Else a caller could write behind its end what no proxy reads."""
    payload = stream("INFO") + stream("BYE")
    assert split(payload, protocol) == [payload]


def test_messages_with_bare_line_feeds():
    messages = [each.replace(b"\r\n", b"\n") for each in (stream("OPTIONS"), REPLY, stream("BYE"))]
    assert split(b"".join(messages)) == messages


@pytest.mark.parametrize("length", ["{}", "000000000{}", "\r\n {}", "{} ", "99999", "9" * 5_000])
def test_what_stands_in_a_body_is_no_message(length):
    """Also where it is cut, or its length is written oddly: a proxy reads it as a body."""
    body = stream("BYE")
    whole = stream("INFO", body, length.format(len(body)))
    assert split(whole) == [whole]


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_a_cut_body_is_all_that_is_left(cut):
    first, last = stream("INVITE", b"v=0\r\n"), stream("INVITE", b"v=1\r\n")
    assert split((first + last)[:-cut]) == [first, last[:-cut]]


@pytest.mark.parametrize("length", ["", "x", "-5", "5x", "0", "00"])
@pytest.mark.parametrize("body", [b"", b"v=0\r\nc=IN IP4 h\r\n\r\n", b"Hello world\r\n"])
def test_without_a_length_only_a_start_line_begins_a_message(length, body):
    first, last = stream("INVITE", body, length), stream("BYE")
    if body:
        assert split(first + last) == [first + last]
    else:
        assert split(first + last) == [first, last]


def test_a_segment_cut_in_the_head_of_its_last_message():
    first, last = stream("INVITE"), stream("BYE")
    start = len(b"BYE sip:a@b SIP/2.0\r\n")
    for end in range(start, len(last)):
        assert split(first + last[:end]) == [first, last[:end]]


@given(st.lists(st.tuples(st.sampled_from(["INVITE", "BYE", "X-Y"]), st.binary(max_size=30))))
@settings(max_examples=200, deadline=None)
def test_any_messages_of_a_stream(kinds):
    messages = [stream(method, body) for method, body in kinds]
    assert split(b"".join(messages)) == (messages or [b""])


@given(
    st.lists(
        st.one_of(
            st.binary(max_size=8),
            st.sampled_from([b"\r\n", b"\n", b"l:", b"Content-Length: ", b"9", b"0", b" "]),
            st.sampled_from([b"BYE a SIP/2.0\r\n\r\n", b"SIP/2.0 200\r\nl: 2\r\n\r\n"]),
        ),
        max_size=30,
    )
)
@settings(max_examples=300, deadline=None)
def test_splitting_loses_nothing_but_empty_lines(pieces):
    payload = b"".join(pieces)
    messages = split(payload)
    assert b"".join(messages).translate(None, b"\r\n") == payload.translate(None, b"\r\n")
    position = 0
    for message in messages:
        found = payload.find(message, position)
        assert found >= 0 and not payload[position:found].strip(b"\r\n")
        position = found + len(message)


# Addresses and values


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", []),
        (" \t", []),
        (",", []),
        (" , ,", []),
        ("a", ["a"]),
        ("a,b", ["a", "b"]),
        (" a , b ,, c ", ["a", "b", "c"]),
        ("<sip:a,b@h>,<sip:c@h>", ["<sip:a,b@h>", "<sip:c@h>"]),
        ('"a,b" <sip:x@h>, c', ['"a,b" <sip:x@h>', "c"]),
        ('"a\\",b" <sip:x@h>;q="1,2",c', ['"a\\",b" <sip:x@h>;q="1,2"', "c"]),
        ('"<" <sip:a@h>, "b>" <sip:b@h>', ['"<" <sip:a@h>', '"b>" <sip:b@h>']),
        ('<sip:a"@h>, <sip:b"@h>', ['<sip:a"@h>', '<sip:b"@h>']),
        ("<sip:a@h, b", ["<sip:a@h, b"]),
        ('"a\\\\",b', ['"a\\\\"', "b"]),
    ],
)
def test_split_values(text, values):
    assert [value.strip() for value in agent.split_values(text)] == values


@pytest.mark.parametrize("text", ['"a,b', 'a,"', 'a, "\\"', '"a",b,"c,', '"a\\\\\\",b'])
def test_values_with_an_open_quote_are_one(text):
    assert agent.split_values(text) == [text]


@pytest.mark.parametrize(
    ("text", "user", "host", "tag"),
    [
        ("<sip:a@b>", "a", "b", ""),
        ("  < sip:a@b > ", "a", "b", ""),
        ("sip:a@b", "a", "b", ""),
        ("sip:a@b;x=1;Y", "a", "b", ""),
        ("<sip:a@b;x=1>;y=2", "a", "b", ""),
        ("<sip:a;x=1@b>;Y = 2 ; z", "a;x=1", "b", ""),
        ("<sip:a@b?h=1,2>;tag=t", "a", "b", "t"),
        ("Bob S. <sip:a@b>", "a", "b", ""),
        ('"x <sip:no@no>; @," <sip:a@b>;t="u;tag=v,w<>"', "a", "b", ""),
        ('"\\"<" <sip:a@b>', "a", "b", ""),
        ('""<sip:a@b>', "a", "b", ""),
        ("<sip:[2001:DB8::1]:5060>;x", "", "2001:db8::1", ""),
        ("<sip:a@b>;tag=1;tag=2", "a", "b", "1"),
        ("<tel:+1-201;phone-context=x>;tag=1", "+1-201", "", "1"),
        ("<sip:a@b>;x=a=b", "a", "b", ""),
    ],
)
def test_address(text, user, host, tag):
    uri = agent.address_uri(text)
    assert (uri.user, uri.host, agent._tag(text)) == (user, host, tag)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Bob",
        "<>",
        "<a@b>",
        ";tag=1",
        "2000",
        "<sip:a@b",
        "Bob <",
        '"Bob <sip:a@b>',
        '<sip:a@b>;x="',
        '"Bob\\" <sip:a@b>',
    ],
)
def test_what_is_no_address(text):
    assert agent.address_uri(text) == agent.NO_URI


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("sip:2000@sip.canyan.io", ("sip", "2000", "sip.canyan.io", None)),
        ("SIP:Bob@EXAMPLE.com:5060;x=y?a=b", ("sip", "Bob", "example.com", 5060)),
        ("sips:a@b", ("sips", "a", "b", None)),
        ("sip:b", ("sip", "", "b", None)),
        ("sip:b:5070", ("sip", "", "b", 5070)),
        ("sip:b;lr", ("sip", "", "b", None)),
        ("sip:b?to=x", ("sip", "", "b", None)),
        ("sip:a:secret@b", ("sip", "a", "b", None)),
        ("sip:@b", ("sip", "", "b", None)),
        ("sip:a@[2001:DB8::1]", ("sip", "a", "2001:db8::1", None)),
        ("sip:a@[2001:db8::1]:5062;x", ("sip", "a", "2001:db8::1", 5062)),
        ("sip:[::1]", ("sip", "", "::1", None)),
        ("sip:a@b:", ("sip", "a", "b", None)),
        ("sip:a@b:x", ("sip", "a", "b", None)),
        ("sip:a@b:999999", ("sip", "a", "b", None)),
        ("sip: a@b", ("sip", "a", "b", None)),
        # RFC 4475 section 3.1.1.13: semicolons may stand in the user part.
        (
            "sip:user;par=u%40example.net@example.com",
            ("sip", "user;par=u%40example.net", "example.com", None),
        ),
        (
            "sip:1_unusual.URI~(to-be!sure)&isn't+it$/crazy?,/;;*:&it+has=1,weird!*pas$wo~d@h;x",
            ("sip", "1_unusual.URI~(to-be!sure)&isn't+it$/crazy?,/;;*", "h", None),
        ),
        ("sip:%6a%40x@h", ("sip", "%6a%40x", "h", None)),
        ("tel:+1-201-555-0123", ("tel", "+1-201-555-0123", "", None, True)),
        ("TEL:7042;phone-context=example.com", ("tel", "7042", "", None, True)),
        ("sip:+1-201@h;user=phone", ("sip", "+1-201", "h", None, True)),
        ("sips:+1-201@h:5061;x; User=Phone ?y=z", ("sips", "+1-201", "h", 5061, True)),
        ("sip:1@h;user=ip", ("sip", "1", "h", None)),
        ("sip:1;user=phone@h", ("sip", "1;user=phone", "h", None)),
        ("sip:1@h?user=phone", ("sip", "1", "h", None)),
        ("sip:1@h?x=y;user=phone", ("sip", "1", "h", None)),
        ("urn:service:sos", ("urn", "", "", None)),
        ("http://u@h/", ("http", "", "", None)),
        (wire("sip:à@h"), ("sip", wire("à"), "h", None)),
    ],
)
def test_parse_uri(text, parts):
    assert uri(text) == agent.Uri(*parts)
    assert uri(f"  {text}\t") == agent.Uri(*parts)


@pytest.mark.parametrize("text", ["", "2000", "a@b", ":x", "+1:x", "s ip:a@b", "<sip:a@b>", "1a:b"])
def test_what_is_no_uri(text):
    assert uri(text) == agent.NO_URI


# Texts for the rating API


@pytest.mark.parametrize(
    ("text", "account"),
    [
        ("sip:2000@h", "2000"),
        ("sip:h", ""),
        ("urn:service:sos", ""),
        ("sip:Bob@h", "Bob"),
        ("sip:bob:secret@h", "bob"),
        ("sip:%6a%6F@h", "jo"),
        ("sip:j%C3%B6rg@h", "jörg"),
        (wire("sip:jörg@h"), "jörg"),
        (wire("sip:à@h"), "à"),
        ("sip:*21*%23@h", "*21*#"),
        ("sip:a%40b%3Bc@h", "a@b;c"),
        ("sip:a%2fb@h", "a/b"),
        ("sip:100%@h", "100%"),
        ("sip:%zz%4@h", "%zz%4"),
        ("sip:user;par=u%40example.net@h", "user;par=u@example.net"),
        # What the rating API does not take stays escaped, so that accounts stay different.
        ("sip:%E9@h", "%E9"),
        ("sip:\xe9@h", "%E9"),
        ("sip:a%00b@h", "a%00b"),
        ("sip:a\x01b@h", "a%01b"),
        ("sip:a\x7fb@h", "a%7Fb"),
        ("sip:a%0D%0Ab@h", "a%0D%0Ab"),
        ("sip:%F0%9F%98%80@h", "%F0%9F%98%80"),
        (wire("sip:😀@h"), "%F0%9F%98%80"),
        ("sip:%ED%A0%80@h", "%ED%A0%80"),  # half of a surrogate pair is no UTF-8
        ("sip:%E2%80%AE1@h", "%E2%80%AE1"),  # right-to-left override
        # RFC 3261 section 19.1.6: the parameters of a telephone number are not of the account.
        ("sip:+1201;phone-context=x@h;user=phone", "+1201"),
        ("sip:7042;ext=22@h", "7042"),
        # RFC 3966: visual separators carry no meaning in a tel number.
        ("tel:+1-201-555-0123", "+12015550123"),
        ("tel:+1(201)555.01.23;ext=22", "+12015550123"),
        ("tel:7042;phone-context=+1", "7042"),
        ("tel:*21%23", "*21#"),
        # RFC 3261 section 19.1.1: with user=phone the user of a SIP URI is such a number.
        ("sip:+1-201-555-0123@h;user=phone", "+12015550123"),
        ("sip:%2B1(201)%35550123;ext=1@h;user=phone", "+12015550123"),
        ("sip:+1-201-555-0123@h", "+1-201-555-0123"),
        ("sip:a-b.c@h;user=phone", "a-b.c"),
        ("sip:%2B1201@h", "+1201"),
        ("tel:*21-%23", "*21#"),
        ("sip:*21%23;ext=2@h", "*21#"),
        ("tel:", ""),
        ("tel:+49\x01", "+49%01"),
        ("tel:+49\xe9", "+49%E9"),
    ],
)
def test_account_text(text, account):
    assert agent.account_text(uri(text)) == account


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("sip:2000@sip.canyan.io:5060;x=y", "sip:2000@sip.canyan.io"),
        ("SIPS:Bob:secret@EXAMPLE.com", "sips:Bob@example.com"),
        ("sip:b", "sip:b"),
        ("sip:a@[2001:DB8::1]:5060", "sip:a@[2001:db8::1]"),
        ("sip:[::1]", "sip:[::1]"),
        # RFC 3966 section 5.1.1: visual separators are no part of a number. Rates compare as text.
        ("tel:+1-201;ext=2", "tel:+1201"),
        ("tel:+1(201).555-01", "tel:+120155501"),
        ("sip:+1-201-555@h;user=phone", "sip:+1201555@h"),
        ("sip:%2B1-201@h;user=phone", "sip:+1201@h"),
        ("sip:a-b.c@h;user=phone", "sip:a-b.c@h"),
        ("sip:+1-201-555@h", "sip:+1-201-555@h"),
        # RFC 3261 section 19.1.4: an escaped character that needs no escape is the same without.
        ("sip:%32%30%3041@h", "sip:20041@h"),
        ("sip:%6a%6F-%5f%7E%2e%21%2a%27%28%29@h", "sip:jo-_~.!*'()@h"),
        ("sip:%2b1@h", "sip:+1@h"),
        ("sip:%23%25%2F%3B%3a%40%20%2525@h", "sip:%23%25%2F%3B%3a%40%20%2525@h"),
        ("sip:%4@h", "sip:%4@h"),
        ("sip:+1-201;phone-context=x@h", "sip:+1-201@h"),
        ("sip:user;par=u%40example.net@h", "sip:user;par=u%40example.net@h"),
        ("sip:%00%C3%B6@h", "sip:%00%C3%B6@h"),
        (wire("sip:ö@h"), "sip:%C3%B6@h"),
        ('sip:a b"{}|\\^`\x7f@h', "sip:a%20b%22%7B%7D%7C%5C%5E%60%7F@h"),
        ("urn:service:sos", "urn:"),
    ],
)
def test_uri_text(text, plain):
    assert agent.uri_text(uri(text)) == plain


UNRESERVED = "ABCXYZabcxyz0123456789-_.!~*'()"


@pytest.mark.parametrize("character", [chr(octet) for octet in range(0x100)])
def test_what_means_the_same_escaped_is_unescaped_and_nothing_else(character):
    """RFC 3261 19.1.4 and 25.1: unreserved characters; and the + that numbers begin with."""
    plain = character in UNRESERVED + "DEFGHIJKLMNOPQRSTUVWdefghijklmnopqrstuvw+"
    for escaped in (f"%{ord(character):02x}", f"%{ord(character):02X}"):
        told = agent.uri_text(uri(f"sip:x{escaped}y@h"))
        assert told == f"sip:x{character if plain else escaped}y@h"


@given(st.text("0123456789*#", min_size=1), st.data(), st.sampled_from(["tel", "sip", "sips"]))
@settings(max_examples=200, deadline=None)
def test_a_number_is_the_same_however_it_is_written(number, data, scheme):
    def written(character: str) -> str:
        escaped = f"%{ord(character):02x}"
        before = data.draw(st.text("-.()", max_size=2))
        return before + (
            escaped if character == "#" else data.draw(st.sampled_from([character, escaped]))
        )

    text = "".join(map(written, number))
    odd = uri(f"tel:{text}" if scheme == "tel" else f"{scheme}:{text}@h;user=phone")
    assert agent.account_text(odd) == number
    if "#" not in number:
        assert agent.uri_text(odd) == f"{scheme}:{number}" + ("" if scheme == "tel" else "@h")


@given(latin_1, latin_1, st.sampled_from(["sip", "sips", "tel", "x"]), st.booleans())
@settings(max_examples=300, deadline=None)
def test_texts_are_fit_for_the_rating_api(user, host, scheme, phone):
    parts = agent.Uri(scheme, user, host, None, phone)
    assert agent.uri_text(parts).isascii() and agent.uri_text(parts).isprintable()
    account = agent.account_text(parts)
    assert account.isprintable() and all(ord(character) < 0x10000 for character in account)


@given(
    st.text(st.characters(codec="utf-8", max_codepoint=0xFFFF), min_size=1).filter(str.isprintable)
)
@settings(max_examples=200, deadline=None)
def test_account_text_undoes_any_escaping(user):
    """However a user that the rating API takes is escaped, it is one and the same account."""
    escaped = "".join(f"%{octet:02x}" for octet in user.encode())
    assert agent.account_text(agent.Uri("sip", escaped, "h", None)) == user


@pytest.mark.parametrize(
    ("time_us", "text"),
    [
        (0, "1970-01-01T00:00:00.000Z"),
        (1_790_000_000_123_456, "2026-09-21T14:13:20.123Z"),
        (1_790_000_000_999_999, "2026-09-21T14:13:20.999Z"),  # cut, not rounded
        (951_782_400_000_000, "2000-02-29T00:00:00.000Z"),
        (4_294_967_295_000_000, "2106-02-07T06:28:15.000Z"),  # the last that HEP can tell
    ],
)
def test_rfc3339(time_us, text):
    assert agent.rfc3339(time_us) == text


# Anything at all

KINDS = {"start-line", "missing", "duplicate", "cseq", "quote", "address"}


def outcome(payload: bytes) -> object:
    """The tags of a message, or what is wrong with it, to compare."""
    try:
        message = agent.parse_sip(payload, TIME)
    except agent.SipError as error:
        return error.kind, str(error)
    return message and (message.from_tag, message.to_tag)


def check(payload: bytes) -> None:
    """A SipMessage that can be used, None, or SipError with a kind, and nothing else.

    Its tags are the same by the short way and by the long one.
    """
    short = outcome(payload)
    with patch.object(agent, "_USUAL_TAG", re.compile("(?!)")):
        assert outcome(payload) == short
    try:
        message = agent.parse_sip(payload, TIME)
    except agent.SipError as error:
        assert error.kind in KINDS
        return
    if message is None:
        return
    assert type(message) is agent.SipMessage
    assert bool(message.method) != bool(message.status)
    assert message.call_id and 0 <= message.cseq < 2**32
    assert max(map(len, (message.call_id, message.from_tag, message.to_tag))) <= agent.MAX_TEXT
    assert message.vias and message.session_interval >= 0
    assert message.branch == message.vias[-1].branch
    assert len(message.way) <= agent.MAX_COMPARED and message.goes_no_further in (True, False)
    texts = [message.request_uri, message.header("from")[0], message.header("to")[0]]
    for text in texts:
        parsed = agent.address_uri(text)
        assert agent.uri_text(parsed).isascii()
        agent.account_text(parsed).encode()


def test_real_messages_parse():
    for payload in real_messages():
        try:
            message = agent.parse_sip(payload, TIME)
        except agent.SipError:
            # Only the recorded xlog payloads are no SIP.
            assert b"SIP/2.0" not in payload.partition(b"\r\n")[0]
            continue
        if message is not None:
            assert message.vias[0].branch.startswith("z9hG4bK")


def test_every_truncation_of_a_real_message():
    for payload in random.Random(1).sample(real_messages(), 20):
        for end in range(len(payload)):
            check(payload[:end])


def test_every_octet_of_a_real_message_changed():
    for payload in random.Random(2).sample(real_messages(), 12):
        for position in range(min(len(payload), 2_000)):
            for octet in b'\0\xff"<,:;\n ':
                check(payload[:position] + bytes([octet]) + payload[position + 1 :])


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_real_messages_changed(data):
    payload = bytearray(data.draw(st.sampled_from(real_messages())))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(payload) - 1))
        payload[position] = data.draw(st.integers(0, 255))
    check(bytes(payload))
    check(bytes(payload[: data.draw(st.integers(0, len(payload)))]))


@given(
    st.sampled_from([b"", b"INVITE sip:a@b SIP/2.0\r\n", b"SIP/2.0 200 OK\r\n"]),
    st.lists(
        st.one_of(
            st.binary(max_size=20),
            st.sampled_from(invite().split(b"\r\n")),
            st.sampled_from([b"\r\n", b"\n", b": ", b"<", b">", b'"', b";tag=", b",", b"\\"]),
        ),
        max_size=30,
    ),
)
@settings(max_examples=300, deadline=None)
def test_random_octets(start, pieces):
    check(start + b"".join(pieces))
    check(start + b"\r\n".join(pieces))


# The work grows with the message, not with its square

SMALL, LARGE = 4_096, 65_536  # octets; the larger is more than any datagram
# A quadratic step would cost 256 times as much for 16 times the octets.
FACTOR = 64
# Seconds of CPU below which 64 KiB cost too little to matter, or to be measured well.
CHEAP = 0.1
UNITS = [
    *(",", ", ", '"', '","', '"a",', ";", "; ", ";a=", ";tag", ";tag=", "; tag ", ";branch"),
    *("<", ">", "<>", "<,", ":", "\\", '"\\', '\\"', " ", "\t", "\r", "\n ", "\r\n\t", "\x85"),
    *("a", "1", "@", "%", "%41", "%C3", "/", " / ", "[", "]", "?", "(", "-", "a b ", "a:", "sip:"),
    *("SIP/2.0/UDP h,", '<sip:a@b>;x="', "\r\ncseq:", "\r\nCSeq: 1", "\r\ncseq: 1 INVITE"),
    *("\r\nv:,", "\r\n:", "\r\ncseq:\r\n ", "\r\n\r\n", "\n\r"),
]


def seconds(work: Callable[[], object], runs: int) -> float:
    """CPU time of the cheapest run: process time, so that a busy machine does not count."""
    times = []
    for _ in range(runs):
        start = time.process_time()
        with suppress(agent.SipError):
            work()
        times.append(time.process_time() - start)
    return min(times)


def assert_linear(what: str, work: Callable[[int], object]) -> None:
    """`work` is given the number of octets to take."""
    if seconds(lambda: work(LARGE), 1) > CHEAP:
        small, large = (seconds(lambda size=size: work(size), 3) for size in (SMALL, LARGE))
        assert large < max(FACTOR * small, CHEAP), f"{what}: {small:.4f} s, then {large:.4f} s"


def suppressed(function: Callable[[str], object], text: str) -> object:
    with suppress(agent.SipError):
        return function(text)
    return None


def hostile(unit: str, where: str, size: int) -> bytes:
    text = unit * (size // len(unit))
    if where == "start":
        return text.encode("latin-1")
    if where == "request line":
        return invite(start="INVITE " + text)
    if where == "reply":
        return invite({"CSeq": "", "X": text}, start="SIP/2.0 200 " + text)
    # With a folded line, so that unfolding has its turn at the text as well.
    return invite({where: text, "X-Folded": "a\r\n b"})


@pytest.mark.parametrize(
    "where",
    ["start", "request line", "reply", "From", "To", "Via", "CSeq", "Call-ID", "Session-Expires"]
    + ["Max-Forwards", "Route"],
)
def test_messages_take_linear_time(where):
    for unit in UNITS:
        assert_linear(
            f"{unit!r} in {where}", lambda size, unit=unit: check(hostile(unit, where, size))
        )


@pytest.mark.parametrize(
    ("form", "before"),
    [
        ("INFO a SIP/2.0\r\nTo: {}", ""),
        ("INFO a SIP/2.0\r\nt: {}\r\nTo: <sip:a@b>\r\n\r\n", ""),
        ("INFO a SIP/2.0\r\nt: {}=", ";tag"),
        ("INFO a SIP/2.0\r\nt: {}", "\r\n ;tag\r\n "),
    ],
)
def test_looking_for_a_tag_takes_linear_time(form, before):
    for unit in UNITS:

        def work(size: int, unit: str = before + unit) -> None:
            check(form.replace("{}", unit * (size // len(unit))).encode("latin-1"))

        assert_linear(f"{unit!r} in {form!r}", work)


@pytest.mark.parametrize(
    "form",
    [
        "{}",
        "INVITE a SIP/2.0\r\n{}\r\n\r\nBYE a SIP/2.0\r\n\r\n",
        "INVITE a SIP/2.0\r\nContent-Length: {}\r\n\r\nBYE a SIP/2.0\r\n\r\n",
        "INVITE a SIP/2.0\r\nl: 0\r\n\r\n{}",
        "INVITE a SIP/2.0\r\nl: 0\r\n\r\nBYE {}",
    ],
)
def test_splitting_takes_linear_time(form):
    messages = ["A b SIP/2.0\r\n\r\n", "\r\nl:", "\r\nl: 0", "\r\nl:1\r\n\r\n", "0", "\n\n", "\n"]
    for unit in [*UNITS, *messages]:

        def work(size: int, unit: str = unit) -> None:
            split(form.replace("{}", unit * (size // len(unit))).encode("latin-1"))

        assert_linear(f"{unit!r} in {form!r}", work)


@pytest.mark.parametrize(
    ("function", "form"),
    [
        (agent.split_values, "{}"),
        (agent.split_values, '"a" <sip:a@b>{}'),
        (agent.address_uri, "{}"),
        (agent.address_uri, "<sip:a@b>{}"),
        (agent.address_uri, '"{}" <sip:a@b>'),
        (lambda text: suppressed(agent._tag, text), "<sip:a@b>;tag={}"),
        # What fits up to its last octet is tried at each length, if a regexp leaves a choice.
        (lambda text: suppressed(agent._tag, text), '<sip:a@b>;tag={}"'),
        (lambda text: suppressed(agent._tag, text), '<sip:a@b>;tag=a{}"'),
        (lambda text: suppressed(agent._tag, text), '<sip:a@b>{};tag=a"'),
        (agent.address_uri, '<sip:a@b>{}"'),
        (agent.address_uri, '<sip:{}@b>"'),
        (agent.parse_uri, "sip:{}@b!"),
        (agent.parse_uri, "sip:a@{}!"),
        (agent.parse_uri, "{}"),
        (agent.parse_uri, "sip:{}"),
        (agent.parse_uri, "tel:{}"),
        (agent.printable_id, "{}"),
        (lambda text: agent.account_text(agent.Uri("sip", text, "", None, True)), "{}"),
        (lambda text: agent.uri_text(agent.Uri("tel", text, "", None, True)), "{}"),
        (lambda text: agent.account_text(agent.Uri("sip", text, "", None)), "{}"),
        (lambda text: agent.account_text(agent.Uri("tel", text, "", None)), "{}"),
        (lambda text: agent.uri_text(agent.Uri("sip", text, text, None)), "{}"),
    ],
)
def test_texts_take_linear_time(function, form):
    for unit in UNITS:
        assert_linear(
            f"{unit!r} in {form}",
            lambda size, unit=unit: function(form.replace("{}", unit * (size // len(unit)))),
        )


# What names a call is kept as long as the call and told to the API: its length is bounded, and
# nobody becomes invisible by a long one (rule 4)


@pytest.mark.parametrize(
    ("name", "form", "part"),
    [
        ("Call-ID", "{}", "call_id"),
        ("From", "<sip:a@b>;tag={}", "from_tag"),
        ("To", "<sip:a@b>;tag={}", "to_tag"),
    ],
)
def test_names_of_a_call_are_bounded(name, form, part):
    def named(text: str) -> str:
        message = parse(invite({name: form.format(text)}))
        others = {"call_id": "1@h", "from_tag": "a", "to_tag": ""}
        del others[part]
        assert {other: getattr(message, other) for other in others} == others
        return str(getattr(message, part))

    longest = "x" * agent.MAX_TEXT
    assert named(longest) == longest
    for length in (1, 100, 60_000):
        short = named(longest + "y" * length)
        assert re.fullmatch("x{64}\\^[0-9a-f]{32}", short)
        assert short == named(longest + "y" * length)
        assert short != named(longest + "y" * (length - 1) + "z")
    # Printed it is still another's than any that could be written short.
    assert agent.printable_id(short) != short


def test_of_a_thousand_hops_the_nearest_and_the_first_are_read():
    hops = [f"SIP/2.0/UDP h{number};branch=b{number}" for number in range(1_000)]
    message = parse(invite({"Via": ", ".join(hops)}))
    assert len(message.vias) == agent.MAX_VIAS
    assert message.vias[agent.MAX_VIAS - 2 :] == (
        agent.Via("b68", "h68"),
        agent.Via("b999", "h999"),
    )


def test_long_branches_are_told_apart_at_bounded_length():
    def branch(text):
        return parse(invite({"Via": f"SIP/2.0/UDP {text};branch={text}"})).vias[0]

    one, other = branch("x" * 60_000 + "1"), branch("x" * 60_000 + "2")
    assert one != other and one == branch("x" * 60_000 + "1")
    assert len(one.branch) <= agent.MAX_COMPARED and len(one.sent_by) <= agent.MAX_COMPARED
    assert branch("x" * agent.MAX_COMPARED).branch == "x" * agent.MAX_COMPARED


@pytest.mark.parametrize("odd", ["1", "\xff", "\x01", "%41", "%F0%9F%98%80"])
def test_what_is_told_to_the_api_is_bounded(odd):
    whole, over = odd * (agent.MAX_TEXT // 12), odd * agent.MAX_TEXT + "1"
    assert agent.account_text(agent.Uri("sip", whole, "h", None)) != ""
    # Cut, it might be another's account.
    assert agent.account_text(agent.Uri("sip", over, "h", None)) == ""
    told = agent.uri_text(agent.Uri("sip", over, over, None))
    assert told.startswith("sip:") and len(told) == agent.MAX_TEXT and told.isascii()


def test_a_message_cut_inside_a_folded_header_does_not_have_that_header():
    """Else a re-INVITE whose To tag is on the line that is cut would look like an initial one."""
    head = b"INVITE sip:a@b SIP/2.0\r\nFrom: <sip:c@d>;tag=f\r\nCall-ID: x\r\nCSeq: 2 INVITE\r\n"
    for cut in (b"", b" ", b" \t;\r\n", b" \t;\r\n ta"):
        with pytest.raises(agent.SipError) as caught:
            agent.parse_sip(head + b"To: <sip:a@b>\r\n" + cut)
        assert caught.value.kind == "missing"
