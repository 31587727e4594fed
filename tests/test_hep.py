"""HEP packets of the three versions, and the cutting of streams into frames."""

from __future__ import annotations

import gzip
import itertools
import random
import re
import struct
import zlib
from collections.abc import Iterable
from functools import cache
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import harness
import hepbuild
import rating_agent_hep as agent
from hep_replay import frames, read_capture
from hepbuild import TIME_US, chunk, hep1, hep2, hep3

MIN = agent.MIN_STAMP
ARRIVAL = TIME_US + 250_000
INVITE = hepbuild.sip_request(
    "INVITE", "sip:2001@sip.canyan.io", call_id="1@h", from_tag="a", cseq=1, branch="z9hG4bK1"
)
FOUR = (("192.0.2.1", 5060), ("192.0.2.2", 5062))
SIX = (("2001:db8::1", 5060), ("2001:db8::2", 5062))
LARGEST_DATAGRAM = 65_507  # octets that UDP over IPv4 can carry


def frame(*chunks: tuple[int, int, bytes], magic: bytes = b"HEP3") -> bytes:
    """A HEP3 frame of just these chunks."""
    body = b"".join(chunk(*each) for each in chunks)
    return magic + struct.pack("!H", len(body) + 6) + body


def u32(value: int) -> bytes:
    return struct.pack("!I", value)


def decode(data: bytes) -> agent.HepPacket:
    return agent.decode_hep(data, ARRIVAL)


def refused(data: bytes) -> agent.HepError:
    """The error with which the packet is refused."""
    with pytest.raises(agent.HepError) as caught:
        decode(data)
    return caught.value


@cache
def real_packets() -> tuple[bytes, ...]:
    """Packets as servers sent them: one of each length of each server and mirror."""
    chosen: dict[tuple[str, str, int], bytes] = {}
    folder = harness.captures_folder()
    for path in sorted(folder.rglob("*.hepl")):
        server, mirror = path.relative_to(folder).parts[:2]
        for _, packet in frames(read_capture(str(path))):
            # 200 octets apart is another message; less is another Call-ID of the same scenario.
            chosen.setdefault((server, mirror, len(packet) // 200), packet)
    assert len({server for server, _, _ in chosen}) == 3
    return tuple(chosen.values())


# HEP3


@pytest.mark.parametrize("magic", [b"HEP3", b"EEP3"])
@pytest.mark.parametrize(("src", "dst"), [FOUR, SIX])
def test_hep3_every_chunk(magic, src, dst):
    packet = decode(
        hep3(
            INVITE,
            src=src,
            dst=dst,
            capture_id=2001,
            capture_name="edge-1",
            correlation_id="corr@h",
            auth_key="s3cret",
            protocol=6,
            magic=magic,
        )
    )
    assert packet == agent.HepPacket(
        version=3,
        time=TIME_US,
        protocol=6,
        protocol_type=agent.SIP_PROTOCOL_TYPE,
        source=hepbuild._packed(src, dst)[1],
        destination=hepbuild._packed(src, dst)[2],
        source_port=src[1],
        destination_port=dst[1],
        capture_id=2001,
        capture_name="edge-1",
        correlation_id="corr@h",
        auth_key=b"s3cret",
        payload=INVITE,
    )
    assert (packet.source_ip, packet.destination_ip) == (src[0], dst[0])


def test_hep3_without_chunks_has_only_its_arrival():
    packet = decode(frame())
    assert packet == agent.HepPacket(version=3, time=ARRIVAL)
    assert (packet.source_ip, packet.destination_ip) == ("", "")


def test_auth_key_is_not_in_the_repr():
    assert "s3cret" not in repr(decode(hep3(b"", auth_key="s3cret")))


@given(st.randoms(use_true_random=False), st.sampled_from([FOUR, SIX]))
@settings(max_examples=100, deadline=None)
def test_hep3_chunks_in_any_order(chance, ends):
    options = {
        "src": ends[0],
        "dst": ends[1],
        "capture_id": 7,
        "capture_name": "n",
        "correlation_id": "c",
        "auth_key": "k",
        "extra_chunks": [(0, 0x29, b"xyz"), (9, 0x0F, b"not the payload")],
    }
    assert decode(hep3(INVITE, order=chance, **options)) == decode(hep3(INVITE, **options))


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param([(0, 0x0D, b"\0\x1e")], id="keep-alive"),
        pytest.param([(0, kind, b"\1\2\3\4\5\6\7") for kind in range(0x14, 0x2A)], id="up to 0x29"),
        pytest.param([(0, 0, b""), (0, 0xFFFF, b"x" * 300)], id="unknown types"),
        # A type number has its meaning only together with vendor 0.
        pytest.param([(1, kind, b"\xff" * 3) for kind in range(0x14)], id="vendor 1"),
        pytest.param([(0xFFFF, kind, b"") for kind in range(0x14)], id="vendor 65535"),
        pytest.param([(0x0100, 0x0F, b"BYE"), (0x0100, 0x0E, b"key")], id="vendor 256"),
    ],
)
@pytest.mark.parametrize("before", [False, True])
def test_hep3_unknown_chunks_are_skipped(extra, before):
    plain = hep3(INVITE, capture_id=1)
    skipped = b"".join(chunk(*each) for each in extra)
    body = skipped + plain[6:] if before else plain[6:] + skipped
    assert decode(b"HEP3" + struct.pack("!H", len(body) + 6) + body) == decode(plain)


