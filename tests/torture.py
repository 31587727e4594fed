"""The SIP torture messages of RFC 4475 and RFC 5118 as a table for the SIP parser.

A case is a message, what the parser makes of it as it stands, and, as most of these messages are
REGISTER or OPTIONS, what it makes of the same oddity in an INVITE (or in a reply to one).

What to expect: a mirror need not answer 400. It must neither lose a call nor charge the wrong
one. So an oddity is accepted where it leaves the identity of the call (Call-ID, tags, CSeq,
method, branch, addresses) unambiguous, and is an error where it does not. What can not matter to
the life of a call is ignored, however malformed.

The texts are those of the RFCs, compared between several public copies of them; a case that
departs from its RFC says so. The `DERIVED` cases are ours: the same oddities one at a time.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum


class Outcome(Enum):
    IGNORED = "parse_sip gives None"
    ERROR = "parse_sip raises SipError"


IGNORED = Outcome.IGNORED
ERROR = Outcome.ERROR

# Keys of an expected message: the attributes of SipMessage; `via` is the first of `vias`;
# `from_*`, `to_*` and `request_*` (scheme, user, host, port) are read with address_uri;
# `header:NAME` is header(NAME). A key that is left out is not compared.
Expected = Outcome | Mapping[str, object]


@dataclass(frozen=True)
class Case:
    name: str
    section: str
    payload: bytes
    expected: Expected
    invite: Expected | None = None  # the same message as (a reply to) an INVITE; None: it is one


def crlf(text: str) -> bytes:
    """The wire form of a message written as a block of lines."""
    return text.removeprefix("\n").replace("\n", "\r\n").encode("ascii")


def sdp(origin: str, connection: str = "", time: str = "0 0") -> bytes:
    """The body that most messages of RFC 4475 carry."""
    return crlf(f"""
v=0
o=mhandley 29739 7272939 IN IP4 {origin}
s=-
c=IN IP4 {connection or origin}
t={time}
m=audio 49217 RTP/AVP 0 12
m=video 3227 RTP/AVP 31
a=rtpmap:31 LPC
""")


def edit(payload: bytes, *changes: tuple[bytes, bytes]) -> bytes:
    """The payload with each (old, new) replaced once; every `old` must be there."""
    for old, new in changes:
        assert old in payload, old
        payload = payload.replace(old, new, 1)
    return payload


_CSEQ = re.compile(rb"^(cseq[ \t]*:\s*\d+\s+)\S+", re.IGNORECASE | re.MULTILINE)


def as_invite(payload: bytes) -> bytes:
    """The same message as an INVITE (a request) or as a reply to an INVITE."""
    if not payload.startswith(b"SIP/"):
        payload = b"INVITE " + payload.split(b" ", 1)[1]
    payload, changed = _CSEQ.subn(rb"\1INVITE", payload, count=1)
    assert changed == 1
    return payload


VALID = [
    Case(
        "wsinv",
        "RFC 4475 3.1.1.1",
        crlf(r"""
INVITE sip:vivekg@chair-dnrc.example.com;unknownparam SIP/2.0
TO :
 sip:vivekg@chair-dnrc.example.com ;   tag    = 1918181833n
from   : "J Rosenberg \\\""       <sip:jdrosen@example.com>
  ;
  tag = 98asjd8
MaX-fOrWaRdS: 0068
Call-ID: wsinv.ndaksdj@192.0.2.1
Content-Length   : 150
cseq: 0009
  INVITE
Via  : SIP  /   2.0
 /UDP
    192.0.2.2;branch=390skdjuw
s :
NewFangledHeader:   newfangled value
 continued newfangled value
UnknownHeaderWithUnusualValue: ;;,,;;,;
Content-Type: application/sdp
Route:
 <sip:services.example.com;lr;unknownwith=value;unknown-no-value>
v:  SIP  / 2.0  / TCP     spindle.example.com   ;
  branch  =   z9hG4bK9ikj8  ,
 SIP  /    2.0   / UDP  192.168.255.111   ; branch=
 z9hG4bK30239
m:"Quoted string \"\"" <sip:jdrosen@example.com> ; newparam =
      newvalue ;
  secondparam ; q = 0.33

""")
        + sdp("192.0.2.3", "192.0.2.4"),
        {
            "method": "INVITE",
            "status": 0,
            "request_uri": "sip:vivekg@chair-dnrc.example.com;unknownparam",
            "request_user": "vivekg",
            "request_host": "chair-dnrc.example.com",
            "call_id": "wsinv.ndaksdj@192.0.2.1",
            "from_tag": "98asjd8",
            "to_tag": "1918181833n",
            "cseq": 9,
            "cseq_method": "INVITE",
            "vias": (
                ("390skdjuw", "192.0.2.2"),
                ("z9hG4bK9ikj8", "spindle.example.com"),
                ("z9hG4bK30239", "192.168.255.111"),
            ),
            "from_user": "jdrosen",
            "from_host": "example.com",
            "to_user": "vivekg",
            "to_host": "chair-dnrc.example.com",
            "header:Subject": [""],
            "header:newfangledheader": ["newfangled value continued newfangled value"],
            "header:UnknownHeaderWithUnusualValue": [";;,,;;,;"],
        },
    ),
    Case(
        "intmeth",
        "RFC 4475 3.1.1.2",
        # Written octet by octet: quoted BEL, NUL and DEL, a parameter and a header in UTF-8.
        b"!interesting-Method0123456789_*+`.%indeed'~ "
        b"sip:1_unusual.URI~(to-be!sure)&isn't+it$/crazy?,/;;*"
        b":&it+has=1,weird!*pas$wo~d_too.(doesn't-it)@example.com SIP/2.0\r\n"
        b"Via: SIP/2.0/TCP host1.example.com;branch=z9hG4bK-.!%66*_+`'~\r\n"
        b'To: "BEL:\\\x07 NUL:\\\x00 DEL:\\\x7f" '
        b"<sip:1_unusual.URI~(to-be!sure)&isn't+it$/crazy?,/;;*@example.com>\r\n"
        b"From: token1~` token2'+_ token3*%!.- <sip:mundane@example.com>"
        b";fromParam''~+*_!.-%="
        b'"\xd1\x80\xd0\xb0\xd0\xb1\xd0\xbe\xd1\x82\xd0\xb0\xd1\x8e\xd1\x89\xd0\xb8\xd0\xb9"'
        b";tag=_token~1'+`*%!-.\r\n"
        b"Call-ID: intmeth.word%ZK-!.*_+'@word`~)(><:\\/\"][?}{\r\n"
        b"CSeq: 139122385 !interesting-Method0123456789_*+`.%indeed'~\r\n"
        b"Max-Forwards: 255\r\n"
        b"extensionHeader-!.%*+_`'~:"
        b"\xef\xbb\xbf\xe5\xa4\xa7\xe5\x81\x9c\xe9\x9b\xbb\r\n"
        b"Content-Length: 0\r\n"
        b"\r\n",
        IGNORED,
        {
            "method": "INVITE",
            "request_uri": "sip:1_unusual.URI~(to-be!sure)&isn't+it$/crazy?,/;;*"
            ":&it+has=1,weird!*pas$wo~d_too.(doesn't-it)@example.com",
            "request_user": "1_unusual.URI~(to-be!sure)&isn't+it$/crazy?,/;;*",
            "request_host": "example.com",
            "call_id": "intmeth.word%ZK-!.*_+'@word`~)(><:\\/\"][?}{",
            "from_tag": "_token~1'+`*%!-.",
            "to_tag": "",
            "cseq": 139122385,
            "vias": (("z9hG4bK-.!%66*_+`'~", "host1.example.com"),),
            "from_user": "mundane",
            "from_host": "example.com",
            "to_user": "1_unusual.URI~(to-be!sure)&isn't+it$/crazy?,/;;*",
            "to_host": "example.com",
            "header:extensionHeader-!.%*+_`'~": [
                b"\xef\xbb\xbf\xe5\xa4\xa7\xe5\x81\x9c\xe9\x9b\xbb".decode("latin-1")
            ],
        },
    ),
    Case(
        "esc01",
        "RFC 4475 3.1.1.3",
        crlf("""
INVITE sip:sips%3Auser%40example.com@example.net SIP/2.0
To: sip:%75se%72@example.com
From: <sip:I%20have%20spaces@example.net>;tag=938
Max-Forwards: 87
i: esc01.239409asdfakjkn23onasd0-3234
CSeq: 234234 INVITE
Via: SIP/2.0/UDP host5.example.net;branch=z9hG4bKkdjuw
C: application/sdp
Contact:
  <sip:cal%6Cer@host5.example.net;%6C%72;n%61me=v%61lue%25%34%31>
Content-Length: 150

""")
        + sdp("192.0.2.1"),
        {
            "method": "INVITE",
            "request_scheme": "sip",
            "request_user": "sips%3Auser%40example.com",
            "request_host": "example.net",
            "call_id": "esc01.239409asdfakjkn23onasd0-3234",
            "from_tag": "938",
            "cseq": 234234,
            "via": ("z9hG4bKkdjuw", "host5.example.net"),
            "from_user": "I%20have%20spaces",
            "from_host": "example.net",
            "to_user": "%75se%72",
            "to_host": "example.com",
            "header:c": ["application/sdp"],
            "header:content-type": ["application/sdp"],
            "header:contact": ["<sip:cal%6Cer@host5.example.net;%6C%72;n%61me=v%61lue%25%34%31>"],
        },
    ),
    Case(
        "escnull",
        "RFC 4475 3.1.1.4",
        crlf("""
