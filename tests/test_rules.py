"""Each rule of `reference/sip-call-rules.md`, each kind of wrong charge found so far, as scenes.

A scene says which rules it is about, what the mirror shows (`scenes`), and what is right: the
seconds from which to which each call is charged, and on which accounts where that matters. It is
played as a mirror of received messages in both directions, once more with the copies that leave the
proxy, with every packet twice, shuffled, with a restart after every message, and, where `requests`
says what is right then, with requests only.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pure
import pytest
import scenes
from pure import Arrival
from scenes import Line

import hepbuild
import rating_agent_hep as agent

# `CASES=10` shuffles each scene ten times as often.
TIMES = int(os.environ.get("CASES", "1"))
# Seconds between a message and its forwarded copy.
TOLERANCE = 0.05
# Seconds by which a message may be late in a shuffled scene: less than the reorder window.
LATE = 1.9


class Scene(NamedTuple):
    """`rules` are numbers of the reference and K1 to K17 of `cases.jsonl`.

    `right` lists "BEGIN-END" in seconds, "BEGIN-" for a call that goes on, with " ACCOUNT>CALLEE"
    behind it where the accounts are other than 2000>2001. `modes` leaves out what can't be right.
    """

    rules: str
    name: str
    text: str
    right: str
    requests: str | None
    routes: str
    modes: frozenset[str]
    options: dict[str, Any]


SCENES: list[Scene] = []
MODES = frozenset("both wire far double compact segments old no-time shuffle restart".split())
ANSWERED = "0 INVITE\n1 200\n1.05 ACK\n"


def scene(
    rules: str,
    name: str,
    text: str,
    right: str,
    requests: str | None = None,
    *,
    routes: str = "",
    without: str = "",
    **options: Any,
) -> None:
    modes = MODES - set(without.split())
    SCENES.append(Scene(rules, name, text, right, requests, routes, modes, options))


# fmt: off
# 1: an INVITE with a To tag never creates or resets a call; a higher CSeq is a retry.

scene("1", "re-INVITEs of both sides, with the CSeq of the INVITE", ANSWERED + """
    2     reINVITE c=2
    2.1   200 c=2
    2.15  ACK c=2
    3     reINVITE c=1 callee
    3.1   200 c=1 callee
    3.15  ACK c=1 callee
    5     BYE c=3
    5.02  200:BYE c=3
""", "1-5", "1.05-5")
scene("1", "re-INVITE alone", """
    0     reINVITE c=2
    0.1   200 c=2
    0.2   ACK c=2
    3     BYE c=3
    3.1   200:BYE c=3
""", "", "")
scene("1", "re-INVITE refused and cancelled", ANSWERED + """
    2     reINVITE c=2
    2.1   488 c=2
    2.15  NACK c=2 uri=sip:2001@127.0.0.30:5060
    3     reINVITE c=3
    3.5   CANCEL c=3
    3.6   487 c=3
    3.65  NACK c=3 uri=sip:2001@127.0.0.30:5060
    5     BYE c=4
    5.02  200:BYE c=4
""", "1-5")
scene("1", "INVITE sent again, before and after the answer", """
    0     INVITE
    0.5   INVITE
    1.5   INVITE
    2     200
    2.1   INVITE
    2.5   200
    2.55  ACK
    6     BYE
    6.02  200:BYE
""", "2-6", "2.55-6")
scene("1 3", "401, 407, 302 and then answered", """
    0     INVITE
    0.1   401
    0.15  NACK
    1     INVITE c=2
    1.1   407 c=2
    1.15  NACK c=2
    2     INVITE c=3
    2.1   302 c=3
    2.15  NACK c=3
    3     INVITE c=4
    4     200 c=4
    4.05  ACK c=4
    9     BYE c=5
    9.02  200:BYE c=5
""", "4-9", "4.05-9")

# 2: a call is a Call-ID and a From tag (K8); transaction tags differ (K9).

scene("2 K8", "another From tag after a 401, hung up by the callee", """
    0     INVITE
    0.1   401
    1     INVITE tag=d c=2
    2     200 tag=d c=2
    2.05  ACK tag=d c=2
    6     BYE tag=d callee
    6.02  200:BYE tag=d callee
""", "2-6", "2.05-6")
scene("2 K8", "another From tag after a 407 with its ACK, same CSeq", """
    0     INVITE
    0.1   407
    0.15  NACK
    1     INVITE tag=d br=d
    2     200 tag=d br=d
    2.05  ACK tag=d br=da
    6     BYE tag=d
    6.02  200:BYE tag=d
""", "2-6", "2.05-6")
scene("2 K8 K9", "two phones, one Call-ID, at one time", """
    0     INVITE
    0.5   INVITE tag=d br=d from=sip:3000@sip.canyan.io dest=sip:3001@sip.canyan.io
    1     200
    1.05  ACK
    1.5   200 tag=d br=d to=t from=sip:3000@sip.canyan.io dest=sip:3001@sip.canyan.io
    1.55  ACK tag=d br=da to=t
    4     BYE
    4.02  200:BYE
    9     BYE tag=d callee to=t
    9.02  200:BYE tag=d callee to=t
""", "1-4, 1.5-9 3000>3001", "1.05-4, 1.55-9 3000>3001")
scene("2 K8", "two phones, one Call-ID: the other one is refused", """
    0     INVITE
    0.5   INVITE tag=d br=d
    1     200
    1.05  ACK
    1.5   486 tag=d br=d to=t
    1.55  NACK tag=d br=d to=t
    4     BYE
    4.02  200:BYE
""", "1-4", "1.05-4")
scene("2 K9", "the Call-ID used again twice, other tags", """
    0     INVITE
    1     200
    1.05  ACK
    2     BYE
    2.02  200:BYE
    10    INVITE tag=d br=d
    11    200 tag=d br=d to=t
    11.05 ACK tag=d br=da to=t
    12    BYE tag=d br=db to=t
    12.02 200:BYE tag=d br=db to=t
    20    INVITE tag=e br=e
    21    200 tag=e br=e to=u
    21.05 ACK tag=e br=ea to=u
    29    BYE tag=e br=eb to=u
    29.02 200:BYE tag=e br=eb to=u
""", "1-2, 11-12, 21-29", "1.05-2, 11.05-12, 21.05-29")
scene("2 4 K9", "the Call-ID used again with the same From tag", """
    0     INVITE
    1     200
    1.05  ACK
    2     BYE
    2.02  200:BYE
    10    INVITE br=d
    11    200 br=d to=t
    11.05 ACK br=da to=t
    19    BYE br=db to=t
    19.02 200:BYE br=db to=t
""", "1-2, 11-19", "1.05-2, 11.05-19")
scene("2 K9", "the Call-ID used again after a refusal", """
    0     INVITE
    1     486
    1.05  NACK
    10    INVITE tag=d br=d
    11    200 tag=d br=d to=t
    11.05 ACK tag=d br=da to=t
    19    BYE tag=d br=db to=t
    19.02 200:BYE tag=d br=db to=t
""", "11-19", "11.05-19")
scene("2 4", "another call under the tags of one that runs", """
    0     INVITE
    1     200
    1.05  ACK
    3     INVITE c=2
    4     200 c=2 to=t
    4.05  ACK c=2 to=t
    6     BYE c=3
    6.02  200:BYE c=3
    9     BYE c=3 to=t br=other
    9.02  200:BYE c=3 to=t br=other
""", "1-6, 4-9", without="shuffle")

# 3: the INVITE that was answered says who pays and for what (K1).

scene("3 K1", "another From in an INVITE that was challenged with 401", """
    0     INVITE from=sip:9999@sip.canyan.io
    0.1   401 from=sip:9999@sip.canyan.io
    0.15  NACK from=sip:9999@sip.canyan.io
    1     INVITE c=2
    2     200 c=2
    2.05  ACK c=2
    5     BYE c=3
    5.02  200:BYE c=3
""", "2-5", "2.05-5")
scene("3 K1", "three attempts, three names", """
    0     INVITE from=sip:9999@sip.canyan.io
    1     INVITE c=2 from=sip:8888@sip.canyan.io
    2     INVITE c=3
    3     200 c=3
    3.05  ACK c=3
    5     BYE c=4
    5.02  200:BYE c=4
""", "3-5", "3.05-5")
scene("3 K1", "the first attempt is answered after the second was sent", """
    0     INVITE
    1     INVITE c=2 from=sip:9999@sip.canyan.io
    3     200
    3.05  ACK
    5     BYE c=3
    5.02  200:BYE c=3
""", "3-5", "3.05-5")
scene("3 K1", "P-Asserted-Identity of the challenged attempt", """
    0     INVITE h="P-Asserted-Identity: <sip:9999@sip.canyan.io>"
    0.1   407
    0.15  NACK
    1     INVITE c=2 h="P-Asserted-Identity: <sip:3000@sip.canyan.io>"
    2     200 c=2
    2.05  ACK c=2
    5     BYE c=3
    5.02  200:BYE c=3
""", "2-5 3000>2001", "2.05-5 3000>2001")
scene("3 K1", "the proxy asserts an identity further on, of the answered attempt only", """
    0     INVITE from=sip:x@x.invalid
    0.01  INVITE from=sip:x@x.invalid hop=p h="P-Asserted-Identity: sip:9999@sip.canyan.io"
    0.1   407
    0.15  NACK
    1     INVITE c=2 from=sip:x@x.invalid
    1.01  INVITE c=2 from=sip:x@x.invalid hop=p h="P-Asserted-Identity: sip:3000@sip.canyan.io"
    2     200 c=2
    2.05  ACK c=2
    5     BYE c=3
    5.02  200:BYE c=3
""", "2-5 3000>2001", "2.05-5 3000>2001", without="shuffle")
scene("3 K1", "the copy further on, which alone names the account, comes before the nearer one", """
    0     INVITE from=sip:x@x.invalid hop=p h="P-Asserted-Identity: sip:3000@sip.canyan.io"
    0.01  INVITE from=sip:x@x.invalid
    2     200
    2.05  ACK
    5     BYE
    5.02  200:BYE