@pytest.mark.parametrize(
    ("chunks", "time"),
    [
        ([], ARRIVAL),
        ([(0, 0x09, u32(0)), (0, 0x0A, u32(0))], ARRIVAL),
        ([(0, 0x09, u32(0)), (0, 0x0A, u32(5))], ARRIVAL),
        ([(0, 0x0A, u32(5))], ARRIVAL),
        # A stamp before 2001 is no time: some senders tell their uptime.
        ([(0, 0x09, u32(12))], ARRIVAL),
        ([(0, 0x09, u32(MIN - 1)), (0, 0x0A, u32(999_999))], ARRIVAL),
        ([(0, 0x09, u32(MIN - 1)), (0, 0x0A, u32(2**32 - 1))], ARRIVAL),
        ([(0, 0x09, u32(MIN))], MIN * 1_000_000),
        ([(0, 0x09, u32(MIN)), (0, 0x0A, u32(34))], MIN * 1_000_000 + 34),
        ([(0, 0x0A, u32(34)), (0, 0x09, u32(MIN))], MIN * 1_000_000 + 34),
        ([(0, 0x09, u32(MIN)), (0, 0x0A, u32(999_999))], MIN * 1_000_000 + 999_999),
        # Microseconds that are none never move a message out of its second.
        ([(0, 0x09, u32(MIN)), (0, 0x0A, u32(1_000_000))], MIN * 1_000_000 + 999_999),
        ([(0, 0x09, u32(MIN)), (0, 0x0A, u32(2**32 - 1))], MIN * 1_000_000 + 999_999),
        ([(0, 0x09, u32(2**32 - 1)), (0, 0x0A, u32(1))], (2**32 - 1) * 1_000_000 + 1),
    ],
)
def test_hep3_time(chunks, time):
    assert decode(frame(*chunks)).time == time


@pytest.mark.parametrize("seconds", [0, 1, 12, MIN - 1, MIN, MIN + 1])
@pytest.mark.parametrize("micros", [0, 5, 999_999])
@pytest.mark.parametrize("seed", [None, 1, 2])
def test_stamps_before_2001_are_no_time(seconds, micros, seed):
    """In the usual order of chunks, in any other, and in HEP2 of both byte orders."""
    stamp = seconds * 1_000_000 + micros
    time = stamp if seconds >= MIN else ARRIVAL
    order = random.Random(seed) if seed else None
    assert decode(hep3(INVITE, time_us=stamp, capture_id=1, order=order)).time == time
    # Without microseconds the octets of these seconds tell a time from both ends.
    for byteorder in ("little", "big") if micros or seconds < 256 else ():
        assert decode(hep2(INVITE, time_us=stamp, byteorder=byteorder)).time == time


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (b"edge-1", "edge-1"),
        (b"edge-1\0", "edge-1"),  # as a C string
        (b"edge-1\0\0\0", "edge-1"),
        (b"a\0b\0", "a\0b"),
        (b"\0", ""),
        (b"", ""),
        (b"\xe9\xff", "\xe9\xff"),  # octet for octet, so that different ids stay different
    ],
)
def test_hep3_strings(value, text):
    packet = decode(frame((0, 0x11, value), (0, 0x13, value)))
    assert (packet.correlation_id, packet.capture_name) == (text, text)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_hep3_capture_id_of_any_width(size):
    # sngrep and captagent write 16 of the 32 bits.
    assert decode(frame((0, 0x0C, (0x7D1).to_bytes(4, "big")[-size:]))).capture_id == (
        0xD1 if size == 1 else 0x7D1
    )
    assert decode(frame((0, 0x0C, b"\xff" * size))).capture_id == 256**size - 1