REGISTER sip:example.com SIP/2.0
To: sip:null-%00-null@example.com
From: sip:null-%00-null@example.com;tag=839923423
Max-Forwards: 70
Call-ID: escnull.39203ndfvkjdasfkq3w4otrq0adsfdfnavd
CSeq: 14398234 REGISTER
Via: SIP/2.0/UDP host5.example.com;branch=z9hG4bKkdjuw
Contact: <sip:%00@host5.example.com>
Contact: <sip:%00%00@host5.example.com>
L:0

"""),
        IGNORED,
        {
            "method": "INVITE",
            "request_user": "",
            "request_host": "example.com",
            "call_id": "escnull.39203ndfvkjdasfkq3w4otrq0adsfdfnavd",
            "from_tag": "839923423",
            "cseq": 14398234,
            "from_user": "null-%00-null",
            "to_user": "null-%00-null",
            "to_tag": "",
            "header:contact": ["<sip:%00@host5.example.com>", "<sip:%00%00@host5.example.com>"],
        },
    ),
    Case(
        "esc02",
        "RFC 4475 3.1.1.5",
        crlf("""
RE%47IST%45R sip:registrar.example.com SIP/2.0
To: "%Z%45" <sip:resource@example.com>
From: "%Z%45" <sip:resource@example.com>;tag=f232jadfj23
Call-ID: esc02.asdfnqwo34rq23i34jrjasdcnl23nrlknsdf
Via: SIP/2.0/TCP host.example.com;branch=z9hG4bK209%fzsnel234
CSeq: 29344 RE%47IST%45R
Max-Forwards: 70
Contact: <sip:alias1@host1.example.com>
C%6Fntact: <sip:alias2@host2.example.com>
Contact: <sip:alias3@host3.example.com>
l: 0

"""),
        IGNORED,
        {
            "method": "INVITE",
            "call_id": "esc02.asdfnqwo34rq23i34jrjasdcnl23nrlknsdf",
            "from_tag": "f232jadfj23",
            "cseq": 29344,
            "via": ("z9hG4bK209%fzsnel234", "host.example.com"),
            "from_user": "resource",
            "to_user": "resource",
            "header:contact": ["<sip:alias1@host1.example.com>", "<sip:alias3@host3.example.com>"],
        },
    ),
    Case(
        "lwsdisp",
        "RFC 4475 3.1.1.6",
        crlf("""
OPTIONS sip:user@example.com SIP/2.0
To: sip:user@example.com
From: caller<sip:caller@example.com>;tag=323
Max-Forwards: 70
Call-ID: lwsdisp.1234abcd@funky.example.com
CSeq: 60 OPTIONS
Via: SIP/2.0/UDP funky.example.com;branch=z9hG4bKkdjuw
l: 0

"""),
        IGNORED,
        {
            "call_id": "lwsdisp.1234abcd@funky.example.com",
            "from_tag": "323",
            "cseq": 60,
            "from_user": "caller",
            "from_host": "example.com",
            "to_user": "user",
        },
    ),
    Case(
        "longreq",
        "RFC 4475 3.1.1.7",
        # The repetitions are written as the RFC writes them: a part and its count.
        (
            "INVITE sip:user@example.com SIP/2.0\r\n"
            f'To: "I have a user name of {"extreme" * 10} proportion"'
            f"<sip:user@example.com:6000;unknownparam1=very{'long' * 20}value;"
            f"longparam{'name' * 25}=shortvalue;very{'long' * 25}ParameterNameWithNoValue>\r\n"
            f"F: sip:{'amazinglylongcallername' * 5}@example.net;tag=12{'982' * 50}424;"
            f"unknownheaderparam{'name' * 20}=unknowheaderparam{'value' * 15};"
            f"unknownValueless{'paramname' * 10}\r\n"
            f"Call-ID: longreq.one{'really' * 20}longcallid\r\n"
            "CSeq: 3882340 INVITE\r\n"
            f"Unknown-{'Long' * 20}-Name: unknown-{'long' * 20}-value;"
            f" unknown-{'long' * 20}-parameter-name ="
            f" unknown-{'long' * 20}-parameter-value\r\n"
        ).encode("ascii")
        + crlf("""
Via: SIP/2.0/TCP sip33.example.com
v: SIP/2.0/TCP sip32.example.com
V: SIP/2.0/TCP sip31.example.com
Via: SIP/2.0/TCP sip30.example.com
ViA: SIP/2.0/TCP sip29.example.com
VIa: SIP/2.0/TCP sip28.example.com
VIA: SIP/2.0/TCP sip27.example.com
via: SIP/2.0/TCP sip26.example.com
viA: SIP/2.0/TCP sip25.example.com
vIa: SIP/2.0/TCP sip24.example.com
vIA: SIP/2.0/TCP sip23.example.com
V :  SIP/2.0/TCP sip22.example.com
v :  SIP/2.0/TCP sip21.example.com
V  : SIP/2.0/TCP sip20.example.com
v  : SIP/2.0/TCP sip19.example.com
Via : SIP/2.0/TCP sip18.example.com
Via  : SIP/2.0/TCP sip17.example.com
Via: SIP/2.0/TCP sip16.example.com
Via: SIP/2.0/TCP sip15.example.com
Via: SIP/2.0/TCP sip14.example.com
Via: SIP/2.0/TCP sip13.example.com
Via: SIP/2.0/TCP sip12.example.com
Via: SIP/2.0/TCP sip11.example.com
Via: SIP/2.0/TCP sip10.example.com
Via: SIP/2.0/TCP sip9.example.com
Via: SIP/2.0/TCP sip8.example.com
Via: SIP/2.0/TCP sip7.example.com
Via: SIP/2.0/TCP sip6.example.com
Via: SIP/2.0/TCP sip5.example.com
Via: SIP/2.0/TCP sip4.example.com
Via: SIP/2.0/TCP sip3.example.com
Via: SIP/2.0/TCP sip2.example.com
Via: SIP/2.0/TCP sip1.example.com
""")
        + (
            "Via: SIP/2.0/TCP host.example.com;received=192.0.2.5;"
            f"branch=very{'long' * 50}branchvalue\r\n"
            "Max-Forwards: 70\r\n"
            f"Contact: <sip:{'amazinglylongcallername' * 5}@host5.example.net>\r\n"
            "Content-Type: application/sdp\r\n"
            "l: 150\r\n"
            "\r\n"
        ).encode("ascii")
        + sdp("192.0.2.1"),
        {
            "method": "INVITE",
            "call_id": "longreq.one" + "really" * 20 + "longcallid",
            "from_tag": "12" + "982" * 50 + "424",
            "to_tag": "",
            "cseq": 3882340,
            "vias": (
                *(("", f"sip{number}.example.com") for number in range(33, 0, -1)),
                ("very" + "long" * 50 + "branchvalue", "host.example.com"),
            ),
            "from_user": "amazinglylongcallername" * 5,
            "from_host": "example.net",
            "to_user": "user",
            "to_host": "example.com",
            "to_port": 6000,
        },
    ),
    Case(
        "dblreq",
        "RFC 4475 3.1.1.8",
        # Over UDP the second request is trailing octets of the first one: nobody's message.
        crlf("""
REGISTER sip:example.com SIP/2.0
To: sip:j.user@example.com
From: sip:j.user@example.com;tag=43251j3j324
Max-Forwards: 8
I: dblreq.0ha0isndaksdj99sdfafnl3lk233412
Contact: sip:j.user@host.example.com
CSeq: 8 REGISTER
Via: SIP/2.0/UDP 192.0.2.125;branch=z9hG4bKkdjuw23492
Content-Length: 0

INVITE sip:joe@example.com SIP/2.0
t: sip:joe@example.com
From: sip:caller@example.net;tag=141334
Max-Forwards: 8
Call-ID: dblreq.0ha0isnda977644900765@192.0.2.15
CSeq: 8 INVITE
Via: SIP/2.0/UDP 192.0.2.15;branch=z9hG4bKkdjuw380234
Content-Type: application/sdp
Content-Length: 150

v=0
o=mhandley 29739 7272939 IN IP4 192.0.2.15
s=-
c=IN IP4 192.0.2.15
t=0 0
m=audio 49217 RTP/AVP 0 12
m =video 3227 RTP/AVP 31
a=rtpmap:31 LPC
"""),
        IGNORED,
        {
            "method": "INVITE",
            "request_uri": "sip:example.com",
            "call_id": "dblreq.0ha0isndaksdj99sdfafnl3lk233412",
            "from_tag": "43251j3j324",
            "cseq": 8,
            "vias": (("z9hG4bKkdjuw23492", "192.0.2.125"),),
            "from_user": "j.user",
            "to_user": "j.user",
        },
    ),
    Case(
        "semiuri",
        "RFC 4475 3.1.1.9",
        crlf("""
OPTIONS sip:user;par=u%40example.net@example.com SIP/2.0
To: sip:j_user@example.com
From: sip:caller@example.org;tag=33242
Max-Forwards: 3
Call-ID: semiuri.0ha0isndaksdj
CSeq: 8 OPTIONS
Accept: application/sdp, application/pkcs7-mime,
        multipart/mixed, multipart/signed,
        message/sip, message/sipfrag
Via: SIP/2.0/UDP 192.0.2.1;branch=z9hG4bKkdjuw
l: 0