""", "2-5 3000>2001", "2.05-5 3000>2001")
scene("3 K1", "another route for the challenged attempt", """
    0     INVITE h="X-Tenant: other"
    0.1   407
    0.15  NACK
    1     INVITE c=2
    2     200 c=2
    2.05  ACK c=2
    5     BYE c=3
    5.02  200:BYE c=3
""", "2-5", "2.05-5", routes="- match: {header: {X-Tenant: other}}\n  action: ignore\n")
scene("3 K1", "another route for the answered attempt", """
    0     INVITE
    0.1   407
    0.15  NACK
    1     INVITE c=2 h="X-Tenant: other"
    2     200 c=2
    2.05  ACK c=2
    5     BYE c=3
    5.02  200:BYE c=3
""", "", "", routes="- match: {header: {X-Tenant: other}}\n  action: ignore\n")
scene("3 K1", "a redirection changes who is called", """
    0     INVITE
    0.1   302
    0.15  NACK
    1     INVITE c=2 uri=sip:+39333@sip.canyan.io
    2     200 c=2
    2.05  ACK c=2
    5     BYE c=3
    5.02  200:BYE c=3
""", "2-5 2000>+39333", "2.05-5 2000>+39333",
      routes="- destination: request-uri\n  destination_account: [request-uri]\n")
scene("3 K1", "a further INVITE while the call runs names another", ANSWERED + """
    2     INVITE c=7 from=sip:9999@sip.canyan.io
    2.1   482 c=7 from=sip:9999@sip.canyan.io
    2.15  NACK c=7 from=sip:9999@sip.canyan.io
    5     BYE
    5.02  200:BYE
""", "1-5", "1.05-5")

# 4: nothing that a caller writes makes a call invisible (K10).

LONG = "x" * 1500
scene("4 K10", "long Call-ID", f"""
    0     INVITE id={LONG}
    1     200 id={LONG}
    1.05  ACK id={LONG}
    5     BYE callee id={LONG}
    5.02  200:BYE callee id={LONG}
""", "1-5", "1.05-5")
scene("4 K10", "two long Call-IDs that differ at their ends", f"""
    0     INVITE id={LONG}1
    0.5   INVITE id={LONG}2
    1     200 id={LONG}1
    1.05  ACK id={LONG}1
    2     200 id={LONG}2
    2.05  ACK id={LONG}2
    5     BYE id={LONG}1
    5.02  200:BYE id={LONG}1
    9     BYE id={LONG}2
    9.02  200:BYE id={LONG}2
""", "1-5, 2-9", "1.05-5, 2.05-9")
scene("4 K10", "long From tag", f"""
    0     INVITE tag={LONG}
    1     200 tag={LONG}
    1.05  ACK tag={LONG}
    5     BYE callee tag={LONG}
    5.02  200:BYE callee tag={LONG}
""", "1-5", "1.05-5")
scene("4 K10", "long To tag", f"""
    0     INVITE
    1     200 to={LONG}
    1.05  ACK to={LONG}
    5     BYE callee to={LONG}
    5.02  200:BYE callee to={LONG}
""", "1-5", "1.05-5")
scene("4 K10", "long branch", f"""
    0     INVITE br={LONG}
    1     200 br={LONG}
    1.05  ACK br={LONG}a
    5     BYE br={LONG}b
    5.02  200:BYE br={LONG}b
""", "1-5", "1.05-5")
scene("4 K10", "highest CSeq", """
    0     INVITE c=4294967294
    1     200 c=4294967294
    1.05  ACK c=4294967294
    5     BYE c=4294967295
    5.02  200:BYE c=4294967295
""", "1-5", "1.05-5")
scene("4 K10", "CSeq over 2^31, hung up by the callee", """
    0     INVITE c=4294967295
    1     200 c=4294967295
    1.05  ACK c=4294967295
    5     BYE callee
    5.02  200:BYE callee
""", "1-5", "1.05-5")
scene("4 K10", "CSeq 0 and leading zeros", """
    0     INVITE c=0
    1     200 c=0
    1.05  ACK c=0
    5     BYE c=1
    5.02  200:BYE c=1
""", "1-5", "1.05-5")

# 6: a 2xx of a CSeq of no attempt (K7).

scene("6 K7", "the proxy answers the challenge; the caller hangs up with its own CSeq", """
    0     INVITE
    1     407
    2     200 c=2
    2.05  ACK
    6     BYE c=2
    6.02  200:BYE c=3 br=BYE2r
""", "2-6", "2.05-6")
scene("6 K7", "the proxy answers the challenge; the callee hangs up", """
    0     INVITE
    1     401
    2     200 c=2
    2.05  ACK c=2
    6     BYE callee
    6.02  200:BYE callee
""", "2-6")
scene("6 3 K7", "the INVITE copy with credentials is lost", """
    0     INVITE
    0.1   407
    0.15  NACK
    2     200 c=2
    2.05  ACK c=2
    6     BYE c=3
    6.02  200:BYE c=3
""", "2-6")
scene("6 K7", "a 2xx of a CSeq of no attempt, hung up within the reorder window", """
    0     INVITE
    1     200 c=2
    1.05  ACK c=2
    2     BYE c=3
    2.02  200:BYE c=3
""", "1-2")
scene("6 K7", "a 2xx that is older than all attempts", """
    0     INVITE c=2
    1     200 c=1
    5     486 c=2
""", "", without="wire")
scene("6 K7", "not our From tag", """
    0     INVITE
    1     200 tag=d c=2
    1.5   486
    1.55  NACK
""", "")
scene("6", "begin_on ack", """
    0     INVITE
    1     200
    2     ACK
    6     BYE
    6.02  200:BYE
""", "2-6", "2-6", begin_on="ack")
scene("6", "begin_on ack without an ACK", """
    0     INVITE
    1     200
    6     BYE callee
    6.02  200:BYE callee
""", "", begin_on="ack")
scene("6 K7", "begin_on ack, CSeq of no attempt", """
    0     INVITE
    1     200 c=2
    2     ACK c=2
    6     BYE c=3
    6.02  200:BYE c=3
""", "2-6", begin_on="ack")

# 7: ACKs where no reply is mirrored, and doubtful ones (K5).

scene("7", "ACK to a 2xx with the INVITE's branch", """
    0     INVITE
    1     200
    1.05  ACK br=INVITE1r
    5     BYE
    5.02  200:BYE
""", "1-5", "1.05-5")
scene("7 K5", "new branch, the INVITE's URI, nothing more", """
    0     INVITE
    1     480
    1.05  ACK uri=sip:2001@sip.canyan.io
""", "", "", max_call_duration=60.0)
scene("7 K5", "new branch, the INVITE's URI, then a retry that is refused", """
    0     INVITE
    1     407
    1.05  ACK uri=sip:2001@sip.canyan.io
    1.1   INVITE c=2
    2     486 c=2
    2.05  ACK c=2 uri=sip:2001@sip.canyan.io br=n2
""", "", "", max_call_duration=60.0)
scene("7 K5", "new branch, the INVITE's URI, then a retry that is answered", """
    0     INVITE
    1     401
    1.05  ACK uri=sip:2001@sip.canyan.io
    1.1   INVITE c=2
    2     200 c=2
    2.05  ACK c=2
    7     BYE c=3
    7.02  200:BYE c=3
""", "2-7", "2.05-7")
scene("7 K5", "new branch, the INVITE's URI, then BYE", """
    0     INVITE
    1     200
    1.05  ACK uri=sip:2001@sip.canyan.io
    7     BYE
    7.02  200:BYE
""", "1-7", "1.05-7")
scene("7 K5", "new branch, the INVITE's URI, then the callee's BYE", """
    0     INVITE
    1     200
    1.05  ACK uri=sip:2001@sip.canyan.io
    7     BYE callee
    7.02  200:BYE callee
""", "1-7", "1.05-7")
scene("7 K5", "new branch, the INVITE's URI, then a re-INVITE", """
    0     INVITE
    1     200
    1.05  ACK uri=sip:2001@sip.canyan.io
    3     reINVITE c=2
    3.1   200 c=2
    3.15  ACK c=2
    7     BYE c=3
    7.02  200:BYE c=3
""", "1-7", "1.05-7")
scene("7 K5", "new branch, the INVITE's URI, then an UPDATE of the callee", """
    0     INVITE
    1     200
    1.05  ACK uri=sip:2001@sip.canyan.io
    3     UPDATE callee
    3.1   200:UPDATE callee
    70    BYE
    70.02 200:BYE
""", "1-70", "1.05-70")
scene("7 K5", "new branch, the INVITE's URI, then a BYE of another dialog", """
    0     INVITE
    1     480
    1.05  ACK uri=sip:2001@sip.canyan.io
    7     BYE to=invented
    7.02  481:BYE to=invented
""", "", "")
scene("7 K5 15", "ACK after CANCEL, to a 487", """
    0     INVITE
    1     CANCEL
    1.1   487
    1.15  ACK
""", "", "", without="shuffle")
scene("7 K5 15", "ACK after CANCEL, to a 200, then BYE", """
    0     INVITE
    1     CANCEL
    1.1   200
    1.15  ACK
    7     BYE
    7.02  200:BYE
""", "1.1-7", "1.15-7")
scene("7 K5", "replies mirrored, the 2xx lost, BYE answered", """
    0     INVITE
    0.5   180
    1.05  ACK
    7     BYE
    7.02  200:BYE
""", "1.05-7", "1.05-7")
scene("7 K5", "replies mirrored but not the proxy's refusal: new branch, other URI", """
    0     INVITE
    0.5   180
    1.05  ACK
""", "", without="shuffle")
scene("7 8", "ACKs to a refusal of both hops", """
    0     INVITE
    0.01  INVITE hop=p
    1     486
    1.05  NACK
    1.06  NACK hop=p
""", "", "")
scene("7 8", "ACK to a refusal before its INVITE copy", """
    0     INVITE hop=p
    0.5   NACK hop=p
    1     INVITE
    1.05  NACK