@pytest.mark.parametrize("kind", [0x02, 0x07, 0x08, 0x09, 0x0A, 0x0B, 0x0C])
@pytest.mark.parametrize("size", [0, 5, 8])
def test_hep3_number_of_odd_size(kind, size):
    error = refused(frame((0, kind, b"\1" * size)))
    assert error.kind == "value"
    assert f"0x{kind:x}" in str(error) and f" {size} octets" in str(error)


@pytest.mark.parametrize("kind", [0x03, 0x04, 0x05, 0x06])
@pytest.mark.parametrize("size", [1, 3, 5, 15, 17])
def test_hep3_address_of_odd_size(kind, size):
    error = refused(frame((0, kind, b"\1" * size)))
    assert error.kind == "value"
    assert f"{size} octets" in str(error)


def test_hep3_empty_address_is_none():
    assert decode(frame((0, 0x03, b""), (0, 0x06, b""))).source_ip == ""


@pytest.mark.parametrize("compress", ["zlib", "gzip"])
def test_hep3_compressed(compress):
    assert decode(hep3(INVITE, compress=compress)).payload == INVITE


@pytest.mark.parametrize("pack", [zlib.compress, gzip.compress])
def test_hep3_compressed_up_to_the_limit(pack):
    payload = b"x" * agent.MAX_INFLATED
    assert decode(frame((0, 0x10, pack(payload)))).payload == payload


@pytest.mark.parametrize("pack", [zlib.compress, gzip.compress])
@pytest.mark.parametrize("size", [agent.MAX_INFLATED + 1, 20_000_000])
def test_hep3_bomb(pack, size):
    error = refused(frame((0, 0x10, pack(b"\0" * size))))
    assert error.kind == "inflate"
    assert str(agent.MAX_INFLATED) in str(error)


@pytest.mark.parametrize("pack", [zlib.compress, gzip.compress])
def test_hep3_compressed_and_cut(pack):
    packed = pack(INVITE)
    for end in range(1, len(packed)):
        assert refused(frame((0, 0x10, packed[:end]))).kind == "inflate"


@pytest.mark.parametrize(
    "value",
    [INVITE, b"\x78\x9c\xff\xff\xff", gzip.compress(INVITE)[:-8] + b"\0" * 8],
    ids=["plain", "garbage", "wrong checksum"],
)
def test_hep3_not_compressed_data(value):
    assert refused(frame((0, 0x10, value))).kind == "inflate"


def test_hep3_plain_payload_goes_before_a_compressed_one():
    assert decode(frame((0, 0x10, b"broken"), (0, 0x0F, INVITE))).payload == INVITE


@pytest.mark.parametrize("chunks", [[], [(0, 0x0F, b"")], [(0, 0x10, b"")]])
def test_hep3_empty_payload(chunks):
    assert decode(frame((0, 0x0B, b"\1"), *chunks)).payload == b""


def test_hep3_largest_datagram():
    room = LARGEST_DATAGRAM - len(hep3(b""))
    data = hep3(b"z" * room)
    assert len(data) == LARGEST_DATAGRAM
    assert decode(data).payload == b"z" * room


@pytest.mark.parametrize("protocol_type", [0, 5, 100, 0x57, 0x64, 255])
def test_hep3_protocol_types_are_told(protocol_type):
    assert decode(hep3(b"x", protocol_type=protocol_type)).protocol_type == protocol_type