"""),
        IGNORED,
        {
            "request_uri": "sip:user;par=u%40example.net@example.com",
            "request_user": "user;par=u%40example.net",
            "request_host": "example.com",
            "call_id": "semiuri.0ha0isndaksdj",
            "from_tag": "33242",
            "from_user": "caller",
            "to_user": "j_user",
        },
    ),
    Case(
        "transports",
        "RFC 4475 3.1.1.10",
        crlf("""
OPTIONS sip:user@example.com SIP/2.0
To: sip:user@example.com
From: <sip:caller@example.com>;tag=323
Max-Forwards: 70
Call-ID:  transports.kijh4akdnaqjkwendsasfdj
Accept: application/sdp
CSeq: 60 OPTIONS
Via: SIP/2.0/UDP t1.example.com;branch=z9hG4bKkdjuw
Via: SIP/2.0/SCTP t2.example.com;branch=z9hG4bKklasjdhf
Via: SIP/2.0/TLS t3.example.com;branch=z9hG4bK2980unddj
Via: SIP/2.0/UNKNOWN t4.example.com;branch=z9hG4bKasd0f3en
Via: SIP/2.0/TCP t5.example.com;branch=z9hG4bK0a9idfnee
l: 0

"""),
        IGNORED,
        {
            "call_id": "transports.kijh4akdnaqjkwendsasfdj",
            "vias": (
                ("z9hG4bKkdjuw", "t1.example.com"),
                ("z9hG4bKklasjdhf", "t2.example.com"),
                ("z9hG4bK2980unddj", "t3.example.com"),
                ("z9hG4bKasd0f3en", "t4.example.com"),
                ("z9hG4bK0a9idfnee", "t5.example.com"),
            ),
        },
    ),
    Case(
        "mpart01",
        "RFC 4475 3.1.1.11",
        (
            b"MESSAGE sip:kumiko@example.org SIP/2.0\r\n"
            b"Via: SIP/2.0/UDP 127.0.0.1:5070"
            b";branch=z9hG4bK-d87543-4dade06d0bdb11ee-1--d87543-;rport\r\n"
            b"Max-Forwards: 70\r\n"
            b"Route: <sip:127.0.0.1:5080>\r\n"
            b"Identity: r5mwreLuyDRYBi/0TiPwEsY3rEVsk/G2WxhgTV1PF7hHuLIK0YWVKZhKv9Mj8UeXqkMVbnVq"
            b"37CD+813gvYjcBUaZngQmXc9WNZSDNGCzA+fWl9MEUHWIZo1CeJebdY/XlgKeTa0Olvq0rt70Q5jiSfbqM"
            b"JmQFteeivUhkMWYUA=\r\n"
            b"Contact: <sip:fluffy@127.0.0.1:5070>\r\n"
            b"To: <sip:kumiko@example.org>\r\n"
            b"From: <sip:fluffy@example.com>;tag=2fb0dcc9\r\n"
            b"Call-ID: 3d9485ad0c49859b@Zmx1ZmZ5LW1hYy0xNi5sb2NhbA..\r\n"
            b"CSeq: 1 MESSAGE\r\n"
            b"Content-Transfer-Encoding: binary\r\n"
            b"Content-Type: multipart/mixed;boundary=7a9cbec02ceef655\r\n"
            b"Date: Sat, 15 Oct 2005 04:44:56 GMT\r\n"
            b"User-Agent: SIPimp.org/0.2.5 (curses)\r\n"
            b"Content-Length: 553\r\n"
            b"\r\n"
            b"--7a9cbec02ceef655\r\n"
            b"Content-Type: text/plain\r\n"
            b"Content-Transfer-Encoding: binary\r\n"
            b"\r\n"
            b"Hello\r\n"
            b"--7a9cbec02ceef655\r\n"
            b"Content-Type: application/octet-stream\r\n"
            b"Content-Transfer-Encoding: binary\r\n"
            b"\r\n"
        )
        + bytes.fromhex("""
            3082015206092A864886F70D010702A08201433082013F02
            01013109300706052B0E03021A300B06092A864886F70D010701318201203082
            011C020101307C3070310B300906035504061302555331133011060355040813
            0A43616C69666F726E69613111300F0603550407130853616E204A6F7365310E
            300C060355040A1305736970697431293027060355040B132053697069742054
            65737420436572746966696361746520417574686F7269747902080195007102
            330113300706052B0E03021A300D06092A864886F70D01010105000481808EF4
            66F948F0522DD2E5978E9D95AAE9F2FE15A06659716292E8DA2AA8D8350A68CE
            FFAE3CBD2BFF1675DDD5648E593DD64728F26220F7E941749E330D9A15EDABDB
            93D10C42102E7B7289D29CC0C9AE2EFBC7C0CFF9172F3B027E4FC027E1546DE4
            B6AA3ABB3E66CCCB5DD6C64B8383149CB8E6FF182D944FE57B65BC99D005""")
        + b"\r\n--7a9cbec02ceef655--\r\n",
        IGNORED,
        {
            "call_id": "3d9485ad0c49859b@Zmx1ZmZ5LW1hYy0xNi5sb2NhbA..",
            "from_tag": "2fb0dcc9",
            "cseq": 1,
            "via": ("z9hG4bK-d87543-4dade06d0bdb11ee-1--d87543-", "127.0.0.1:5070"),
            "from_user": "fluffy",
            "to_user": "kumiko",
            "header:content-type": ["multipart/mixed;boundary=7a9cbec02ceef655"],
        },
    ),
    Case(
        "unreason",
        "RFC 4475 3.1.1.12",
        b"SIP/2.0 200 = 2**3 * 5**2 "
        b"\xd0\xbd\xd0\xbe\x20\xd1\x81\xd1\x82\xd0\xbe\x20\xd0\xb4\xd0\xb5\xd0\xb2\xd1\x8f\xd0\xbd"
        b"\xd0\xbe\xd1\x81\xd1\x82\xd0\xbe\x20\xd0\xb4\xd0\xb5\xd0\xb2\xd1\x8f\xd1\x82\xd1\x8c\x20"
        b"\x2d\x20\xd0\xbf\xd1\x80\xd0\xbe\xd1\x81\xd1\x82\xd0\xbe\xd0\xb5\r\n"
        + crlf("""
Via: SIP/2.0/UDP 192.0.2.198;branch=z9hG4bK1324923
Call-ID: unreason.1234ksdfak3j2erwedfsASdf
CSeq: 35 INVITE
From: sip:user@example.com;tag=11141343
To: sip:user@example.edu;tag=2229
Content-Length: 154
Content-Type: application/sdp
Contact: <sip:user@host198.example.com>

""")
        + sdp("192.0.2.198"),
        {
            "method": "",
            "status": 200,
            "request_uri": "",
            "call_id": "unreason.1234ksdfak3j2erwedfsASdf",
            "from_tag": "11141343",
            "to_tag": "2229",
            "cseq": 35,
            "cseq_method": "INVITE",
            "via": ("z9hG4bK1324923", "192.0.2.198"),
            "from_host": "example.com",
            "to_host": "example.edu",
        },
    ),
    Case(
        "noreason",
        "RFC 4475 3.1.1.13",
        # The space after the status code belongs to the message.
        b"SIP/2.0 100 \r\n"
        + crlf("""
Via: SIP/2.0/UDP 192.0.2.105;branch=z9hG4bK2398ndaoe
Call-ID: noreason.asndj203insdf99223ndf
CSeq: 35 INVITE
From: <sip:user@example.com>;tag=39ansfi3
To: <sip:user@example.edu>;tag=902jndnke3
Content-Length: 0
Contact: <sip:user@host105.example.com>

"""),
        {
            "method": "",
            "status": 100,
            "call_id": "noreason.asndj203insdf99223ndf",
            "from_tag": "39ansfi3",
            "to_tag": "902jndnke3",
            "cseq": 35,
            "cseq_method": "INVITE",
            "via": ("z9hG4bK2398ndaoe", "192.0.2.105"),
        },
    ),
]

INVALID = [
    Case(
        "badinv01",
        "RFC 4475 3.1.2.1",
        crlf("""
INVITE sip:user@example.com SIP/2.0
To: sip:j.user@example.com
From: sip:caller@example.net;tag=134161461246
Max-Forwards: 7
Call-ID: badinv01.0ha0isndaksdjasdf3234nas
CSeq: 8 INVITE
Via: SIP/2.0/UDP 192.0.2.15;;,;,,
Contact: "Joe" <sip:joe@example.org>;;;;
Content-Length: 152
Content-Type: application/sdp

""")
        + sdp("192.0.2.15"),
        {
            "method": "INVITE",
            "call_id": "badinv01.0ha0isndaksdjasdf3234nas",
            "from_tag": "134161461246",
            "cseq": 8,
            "via": ("", "192.0.2.15"),
            "from_user": "caller",
            "to_user": "j.user",
        },
    ),
    Case(
        "clerr",
        "RFC 4475 3.1.2.2",
        crlf("""
INVITE sip:user@example.com SIP/2.0
Max-Forwards: 80
To: sip:j.user@example.com
From: sip:caller@example.net;tag=93942939o2
Contact: <sip:caller@hungry.example.net>
Call-ID: clerr.0ha0isndaksdjweiafasdk3
CSeq: 8 INVITE
Via: SIP/2.0/UDP host5.example.com;branch=z9hG4bK-39234-23523
Content-Type: application/sdp
Content-Length: 9999