""", "", "")
scene("7", "two branches, one refused, the other answered", """
    0     INVITE
    0.01  INVITE hop=p
    0.02  INVITE hop=q uri=sip:2001@127.0.0.40
    1     486 hop=q
    1.05  NACK hop=q uri=sip:2001@127.0.0.40
    2     200
    2.05  ACK
    7     BYE
    7.02  200:BYE
""", "2-7", "2.05-7")

# 8: refusals.

for status in (300, 302, 400, 403, 404, 408, 480, 486, 487, 488, 500, 503, 600, 603):
    scene("8", f"refused with {status}", f"""
        0     INVITE
        1     180
        2     {status}
        2.05  NACK
    """, "", "")
scene("8", "a 200 behind the 486 of another fork", """
    0     INVITE
    1     486
    2     200 to=t
    2.05  ACK to=t
    7     BYE to=t
    7.02  200:BYE to=t
""", "2-7", "2.05-7")
scene("8 15", "a 200 crosses CANCEL and 487", """
    0     INVITE
    1     CANCEL
    1.01  200:CANCEL
    1.05  487
    1.1   200 to=t
    1.15  ACK to=t
    7     BYE to=t
    7.02  200:BYE to=t
""", "1.1-7", "1.15-7")

# 9: a 2xx that nobody acknowledges.

REPEATED = "\n".join(f"{time} 200" for time in (1, 1.5, 2.5, 4.5, 8.5, 12.5, 16.5))
scene("9", "repeated for 16 s", f"0 INVITE\n{REPEATED}\n17 200", "1-1")
scene("9", "repeated for 32 s, then the callee's BYE", f"""
    0 INVITE
    {REPEATED}
    20.5  200
    24.5  200
    28.5  200
    32.5  200
    33    BYE callee
    33.1  200:BYE callee
""", "1-1")
scene("9", "repeated for 15.9 s", f"0 INVITE\n{REPEATED}\n16.9 200", "1-")
scene("9", "repeated for 15.9 s, then the callee's BYE", f"""
    0 INVITE
    {REPEATED}
    16.9  200
    33    BYE callee
    33.1  481:BYE callee
""", "1-33")
scene("9", "acknowledged at last", f"""
    0 INVITE
    {REPEATED}
    17    200
    17.2  ACK
    40    BYE
    40.02 200:BYE
""", "1-40")
scene("9", "begin_on ack", f"0 INVITE\n{REPEATED}\n17 200", "", begin_on="ack")
scene("9 11", "of two answers the one that nobody acknowledges", f"""
    0 INVITE
    {REPEATED.replace("200", "200 to=t")}
    1.2   200
    1.3   ACK
    17    200 to=t
    40    BYE
    40.02 200:BYE
""", "1-40")

# 10: 1xx renew the ringing time-out (K14).

for status in (100, 180, 181, 182, 183):
    scene("10 K14", f"rings with {status}", f"""
        0     INVITE
        2     {status}
        4     {status}
        6     {status}
        8     200
        8.05  ACK
        15    BYE
        15.02 200:BYE
    """, "8-15", invite_timeout=4.0)
scene("10 K14", "rings for longer after the last 1xx", """
    0     INVITE
    3     180
    8     200
""", "", invite_timeout=4.0, without="shuffle restart")

# 11: several dialogs (K6).

scene("11 K6", "three answers, all acknowledged, two hung up at once", """
    0     INVITE
    1     200 to=s
    1.1   200 to=t
    1.2   200 to=u
    1.25  ACK to=s br=as
    1.3   ACK to=t br=at
    1.35  ACK to=u br=au
    1.4   BYE to=s br=bs
    1.42  200:BYE to=s br=bs
    1.5   BYE to=u br=bu
    1.52  200:BYE to=u br=bu
    8     BYE to=t br=bt
    8.02  200:BYE to=t br=bt
""", "1-8", "1.25-8")
scene("11 K6", "three answers, one acknowledged, the others never", """
    0     INVITE
    1     200 to=s
    1.1   200 to=t
    1.2   200 to=u
    1.3   ACK to=t
    8     BYE to=t
    8.02  200:BYE to=t
""", "1-8", "1.3-8")
scene("11 K6", "the loser hangs up itself", """
    0     INVITE
    1     200 to=s
    1.1   200 to=t
    1.2   ACK to=t br=at
    1.4   BYE to=s callee
    1.42  200:BYE to=s callee
    8     BYE to=t callee br=bt
    8.02  200:BYE to=t callee br=bt
""", "1-8", "1.2-8")
scene("11 K6", "the winner answered first, the loser's BYE is last", """
    0     INVITE
    1     200 to=s
    1.1   200 to=t
    1.2   ACK to=s br=as
    1.3   ACK to=t br=at
    8     BYE to=s
    8.02  200:BYE to=s
    9     BYE to=t br=bt
    9.02  200:BYE to=t br=bt
""", "1-9", "1.2-9")
scene("11 K6", "the second answer comes after the first one's BYE", """
    0     INVITE
    1     200 to=s
    1.05  ACK to=s br=as
    1.5   BYE to=s br=bs
    1.52  200:BYE to=s br=bs
    2     200 to=t
    2.05  ACK to=t br=at
    8     BYE to=t br=bt
    8.02  200:BYE to=t br=bt
""", "1-8", "1.05-8", without="shuffle")
scene("11 K6", "an invented dialog: a BYE whose tag nobody answered with", ANSWERED + """
    3     BYE to=invented
    3.02  481:BYE to=invented
    8     BYE c=3
    8.02  200:BYE c=3
""", "1-8", "1.05-8")

# 12: a BYE that was carried out, or not (K2).

for status in (200, 202, 481, 408):
    scene("12", f"BYE answered with {status}", ANSWERED + f"""
        5     BYE
        5.02  {status}:BYE
    """, "1-5", "1.05-5")
    scene("12", f"the callee's BYE answered with {status}", ANSWERED + f"""
        5     BYE callee
        5.02  {status}:BYE callee
    """, "1-5", "1.05-5")
for status in (302, 400, 403, 404, 405, 420, 483, 488, 500, 501, 503, 600, 603):
    scene("12 K2", f"BYE refused with {status}", ANSWERED + f"""
        5     BYE
        5.02  {status}:BYE
        60    BYE c=3
        60.02 200:BYE c=3
    """, "1-60", "1.05-5")
    scene("12 K2", f"the callee's BYE refused with {status}, and nothing more", ANSWERED + f"""
        5     BYE callee
        5.02  {status}:BYE callee
    """, "1-", "1.05-5")
for status in (481, 500, 408):
    scene("12 K2", f"a BYE of an old CSeq, answered with {status}", """
        0     INVITE c=10
        1     200 c=10
        1.05  ACK c=10
        5     BYE c=9
        5.02  {status}:BYE c=9
        8     reINVITE c=11
        8.1   200 c=11
        8.15  ACK c=11
        20    BYE c=12
        20.02 200:BYE c=12
    """.replace("{status}", str(status)), "1-20", "1.05-20")
scene("12 K2", "a BYE of the callee's with a CSeq below that of its re-INVITE", ANSWERED + """
    3     reINVITE callee c=100
    3.1   200 callee c=100
    3.15  ACK callee c=100
    5     BYE callee c=99
    5.02  500:BYE callee c=99
    20    BYE callee c=101
    20.02 200:BYE callee c=101
""", "1-20", "1.05-20")
scene("12 K2", "a BYE below the CSeq of an UPDATE and an INFO", ANSWERED + """
    3     UPDATE c=5
    3.1   200:UPDATE c=5
    4     INFO c=7
    4.1   200:INFO c=7
    5     BYE c=6
    5.02  500:BYE c=6
    20    BYE c=8
    20.02 200:BYE c=8
""", "1-20", "1.05-20")
for status in (401, 407):
    scene("12", f"BYE challenged with {status} and repeated", ANSWERED + f"""
        5     BYE
        5.02  {status}:BYE
        5.1   BYE c=3
        5.12  200:BYE c=3
    """, "1-5", "1.05-5")
    scene("12", f"the callee's BYE challenged with {status} and repeated", ANSWERED + f"""
        5     BYE callee
        5.02  {status}:BYE callee
        5.1   BYE callee c=2
        5.12  200:BYE callee c=2
    """, "1-5", "1.05-5")
    scene("12 K2", f"BYE challenged with {status}, never repeated", ANSWERED + f"""
        5     BYE
        5.02  {status}:BYE
    """, "1-")
    scene("12 K2", f"BYE challenged with {status}, the retry is refused", ANSWERED + f"""
        5     BYE
        5.02  {status}:BYE
        5.1   BYE c=3
        5.12  403:BYE c=3
        60    BYE callee
        60.02 200:BYE callee
    """, "1-60")
    scene("12 K2", f"BYE challenged with {status}, repeated after a minute's talk", ANSWERED + f"""
        5     BYE
        5.02  {status}:BYE
        60    BYE c=3
        60.02 200:BYE c=3
    """, "1-60")
scene("12", "challenged by two proxies, one after the other", ANSWERED + """
    5     BYE
    5.02  407:BYE
    5.1   BYE c=3
    5.12  401:BYE c=3
    5.2   BYE c=4
    5.22  200:BYE c=4
""", "1-5", "1.05-5")
scene("12 K2", "Max-Forwards 0", ANSWERED + """
    5     BYE mf=0
    5.02  483:BYE
    60    BYE c=3
    60.02 200:BYE c=3
""", "1-60", "1.05-60", without="wire")
scene("12 K2", "Max-Forwards 0, the 483 not mirrored", ANSWERED + """
    5     BYE mf=0
    60    BYE c=3
    60.02 200:BYE c=3
""", "1-60", "1.05-60", without="wire")
scene("12 K2", "Max-Forwards 000 of the callee, and never again", ANSWERED + """
    5     BYE mf=000 callee