@pytest.mark.parametrize("off", [-20, -1, 1, 6, 1000])
def test_hep3_total_length_wrong(off):
    data = hep3(INVITE)
    total = len(data) + off
    error = refused(data[:4] + struct.pack("!H", total) + data[6:])
    assert error.kind == "length"
    assert f"says {total} octets, {len(data)} came" in str(error)


@pytest.mark.parametrize("data", [b"HEP3", b"EEP3\0", b"HEP3\0\0", b"HEP3\0\5", b"HEP3\0\7"])
def test_hep3_header_cut(data):
    assert refused(data).kind == "length"


@pytest.mark.parametrize("length", [0, 1, 5, 8, 1000, 0xFFFF])
def test_hep3_chunk_length_wrong(length):
    """Below its own header, or past the end of the packet."""
    first = chunk(0, 0x07, b"\1\1")
    body = first + struct.pack("!HHH", 0, 0x0F, length) + b"Z"
    error = refused(b"HEP3" + struct.pack("!H", len(body) + 6) + body)
    assert error.kind == "chunk"
    assert f"chunk 0xf at offset {6 + len(first)} has length {length}" in str(error)


@pytest.mark.parametrize("left", [1, 2, 3, 4, 5])
def test_hep3_chunk_header_cut(left):
    first = chunk(0, 0x07, b"\1\1")
    body = first + b"\0\0\0\x0f\0\6"[:left]
    error = refused(b"HEP3" + struct.pack("!H", len(body) + 6) + body)
    assert error.kind == "chunk"
    assert f"offset {6 + len(first)}" in str(error)


@pytest.mark.parametrize(
    "data",
    [b"", b"\0", b"\3", b"H", b"HEP", b"HEP1\0\6", b"HEP2\0\6", b"hep3\0\6", b"INVITE sip:a@b"],
)
def test_no_hep(data):
    error = refused(data)
    assert error.kind == "magic"
    assert (data[:4].hex() or "nothing") in str(error)


# HEP1 and HEP2


@pytest.mark.parametrize(("src", "dst"), [FOUR, SIX])
@pytest.mark.parametrize("header_length", [None, 0, 16, 28, 255])
def test_hep1(src, dst, header_length):
    packet = decode(hep1(INVITE, src=src, dst=dst, header_length=header_length))
    assert packet == agent.HepPacket(
        version=1,
        time=ARRIVAL,
        protocol=17,
        protocol_type=agent.SIP_PROTOCOL_TYPE,
        source=hepbuild._packed(src, dst)[1],
        destination=hepbuild._packed(src, dst)[2],
        source_port=5060,
        destination_port=5062,
        payload=INVITE,
    )


BYE = INVITE.replace(b"INVITE", b"BYE")
TRYING = b"SIP/2.0 100 Trying\r\n\r\n"


@pytest.mark.parametrize(("src", "dst"), [FOUR, SIX])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("byteorder", ["little", "big"])
# 0, without the time header, with it, with 10 octets of it, more than the packet.
@pytest.mark.parametrize("header_length", [None, 0, 16, 28, 26, 40, 52, 255])
@pytest.mark.parametrize("payload", [INVITE, BYE, TRYING], ids=["invite", "bye", "reply"])
def test_hep2(src, dst, padded, byteorder, header_length, payload):
    packet = decode(
        hep2(
            payload,
            src=src,
            dst=dst,
            capture_id=2001,
            padded=padded,
            byteorder=byteorder,
            header_length=header_length,
        )
    )
    assert packet == agent.HepPacket(
        version=2,
        time=TIME_US,
        protocol=17,
        protocol_type=agent.SIP_PROTOCOL_TYPE,
        source=hepbuild._packed(src, dst)[1],
        destination=hepbuild._packed(src, dst)[2],
        source_port=5060,
        destination_port=5062,
        capture_id=2001,
        payload=payload,
    )


@pytest.mark.parametrize("payload", [b"", b"\0\0\0\0", b"xlog: not SIP"])
def test_hep2_of_no_sip_is_padded(payload):
    """Where no start line tells, the 12 octets of Kamailio and OpenSIPS."""
    assert decode(hep2(payload)).payload == payload