""")
        + sdp("192.0.2.155"),
        {
            "method": "INVITE",
            "call_id": "clerr.0ha0isndaksdjweiafasdk3",
            "from_tag": "93942939o2",
            "cseq": 8,
            "via": ("z9hG4bK-39234-23523", "host5.example.com"),
        },
    ),
    Case(
        "ncl",
        "RFC 4475 3.1.2.3",
        crlf("""
INVITE sip:user@example.com SIP/2.0
Max-Forwards: 254
To: sip:j.user@example.com
From: sip:caller@example.net;tag=32394234
Call-ID: ncl.0ha0isndaksdj2193423r542w35
CSeq: 0 INVITE
Via: SIP/2.0/UDP 192.0.2.53;branch=z9hG4bKkdjuw
Contact: <sip:caller@example53.example.net>
Content-Type: application/sdp
Content-Length: -999

""")
        + sdp("192.0.2.53"),
        {
            "method": "INVITE",
            "call_id": "ncl.0ha0isndaksdj2193423r542w35",
            "from_tag": "32394234",
            "cseq": 0,
            "via": ("z9hG4bKkdjuw", "192.0.2.53"),
        },
    ),
    Case(
        "scalar02",
        "RFC 4475 3.1.2.4",
        crlf(f"""
REGISTER sip:example.com SIP/2.0
Via: SIP/2.0/TCP host129.example.com;branch=z9hG4bK342sdfoi3
To: <sip:user@example.com>
From: <sip:user@example.com>;tag=239232jh3
CSeq: 36893488147419103232 REGISTER
Call-ID: scalar02.23o0pd9vanlq3wnrlnewofjas9ui32
Max-Forwards: 300
Expires: 1{"0" * 100}
Contact: <sip:user@host129.example.com>
  ;expires=280297596632815
Content-Length: 0

"""),
        IGNORED,
        ERROR,
    ),
    Case(
        "scalarlg",
        "RFC 4475 3.1.2.5",
        crlf("""
SIP/2.0 503 Service Unavailable
Via: SIP/2.0/TCP host129.example.com;branch=z9hG4bKzzxdiwo34sw;received=192.0.2.129
To: <sip:user@example.com>
From: <sip:other@example.net>;tag=2easdjfejw
CSeq: 9292394834772304023312 OPTIONS
Call-ID: scalarlg.noase0of0234hn2qofoaf0232aewf2394r
Retry-After: 949302838503028349304023988
Warning: 1812 overture "In Progress"
Content-Length: 0

"""),
        IGNORED,
        ERROR,
    ),
    Case(
        "quotbal",
        "RFC 4475 3.1.2.6",
        crlf("""
INVITE sip:user@example.com SIP/2.0
To: "Mr. J. User <sip:j.user@example.com>
From: sip:caller@example.net;tag=93334
Max-Forwards: 10
Call-ID: quotbal.aksdj
Contact: <sip:caller@host59.example.net>
CSeq: 8 INVITE
Via: SIP/2.0/UDP 192.0.2.59:5050;branch=z9hG4bKkdjuw39234
Content-Type: application/sdp
Content-Length: 152

""")
        + sdp("192.0.2.15"),
        ERROR,
    ),
    Case(
        "ltgtruri",
        "RFC 4475 3.1.2.7",
        crlf("""
INVITE <sip:user@example.com> SIP/2.0
To: sip:user@example.com
From: sip:caller@example.net;tag=39291
Max-Forwards: 23
Call-ID: ltgtruri.1@192.0.2.5
CSeq: 1 INVITE
Via: SIP/2.0/UDP 192.0.2.5
Contact: <sip:caller@host5.example.net>
Content-Type: application/sdp
Content-Length: 159

""")
        + sdp("192.0.2.5", time="3149328700 0"),
        ERROR,
    ),
    Case(
        "lwsruri",
        "RFC 4475 3.1.2.8",
        crlf("""
INVITE sip:user@example.com; lr SIP/2.0
To: sip:user@example.com;tag=3xfe-9921883-z9f
From: sip:caller@example.net;tag=231413434
Max-Forwards: 5
Call-ID: lwsruri.asdfasdoeoi2323-asdfwrn23-asd834rk423
CSeq: 2130706432 INVITE
Via: SIP/2.0/UDP 192.0.2.1:5060;branch=z9hG4bKkdjuw2395
Contact: <sip:caller@host1.example.net>
Content-Type: application/sdp
Content-Length: 159

""")
        + sdp("192.0.2.1", time="3149328700 0"),
        ERROR,
    ),
    Case(
        "lwsstart",
        "RFC 4475 3.1.2.9",
        crlf("""
INVITE  sip:user@example.com  SIP/2.0
Max-Forwards: 8
To: sip:user@example.com
From: sip:caller@example.net;tag=8814
Call-ID: lwsstart.dfknq234oi243099adsdfnawe3@example.com
CSeq: 1893884 INVITE
Via: SIP/2.0/UDP host1.example.com;branch=z9hG4bKkdjuw3923
Contact: <sip:caller@host1.example.net>
Content-Type: application/sdp
Content-Length: 150

""")
        + sdp("192.0.2.1"),
        {
            "method": "INVITE",
            "request_uri": "sip:user@example.com",
            "call_id": "lwsstart.dfknq234oi243099adsdfnawe3@example.com",
            "from_tag": "8814",
            "cseq": 1893884,
            "via": ("z9hG4bKkdjuw3923", "host1.example.com"),
        },
    ),
    Case(
        "trws",
        "RFC 4475 3.1.2.10",
        # Two spaces at the end of the start line; the misspelt Via host is the RFC's.
        b"OPTIONS sip:remote-target@example.com SIP/2.0  \r\n"
        + crlf("""
Via: SIP/2.0/TCP host1.examle.com;branch=z9hG4bK299342093
To: <sip:remote-target@example.com>
From: <sip:local-resource@example.com>;tag=329429089
Call-ID: trws.oicu34958239neffasdhr2345r
Accept: application/sdp
CSeq: 238923 OPTIONS
Max-Forwards: 70
Content-Length: 0

"""),
        IGNORED,
        {
            "method": "INVITE",
            "request_uri": "sip:remote-target@example.com",
            "call_id": "trws.oicu34958239neffasdhr2345r",
            "from_tag": "329429089",
            "cseq": 238923,
            "via": ("z9hG4bK299342093", "host1.examle.com"),
        },
    ),
    Case(
        "escruri",
        "RFC 4475 3.1.2.11",
        crlf("""
INVITE sip:user@example.com?Route=%3Csip:example.com%3E SIP/2.0
To: sip:user@example.com
From: sip:caller@example.net;tag=341518
Max-Forwards: 7
Contact: <sip:caller@host39923.example.net>
Call-ID: escruri.23940-asdfhj-aje3br-234q098w-fawerh2q-h4n5
CSeq: 149209342 INVITE
Via: SIP/2.0/UDP host-of-the-hour.example.com;branch=z9hG4bKkdjuw
Content-Type: application/sdp
Content-Length: 150

""")
        + sdp("192.0.2.1"),
        {
            "method": "INVITE",
            "request_uri": "sip:user@example.com?Route=%3Csip:example.com%3E",
            "request_user": "user",
            "request_host": "example.com",
            "call_id": "escruri.23940-asdfhj-aje3br-234q098w-fawerh2q-h4n5",
            "from_tag": "341518",
            "cseq": 149209342,
            "via": ("z9hG4bKkdjuw", "host-of-the-hour.example.com"),
        },
    ),
    Case(
        "baddate",
        "RFC 4475 3.1.2.12",
        crlf("""
INVITE sip:user@example.com SIP/2.0
To: sip:user@example.com
From: sip:caller@example.net;tag=2234923
Max-Forwards: 70
Call-ID: baddate.239423mnsadf3j23lj42--sedfnm234
CSeq: 1392934 INVITE
Via: SIP/2.0/UDP host.example.com;branch=z9hG4bKkdjuw
Date: Fri, 01 Jan 2010 16:00:00 EST
Contact: <sip:caller@host5.example.net>
Content-Type: application/sdp
Content-Length: 150

""")
        + sdp("192.0.2.5"),
        {
            "method": "INVITE",
            "call_id": "baddate.239423mnsadf3j23lj42--sedfnm234",
            "from_tag": "2234923",
            "cseq": 1392934,
            "header:date": ["Fri, 01 Jan 2010 16:00:00 EST"],
        },
    ),
    Case(
        "regbadct",
        "RFC 4475 3.1.2.13",
        crlf("""
REGISTER sip:example.com SIP/2.0
To: sip:user@example.com
From: sip:user@example.com;tag=998332
Max-Forwards: 70
Call-ID: regbadct.k345asrl3fdbv@10.0.0.1
CSeq: 1 REGISTER
Via: SIP/2.0/UDP 135.180.130.133:5060;branch=z9hG4bKkdjuw
Contact: sip:user@example.com?Route=%3Csip:sip.example.com%3E
l: 0

"""),
        IGNORED,
        {
            "method": "INVITE",
            "call_id": "regbadct.k345asrl3fdbv@10.0.0.1",
            "from_tag": "998332",
            "cseq": 1,
            "via": ("z9hG4bKkdjuw", "135.180.130.133:5060"),
        },
    ),
    Case(
        "badaspec",
        "RFC 4475 3.1.2.14",
        crlf("""