""", "1-", "1.05-", without="wire")
scene("12", "Max-Forwards 10", ANSWERED + """
    5     BYE mf=10
    5.02  200:BYE
""", "1-5", "1.05-5")
scene("12", "nobody answers the BYE", ANSWERED + """
    5     BYE
    5.5   BYE
    6.5   BYE
    8.5   BYE
    12.5  BYE
    16.5  BYE
""", "1-5", "1.05-5")
scene("12", "nobody answers the callee's BYE", ANSWERED + "5 BYE callee", "1-5", "1.05-5")
scene("12", "nobody answers the BYE, unanswered_bye ignore", ANSWERED + "5 BYE", "1-", "1.05-5",
      unanswered_bye="ignore")
scene("12", "nobody answers the BYE, and life afterwards", ANSWERED + """
    5     BYE
    10    reINVITE c=3
    10.1  200 c=3
    10.15 ACK c=3
    90    BYE c=4
    90.02 200:BYE c=4
""", "1-90")
scene("12", "nobody answers the BYE, and life of the callee afterwards", ANSWERED + """
    5     BYE
    10    UPDATE callee
    10.1  200:UPDATE callee
    90    BYE callee c=2
    90.02 200:BYE callee c=2
""", "1-90")
scene("12", "nobody answers the BYE; the callee's one is carried out later", ANSWERED + """
    5     BYE
    20    BYE callee
    20.02 200:BYE callee
""", "1-20", "1.05-5")
scene("12", "nobody answers the BYE; a second one of the caller is carried out", ANSWERED + """
    5     BYE
    20    BYE c=3
    20.02 200:BYE c=3
""", "1-20", "1.05-5")
scene("12", "BYEs of both sides cross", ANSWERED + """
    5     BYE
    5.01  BYE callee
    5.02  200:BYE
    5.03  200:BYE callee
""", "1-5", "1.05-5")
scene("12", "the answer comes at the end of the 32 s", ANSWERED + """
    5     BYE
    34    200:BYE
""", "1-5", "1.05-5")
scene("12 K2", "the refusal comes at the end of the 32 s", ANSWERED + """
    5     BYE
    34    500:BYE
    90    BYE c=3
    90.02 200:BYE c=3
""", "1-90")
scene("12", "NOTIFY and its answer behind the BYE of a transfer", ANSWERED + """
    3     REFER
    3.1   202:REFER
    3.2   NOTIFY callee
    3.3   200:NOTIFY callee
    5     BYE c=3
    5.02  200:BYE c=3
    5.5   NOTIFY callee c=2
    5.6   481:NOTIFY callee c=2
""", "1-5", "1.05-5")

# 13: a reply to a BYE that was not seen (K4).

for status in (200, 481, 408):
    scene("13 K4", f"the proxy ends the call, {status} of the callee", ANSWERED + f"""
        5     {status}:BYE
    """, "1-5")
    scene("13 K4", f"the proxy ends the call, {status} of the caller", ANSWERED + f"""
        5     {status}:BYE callee
    """, "1-5")
scene("13 K4", "the proxy ends the call, both sides answer, again and again", ANSWERED + """
    5     200:BYE
    5.1   200:BYE callee
    5.5   200:BYE
    5.6   200:BYE callee
""", "1-5")
scene("13 K4 12", "the BYE comes late, but in time", ANSWERED + """
    5.02  200:BYE
    6     BYE seen=5
""", "1-5")
scene("13 K2", "a refusal of a BYE that was not seen", ANSWERED + """
    5     500:BYE
    9     404:BYE c=3
    20    BYE c=4
    20.02 200:BYE c=4
""", "1-20")
scene("13", "a reply to a BYE of another dialog", ANSWERED + """
    5     200:BYE to=other
    20    BYE c=4
    20.02 200:BYE c=4
""", "1-20")

# 14: a BYE before the answer (K3).

scene("14 K3", "ends the ringing call", """
    0     INVITE
    0.5   180
    1     BYE
    1.02  200:BYE
    1.05  487
    1.1   NACK
""", "", "")
scene("14 K3", "ends one of three early dialogs, another one answers", """
    0     INVITE
    0.5   180 to=s
    0.6   180 to=t
    0.7   180 to=u
    1     BYE to=s
    1.02  200:BYE to=s
    5     200 to=t
    5.05  ACK to=t
    9     BYE to=t c=3
    9.02  200:BYE to=t c=3
""", "5-9", "5.05-9")
scene("14 K3", "an invented tag", """
    0     INVITE
    0.5   180
    1     BYE to=invented
    1.02  481:BYE to=invented
    5     200
    5.05  ACK
    9     BYE c=3
    9.02  200:BYE c=3
""", "5-9", "5.05-9")
scene("14 K3", "refused, the same dialog is answered", """
    0     INVITE
    0.5   180
    1     BYE
    1.02  481:BYE
    5     200
    5.05  ACK
    9     BYE c=3
    9.02  200:BYE c=3
""", "5-9", "5.05-9")
scene("14 K3", "carried out, and answered all the same: BYE crosses the 200", """
    0     INVITE
    0.5   180
    1     BYE
    1.01  200:BYE
    1.02  200
    1.05  ACK
""", "", without="shuffle segments")
scene("14 K3", "of the callee", """
    0     INVITE
    0.5   180 to=s
    0.6   180 to=t
    1     BYE to=s callee
    1.02  200:BYE to=s callee
    5     200 to=t
    5.05  ACK to=t
    9     BYE to=t callee c=1 br=x
    9.02  200:BYE to=t callee c=1 br=x
""", "5-9", "5.05-9")
scene("14", "UPDATE and PRACK in early dialogs", """
    0     INVITE
    0.5   183 to=s
    0.6   PRACK to=s
    0.7   200:PRACK to=s
    0.8   183 to=t
    0.9   UPDATE to=s c=3
    1     200:UPDATE to=s c=3
    3     200 to=t
    3.05  ACK to=t
    9     BYE to=t c=4
    9.02  200:BYE to=t c=4
""", "3-9", "3.05-9")
scene("14", "UPDATE in an early dialog, then refused", """
    0     INVITE
    0.5   183
    0.9   UPDATE
    1     200:UPDATE
    3     486
    3.05  NACK
""", "", "")

# 15: CANCEL never ends an answered call.

scene("15", "CANCEL behind the answer", ANSWERED + """
    2     CANCEL
    2.01  481:CANCEL
    9     BYE
    9.02  200:BYE
""", "1-9", "1.05-9", without="shuffle")
scene("15", "cancelled", """
    0     INVITE
    1     180
    2     CANCEL
    2.01  200:CANCEL
    2.05  487
    2.1   NACK
""", "", "")

# 16: deadlines and session timers (K13).

scene("16", "max_call_duration", ANSWERED + "100 -", "1-31", "1.05-31.05", without="shuffle",
      max_call_duration=30.0)
scene("16", "max_call_duration, last seen", ANSWERED + """
    9     reINVITE c=2
    9.1   200 c=2
    100   -
""", "1-9.1", "1.05-9", max_call_duration=30.0, expired_call_end="last-seen")
TIMED = '0 INVITE\n1 200 h="Session-Expires: 90;refresher=uac"\n1.05 ACK\n'
scene("16", "a session that nobody refreshes", TIMED + "200 -", "1-91", without="restart")
scene("16", "compact and without case", TIMED.replace(
    "Session-Expires: 90;refresher=uac", "x: 90 ; Refresher=UAS") + "200 -", "1-91",
    without="restart")
scene("16 K13", "no refresher", TIMED.replace(";refresher=uac", "") + """
    150   BYE
    150.1 200:BYE
""", "1-150")
for who, name in (("", "caller"), ("callee", "callee")):
    scene("16", f"refreshed by a re-INVITE of the {name}", TIMED + f"""
        60     reINVITE c=2 {who}
        60.1   200 c=2 {who} h="Session-Expires: 90;refresher=uac"
        60.15  ACK c=2 {who}
        120    UPDATE c=3 {who}
        120.1  200:UPDATE c=3 {who} h="Session-Expires: 90;refresher=uac"
        230    BYE c=4 {who}
        230.1  200:BYE c=4 {who}
    """, "1-230")
    scene("16", f"stopped by a re-INVITE of the {name}", TIMED + f"""
        60     reINVITE c=2 {who}
        60.1   200 c=2 {who}
        60.15  ACK c=2 {who}
        400    BYE c=4
        400.1  200:BYE c=4
    """, "1-400")
    scene("16", f"begun by an UPDATE of the {name}", ANSWERED + f"""
        60     UPDATE c=2 {who}
        60.1   200:UPDATE c=2 {who} h="Session-Expires: 90;refresher=uas"
        400    -
    """, "1-150.1", without="restart")
scene("16", "INFO and NOTIFY refresh nothing", TIMED + """
    60     INFO
    60.1   200:INFO
    80     NOTIFY callee
    80.1   200:NOTIFY callee
    400    -
""", "1-91", without="restart")

# 17: two Call-IDs, one call (K16).

TIE = "- transaction_tag: header:X-CID\n  account: [from]\n  destination_account: [to]\n"
LEGS = """
    0     INVITE h="X-CID: one"
    0.1   INVITE id=leg-2@b2b tag=b br=b h="X-CID: one"
    1     200 id=leg-2@b2b tag=b br=b to=t
    1.02  200
    1.05  ACK
    1.07  ACK id=leg-2@b2b tag=b br=ba to=t
"""
scene("17", "both legs begin, the caller's BYE", LEGS + """
    5     BYE h="X-CID: one"
    5.02  200:BYE
    5.1   BYE id=leg-2@b2b tag=b br=bb to=t h="X-CID: one"
    5.12  200:BYE id=leg-2@b2b tag=b br=bb to=t
""", "1-5", "1.05-5", routes=TIE, without="shuffle wire")
scene("17", "both legs begin, only the callee's BYE of the other leg", LEGS + """
    5     BYE id=leg-2@b2b tag=b br=bb to=t callee h="X-CID: one"
    5.02  200:BYE id=leg-2@b2b tag=b br=bb to=t callee