def test_hep2_padding_that_reads_like_a_method():
    # Two octets further on, INVITE reads as VITE, a token like any other.
    assert decode(hep2(INVITE, padded=False)).payload == INVITE
    # Padding that is not zero, as a C struct on the stack leaves it.
    stamped = hep2(b"", padded=False) + b"AC" + INVITE
    assert decode(stamped).payload == INVITE


@pytest.mark.parametrize("byteorder", ["little", "big"])
@pytest.mark.parametrize("age", [0, 1_000_000, -1_000_000, 25 * 365 * 86_400 * 1_000_000])
def test_hep2_byte_order_follows_the_plausible_time(byteorder, age):
    stamp = TIME_US - age
    assert decode(hep2(INVITE, time_us=stamp, byteorder=byteorder, capture_id=1)).time == stamp


@pytest.mark.parametrize("byteorder", ["little", "big"])
def test_hep2_byte_order_where_the_microseconds_fit_both(byteorder):
    # 0 microseconds read alike from both ends, so the nearer time has to decide.
    stamp = TIME_US // 1_000_000 * 1_000_000
    packet = decode(hep2(INVITE, time_us=stamp, byteorder=byteorder, capture_id=258))
    assert (packet.time, packet.capture_id) == (stamp, 258)


@pytest.mark.parametrize(
    "stamp",
    [
        struct.pack("<IIH", 0, 0, 9),
        struct.pack("<IIH", 0, 77, 9),
        # Neither order gives microseconds below a million.
        struct.pack("<IIH", 1_790_000_000, 0xFFFFFFFF, 9),
    ],
)
def test_hep2_without_a_usable_time(stamp):
    header = hep2(b"", padded=False)[:-10]
    packet = decode(header + stamp + b"\0\0" + INVITE)
    assert (packet.time, packet.capture_id, packet.payload) == (ARRIVAL, 9, INVITE)


@pytest.mark.parametrize("build", [hep1, hep2])
@pytest.mark.parametrize("family", [0, 1, 3, 9, 11, 255])
def test_old_hep_family(build, family):
    data = bytearray(build(INVITE))
    data[2] = family
    error = refused(bytes(data))
    assert error.kind == "family"
    assert f"family {family}," in str(error)


@pytest.mark.parametrize("build", [hep1, hep2])
@pytest.mark.parametrize(("src", "dst"), [FOUR, SIX])
def test_old_hep_short(build, src, dst):
    whole = build(b"", src=src, dst=dst)
    least = len(whole) - (2 if build is hep2 else 0)  # the padding may be missing
    for size in range(1, least):
        error = refused(whole[:size])
        assert error.kind == "short"
        assert str(size) in str(error)
    assert decode(whole[:least]).payload == b""


# Streams

STREAM = [
    hep3(INVITE, capture_id=1),
    frame(),
    hep3(BYE, magic=b"EEP3"),
    hep3(b"x" * 500, extra_chunks=[(1, 1, b"HEP3\0\6")]),
]


def feed_all(splitter: agent.HepSplitter, pieces: Iterable[bytes]) -> list[bytes]:
    out = []
    for piece in pieces:
        out += splitter.feed(piece)
        assert 1 <= splitter.room <= agent.MAX_HEP_FRAME
    return out


def drain(splitter: agent.HepSplitter, data: bytes) -> tuple[list[bytes], agent.HepError | None]:
    """The frames of one feed, and the error that ended them."""
    out = []
    try:
        for each in splitter.feed(data):
            out.append(each)
    except agent.HepError as error:
        return out, error
    return out, None


def test_splitter_cut_at_every_octet():
    stream = b"".join(STREAM)
    for cut in range(len(stream) + 1):
        assert feed_all(agent.HepSplitter(), [stream[:cut], stream[cut:]]) == STREAM


def test_splitter_octet_by_octet():
    stream = b"".join(STREAM)
    splitter = agent.HepSplitter()
    assert feed_all(splitter, (stream[i : i + 1] for i in range(len(stream)))) == STREAM
    assert splitter.room == agent.MAX_HEP_FRAME