OPTIONS sip:user@example.org SIP/2.0
Via: SIP/2.0/UDP host4.example.com:5060;branch=z9hG4bKkdju43234
Max-Forwards: 70
From: "Bell, Alexander" <sip:a.g.bell@example.com>;tag=433423
To: "Watson, Thomas" < sip:t.watson@example.org >
Call-ID: badaspec.sdf0234n2nds0a099u23h3hnnw009cdkne3
Accept: application/sdp
CSeq: 3923239 OPTIONS
l: 0

"""),
        IGNORED,
        {
            "call_id": "badaspec.sdf0234n2nds0a099u23h3hnnw009cdkne3",
            "from_tag": "433423",
            "cseq": 3923239,
            "via": ("z9hG4bKkdju43234", "host4.example.com:5060"),
            "from_user": "a.g.bell",
            "from_host": "example.com",
            "to_scheme": "sip",
            "to_user": "t.watson",
            "to_host": "example.org",
        },
    ),
    Case(
        "baddn",
        "RFC 4475 3.1.2.15",
        # From and To hold one value each: the comma of the bare display name separates nothing.
        crlf("""
OPTIONS sip:t.watson@example.org SIP/2.0
Via:     SIP/2.0/UDP c.example.com:5060;branch=z9hG4bKkdjuw
Max-Forwards:      70
From:    Bell, Alexander <sip:a.g.bell@example.com>;tag=43
To:      Watson, Thomas <sip:t.watson@example.org>
Call-ID: baddn.31415@c.example.com
Accept: application/sdp
CSeq:    3923239 OPTIONS
l: 0

"""),
        IGNORED,
        {
            "call_id": "baddn.31415@c.example.com",
            "from_tag": "43",
            "to_tag": "",
            "cseq": 3923239,
            "via": ("z9hG4bKkdjuw", "c.example.com:5060"),
            "from_user": "a.g.bell",
            "from_host": "example.com",
            "to_user": "t.watson",
            "to_host": "example.org",
        },
    ),
    Case(
        "badvers",
        "RFC 4475 3.1.2.16",
        crlf("""
OPTIONS sip:t.watson@example.org SIP/7.0
Via:     SIP/7.0/UDP c.example.com;branch=z9hG4bKkdjuw
Max-Forwards:     70
From:    A. Bell <sip:a.g.bell@example.com>;tag=qweoiqpe
To:      T. Watson <sip:t.watson@example.org>
Call-ID: badvers.31417@c.example.com
CSeq:    1 OPTIONS
l: 0

"""),
        IGNORED,
        ERROR,
    ),
    Case(
        "mismatch01",
        "RFC 4475 3.1.2.17",
        # As an INVITE it would match: its point is kept in DERIVED.
        crlf("""
OPTIONS sip:user@example.com SIP/2.0
To: sip:j.user@example.com
From: sip:caller@example.net;tag=34525
Max-Forwards: 6
Call-ID: mismatch01.dj0234sxdfl3
CSeq: 8 INVITE
Via: SIP/2.0/UDP host.example.com;branch=z9hG4bKkdjuw
l: 0

"""),
        IGNORED,
    ),
    Case(
        "mismatch02",
        "RFC 4475 3.1.2.18",
        # As an INVITE it would match: its point is kept in DERIVED.
        crlf("""
NEWMETHOD sip:user@example.com SIP/2.0
To: sip:j.user@example.com
From: sip:caller@example.net;tag=34525
Max-Forwards: 6
Call-ID: mismatch02.dj0234sxdfl3
CSeq: 8 INVITE
Contact: <sip:caller@host.example.net>
Via: SIP/2.0/UDP host.example.net;branch=z9hG4bKkdjuw
Content-Type: application/sdp
l: 138

v=0
o=mhandley 29739 7272939 IN IP4 192.0.2.1
c=IN IP4 192.0.2.1
m=audio 49217 RTP/AVP 0 12
m=video 3227 RTP/AVP 31
a=rtpmap:31 LPC
"""),
        IGNORED,
    ),
    Case(
        "bigcode",
        "RFC 4475 3.1.2.19",
        crlf("""
SIP/2.0 4294967301 better not break the receiver
Via: SIP/2.0/UDP 192.0.2.105;branch=z9hG4bK2398ndaoe
Call-ID: bigcode.asdof3uj203asdnf3429uasdhfas3ehjasdfas9i
CSeq: 353494 INVITE
From: <sip:user@example.com>;tag=39ansfi3
To: <sip:user@example.edu>;tag=902jndnke3
Content-Length: 0
Contact: <sip:user@host105.example.com>

"""),
        ERROR,
    ),
]

LAYERS = [
    Case(
        "badbranch",
        "RFC 4475 3.2.1",
        crlf("""
OPTIONS sip:user@example.com SIP/2.0
To: sip:user@example.com
From: sip:caller@example.org;tag=33242
Max-Forwards: 3
Via: SIP/2.0/UDP 192.0.2.1;branch=z9hG4bK
Accept: application/sdp
Call-ID: badbranch.sadonfo23i420jv0as0derf3j3n
CSeq: 8 OPTIONS
l: 0

"""),
        IGNORED,
        {
            "call_id": "badbranch.sadonfo23i420jv0as0derf3j3n",
            "from_tag": "33242",
            "vias": (("z9hG4bK", "192.0.2.1"),),
        },
    ),
    Case(
        "insuf",
        "RFC 4475 3.3.1",
        crlf("""
INVITE sip:user@example.com SIP/2.0
CSeq: 193942 INVITE
Via: SIP/2.0/UDP 192.0.2.95;branch=z9hG4bKkdj.insuf
Content-Type: application/sdp
l: 152

""")
        + sdp("192.0.2.95"),
        ERROR,
    ),
    Case(
        "unkscm",
        "RFC 4475 3.3.2",
        crlf("""
OPTIONS nobodyKnowsThisScheme:totallyopaquecontent SIP/2.0
To: sip:user@example.com
From: sip:caller@example.net;tag=384
Max-Forwards: 3
Call-ID: unkscm.nasdfasser0q239nwsdfasdkl34
CSeq: 3923423 OPTIONS
Via: SIP/2.0/TCP host9.example.com;branch=z9hG4bKkdjuw39234
Content-Length: 0

"""),
        IGNORED,
        {
            "request_uri": "nobodyKnowsThisScheme:totallyopaquecontent",
            "request_scheme": "nobodyknowsthisscheme",
            "call_id": "unkscm.nasdfasser0q239nwsdfasdkl34",
            "from_tag": "384",
            "cseq": 3923423,
        },
    ),
    Case(
        "novelsc",
        "RFC 4475 3.3.3",
        crlf("""
OPTIONS soap.beep://192.0.2.103:3002 SIP/2.0
To: sip:user@example.com
From: sip:caller@example.net;tag=384
Max-Forwards: 3
Call-ID: novelsc.asdfasser0q239nwsdfasdkl34
CSeq: 3923423 OPTIONS
Via: SIP/2.0/TCP host9.example.com;branch=z9hG4bKkdjuw39234
Content-Length: 0

"""),
        IGNORED,
        {
            "request_uri": "soap.beep://192.0.2.103:3002",
            "request_scheme": "soap.beep",
            "call_id": "novelsc.asdfasser0q239nwsdfasdkl34",
            "cseq": 3923423,
        },
    ),
    Case(
        "unksm2",
        "RFC 4475 3.3.4",
        crlf("""
REGISTER sip:example.com SIP/2.0
To: isbn:2983792873
From: <http://www.example.com>;tag=3234233
Call-ID: unksm2.daksdj@hyphenated-host.example.com
CSeq: 234902 REGISTER
Max-Forwards: 70
Via: SIP/2.0/UDP 192.0.2.21:5060;branch=z9hG4bKkdjuw
Contact: <name:John_Smith>
l: 0

"""),
        IGNORED,
        {
            "call_id": "unksm2.daksdj@hyphenated-host.example.com",
            "from_tag": "3234233",
            "to_tag": "",
            "cseq": 234902,
            "from_scheme": "http",
            "to_scheme": "isbn",
            "via": ("z9hG4bKkdjuw", "192.0.2.21:5060"),
        },
    ),
    Case(
        "bext01",
        "RFC 4475 3.3.5",
        crlf("""
OPTIONS sip:user@example.com SIP/2.0
To: sip:j_user@example.com
From: sip:caller@example.net;tag=242etr
Max-Forwards: 6
Call-ID: bext01.0ha0isndaksdj
Require: nothingSupportsThis, nothingSupportsThisEither
Proxy-Require: noProxiesSupportThis, norDoAnyProxiesSupportThis
CSeq: 8 OPTIONS
Via: SIP/2.0/TLS fold-and-staple.example.com;branch=z9hG4bKkdjuw
Content-Length: 0

"""),
        IGNORED,
        {
            "call_id": "bext01.0ha0isndaksdj",
            "from_tag": "242etr",
            "via": ("z9hG4bKkdjuw", "fold-and-staple.example.com"),
            "header:require": ["nothingSupportsThis, nothingSupportsThisEither"],
        },
    ),
    Case(
        "invut",
        "RFC 4475 3.3.6",
        crlf("""
INVITE sip:user@example.com SIP/2.0
Contact: <sip:caller@host5.example.net>
To: sip:j.user@example.com
From: sip:caller@example.net;tag=8392034
Max-Forwards: 70
Call-ID: invut.0ha0isndaksdjadsfij34n23d
CSeq: 235448 INVITE
Via: SIP/2.0/UDP somehost.example.com;branch=z9hG4bKkdjuw
Content-Type: application/unknownformat
Content-Length: 40