""", "1-5", "1.05-5", routes=TIE, without="shuffle wire")
for other in ("callee", ""):
    name = "callee" if other else "caller"
    scene("17", f"only a BYE of the {name} on the other leg, its INVITE unseen", f"""
        0     INVITE corr=one
        1     200 corr=one
        1.05  ACK corr=one
        5     BYE id=leg-2@b2b tag=b to=t {other} corr=one
        5.02  200:BYE id=leg-2@b2b tag=b to=t {other} corr=one
    """, "1-5", "1.05-5", routes="- transaction_tag: correlation-id\n")
    scene("17 12 K2", f"that BYE of the {name} is refused", f"""
        0     INVITE corr=one
        1     200 corr=one
        1.05  ACK corr=one
        5     BYE id=leg-2@b2b tag=b to=t {other} corr=one
        5.02  500:BYE id=leg-2@b2b tag=b to=t {other} corr=one
    """, "1-", routes="- transaction_tag: correlation-id\n")
    # A proxy that hides topology leaves the tags as they are.
    scene("17 K16", f"topology hiding, the {name}'s BYE under the other Call-ID", f"""
        0     INVITE tag=caller-tag
        1     200 tag=caller-tag to=callee-tag
        1.05  ACK tag=caller-tag to=callee-tag
        5     BYE id=DLGCH_1 tag=caller-tag to=callee-tag {other}
        5.02  200:BYE id=DLGCH_1 tag=caller-tag to=callee-tag {other}
    """, "1-5", "1.05-5")
scene("17 K16", "topology hiding, requests only on the caller's side", """
    0     INVITE tag=caller-tag
    1.05  ACK tag=caller-tag to=callee-tag
    5     BYE id=DLGCH_1 tag=caller-tag to=callee-tag callee
    5.02  200:BYE id=DLGCH_1 tag=caller-tag to=callee-tag callee
""", "1.05-5", "1.05-5", without="far")
scene("17 K16", "another call's BYE has one of the tags only", """
    0     INVITE tag=caller-tag
    1     200 tag=caller-tag to=callee-tag
    1.05  ACK tag=caller-tag to=callee-tag
    5     BYE id=other@host tag=caller-tag to=another-tag
    5.02  200:BYE id=other@host tag=caller-tag to=another-tag
""", "1-", "1.05-")

# 18: exactly once, clocks and late copies (K12, K15).

scene("18 K12", "the end is stamped before the begin", """
    0     INVITE
    1     200 seen=4
    1.05  ACK seen=4.05
    2     BYE
    2.02  200:BYE
""", "4-4", "4.05-4.05", without="shuffle")
COPY = [line.split(maxsplit=1) for line in
        (ANSWERED + "5 BYE\n5.02 200:BYE").strip().splitlines()]  # fmt: skip
for late in (45, 300, 590):
    copies = "\n".join(
        f"{float(time) + late} {rest} seen={time} cap=2" for time, rest in COPY
    )
    scene("18 K15", f"a copy of the whole call {late} s later",
          ANSWERED + f"5 BYE\n5.02 200:BYE\n{copies}", "1-5", "1.05-5")
copies = "\n".join(f"{float(time) + 60} {rest} seen={time} cap=2" for time, rest in COPY)
scene("18 K15", "a copy of the whole call while it runs no more, of a mirror that saw no BYE",
      ANSWERED + f"5.02 200:BYE\n{copies}", "1-5.02", without="wire")
scene("18 2 K15 K9", "a late copy after the Call-ID was used again", ANSWERED + f"""
    5     BYE
    5.02  200:BYE
    20    INVITE tag=d br=d
    21    200 tag=d br=d to=t
    21.05 ACK tag=d br=da to=t
    25    BYE tag=d br=db to=t
    25.02 200:BYE tag=d br=db to=t
    {copies}
""", "1-5, 21-25", "1.05-5, 21.05-25")
scene("18", "a late copy of a refused call", """
    0     INVITE
    1     486
    1.05  NACK
    60    INVITE seen=0
    61    486 seen=1
    61.05 NACK seen=1.05
""", "", "")

# 19: messages before their INVITE.

scene("19", "all before the INVITE", """
    0.1   BYE seen=5
    0.15  200:BYE seen=5.02
    0.2   ACK seen=1.05
    0.3   200 seen=1
    0.4   INVITE seen=0
""", "1-5", "1.05-5")
scene("19", "the callee's BYE before the INVITE", """
    0.1   BYE callee seen=5
    0.15  200:BYE callee seen=5.02
    0.3   200 seen=1
    0.35  ACK seen=1.05
    0.4   INVITE seen=0
""", "1-5", "1.05-5")
scene("19", "no INVITE at all", """
    1     200
    1.05  ACK
    5     BYE
    5.02  200:BYE
""", "", "")
scene("19", "the INVITE is too late for what it explains", """
    0.1   200
    0.2   BYE
    0.25  200:BYE
    3     INVITE seen=0
""", "", "", without="shuffle")

# More of what public reports may hold.

scene("6 3 K7", "the proxy answers the challenge, and what it sends is mirrored too", """
    0     INVITE
    0.01  INVITE hop=p
    0.5   407 hop=p
    0.51  INVITE c=2 hop=q br=INVITE1r
    2     200 c=2 hop=q br=INVITE1r
    2.01  200
    2.05  ACK
    2.06  ACK c=2 hop=q br=ACK1r
    6     BYE c=2
    6.01  BYE c=3 hop=q br=BYE2r
    6.02  200:BYE c=3 hop=q br=BYE2r
    6.03  200:BYE c=2
""", "2-6", "2.05-6")
scene("6 12 K7", "the proxy answers the challenge of INVITE and BYE", """
    0     INVITE
    0.5   407
    2     200 c=2
    2.05  ACK
    6     BYE c=2
    6.02  407:BYE c=3 br=BYE2r
    6.1   200:BYE c=4 br=BYE2r
""", "2-6")
scene("3 K1", "History-Info of the challenged attempt only", """
    0     INVITE h="History-Info: <sip:9999@sip.canyan.io>;index=1,<sip:2001@sip.canyan.io>;index=2"
    0.1   401
    0.15  NACK
    1     INVITE c=2
    2     200 c=2
    2.05  ACK c=2
    5     BYE c=3
    5.02  200:BYE c=3
""", "2-5", "2.05-5")
scene("3 5 K1", "Diversion of the answered attempt", """
    0     INVITE h="Diversion: <sip:9999@sip.canyan.io>;reason=no-answer"
    0.1   407
    0.15  NACK
    1     INVITE c=2 h="Diversion: <sip:3000@sip.canyan.io>, <sip:9999@sip.canyan.io>"
    2     200 c=2
    2.05  ACK c=2
    5     BYE c=3
    5.02  200:BYE c=3
""", "2-5 3000>2001", "2.05-5 3000>2001",
      routes="- account: [diversion, from]\n  destination_account: [to]\n")
scene("3 5 K1", "Remote-Party-ID of the answered attempt", """
    0     INVITE h="Remote-Party-ID: <sip:9999@sip.canyan.io>;party=calling"
    0.1   407
    0.15  NACK
    1     INVITE c=2 h="Remote-Party-ID: <sip:3000@sip.canyan.io>;party=calling"
    2     200 c=2
    2.05  ACK c=2
    5     BYE callee
    5.02  200:BYE callee
""", "2-5 3000>2001", "2.05-5 3000>2001",
      routes="- account: [remote-party-id, from]\n  destination_account: [to]\n")
scene("3 K1", "challenged under another tenant's route, both attempts with one CSeq", """
    0     INVITE from=sip:9999@sip.canyan.io
    0.1   407 from=sip:9999@sip.canyan.io
    0.15  NACK from=sip:9999@sip.canyan.io
    1     INVITE br=second
    2     200 br=second
    2.05  ACK
    5     BYE
    5.02  200:BYE
""", "2-5", "2.05-5")
scene("2 3 K8", "another From tag and another name after the challenge", """
    0     INVITE from=sip:9999@sip.canyan.io
    0.1   407 from=sip:9999@sip.canyan.io
    1     INVITE tag=d c=2
    2     200 tag=d c=2
    2.05  ACK tag=d c=2
    6     BYE tag=d c=3
    6.02  200:BYE tag=d c=3
""", "2-6", "2.05-6")
scene("2 K8", "the From tag changes twice", """
    0     INVITE
    1     INVITE tag=d c=2
    2     INVITE tag=e c=3
    3     200 tag=e c=3
    3.05  ACK tag=e c=3
    6     BYE tag=e callee
    6.02  200:BYE tag=e callee
""", "3-6", "3.05-6")
scene("1 12", "four re-INVITEs, holds of both sides", ANSWERED + """
    2     reINVITE c=2
    2.1   200 c=2
    2.15  ACK c=2
    3     reINVITE c=3 callee
    3.05  491 c=3 callee
    3.06  NACK c=3 callee uri=sip:2000@127.0.0.20:5070
    4     reINVITE c=4 callee
    4.1   200 c=4 callee
    4.15  ACK c=4 callee
    5     reINVITE c=3
    5.1   200 c=3
    5.15  ACK c=3
    9     BYE c=5 callee
    9.02  200:BYE c=5 callee
""", "1-9", "1.05-9")
scene("12", "NOTIFY of the same side behind its BYE", ANSWERED + """
    5     BYE c=2
    5.02  481:BYE c=2
    5.1   NOTIFY c=3
    5.12  481:NOTIFY c=3
""", "1-5", "1.05-5")
scene("12", "the callee's NOTIFY behind its BYE, which nobody answers", ANSWERED + """
    3     REFER
    3.1   202:REFER
    3.2   NOTIFY callee c=1
    3.3   200:NOTIFY callee c=1
    5     BYE callee c=2
    5.1   NOTIFY callee c=3
""", "1-5", "1.05-5")
scene("12", "the answered INVITE's 200 and ACK once more behind the BYE", ANSWERED + """
    5     BYE
    5.01  200
    5.02  ACK
    5.03  200:BYE
    5.5   200