def test_splitter_all_in_one():
    assert feed_all(agent.HepSplitter(), [b"".join(STREAM) * 20]) == STREAM * 20


def test_splitter_gives_a_frame_as_soon_as_it_is_whole():
    splitter = agent.HepSplitter()
    assert list(splitter.feed(STREAM[0][:-1])) == []
    assert list(splitter.feed(STREAM[0][-1:] + STREAM[2][:9])) == [STREAM[0]]
    assert splitter.room == agent.MAX_HEP_FRAME - 9
    assert list(splitter.feed(b"")) == []
    assert list(splitter.feed(STREAM[2][9:])) == [STREAM[2]]


@given(st.lists(st.integers(0, 700), max_size=60), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_splitter_any_chunk_sizes(sizes, copies):
    stream = b"".join(STREAM) * copies
    ends = [0, *(min(end, len(stream)) for end in itertools.accumulate(sizes)), len(stream)]
    pieces = [stream[start:end] for start, end in itertools.pairwise(ends)]
    assert feed_all(agent.HepSplitter(), pieces) == STREAM * copies


@pytest.mark.parametrize("behind", [0, 1, 5, 65_534])
def test_splitter_reads_of_its_room_hold_one_maximal_frame(behind):
    """Whatever lies before it, reads of at most `room` octets get a maximal frame through."""
    largest = frame((0, 0x0F, b"\xff" * (agent.MAX_HEP_FRAME - 12)))
    assert len(largest) == agent.MAX_HEP_FRAME
    stream = largest * 3
    splitter, out, position = agent.HepSplitter(), [], 0
    reads = [behind] if behind else []
    while position < len(stream):
        size = reads.pop() if reads else splitter.room
        assert size <= splitter.room
        piece = stream[position : position + size]
        position += len(piece)
        out += splitter.feed(piece)
        # What is kept and what the next read may bring are one maximal frame together.
        assert position - sum(map(len, out)) + splitter.room == agent.MAX_HEP_FRAME
    assert out == [largest] * 3


@pytest.mark.parametrize("good", range(4))
@pytest.mark.parametrize(
    "bad",
    [
        b"\x01\x10\x02\x11",
        b"GET / HTTP/1.1\r\n",
        b"HEP2\0\x20",
        b"EEPX",
        b"\0",
        b"\x16\x03\x01\x02\0",  # a TLS client on the plain port
    ],
)
def test_splitter_frames_before_lost_framing(good, bad):
    out, error = drain(agent.HepSplitter(), b"".join(STREAM[:good]) + bad + STREAM[0])
    assert out == STREAM[:good]
    assert error is not None and error.kind == "framing"
    assert bad[:4].hex() in str(error)


@pytest.mark.parametrize("magic", [b"HEP3", b"EEP3"])
@pytest.mark.parametrize("right", range(4))
def test_splitter_tells_garbage_at_its_first_octet(magic, right):
    splitter = agent.HepSplitter()
    for position in range(right):
        assert drain(splitter, magic[position : position + 1]) == ([], None)
    out, error = drain(splitter, b"\n")
    assert out == []
    assert error is not None and error.kind == "framing"
    assert (magic[:right] + b"\n").hex() in str(error)


@pytest.mark.parametrize("total", range(6))
def test_splitter_total_length_below_the_header(total):
    out, error = drain(agent.HepSplitter(), STREAM[0] + b"HEP3\0" + bytes([total]))
    assert out == STREAM[:1]
    assert error is not None and error.kind == "framing"
    assert f" {total} octets" in str(error)


@pytest.mark.parametrize("data", [hep1(INVITE), hep2(INVITE)])
def test_splitter_refuses_old_hep(data):
    out, error = drain(agent.HepSplitter(), data)
    assert out == []
    assert error is not None and error.kind == "framing"


# Anything at all


NEVER = re.compile(b"(?!)")


def outcome(data: bytes) -> object:
    try:
        return decode(data)
    except agent.HepError as error:
        return error.kind, str(error)


def check(data: bytes) -> None:
    """A HepPacket whose every field can be used, or HepError with a kind, and nothing else.

    The same by the short way, for packets with the usual chunks, and by the long one.
    """
    short = outcome(data)
    with patch.object(agent, "_USUAL_HEAD", NEVER):
        assert outcome(data) == short
    try:
        packet = decode(data)
    except agent.HepError as error:
        assert error.kind in {"magic", "length", "chunk", "value", "inflate", "short", "family"}
        assert "\n" not in str(error)
        return
    assert type(packet) is agent.HepPacket
    assert packet.version in (1, 2, 3)
    assert 0 < packet.time < 2**32 * 1_000_000
    assert len(packet.payload) <= max(len(data), agent.MAX_INFLATED)
    for address in (packet.source_ip, packet.destination_ip):
        assert address == "" or "." in address or ":" in address


def test_real_packets_decode():
    for packet in real_packets():
        assert decode(packet).time > 1_600_000_000_000_000


def test_every_truncation_of_a_real_packet():
    for packet in random.Random(1).sample(real_packets(), 12):
        for end in range(len(packet)):
            check(packet[:end])


def test_every_octet_of_a_real_packet_changed():
    for packet in random.Random(2).sample(real_packets(), 6):
        for position in range(len(packet)):
            for flip in (0x01, 0x80, 0xFF):
                changed = bytearray(packet)
                changed[position] ^= flip
                check(bytes(changed))


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_real_packets_changed(data):
    packet = bytearray(data.draw(st.sampled_from(real_packets())))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(packet) - 1))
        packet[position] = data.draw(st.integers(0, 255))
    check(bytes(packet))
    check(bytes(packet[: data.draw(st.integers(0, len(packet)))]))