<audio>
 <pcmu port="443"/>
</audio>
"""),
        {
            "method": "INVITE",
            "call_id": "invut.0ha0isndaksdjadsfij34n23d",
            "from_tag": "8392034",
            "cseq": 235448,
        },
    ),
    Case(
        "regaut01",
        "RFC 4475 3.3.7",
        crlf("""
REGISTER sip:example.com SIP/2.0
To: sip:j.user@example.com
From: sip:j.user@example.com;tag=87321hj23128
Max-Forwards: 8
Call-ID: regaut01.0ha0isndaksdj
CSeq: 9338 REGISTER
Via: SIP/2.0/TCP 192.0.2.253;branch=z9hG4bKkdjuw
Authorization: NoOneKnowsThisScheme opaque-data=here
Content-Length:0

"""),
        IGNORED,
        {
            "call_id": "regaut01.0ha0isndaksdj",
            "from_tag": "87321hj23128",
            "cseq": 9338,
            "header:authorization": ["NoOneKnowsThisScheme opaque-data=here"],
            "header:content-length": ["0"],
        },
    ),
    Case(
        "multi01",
        "RFC 4475 3.3.8",
        crlf("""
INVITE sip:user@company.com SIP/2.0
Contact: <sip:caller@host25.example.net>
Via: SIP/2.0/UDP 192.0.2.25;branch=z9hG4bKkdjuw
Max-Forwards: 70
CSeq: 5 INVITE
Call-ID: multi01.98asdh@192.0.2.1
CSeq: 59 INVITE
Call-ID: multi01.98asdh@192.0.2.2
From: sip:caller@example.com;tag=3413415
To: sip:user@example.com
To: sip:other@example.net
From: sip:caller@example.net;tag=2923420123
Content-Type: application/sdp
l: 154
Contact: <sip:caller@host36.example.net>
Max-Forwards: 5

""")
        + sdp("192.0.2.25"),
        ERROR,
    ),
    Case(
        "mcl01",
        "RFC 4475 3.3.9",
        crlf("""
OPTIONS sip:user@example.com SIP/2.0
Via: SIP/2.0/UDP host5.example.net;branch=z9hG4bK293423
To: sip:user@example.com
From: sip:other@example.net;tag=3923942
Call-ID: mcl01.fhn2323orihawfdoa3o4r52o3irsdf
CSeq: 15932 OPTIONS
Content-Length: 13
Max-Forwards: 60
Content-Length: 5
Content-Type: text/plain

There's no way to know how many octets are supposed to be here.
"""),
        IGNORED,
        {
            "call_id": "mcl01.fhn2323orihawfdoa3o4r52o3irsdf",
            "from_tag": "3923942",
            "cseq": 15932,
            "via": ("z9hG4bK293423", "host5.example.net"),
            "header:content-length": ["13", "5"],
        },
    ),
    Case(
        "bcast",
        "RFC 4475 3.3.10",
        crlf("""
SIP/2.0 200 OK
Via: SIP/2.0/UDP 192.0.2.198;branch=z9hG4bK1324923
Via: SIP/2.0/UDP 255.255.255.255;branch=z9hG4bK1saber23
Call-ID: bcast.0384840201234ksdfak3j2erwedfsASdf
CSeq: 35 INVITE
From: sip:user@example.com;tag=11141343
To: sip:user@example.edu;tag=2229
Content-Length: 154
Content-Type: application/sdp
Contact: <sip:user@host28.example.com>

""")
        + sdp("192.0.2.198"),
        {
            "method": "",
            "status": 200,
            "call_id": "bcast.0384840201234ksdfak3j2erwedfsASdf",
            "from_tag": "11141343",
            "to_tag": "2229",
            "cseq": 35,
            "cseq_method": "INVITE",
            "vias": (("z9hG4bK1324923", "192.0.2.198"), ("z9hG4bK1saber23", "255.255.255.255")),
        },
    ),
    Case(
        "zeromf",
        "RFC 4475 3.3.11",
        crlf("""
OPTIONS sip:user@example.com SIP/2.0
To: sip:user@example.com
From: sip:caller@example.net;tag=3ghsd41
Call-ID: zeromf.jfasdlfnm2o2l43r5u0asdfas
CSeq: 39234321 OPTIONS
Via: SIP/2.0/UDP host1.example.com;branch=z9hG4bKkdjuw2349i
Max-Forwards: 0
Content-Length: 0

"""),
        IGNORED,
        {
            "call_id": "zeromf.jfasdlfnm2o2l43r5u0asdfas",
            "from_tag": "3ghsd41",
            "cseq": 39234321,
        },
    ),
    Case(
        "cparam01",
        "RFC 4475 3.3.12",
        crlf("""
REGISTER sip:example.com SIP/2.0
Via: SIP/2.0/UDP saturn.example.com:5060;branch=z9hG4bKkdjuw
Max-Forwards: 70
From: sip:watson@example.com;tag=DkfVgjkrtMwaerKKpe
To: sip:watson@example.com
Call-ID: cparam01.70710@saturn.example.com
CSeq: 2 REGISTER
Contact: sip:+19725552222@gw1.example.net;unknownparam
l: 0

"""),
        IGNORED,
        {
            "call_id": "cparam01.70710@saturn.example.com",
            "from_tag": "DkfVgjkrtMwaerKKpe",
            "cseq": 2,
            "header:m": ["sip:+19725552222@gw1.example.net;unknownparam"],
        },
    ),
    Case(
        "cparam02",
        "RFC 4475 3.3.13",
        crlf("""
REGISTER sip:example.com SIP/2.0
Via: SIP/2.0/UDP saturn.example.com:5060;branch=z9hG4bKkdjuw
Max-Forwards: 70
From: sip:watson@example.com;tag=838293
To: sip:watson@example.com
Call-ID: cparam02.70710@saturn.example.com
CSeq: 3 REGISTER
Contact: <sip:+19725552222@gw1.example.net;unknownparam>
l: 0

"""),
        IGNORED,
        {
            "call_id": "cparam02.70710@saturn.example.com",
            "from_tag": "838293",
            "cseq": 3,
            "header:contact": ["<sip:+19725552222@gw1.example.net;unknownparam>"],
        },
    ),
    Case(
        "regescrt",
        "RFC 4475 3.3.14",
        crlf("""
REGISTER sip:example.com SIP/2.0
To: sip:user@example.com
From: sip:user@example.com;tag=8
Max-Forwards: 70
Call-ID: regescrt.k345asrl3fdbv@192.0.2.1
CSeq: 14398234 REGISTER
Via: SIP/2.0/UDP host5.example.com;branch=z9hG4bKkdjuw
M: <sip:user@example.com?Route=%3Csip:sip.example.com%3E>
L:0

"""),
        IGNORED,
        {
            "call_id": "regescrt.k345asrl3fdbv@192.0.2.1",
            "from_tag": "8",
            "cseq": 14398234,
            "header:contact": ["<sip:user@example.com?Route=%3Csip:sip.example.com%3E>"],
        },
    ),
    Case(
        "sdp01",
        "RFC 4475 3.3.15",
        crlf("""
INVITE sip:user@example.com SIP/2.0
To: sip:j_user@example.com
Contact: <sip:caller@host15.example.net>
From: sip:caller@example.net;tag=234
Max-Forwards: 5
Call-ID: sdp01.ndaksdj9342dasdd
Accept: text/nobodyKnowsThis
CSeq: 8 INVITE
Via: SIP/2.0/UDP 192.0.2.15;branch=z9hG4bKkdjuw
Content-Length: 150
Content-Type: application/sdp

""")
        + sdp("192.0.2.5"),
        {
            "method": "INVITE",
            "call_id": "sdp01.ndaksdj9342dasdd",
            "from_tag": "234",
            "cseq": 8,
            "from_user": "caller",
            "to_user": "j_user",
        },
    ),
    Case(
        "inv2543",
        "RFC 4475 3.4.1",
        crlf("""
INVITE sip:UserB@example.com SIP/2.0
Via: SIP/2.0/UDP iftgw.example.com
From: <sip:+13035551111@ift.client.example.net;user=phone>
Record-Route: <sip:UserB@example.com;maddr=ss1.example.com>
To: sip:+16505552222@ss1.example.net;user=phone
Call-ID: inv2543.1717@ift.client.example.com
CSeq: 56 INVITE
Content-Type: application/sdp

v=0
o=mhandley 29739 7272939 IN IP4 192.0.2.5
s=-
c=IN IP4 192.0.2.5
t=0 0
m=audio 49217 RTP/AVP 0
"""),
        {
            "method": "INVITE",
            "request_user": "UserB",
            "call_id": "inv2543.1717@ift.client.example.com",
            "from_tag": "",
            "to_tag": "",
            "cseq": 56,
            "vias": (("", "iftgw.example.com"),),
            "from_user": "+13035551111",
            "from_host": "ift.client.example.net",
            "to_user": "+16505552222",
            "to_host": "ss1.example.net",
        },
    ),
]

# RFC 5118. The two messages of 4.10 lack their empty line in the RFC's archive; here they have it.
IPV6 = [
    Case(
        "ipv6-good",
        "RFC 5118 4.1",
        crlf("""