""", "1-5", "1.05-5")
scene("12", "a 100 to the BYE, then nothing", ANSWERED + """
    5     BYE
    5.1   100:BYE
""", "1-5", "1.05-5")
scene("12 K2", "BYEs refused on both sides, the third is carried out", ANSWERED + """
    5     BYE
    5.02  403:BYE
    8     BYE callee
    8.02  503:BYE callee
    60    BYE c=3
    60.02 200:BYE c=3
""", "1-60", "1.05-5")
scene("12", "refused in one try, 481 in the next", ANSWERED + """
    5     BYE
    5.02  503:BYE
    8     BYE c=3
    8.02  481:BYE c=3
""", "1-8", "1.05-5")
scene("12", "the same BYE is refused, and goes through when it is sent again", ANSWERED + """
    5     BYE
    5.02  503:BYE
    5.5   BYE
    5.52  200:BYE
""", "1-5", "1.05-5")
scene("12", "one side's BYE is challenged, the other side hangs up", ANSWERED + """
    5     BYE
    5.02  407:BYE
    9     BYE callee
    9.02  200:BYE callee
""", "1-9", "1.05-5")
scene("12 11", "BYE to a fork that was not answered", ANSWERED + """
    0.5   180 to=t
    5     BYE to=t
    5.02  481:BYE to=t
    9     BYE c=3
    9.02  200:BYE c=3
""", "1-9", "1.05-9", without="far")
scene("13 K4", "the proxy ends the call; callee's 200 and the caller's 481", ANSWERED + """
    5     200:BYE c=100
    5.1   481:BYE callee c=100
""", "1-5")
scene("13 K4", "the BYE is lost, its 200 is seen, the other side's BYE follows", ANSWERED + """
    5     200:BYE
    5.5   BYE callee
    5.52  481:BYE callee
""", "1-5", without="shuffle")
scene("13 11 K4", "two dialogs, the proxy ends both", """
    0     INVITE
    1     200 to=s
    1.1   200 to=t
    1.2   ACK to=s br=as
    1.3   ACK to=t br=at
    5     200:BYE to=s
    6     200:BYE to=t
""", "1-6")
scene("14 11 K3", "an early fork is refused, another ended by BYE, the third answers", """
    0     INVITE
    0.5   180 to=s
    0.6   180 to=t
    0.7   180 to=u
    1     486 to=u
    2     BYE to=s
    2.02  200:BYE to=s
    5     200 to=t
    5.05  ACK to=t
    9     BYE to=t callee br=x
    9.02  200:BYE to=t callee br=x
""", "5-9", "5.05-9")
scene("14 K3", "Max-Forwards 0", """
    0     INVITE
    0.5   180
    1     BYE mf=0
    1.02  483:BYE
    5     200
    5.05  ACK
    9     BYE c=3
    9.02  200:BYE c=3
""", "5-9", "5.05-9", without="wire far")
scene("14 K3", "nobody answers it, and the dialog is answered", """
    0     INVITE
    0.5   180
    1     BYE
    5     200
    5.05  ACK
    9     BYE c=3
    9.02  200:BYE c=3
""", "5-9", "5.05-9")
scene("16", "refreshed by an UPDATE, then never again", TIMED + """
    60     UPDATE c=2
    60.1   200:UPDATE c=2 h="Session-Expires: 120;refresher=uac"
    400    -
""", "1-180.1", without="restart")
scene("16", "of two dialogs one expires, the other is hung up", """
    0     INVITE
    1     200 to=s h="Session-Expires: 90;refresher=uac"
    1.1   200 to=t
    1.2   ACK to=s br=as
    1.3   ACK to=t br=at
    300   BYE to=t br=bt
    300.1 200:BYE to=t br=bt
""", "1-300", without="restart")
scene("16", "a short session counts as one of 90 s", TIMED.replace("90", "5") + "200 -", "1-91",
      without="restart")
scene("17 K16", "tied, requests only: BYE of the other leg", """
    0     INVITE corr=one
    1.05  ACK corr=one
    5     BYE id=leg-2@b2b tag=b to=t callee corr=one
""", "1.05-5", "1.05-5", routes="- transaction_tag: correlation-id\n", without="far")
scene("17 2", "two calls of one Call-ID and one tie are charged once", """
    0     INVITE h="X-CID: one"
    0.1   INVITE tag=b br=b h="X-CID: one"
    1     200
    1.02  200 tag=b br=b to=t
    1.05  ACK
    1.07  ACK tag=b br=ba to=t
    5     BYE h="X-CID: one"
    5.02  200:BYE
""", "1-5", "1.05-5", routes=TIE, without="shuffle wire")
scene("17", "the tie is used again by a later call", """
    0     INVITE h="X-CID: one"
    1     200
    1.05  ACK
    5     BYE h="X-CID: one"
    5.02  200:BYE
    10    INVITE id=call-2@host br=d h="X-CID: one"
    11    200 id=call-2@host br=d
    11.05 ACK id=call-2@host br=da
    15    BYE id=call-2@host br=db h="X-CID: one"
    15.02 200:BYE id=call-2@host br=db
""", "1-5, 11-15", "1.05-5, 11.05-15", routes=TIE)
# 17: legs tied by a part of the Call-ID or of a header.

PART = "- transaction_tag: {from: call-id, match: '^(.+?)(?:_(?:b2b|pbx)-1)*$'}\n"
APPENDED = """
    0     INVITE
    0.1   INVITE id=call-1@host_b2b-1_pbx-1 tag=b br=b
    1     200 id=call-1@host_b2b-1_pbx-1 tag=b br=b to=t
    1.02  200
    1.05  ACK
    1.07  ACK id=call-1@host_b2b-1_pbx-1 tag=b br=ba to=t
"""
scene("17", "a B2BUA appends to the Call-ID, the caller's BYE", APPENDED + """
    5     BYE
    5.02  200:BYE
    5.1   BYE id=call-1@host_b2b-1_pbx-1 tag=b br=bb to=t
    5.12  200:BYE id=call-1@host_b2b-1_pbx-1 tag=b br=bb to=t
""", "1-5", "1.05-5", routes=PART, without="shuffle wire")
scene("17", "a B2BUA appends to the Call-ID, only the callee's BYE of the other leg", APPENDED + """
    5     BYE id=call-1@host_b2b-1_pbx-1 tag=b br=bb to=t callee
    5.02  200:BYE id=call-1@host_b2b-1_pbx-1 tag=b br=bb to=t callee
""", "1-5", "1.05-5", routes=PART, without="shuffle wire")
scene("17", "a B2BUA appends to the Call-ID, the other leg's INVITE unseen", ANSWERED + """
    5     BYE id=call-1@host_b2b-1 tag=b to=t callee
    5.02  200:BYE id=call-1@host_b2b-1 tag=b to=t callee
""", "1-5", "1.05-5", routes=PART)
scene("17 2", "another call of the same Call-ID is no leg by the Call-ID", """
    0     INVITE
    0.1   INVITE tag=b br=b
    1     200
    1.02  200 tag=b br=b to=t
    1.05  ACK
    1.07  ACK tag=b br=ba to=t
    5     BYE
    5.02  200:BYE
    9     BYE tag=b br=bb to=t
    9.02  200:BYE tag=b br=bb to=t
""", "1-5, 1.02-9", "1.05-5, 1.07-9", routes=PART, without="shuffle wire")
scene("17 2", "a BYE of the same Call-ID with other tags is of no leg", ANSWERED + """
    5     BYE tag=b to=t
    5.02  200:BYE tag=b to=t
    9     BYE c=3
    9.02  200:BYE c=3
""", "1-9", "1.05-9", routes=PART)
scene("17", "a caller appends what a B2BUA appends, where a rule takes it from the B2BUA only", """
    0     INVITE
    0.1   INVITE id=call-1@host_b2b-1 tag=b br=b
    1     200
    1.02  200 id=call-1@host_b2b-1 tag=b br=b to=t
    1.05  ACK
    1.07  ACK id=call-1@host_b2b-1 tag=b br=ba to=t
    5     BYE
    5.02  200:BYE
    9     BYE id=call-1@host_b2b-1 tag=b br=bb to=t
    9.02  200:BYE id=call-1@host_b2b-1 tag=b br=bb to=t
""", "1-5, 1.02-9", "1.05-5, 1.07-9", without="shuffle wire", routes="""
- match: {capture_id: 7}
  transaction_tag: {from: call-id, match: '^(.+?)(?:_b2b-1)*$'}
- transaction_tag: {from: call-id, match: '(.+)'}
""")
scene("17", "legs tied by a part of a header", """
    0     INVITE h="P-Charging-Vector: icid-value=one;icid-generated-at=a"
    0.1   INVITE id=leg-2@b2b tag=b br=b h='P-Charging-Vector: icid-value="one";orig-ioi=b'
    1     200 id=leg-2@b2b tag=b br=b to=t
    1.02  200
    1.05  ACK
    1.07  ACK id=leg-2@b2b tag=b br=ba to=t
    5     BYE id=leg-2@b2b tag=b br=bb to=t callee
    5.02  200:BYE id=leg-2@b2b tag=b br=bb to=t callee
""", "1-5", "1.05-5", without="shuffle wire", routes="""
- transaction_tag: {from: header:P-Charging-Vector, match: 'icid-value="?([^";]+)'}
""")
scene("18 K12", "both BYE and its answer are stamped before the begin", """
    0     INVITE
    1     200
    1.05  ACK
    5     BYE seen=0.2
    5.02  200:BYE seen=0.22
""", "1-1", "1.05-1.05", without="shuffle")
scene("18", "late copies of the answer and of the ACK of a call that runs", ANSWERED + """
    45    INVITE seen=0 cap=2
    46    200 seen=1 cap=2
    46.05 ACK seen=1.05 cap=2
    60    BYE
    60.02 200:BYE