@given(
    st.sampled_from([b"", b"HEP3", b"EEP3", b"\1", b"\2", b"\1\x10\2\x11", b"\2\x1c\x0a\x11"]),
    st.binary(max_size=200),
    st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_random_octets(start, rest, sized):
    if sized and len(start) == 4:
        # With a right total length the chunks get their turn.
        start += struct.pack("!H", len(rest) + 6)
    check(start + rest)


USUAL = [(1, 1), (2, 1), (3, 4), (4, 4), (7, 2), (8, 2), (9, 4), (10, 4), (11, 1), (12, 4)]
OPENSIPS = [*USUAL[:2], *USUAL[4:], *USUAL[2:4]]


@given(st.sampled_from([USUAL, OPENSIPS]), st.data())
@settings(max_examples=300, deadline=None)
def test_usual_chunks_with_something_odd_among_them(usual, data):
    size = st.sampled_from([0, 1, 2, 4, 5, 16])
    odd = st.tuples(st.sampled_from([0, 0, 1]), st.integers(0, 0x14), size)
    chunks = [(0, kind, size) for kind, size in usual]
    for place, extra in data.draw(st.lists(st.tuples(st.integers(0, 13), odd), max_size=3)):
        chunks[place:place] = [extra]
    if data.draw(st.booleans()):
        del chunks[data.draw(st.integers(0, len(chunks) - 1))]
    value = data.draw(st.sampled_from([b"\0", b"\1", b"\x0f", b"\n", b"\xff"]))
    check(frame(*((vendor, kind, value * size) for vendor, kind, size in chunks)))


@given(
    st.lists(
        st.tuples(
            st.sampled_from([0, 0, 0, 1]),
            st.integers(0, 0x14),
            st.one_of(st.binary(max_size=40), st.integers(0, 2**32 - 1).map(u32)),
        ),
        max_size=12,
    )
)
@settings(max_examples=300, deadline=None)
def test_random_chunks(chunks):
    check(frame(*chunks))


@given(st.lists(st.binary(max_size=20), max_size=10), st.booleans())
@settings(max_examples=200, deadline=None)
def test_random_streams(pieces, begins_well):
    """Frames that begin with a magic number and have their total length, or HepError."""
    splitter = agent.HepSplitter()
    for piece in [b"HEP3" if begins_well else b"", *pieces]:
        out, error = drain(splitter, piece)
        for each in out:
            assert each[:4] in (b"HEP3", b"EEP3")
            assert int.from_bytes(each[4:6], "big") == len(each)
        assert 1 <= splitter.room <= agent.MAX_HEP_FRAME
        if error is not None:
            assert error.kind == "framing"
            return