REGISTER sip:[2001:db8::10] SIP/2.0
To: sip:user@example.com
From: sip:user@example.com;tag=81x2
Via: SIP/2.0/UDP [2001:db8::9:1];branch=z9hG4bKas3-111
Call-ID: SSG9559905523997077@hlau_4100
Max-Forwards: 70
Contact: "Caller" <sip:caller@[2001:db8::1]>
CSeq: 98176 REGISTER
Content-Length: 0

"""),
        IGNORED,
        {
            "request_uri": "sip:[2001:db8::10]",
            "request_user": "",
            "request_host": "2001:db8::10",
            "request_port": None,
            "call_id": "SSG9559905523997077@hlau_4100",
            "from_tag": "81x2",
            "cseq": 98176,
            "vias": (("z9hG4bKas3-111", "[2001:db8::9:1]"),),
        },
    ),
    Case(
        "ipv6-bad",
        "RFC 5118 4.2",
        # Where the request goes is unclear, whose call it is is not.
        crlf("""
REGISTER sip:2001:db8::10 SIP/2.0
To: sip:user@example.com
From: sip:user@example.com;tag=81x2
Via: SIP/2.0/UDP [2001:db8::9:1];branch=z9hG4bKas3-111
Call-ID: SSG9559905523997077@hlau_4100
Max-Forwards: 70
Contact: "Caller" <sip:caller@[2001:db8::1]>
CSeq: 98176 REGISTER
Content-Length: 0

"""),
        IGNORED,
        {
            "request_uri": "sip:2001:db8::10",
            "call_id": "SSG9559905523997077@hlau_4100",
            "from_tag": "81x2",
            "cseq": 98176,
        },
    ),
    Case(
        "port-ambiguous",
        "RFC 5118 4.3",
        crlf("""
REGISTER sip:[2001:db8::10:5070] SIP/2.0
To: sip:user@example.com
From: sip:user@example.com;tag=81x2
Via: SIP/2.0/UDP [2001:db8::9:1];branch=z9hG4bKas3-111
Call-ID: SSG9559905523997077@hlau_4100
Contact: "Caller" <sip:caller@[2001:db8::1]>
Max-Forwards: 70
CSeq: 98176 REGISTER
Content-Length: 0

"""),
        IGNORED,
        {"request_host": "2001:db8::10:5070", "request_port": None, "cseq": 98176},
    ),
    Case(
        "port-unambiguous",
        "RFC 5118 4.4",
        crlf("""
REGISTER sip:[2001:db8::10]:5070 SIP/2.0
To: sip:user@example.com
From: sip:user@example.com;tag=81x2
Via: SIP/2.0/UDP [2001:db8::9:1];branch=z9hG4bKas3-111
Call-ID: SSG9559905523997077@hlau_4100
Contact: "Caller" <sip:caller@[2001:db8::1]>
Max-Forwards: 70
CSeq: 98176 REGISTER
Content-Length: 0

"""),
        IGNORED,
        {"request_host": "2001:db8::10", "request_port": 5070, "cseq": 98176},
    ),
    Case(
        "via-received-param-with-delim",
        "RFC 5118 4.5",
        crlf("""
BYE sip:[2001:db8::10] SIP/2.0
To: sip:user@example.com;tag=bd76ya
From: sip:user@example.com;tag=81x2
Via: SIP/2.0/UDP [2001:db8::9:1];received=[2001:db8::9:255];branch=z9hG4bKas3-111
Call-ID: SSG9559905523997077@hlau_4100
Max-Forwards: 70
CSeq: 321 BYE
Content-Length: 0

"""),
        {
            "method": "BYE",
            "cseq_method": "BYE",
            "call_id": "SSG9559905523997077@hlau_4100",
            "from_tag": "81x2",
            "to_tag": "bd76ya",
            "cseq": 321,
            "vias": (("z9hG4bKas3-111", "[2001:db8::9:1]"),),
        },
    ),
    Case(
        "via-received-param-no-delim",
        "RFC 5118 4.5",
        crlf("""
OPTIONS sip:[2001:db8::10] SIP/2.0
To: sip:user@example.com
From: sip:user@example.com;tag=81x2
Via: SIP/2.0/UDP [2001:db8::9:1];received=2001:db8::9:255;branch=z9hG4bKas3
Call-ID: SSG95523997077@hlau_4100
Max-Forwards: 70
Contact: "Caller" <sip:caller@[2001:db8::9:1]>
CSeq: 921 OPTIONS
Content-Length: 0

"""),
        IGNORED,
        {
            "call_id": "SSG95523997077@hlau_4100",
            "cseq": 921,
            "vias": (("z9hG4bKas3", "[2001:db8::9:1]"),),
        },
    ),
    Case(
        "ipv6-in-sdp",
        "RFC 5118 4.6",
        crlf("""
INVITE sip:user@[2001:db8::10] SIP/2.0
To: sip:user@[2001:db8::10]
From: sip:user@example.com;tag=81x2
Via: SIP/2.0/UDP [2001:db8::20];branch=z9hG4bKas3-111
Call-ID: SSG9559905523997077@hlau_4100
Contact: "Caller" <sip:caller@[2001:db8::20]>
CSeq: 8612 INVITE
Max-Forwards: 70
Content-Type: application/sdp
Content-Length: 268

v=0
o=assistant 971731711378798081 0 IN IP6 2001:db8::20
s=Live video feed for today's meeting
c=IN IP6 2001:db8::20
t=3338481189 3370017201
m=audio 6000 RTP/AVP 2
a=rtpmap:2 G726-32/8000
m=video 6024 RTP/AVP 107
a=rtpmap:107 H263-1998/90000
"""),
        {
            "method": "INVITE",
            "request_user": "user",
            "request_host": "2001:db8::10",
            "to_user": "user",
            "to_host": "2001:db8::10",
            "to_port": None,
            "from_tag": "81x2",
            "to_tag": "",
            "cseq": 8612,
            "via": ("z9hG4bKas3-111", "[2001:db8::20]"),
        },
    ),
    Case(
        "mult-ip-in-header",
        "RFC 5118 4.7",
        crlf("""
BYE sip:user@host.example.net SIP/2.0
Via: SIP/2.0/UDP [2001:db8::9:1]:6050;branch=z9hG4bKas3-111
Via: SIP/2.0/UDP 192.0.2.1;branch=z9hG4bKjhja8781hjuaij65144
Via: SIP/2.0/TCP [2001:db8::9:255];branch=z9hG4bK451jj;received=192.0.2.200
Call-ID: 997077@lau_4100
Max-Forwards: 70
CSeq: 89187 BYE
To: sip:user@example.net;tag=9817--94
From: sip:user@example.com;tag=81x2
Content-Length: 0

"""),
        {
            "method": "BYE",
            "call_id": "997077@lau_4100",
            "from_tag": "81x2",
            "to_tag": "9817--94",
            "cseq": 89187,
            "vias": (
                ("z9hG4bKas3-111", "[2001:db8::9:1]:6050"),
                ("z9hG4bKjhja8781hjuaij65144", "192.0.2.1"),
                ("z9hG4bK451jj", "[2001:db8::9:255]"),
            ),
        },
    ),
    Case(
        "mult-ip-in-sdp",
        "RFC 5118 4.8",
        crlf("""
INVITE sip:user@[2001:db8::10] SIP/2.0
To: sip:user@[2001:db8::10]
From: sip:user@example.com;tag=81x2
Via: SIP/2.0/UDP [2001:db8::9:1];branch=z9hG4bKas3-111
Call-ID: SSG9559905523997077@hlau_4100
Contact: "Caller" <sip:caller@[2001:db8::9:1]>
Max-Forwards: 70
CSeq: 8912 INVITE
Content-Type: application/sdp
Content-Length: 181

v=0
o=bob 280744730 28977631 IN IP4 host.example.com
s=
t=0 0
m=audio 22334 RTP/AVP 0
c=IN IP4 192.0.2.1
m=video 6024 RTP/AVP 107
c=IN IP6 2001:db8::1
a=rtpmap:107 H263-1998/90000
"""),
        {
            "method": "INVITE",
            "to_host": "2001:db8::10",
            "from_tag": "81x2",
            "cseq": 8912,
            "via": ("z9hG4bKas3-111", "[2001:db8::9:1]"),
        },
    ),
    Case(
        "ipv4-mapped-ipv6",
        "RFC 5118 4.9",
        crlf("""
INVITE sip:user@example.com SIP/2.0
To: sip:user@example.com
From: sip:user@east.example.com;tag=81x2
Via: SIP/2.0/UDP [::ffff:192.0.2.10]:19823;branch=z9hG4bKbh19
Via: SIP/2.0/UDP [::ffff:192.0.2.2];branch=z9hG4bKas3-111
Call-ID: SSG9559905523997077@hlau_4100
Contact: "T. desk phone" <sip:ted@[::ffff:192.0.2.2]>
CSeq: 612 INVITE
Max-Forwards: 70
Content-Type: application/sdp
Content-Length: 236

v=0
o=assistant 971731711378798081 0 IN IP6 ::ffff:192.0.2.2
s=Call me soon, please!
c=IN IP6 ::ffff:192.0.2.2
t=3338481189 3370017201
m=audio 6000 RTP/AVP 2
a=rtpmap:2 G726-32/8000
m=video 6024 RTP/AVP 107
a=rtpmap:107 H263-1998/90000
"""),
        {
            "method": "INVITE",
            "from_host": "east.example.com",
            "from_tag": "81x2",
            "cseq": 612,
            "vias": (
                ("z9hG4bKbh19", "[::ffff:192.0.2.10]:19823"),
                ("z9hG4bKas3-111", "[::ffff:192.0.2.2]"),
            ),
        },
    ),
    Case(
        "ipv6-bug-abnf-3-colons",
        "RFC 5118 4.10",
        crlf("""