""", "1-60", "1.05-60", without="wire")
scene("20 K12", "stamps of 1970 in some messages only", """
    0     INVITE seen=-1795600000
    1     200
    1.05  ACK seen=-1795600000
    5     BYE
    5.02  200:BYE seen=-1795600000
""", "1-5", "1.05-5", without="wire far shuffle")
scene("4 K10", "many forks under invented tags", ANSWERED + "\n".join(
    f"{2 + index / 100} UPDATE to=invented{index} c={3 + index}" for index in range(80)) + """
    5     BYE c=100
    5.02  200:BYE c=100
""", "1-5", "1.05-5")
scene("4 12 K10", "many BYEs that are refused", ANSWERED + "\n".join(
    f"{2 + index} BYE c={3 + index}\n{2.02 + index} 403:BYE c={3 + index}"
    for index in range(40)) + """
    50     BYE c=100
    50.02  200:BYE c=100
""", "1-50", without="shuffle")
scene("4 K10", "many challenged attempts", "\n".join(
    f"{index} INVITE c={1 + index} from=sip:9999@sip.canyan.io\n{index}.1 407 c={1 + index}"
    for index in range(40)) + """
    40    INVITE c=41
    41    200 c=41
    41.05 ACK c=41
    50    BYE c=42
    50.02 200:BYE c=42
""", "41-50", "41.05-50")
scene("1 4 K10", "a re-INVITE of the ringing dialog with the CSeq of the INVITE", """
    0     INVITE
    0.5   180
    0.6   reINVITE c=1 br=other
    0.7   500 c=1 br=other
    1     200
    1.05  ACK
    5     BYE
    5.02  200:BYE
""", "1-5", "1.05-5")
scene("1 4 K10", "a re-INVITE with an old CSeq while the call runs", ANSWERED + """
    2     reINVITE c=1 br=other
    2.1   500 c=1 br=other
    3     200
    5     BYE
    5.02  200:BYE
""", "1-5", "1.05-5")
scene("12 K2", "an old CSeq, then a higher one", ANSWERED + """
    3     OPTIONS c=7
    3.1   200:OPTIONS c=7
    5     BYE c=6
    5.02  481:BYE c=6
    5.5   UPDATE c=8
    5.6   200:UPDATE c=8
    50    BYE c=9
    50.02 200:BYE c=9
""", "1-50", "1.05-50")
scene("3 4", "more attempts than are kept, and the answer comes before its INVITE", "\n".join(
    f"{index / 10} INVITE c={1 + index} from=sip:9999@sip.canyan.io\n"
    f"{index / 10}1 407 c={1 + index}" for index in range(1, 40)) + """
    4.9   200 c=41
    5     INVITE c=41 seen=4
    5.05  ACK c=41
    50    BYE c=42
    50.02 200:BYE c=42
""", "4.9-50", without="shuffle")
scene("8 4", "an ACK to a refusal that there never was, while it rings for long", """
    0     INVITE
    1     NACK
    2     180
    50    200
    50.05 ACK
    60    BYE
    60.02 200:BYE
""", "50-60", "50.05-60")
scene("8 15", "a CANCEL that never went further, while it rings for long", """
    0     INVITE
    1     CANCEL
    50    200
    50.05 ACK
    60    BYE
    60.02 200:BYE
""", "50-60", "50.05-60")
scene("4 12", "many BYEs before the answer, of the answered dialog", "0 INVITE\n" + "\n".join(
    f"{1 + index / 10} BYE br=b{index} c={index + 2}" for index in range(20)) + """
    4     200
    4.05  ACK
    60    BYE c=30
    60.02 200:BYE c=30
""", "4-60")
scene("2 4", "four calls at one time under one Call-ID and one From tag",
      ANSWERED + "".join(f"""
    {2 + index}    INVITE c={index + 2} br=p{index}
    {2.5 + index}  200 c={index + 2} br=p{index} to=t{index}
    {2.55 + index} ACK c={index + 2} to=t{index}
    {20 + index}   BYE c=9 to=t{index} br=b{index}
    {20.1 + index} 200:BYE c=9 to=t{index} br=b{index}
""" for index in range(3)) + """
    30    BYE c=9
    30.02 200:BYE c=9
""", "1-30, 2.5-20, 3.5-21, 4.5-22", without="shuffle")
scene("12", "sent again with another branch, after a refusal", ANSWERED + """
    5     BYE br=one
    5.02  403:BYE br=one
    9     BYE br=two
    9.02  200:BYE br=two
""", "1-9", "1.05-5")
scene("7 8", "an ACK of an INVITE of which only the CANCEL was seen", """
    0     CANCEL br=two seen=0.3
    0.1   INVITE br=one seen=0
    0.2   ACK br=two
""", "", "", without="wire shuffle")
scene("3 K1", "the answer comes before its INVITE, whose CSeq is that of the refused one", """
    0     INVITE from=sip:9999@sip.canyan.io
    0.1   407 from=sip:9999@sip.canyan.io
    0.15  NACK from=sip:9999@sip.canyan.io
    1     200 br=second seen=2
    1.1   INVITE br=second seen=1
    2.05  ACK
    5     BYE
    5.02  200:BYE
""", "2-5", without="shuffle")
scene("12 K7", "the proxy answers the challenge of a BYE, all in the wrong order", ANSWERED + """
    6     407:BYE c=3 br=BYE2r seen=6.02
    6.1   200:BYE c=4 br=BYE2r
    6.2   BYE c=2 seen=6
""", "1-6")
scene("1 19", "a re-INVITE and the answer before the INVITE", """
    0     reINVITE c=1 br=other seen=0.6
    0.1   200 seen=1
    0.2   INVITE seen=0
    1.05  ACK
    5     BYE
    5.02  200:BYE
""", "1-5")
# fmt: on


# How they are played


def wire(lines: list[Line]) -> list[Arrival]:
    """The messages once more as they leave the proxy, or come to it."""
    seen = []
    for line in lines:
        near = line.forwarded() if line.status else line
        pair = [line.beyond(), near] if line.status else [near, line.beyond()]
        seen += [copy.arrival() for copy in pair]
    return seen


def compact(lines: list[Line]) -> list[Arrival]:
    """Compact names, odd case, blanks before colons, folded lines (RFC 3261 7.3)."""
    return [line.arrival(COMPACT.sub(_shorten, line.payload())) for line in lines]


COMPACT = re.compile(
    rb"(?m)^(Via|From|To|Call-ID|CSeq|Session-Expires|Max-Forwards|Content-Length): "
)
SHORT = {
    b"Via": b"V",
    b"From": b"f",
    b"To": b"T",
    b"Call-ID": b"i",
    b"CSeq": b"cseq",
    b"Session-Expires": b"x",
    b"Max-Forwards": b"mAX-forwards",
    b"Content-Length": b"l",
}


def _shorten(name: re.Match[bytes]) -> bytes:
    fold = b"\r\n\t" if name[1] in (b"Call-ID", b"Max-Forwards", b"Session-Expires") else b""
    return SHORT[name[1]] + b" :" + fold


def segments(lines: list[Line]) -> list[Arrival]:
    """SIP over TCP without assembly: what comes within 20 ms is one payload, with keep-alives."""
    seen: list[Arrival] = []
    group: list[Line] = []
    for line in [*lines, None]:
        if group and (line is None or line.time - group[0].time > 0.0201):
            payload = b"\r\n\r\n".join(x.payload() for x in group)
            seen.append(group[0].arrival(b"\r\n\r\n" + payload + b"\r\n", protocol=6))
            group = []
        if line is not None:
            group.append(line)
    return seen


def without_time(lines: list[Line]) -> list[Arrival]:
    """Stamps that are none: an uptime, or the year 2000."""
    return [
        line.arrival(time_us=round(line.time * 1_000_000) + (index % 2) * 946_684_800_000_000)
        for index, line in enumerate(lines)
    ]


VIEWS: dict[str, Callable[[list[Line]], list[Arrival]]] = {
    "both": scenes.arrivals,
    "double": lambda lines: [x for x in scenes.arrivals(lines) for _ in (1, 2)],
    "wire": wire,
    "far": lambda lines: [line.beyond().arrival() for line in lines],
    "compact": compact,
    "segments": segments,
    "old": lambda lines: [line.old_arrival() for line in lines],
    "no-time": without_time,
}


def is_seen(view: str, lines: list[Line]) -> bool:
    """Whether a view can show a scene as it is."""
    named = {name for line in lines for name in line.options}
    if view in ("wire", "far"):
        return "hop" not in named
    if view == "segments":
        return not named & {"seen", "corr"}
    return not (view == "old" and "corr" in named) and not (view == "no-time" and "seen" in named)


def kind(line: Line) -> tuple[Any, ...]:
    """Alike for a message and its retransmissions, and for answers of two forks.

    Begin is reported at once at the first copy that comes, so these do not overtake one another.
    """
    options = [line.get(name, "") for name in ("id", "tag", "c", "callee", "cap")]
    return (line.what, *options)


def shuffled(lines: list[Line], seed: int) -> list[Arrival]:
    """The messages with delays within the reorder window."""
    chance = random.Random(seed)
    queues: dict[Any, list[Line]] = {}
    for line in lines:
        queues.setdefault(kind(line), []).append(line)
    seen = []
    for alike in queues.values():
        times = sorted(line.time + chance.uniform(0, LATE) for line in alike)
        seen += [line.arrival()._replace(time=at) for at, line in zip(times, alike, strict=True)]
    return sorted(seen, key=lambda arrival: arrival.time)


def charged(events: list[agent.RatingEvent]) -> list[tuple[float, float | None, str, str]]:
    """(begin, end, accounts, what gave the begin) of each call, by begin; seconds."""
    found = []
    for tag, told in pure.by_tag(events).items():
        kinds = [event.kind for event in told]
        assert kinds in (["begin"], ["begin", "end"]), (tag, kinds)
        times = [round(event.time / 1_000_000 - scenes.UNIX, 3) for event in told]
        body = json.loads(told[0].body)
        who = f"{body.get('account_tag')}>{body.get('destination_account_tag')}"
        assert len({(x.account_tag, x.destination_account_tag) for x in told}) == 1
        found.append((times[0], times[1] if times[1:] else None, who, told[0].reason))
    return sorted(found, key=lambda call: call[0])


def expected(right: str) -> list[tuple[float, float | None, str]]:
    calls = []
    for text in filter(None, right.split(", ")):
        times, _, who = text.partition(" ")
        begin, _, end = times.partition("-")
        calls.append((float(begin), float(end) if end else None, who or "2000>2001"))
    return sorted(calls, key=lambda call: call[0])


def faults(
    events: list[agent.RatingEvent], right: str, acks: list[float] | None = None
) -> list[str]:
    """What is wrong; `acks` are times at which a call may begin whose ACK overtook all replies."""
    got, want = charged(events), expected(right)
    if len(got) != len(want):
        return [f"{got}, expected {want}"]
    wrong = []
    for (begin, end, who, reason), (first, last, whose) in zip(got, want, strict=True):
        overtaken = reason == "ack" and any(abs(begin - time) < 0.001 for time in acks or ())
        right_end = end == last if None in (end, last) else abs(end - last) <= TOLERANCE  # type: ignore[operator]
        if overtaken and last is not None and abs(last - first) < 0.001:
            right_end = end == begin  # rule 9: an end at the same time
        right_begin = abs(begin - first) <= TOLERANCE or overtaken
        if not right_begin or not right_end or who != whose:
            wrong.append(f"{got}, expected {want}")
    return wrong


def play(one: Scene, arrivals: list[Arrival], restart: int = 0) -> pure.Core:
    core = pure.Core(pure.settings(**one.options), one.routes, scenes.UNIX, restart)
    lines = scenes.read(one.text)
    last = max([arrival.time for arrival in arrivals] + [line.time for line in lines])
    core.play(arrivals, last - max(arrival.time for arrival in arrivals) + pure.SETTLED)
    return core


def cases(mode: str) -> list[Any]:
    found = [x for x in SCENES if mode in x.modes and is_seen(mode, scenes.messages(x.text))]
    return [pytest.param(x, id=f"{x.rules.replace(' ', '+')}: {x.name}") for x in found]


@pytest.mark.parametrize(
    ("view", "one"),
    [
        pytest.param(view, *case.values, id=f"{view}: {case.id}")
        for view in VIEWS
        for case in cases(view)
    ],
)
def test_scene(view: str, one: Scene) -> None:
    lines = scenes.messages(one.text)
    assert faults(play(one, VIEWS[view](lines)).events, one.right) == []
    requests = [line for line in lines if not line.status]
    # Behind the proxy the INVITE has the URI of an ACK to a 2xx: without replies all are doubtful.
    if one.requests is not None and requests and view != "far":
        assert faults(play(one, VIEWS[view](requests)).events, one.requests) == []


@pytest.mark.parametrize("one", cases("restart"))
def test_scene_with_a_restart_after_every_message(one: Scene) -> None:
    arrivals = scenes.arrivals(scenes.messages(one.text))
    assert faults(play(one, arrivals, restart=1).events, one.right) == []


@pytest.mark.parametrize("one", cases("shuffle"))
def test_scene_in_any_order(one: Scene) -> None:
    lines = scenes.messages(one.text)
    acks = [line.stamp / 1_000_000 - scenes.UNIX for line in lines if line.what == "ACK"]
    for seed in range(4 * TIMES):
        core = play(one, shuffled(lines, seed), restart=seed % 2 * ("restart" in one.modes))
        assert faults(core.events, one.right, acks) == [], seed


# Rule 5, K11: what is written, and the number or account that rates read.
NUMBERS = [
    ("tel:+52-33.1234(5678)", "tel:+523312345678"),
    ("tel:+523312345678;phone-context=example.com", "tel:+523312345678"),
    ("TEL:+52-33", "tel:+5233"),
    ("sip:+52-33-1234@sip.canyan.io;user=phone", "sip:+52331234@sip.canyan.io"),
    ("sip:(0039)06.1234@sip.canyan.io;USER=Phone", "sip:0039061234@sip.canyan.io"),
    ("sip:%2B39061234@sip.canyan.io", "sip:+39061234@sip.canyan.io"),
    ("sip:%2b39061234@sip.canyan.io;user=phone", "sip:+39061234@sip.canyan.io"),
    ("sip:%32001@sip.canyan.io", "sip:2001@sip.canyan.io"),
    ("sip:+39061234;npdi=yes@sip.canyan.io", "sip:+39061234@sip.canyan.io"),
    ("sips:2001@SIP.Canyan.IO:5061", "sips:2001@sip.canyan.io"),
    ("sip:anne-marie@sip.canyan.io", "sip:anne-marie@sip.canyan.io"),
    ("sip:a%40b@sip.canyan.io", "sip:a%40b@sip.canyan.io"),
]


@pytest.mark.parametrize(("written", "read"), NUMBERS)
@pytest.mark.parametrize("callee", [False, True])
def test_numbers_as_rates_read_them(written: str, read: str, callee: bool) -> None:
    party = "dest" if callee else "from"
    text = ANSWERED.replace("INVITE", f"INVITE {party}={written}") + "5 BYE\n5.02 200:BYE"
    core = pure.Core(
        pure.settings(), "- account: [from]\n  destination_account: [to]\n", scenes.UNIX
    )
    events = core.play(scenes.arrivals(scenes.messages(text)))
    body = json.loads(events[0].body)
    assert body["destination" if callee else "source"] == read
    account = body["destination_account_tag" if callee else "account_tag"]
    assert account == read.partition(":")[2].partition("@")[0].replace("%40", "@")


# Rule 5: several identities in one header; the account that is charged.
IDENTITIES = [
    ("P-Asserted-Identity: <tel:+39061234>, <sip:3000@sip.canyan.io>", "3000"),
    ('P-Asserted-Identity: "A, B <x>" <sip:3000@sip.canyan.io>', "3000"),
    ("p-ASSERTED-identity : sip:3000@SIP.canyan.io;user=phone", "3000"),
    ("P-Asserted-Identity: <sip:3000@elsewhere.example>", "2000"),
    ('History-Info: <sip:3000@sip.canyan.io>;index=1, "x, <y>" <sip:2001@x.example>;index=1.1',
     "3000"),
]  # fmt: skip


@pytest.mark.parametrize(("header", "account"), IDENTITIES)
def test_identity_of_the_answered_attempt(header: str, account: str) -> None:
    text = """
        0     INVITE h="P-Asserted-Identity: <sip:9999@sip.canyan.io>"
        0.1   407
        1     INVITE c=2
        2     200 c=2
    """
    lines = scenes.messages(text)
    name, _, value = header.partition(":")
    lines[2].headers.append((name, value.strip()))
    core = pure.Core(pure.settings(), unix=scenes.UNIX)
    assert core.play([x.arrival() for x in lines])[0].account_tag == account


# Rule 4, K17: what is one payload, and what becomes of the call.
def test_three_messages_of_a_segment() -> None:
    lines = scenes.messages("0 INVITE\n1 183\n1 200\n1.05 ACK\n5 BYE\n5.02 200:BYE")
    payloads = [line.payload() for line in lines]
    body = b"v=0\r\n\r\nBYE sip:x SIP/2.0\r\n"
    payloads[2] = payloads[2].replace(b"Length: 0", b"Length: %d" % len(body)) + body
    keep_alive = b"\r\n\r\n"
    arrivals = [
        lines[0].arrival(keep_alive + payloads[0] + keep_alive, protocol=6),
        lines[2].arrival(payloads[1] + keep_alive + payloads[2] + payloads[3], protocol=6),
        Arrival(4.0, hepbuild.hep3(keep_alive, protocol=6, time_us=lines[3].stamp)),
        lines[4].arrival(payloads[4] + payloads[5], protocol=6),
    ]
    core = pure.Core(pure.settings(), unix=scenes.UNIX)
    assert faults(core.play(arrivals), "1-5") == []


@pytest.mark.parametrize("kept", [0, 1, 40])
def test_the_last_message_of_a_segment_is_cut(kept: int) -> None:
    """A cut body matters to nobody; a cut head is no message, and those before it count."""
    lines = scenes.messages("0 INVITE\n1 200\n1.05 ACK\n5 BYE\n5.02 200:BYE")
    body = b"v=0\r\n" * 20
    long = lines[1].payload().replace(b"Length: 0", b"Length: 9999") + body[:kept]
    arrivals = [
        lines[0].arrival(),
        lines[1].arrival(lines[0].payload() + long, protocol=6),
        lines[2].arrival(),
        lines[3].arrival(lines[3].payload() + lines[4].payload()[:kept], protocol=6),
        lines[4].arrival(),
    ]
    core = pure.Core(pure.settings(), unix=scenes.UNIX)
    assert faults(core.play(arrivals), "1-5") == []


def test_behind_the_message_of_a_datagram_nothing_counts() -> None:
    """Or a caller could write an end there that no proxy reads."""
    lines = scenes.messages(ANSWERED + "2 INFO\n5 BYE\n9 200:BYE")
    hidden = lines[3].payload() + lines[4].payload() + lines[5].payload()
    arrivals = [*(x.arrival() for x in lines[:3]), lines[3].arrival(hidden, protocol=17)]
    core = pure.Core(pure.settings(), unix=scenes.UNIX)
    assert faults(core.play(arrivals), "1-") == []


def test_every_rule_and_every_kind_has_a_scene() -> None:
    named = {name for x in SCENES for name in x.rules.split()}
    named |= set(re.findall(r"K\d+", " ".join(ELSEWHERE))) | set(
        re.findall(r"(?<!K)\b\d+\b", " ".join(ELSEWHERE))
    )
    assert named >= {str(number) for number in range(1, 21)} | {f"K{n}" for n in range(1, 18)}


# What is no scene, for its rule is about numbers, stamps or payloads.
ELSEWHERE = ("5 K11", "20 K12", "4 K17")