OPTIONS sip:user@[2001:db8:::192.0.2.1] SIP/2.0
To: sip:user@[2001:db8:::192.0.2.1]
From: sip:user@example.com;tag=810x2
Via: SIP/2.0/UDP lab1.east.example.com;branch=z9hG4bKas3-111
Call-ID: G9559905523997077@hlau_4100
CSeq: 689 OPTIONS
Max-Forwards: 70
Content-Length: 0

"""),
        IGNORED,
        {
            "request_user": "user",
            "to_user": "user",
            "to_host": "2001:db8:::192.0.2.1",
            "from_tag": "810x2",
            "cseq": 689,
        },
    ),
    Case(
        "ipv6-correct-abnf-2-colons",
        "RFC 5118 4.10",
        crlf("""
OPTIONS sip:user@[2001:db8::192.0.2.1] SIP/2.0
To: sip:user@[2001:db8::192.0.2.1]
From: sip:user@example.com;tag=810x2
Via: SIP/2.0/UDP lab1.east.example.com;branch=z9hG4bKas3-111
Call-ID: G9559905523997077@hlau_4100
CSeq: 689 OPTIONS
Max-Forwards: 70
Content-Length: 0

"""),
        IGNORED,
        {
            "request_host": "2001:db8::192.0.2.1",
            "to_user": "user",
            "to_host": "2001:db8::192.0.2.1",
            "from_tag": "810x2",
            "cseq": 689,
        },
    ),
]

RFC_CASES = [*VALID, *INVALID, *LAYERS, *IPV6]
_RAW = {case.name: case.payload for case in RFC_CASES}
_INVUT = {"method": "INVITE", "call_id": "invut.0ha0isndaksdjadsfij34n23d", "cseq": 235448}
_SCALAR = {"call_id": "scalar02.23o0pd9vanlq3wnrlnewofjas9ui32", "from_tag": "239232jh3"}


def _derived() -> Iterator[Case]:
    """Ours: one oddity at a time, where an RFC message has several or can not be an INVITE."""
    escaped = edit(_RAW["invut"], (b"INVITE sip:", b"IN%56ITE sip:"), (b" INVITE", b" IN%56ITE"))
    yield Case("esc02-escaped-invite", "RFC 4475 3.1.1.5", escaped, IGNORED)
    yield Case(
        "dblreq-second",
        "RFC 4475 3.1.1.8",
        _RAW["dblreq"][_RAW["dblreq"].index(b"INVITE ") :],
        {
            "call_id": "dblreq.0ha0isnda977644900765@192.0.2.15",
            "from_tag": "141334",
            "to_user": "joe",
            "vias": (("z9hG4bKkdjuw380234", "192.0.2.15"),),
        },
    )
    yield Case(
        "noreason-no-space",
        "RFC 4475 3.1.1.13",
        edit(_RAW["noreason"], (b"100 \r", b"100\r")),
        {"status": 100, "call_id": "noreason.asndj203insdf99223ndf", "cseq": 35},
    )

    fits = edit(as_invite(_RAW["scalar02"]), (b"36893488147419103232", b"2147483647"))
    yield Case("scalar02-cseq-fits", "RFC 4475 3.1.2.4", fits, _SCALAR | {"cseq": 2147483647})
    # Over the limit of RFC 3261 8.1.1.5, but not over what a proxy may forward all the same.
    for name, number in (("over", 2147483648), ("most", 4294967295)):
        wide = edit(fits, (b"2147483647", b"%d" % number))
        yield Case(f"scalar02-cseq-{name}", "RFC 4475 3.1.2.4", wide, _SCALAR | {"cseq": number})
    past = edit(fits, (b"2147483647", b"4294967296"))
    yield Case("scalar02-cseq-past", "RFC 4475 3.1.2.4", past, ERROR)
    yield Case(
        "scalarlg-cseq-fits",
        "RFC 4475 3.1.2.5",
        edit(as_invite(_RAW["scalarlg"]), (b"9292394834772304023312", b"92923948")),
        {
            "status": 503,
            "call_id": "scalarlg.noase0of0234hn2qofoaf0232aewf2394r",
            "cseq": 92923948,
            "vias": (("z9hG4bKzzxdiwo34sw", "host129.example.com"),),
        },
    )
    for odd in (b"", b"-1", b"0x10", b"1.5", b"word", b"\xb2", b"1_0"):
        yield Case(
            f"cseq-{odd.decode('latin-1') or 'empty'}",
            "RFC 3261 20.16",
            edit(_RAW["invut"], (b"235448 ", odd + b" ")),
            ERROR,
        )

    unbalanced = edit(_RAW["invut"], (b"From: sip:caller@example.net;", b'From: "A <sip:a@b.c>;'))
    yield Case("quotbal-from", "RFC 4475 3.1.2.6", unbalanced, ERROR)
    yield Case(
        "badvers-reply", "RFC 4475 3.1.2.16", edit(_RAW["bcast"], (b"SIP/2", b"SIP/7")), ERROR
    )
    for name in ("mismatch01", "mismatch02"):
        method = _RAW[name].split(b" ", 1)[0]
        swapped = edit(_RAW[name], (method, b"INVITE"), (b" 8 INVITE", b" 8 " + method))
        yield Case(f"{name}-swapped", "RFC 4475 3.1.2.17", swapped, ERROR)
    bye = edit(_RAW["via-received-param-with-delim"], (b"321 BYE", b"321 INVITE"))
    yield Case("mismatch01-bye", "RFC 4475 3.1.2.17", bye, ERROR)
    for code in (b"20", b"2000", b"2O0", b"-20", b"2\xb20"):
        yield Case(
            f"bigcode-{code.decode('latin-1')}",
            "RFC 4475 3.1.2.19",
            edit(_RAW["bcast"], (b" 200 ", b" " + code + b" ")),
            ERROR,
        )

    whole = _RAW["invut"]
    for header in (b"Call-ID", b"From", b"To", b"CSeq"):
        line = next(line for line in whole.split(b"\r\n") if line.startswith(header + b":"))
        name = header.decode()
        without = edit(whole, (line + b"\r\n", b""))
        yield Case(f"insuf-{name}", "RFC 4475 3.3.1", without, ERROR)
        twice = edit(whole, (line, line + b"\r\n" + line))
        yield Case(f"multi01-{name}-same", "RFC 4475 3.3.8", twice, _INVUT)
        other = re.sub(rb"(\w+)$", rb"1\1", line) if header != b"CSeq" else b"CSeq: 5 INVITE"
        twice = edit(whole, (line, line + b"\r\n" + other))
        yield Case(f"multi01-{name}-other", "RFC 4475 3.3.8", twice, ERROR)

    quote = edit(whole, (b"z9hG4bKkdjuw", b'z9hG4bKkdjuw;x="a, b'))
    via = {"via": ("z9hG4bKkdjuw", "somehost.example.com")}
    yield Case("via-open-quote", "RFC 4475 3.1.2.6", quote, _INVUT | via)
    utf8 = edit(whole, (b"sip:user@example.com SIP", b"sip:voil\xc3\xa0@example.com SIP"))
    yield Case("uri-utf8", "RFC 4475 3.1.1.2", utf8, _INVUT | {"request_user": "voil\xc3\xa0"})
    for name, display in (("from-no-scheme", b'"Bob"'), ("from-no-scheme-bare", b"Bob")):
        bob = edit(whole, (b"sip:caller@example.net;", display + b" <bob@example.net>;"))
        yield Case(name, "RFC 3261 20.20", bob, _INVUT | {"from_tag": "8392034"})
    zeros = edit(whole, (b"235448", b"00000000235448"))
    yield Case("cseq-leading-zeros", "RFC 4475 3.1.1.1", zeros, _INVUT)

    lower = edit(whole, (b" SIP/2.0\r", b" sip/2.0\r"))
    yield Case("version-lower-case", "RFC 3261 7.1", lower, _INVUT)
    lower = edit(_RAW["bcast"], (b"SIP/2.0 ", b"sip/2.0 "))
    yield Case("version-lower-case-reply", "RFC 3261 7.1", lower, {"status": 200, "cseq": 35})
    without = edit(whole, (b"Max-Forwards: 70\r\n", b""))
    yield Case("no-max-forwards", "RFC 3261 8.1.1", without, _INVUT)
    for name, start in (
        ("no-version", b"INVITE sip:user@example.com"),
        ("no-uri", b"INVITE SIP/2.0"),
        ("method-only", b"INVITE"),
        ("http", b"INVITE sip:user@example.com HTTP/1.1"),
    ):
        changed = edit(whole, (b"INVITE sip:user@example.com SIP/2.0", start))
        yield Case(f"start-{name}", "RFC 3261 7.1", changed, ERROR)


DERIVED = list(_derived())

CASES = [*RFC_CASES, *DERIVED]


def rows() -> Iterator[tuple[str, bytes, Expected]]:
    """Every case as it stands and, where it has such an expectation, as an INVITE."""
    for case in CASES:
        yield case.name, case.payload, case.expected
        if case.invite is not None:
            yield f"{case.name}-as-invite", as_invite(case.payload), case.invite
