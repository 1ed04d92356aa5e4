"""Raw HTTP/1.1 requests and the answers they may get: tables for the wire tests, seeds for fuzzing.

A row says why (9110 and 9112 are RFCs, a CVE is a hole that others had), then the bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Union

Row = tuple[Union[str, bytes], ...]


class Case(NamedTuple):
    """One request as it goes over the wire, and the statuses that its first answer may have."""

    name: str
    sent: bytes
    answers: tuple[int, ...]
    why: str


CHAT = b"/v1/chat/completions"
HOST = b"Host: 127.0.0.1\r\n"
EVIL = b"Host: evil.example\r\n"


def post(fields: bytes, body: bytes, path: bytes = CHAT, version: bytes = b"1.1") -> bytes:
    """A chat request whose framing is up to the caller: `fields` are whole lines."""
    head = b"POST " + path + b" HTTP/" + version + b"\r\n" + HOST
    return head + b"Content-Type: application/json\r\n" + fields + b"\r\n" + body


def get(host: bytes = b"127.0.0.1", target: bytes = b"/health", fields: bytes = b"") -> bytes:
    return b"GET " + target + b" HTTP/1.1\r\nHost: " + host + b"\r\n" + fields + b"\r\n"


def saying(text: bytes) -> bytes:
    return b'{"model":"m","messages":[{"role":"user","content":"' + text + b'"}]}'


def whole(text: bytes) -> bytes:
    return post(b"Content-Length: %d\r\n" % len(saying(text)), saying(text))


def chunk(data: bytes) -> bytes:
    return b"%x\r\n" % len(data) + data + b"\r\n"


def rows(table: list[Row]) -> Iterator[tuple[str, bytes, str]]:
    """A name, the bytes and the reason for each of a table's byte strings."""
    for why, *values in table:
        for value in values:
            assert isinstance(why, str)
            assert isinstance(value, bytes)
            name = ascii(value)[2:-1] or "(empty)"
            yield name if len(name) < 50 else f"{name[:25]}...{name[-25:]}", value, why


# Every doubtful request carries a body that would be good if the doubt were decided in its favour,
# and SMUGGLED stands right behind it. The backend shows which of the two was run: neither may be.
BODY = saying(b"first")  # 60 bytes, 3c in hex
SMUGGLED = whole(b"smuggled")
LENGTH = b"Content-Length: 60\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
LAST = b"0\r\n\r\n"
CHUNKS = b"3c\r\n" + BODY + b"\r\n" + LAST

# ---- Content-Length: 1*DIGIT, once (9110 §8.6, 9112 §6.3); Python's int() takes most of these ----

BAD_LENGTHS: list[Row] = [
    ("CVE-2023-47627 aiohttp: int() takes a sign", b"+60", b"-60", b"-0"),
    ("other notations of numbers", b"6_0", b"60.0", b"60e0", b"0x3c", b"0o74", b"3c", b"many"),
    ("any decimal digit of Unicode", b"\xef\xbc\x96\xef\xbc\x90", b"\xd9\xa6\xd9\xa0"),
    ("latin-1 superscripts pass str.isdigit()", b"60\xb2", b"\xb9"),
    ("str.strip() eats these, OWS is SP and HTAB", b"\xa060", b"60\xa0", b"60\x85", b"60\x1f"),
    ("bytes.strip() eats these", b"\x0b60", b"60\x0b", b"60\x0c"),
    ("9110 §5.5: NUL is dangerous", b"60\x00", b"\x0060"),
    ("9112 §2.2, CVE-2023-30589 llhttp: CR is no line end", b"60\rX: y", b"60\r"),
    ("http-garden: an empty value read as 0", b"", b" \t "),
    ("9112 §6.3: a list of the same may be refused, so it is", b"60, 60", b"60,60"),
    ("9112 §6.3: MUST be refused", b"60, 0", b"0, 60", b"60,", b",60"),
    ("not one number", b"6 0", b'"60"', b"60;a=b", b"60 bytes"),
    ("9112 §5.2: obs-fold in framing", b"\r\n 60", b"6\r\n 0"),
]
HUGE_LENGTHS: list[Row] = [
    ("past 18 digits, whatever they say", b"1" + b"0" * 18, b"0" * 17 + b"60"),
    ("2**64 + 60 wraps to 60 elsewhere", b"18446744073709551676"),
    ("CVE-2020-10735: int() raises past 4300 digits", b"9" * 5000),
]
DOUBLE_LENGTHS: list[Row] = [
    ("9112 §6.3: twice the same may be refused, so it is", LENGTH + LENGTH),
    ("9112 §6.3: MUST be refused", LENGTH + b"Content-Length: 0\r\n"),
    ("9112 §6.3: MUST be refused", b"Content-Length: 0\r\n" + LENGTH),
    ("names have no case", LENGTH + b"content-length: 1\r\n", b"CONTENT-LENGTH: 1\r\n" + LENGTH),
    ("an empty one differs", LENGTH + b"Content-Length:\r\n"),
    ("the third differs", LENGTH + b"X: y\r\n" + LENGTH + b"Content-Length: 7\r\n"),
    ("9112 §5.1: MUST be 400", b"Content-Length : 60\r\n", b"Content-Length\t: 60\r\n"),
    ("9112 §5.2: a folded line, never a field", b" Content-Length: 60\r\n"),
]

# ---- Transfer-Encoding: exactly `chunked`, once, never beside Content-Length (9112 §6.1) ---------

BAD_CODINGS: list[Row] = [
    ("http-garden: ends or starts with chunked", b"xchunked", b"chunkedx", b"chunke"),
    ("9112 §7: MUST NOT apply chunked twice", b"chunked, chunked", b"chunked,chunked"),
    ("CVE-2024-1135 gunicorn: no parameter", b"chunked;q=1", b"chunked; a=b"),
    ("CVE-2019-18277 HAProxy: no white space", b"\x0bchunked", b"chunked\x0b", b"\x0cchunked"),
    ("str.strip() eats these", b"\xa0chunked", b"chunked\x85"),
    ("9110 §5.5 and CVE-2023-30589 llhttp", b"chunked\x00", b"chunked\rX: y"),
    ("gone since RFC 7230; a length must not win", b"identity", b"identity, chunked"),
    ("CVE-2024-6827 gunicorn; 9112 §6.3: chunked is not last", b"chunked, identity"),
    ("codings that we do not know", b"gzip", b"gzip, chunked", b"chunked, gzip"),
    ("no coding, or an empty list member", b"", b",chunked", b"chunked,"),
    ("not the token", b'"chunked"', b"chun ked", b"chun\xe2\x84\xaaed", b"\r\n chunked"),
]
MIXED_FRAMING: list[Row] = [
    ("9112 §6.1: CL.TE and TE.CL", LENGTH + CHUNKED, CHUNKED + LENGTH),
    ("9112 §6.1: the body as a request", b"Content-Length: 0\r\n" + CHUNKED),
    ("9112 §7: MUST NOT apply chunked twice", CHUNKED + CHUNKED),
    ("TE.TE", CHUNKED + b"Transfer-Encoding: x\r\n", b"Transfer-Encoding: x\r\n" + CHUNKED),
    ("9112 §5.1: MUST be 400", LENGTH + b"Transfer-Encoding : chunked\r\n"),
    ("not a field name", LENGTH + b"Transfer-Encoding\x0b: chunked\r\n"),
    ("9112 §5.2: a folded line, never a field", b" " + CHUNKED + LENGTH),
    ("9112 §2.2, CVE-2023-30589 llhttp", b"X: y\r" + CHUNKED + LENGTH),
    ("a line end or not: 400 either way", b"X: y\n" + CHUNKED + LENGTH),
]

# ---- Chunks (9112 §7.1) --------------------------------------------------------------------------

BAD_SIZES: list[Row] = [  # before CRLF, the data and all the rest
    ("1*HEXDIG, at least one", b"", b";a=b"),
    ("CVE-2023-47627 aiohttp: int(x, 16) takes these", b"+3c", b"-3c", b"0x3c", b"0X3c", b"3_c"),
    ("int() strips", b" 3c", b"3c ", b"\t3c", b"3c\t", b"3c\x0b", b"\xa03c"),
    ("any decimal digit of Unicode, str.isdigit()", b"\xef\xbc\x903c", b"\xb2"),
    ("a valid prefix is not the size", b"3c.0", b"3cg", b"3c 0", b"3c,", b"3ch", b"3c\x00"),
    ("CR CR LF", b"3c\r"),
    ("CVE-2025-55315 Kestrel: CR or LF in an extension", b"3c;a\nb", b"3c;a\rb", b"3c;\n"),
    ("9110 §5.5; quotes end with their line", b"3c;a\x00b", b'3c;a="\r\n"'),
]
HUGE_SIZES: list[Row] = [
    ("2**64 + 60 wraps to 60 elsewhere", b"1000000000000003c"),
    ("-1 and the smallest number of 64 bits", b"F" * 16, b"8" + b"0" * 15),
    ("bounded, and no big numbers", b"9" * 5000),
    ("CVE-2023-39326 Go: extensions are bounded", b"3c;" + b"a" * 200_000),
]
BAD_SIZE_ENDS: list[Row] = [  # in place of CRLF
    ("CVE-2025-22871 Go, 9112 erratum 7633: no lone LF", b"\n"),
    ("no line ends either", b"\r", b"\n\r"),
]
BAD_DATA_ENDS: list[Row] = [  # in place of CRLF
    ("CVE-2025-22871 Go: CRLF and nothing else", b"", b"\n", b"\r", b"\n\r"),
    ("CVE-2025-43859 h11: two bytes of any kind", b"XX", b"  "),
    ("one byte more than the size", b" \r\n"),
]
BAD_LASTS: list[Row] = [  # in place of the last chunk
    ("no size is not zero", b"\r\n\r\n", b";a=b\r\n\r\n"),
    ("int() gives 0", b"+0\r\n\r\n", b"-0\r\n\r\n", b"0x0\r\n\r\n", b"0_0\r\n\r\n"),
    ("CVE-2025-22871 Go: lone LFs", b"0\n\n", b"0\n\r\n", b"0\r\n\n"),
    ("what follows is no trailer field", b"0\r\n", b"0\r\nXX", b"0\r\njunk\r\n\r\n"),
    ("9110 §5.5, 9112 §2.2", b"0\r\nX-T: a\x00b\r\n\r\n", b"0\r\nX-T: a\rb\r\n\r\n"),
]


def _refused() -> list[Case]:
    """All doubtful framings: the message itself, then SMUGGLED on the same connection."""
    cases = []

    def add(kind: str, table: list[Row], fields: bytes, body: bytes, *answers: int) -> None:
        for name, value, why in rows(table):
            sent = post(fields.replace(b"@", value), body.replace(b"@", value)) + SMUGGLED
            cases.append(Case(f"{kind} {name}", sent, answers, why))

    coding, good = b"Transfer-Encoding: @\r\n", b"\r\n" + BODY + b"\r\n" + LAST
    add("length", BAD_LENGTHS, b"Content-Length: @\r\n", BODY, 400)
    add("length", HUGE_LENGTHS, b"Content-Length: @\r\n", BODY, 400, 413)
    add("fields", DOUBLE_LENGTHS, b"@", BODY, 400)
    add("coding", BAD_CODINGS, coding, CHUNKS, 400, 501)
    add("length and coding", BAD_CODINGS, LENGTH + coding, CHUNKS, 400, 501)
    add("fields", MIXED_FRAMING, b"@", CHUNKS, 400, 501)
    add("size", BAD_SIZES, CHUNKED, b"@" + good, 400)
    add("size", HUGE_SIZES, CHUNKED, b"@" + good, 400, 413)
    add("size end", BAD_SIZE_ENDS, CHUNKED, b"3c@" + good[2:], 400)
    add("data end", BAD_DATA_ENDS, CHUNKED, chunk(BODY)[:-2] + b"@" + LAST, 400)
    add("last", BAD_LASTS, CHUNKED, chunk(BODY) + b"@", 400)
    old = post(CHUNKED + b"Connection: keep-alive\r\n", CHUNKS, version=b"1.0") + SMUGGLED
    return [*cases, Case("coding in 1.0", old, (400, 501), "9112 §6.1: faulty framing")]


REFUSED = _refused()

GOOD_LENGTHS: list[Row] = [
    ("9112 §6.2", LENGTH),
    ("9112 §5.1: OWS is SP and HTAB, and optional", b"cOntent-lEngth:\t 60 \t\r\n"),
    ("9112 §5.1: OWS is SP and HTAB, and optional", b"Content-Length:60\r\n"),
    ("1*DIGIT, up to 18 of them", b"Content-Length: 000000000000000060\r\n"),
]
GOOD_CHUNKS: list[Row] = [
    ("9112 §7.1", CHUNKS, b"".join(chunk(bytes([byte])) for byte in BODY) + LAST),
    ("HEXDIG has both cases, up to 16 of them", CHUNKS.replace(b"3c", b"00000000000003C")),
    ('last-chunk = 1*"0"', CHUNKS.replace(LAST, b"000\r\n\r\n")),
    ("9112 §7.1.1: MUST ignore extensions", CHUNKS.replace(b"3c", b"3c;a=b;c")),
    ("9112 §7.1.1: MUST ignore extensions", CHUNKS.replace(LAST, b"0;a\r\n\r\n")),
    ("9110 §5.6.4: quoted strings", CHUNKS.replace(b"3c", b'3c;a="x;\\"y"')),
    ("short ones are fine", CHUNKS.replace(b"3c", b"3c;" + b"a" * 200)),
    ("9112 §7.1.2: trailers are discarded", CHUNKS[:-2] + b"X-T: 1\r\nX-U: 2\r\n\r\n"),
]
SERVED = [  # the backend gets BODY, and the connection goes on
    *(Case(name, post(fields, BODY), (200,), why) for name, fields, why in rows(GOOD_LENGTHS)),
    *(Case(name, post(CHUNKED, body), (200,), why) for name, body, why in rows(GOOD_CHUNKS)),
    Case("case", post(b"transfer-encoding:ChUnKeD \r\n", CHUNKS), (200,), "codings have none"),
    Case("blank line first", b"\r\n" + post(LENGTH, BODY), (200,), "9112 §2.2: SHOULD ignore it"),
]

CUT_CHUNKS = [CHUNKS[:-end] for end in (1, 2, 4, 5, 6, 7, 30, len(BODY) + 6, len(CHUNKS))]
CUT = [  # then EOF: closed, perhaps with a 400; never executed (9112 §8)
    Case("one byte", post(LENGTH, BODY[:-1]), (400, 408), "9112 §8"),
    Case("no body", post(LENGTH, b""), (400, 408), "9112 §8"),
    Case("half a head", post(LENGTH, b"")[:-2], (400, 408), "9112 §8"),
    *(
        Case(f"-{len(CHUNKS) - len(c)}", post(CHUNKED, c), (400, 408), "9112 §8")
        for c in CUT_CHUNKS
    ),
]


def _early() -> list[Case]:
    """Bodies nobody asked for, each one a whole request: read away, or the connection is closed."""
    length = b"Content-Length: %d\r\n" % len(SMUGGLED)
    chunks = chunk(SMUGGLED) + LAST
    ignored, gone, wrong, foreign = (200, 400, 413), (404,), (405, 501), (403,)
    early = [
        ("GET with a body", get(fields=length) + SMUGGLED, ignored, "9110 §9.3.1"),
        ("GET chunked", get(fields=CHUNKED) + chunks, ignored, "9110 §9.3.1"),
        ("404", post(length, SMUGGLED, b"/nowhere"), gone, "9112 §9.3: read it or close"),
        ("404 chunked", post(CHUNKED, chunks, b"/nowhere"), gone, "9112 §9.3"),
        ("405", post(length, SMUGGLED, b"/health"), wrong, "9110 §15.5.6"),
        ("405 chunked", post(CHUNKED, chunks, b"/health"), wrong, "9110 §15.5.6"),
        ("GET of a POST", get(target=CHAT, fields=length) + SMUGGLED, wrong, "9110 §15.5.6"),
        ("PUT", b"PUT" + post(length, SMUGGLED)[4:], wrong, "9110 §15.5.6"),
        ("DELETE", b"DELETE" + post(length, SMUGGLED)[4:], wrong, "9110 §15.5.6"),
        ("no method", b"FROBNICATE" + post(length, SMUGGLED)[4:], wrong, "9110 §9.1"),
        ("403", get(b"evil.example", fields=length) + SMUGGLED, foreign, "9112 §9.3"),
    ]
    return [Case(*case) for case in early]


EARLY = _early()

# ---- Host (9110 §7.2; rebinding: CVE-2024-28224 Ollama) ------------------------------------------

ALLOWED_HOSTS: list[Row] = [
    ("an IP literal has no DNS record to turn", b"127.0.0.1", b"127.8.9.10:11500", b"0.0.0.0"),
    ("on any port", b"127.0.0.1:1", b"192.168.1.20:11500", b"localhost:65535"),
    ("IPv6 in brackets", b"[::1]", b"[::1]:11500", b"[fe80::1]:80", b"[::FFFF:127.0.0.1]"),
    ("names have no case", b"localhost", b"LocalHost:8080"),
    ("RFC 6761 §6.3: below localhost", b"app.localhost", b"a.b.LOCALHOST:3000"),
    ("containers reach their host so; never public", b"host.docker.internal:11500", b"x.internal"),
]
FOREIGN_HOSTS: list[Row] = [
    ("its owner can point it at 127.0.0.1", b"evil.example", b"evil.example:11500"),
    ("prefix", b"127.0.0.1.evil.example", b"127.0.0.1.nip.io:11500", b"localhost.evil.example"),
    ("prefix", b"localhostevil", b"internal.evil.example"),
    ("suffix without a dot", b"evillocalhost", b"evil-localhost", b"xinternal", b"internal"),
    ("only this machine's own name counts below .local", b"evil.local"),
    ("a dotless name counts only on a bind outside loopback", b"some-other-box"),
]
HALF_HOSTS: list[Row] = [  # 403 as foreign or 400 as malformed, never served
    ("ollama PR 17721: an empty name is never local", b"", b":11500", b":", b" "),
    ("an empty label", b".localhost", b".internal", b"127.0.0.1."),
    ("inet_aton() forms", b"127.1", b"2130706433", b"0x7f000001", b"0177.0.0.1"),
    ("brackets", b"::1", b"[::1", b"::1]", b"[localhost]", b"[127.0.0.1]", b"[]", b"[::1]x"),
    ("junk behind the bracket", b"[::1]evil.example", b"[::1].evil.example:80", b"[::1]]:80"),
    ("a port is digits", b"localhost:port", b"localhost:+80", b"localhost:80:80"),
    ("no blanks", b"localhost evil.example", b"localhost\tevil.example", b"evil localhost"),
    ("no lists", b"localhost,evil.example", b"evil.example,localhost", b"localhost;evil"),
    ("no path", b"localhost/evil.example", b"evil.example/.localhost", b"http://localhost"),
    ("no more of a URL", b"evil.example#.localhost", b"evil.example?.localhost"),
    ("WHATWG parsers differ", b"evil.example\\.localhost", b"loc%61lhost"),
    ("no user", b"localhost@evil.example", b"evil.example@localhost", b"evil:80@localhost"),
    ("a Cyrillic o; NFKC makes it an l", b"l\xd0\xbecalhost", b"\xef\xbd\x8cocalhost"),
    ("strip() eats these", b"localhost\xa0", b"localhost\x0b"),
    ("no patterns", b"*", b"*.localhost"),
    ("long", b"a" * 3000 + b".evil.example", b"localhost." * 300 + b"evil.example"),
]
HOSTS = [
    Case(name, get(value), answers, why)
    for table, answers in (
        (ALLOWED_HOSTS, (200,)),
        (FOREIGN_HOSTS, (403,)),
        (HALF_HOSTS, (400, 403)),
    )
    for name, value, why in rows(table)
]
BAD_HOST_FIELDS = [  # 400 and closed (9112 §3.2)
    Case("missing", b"GET /health HTTP/1.1\r\n\r\n", (400,), "MUST be 400"),
    Case("twice", get(fields=EVIL), (400,), "MUST be 400"),
    Case("twice, evil first", get(b"evil.example", fields=HOST), (400,), "MUST be 400"),
    Case("twice the same", get(fields=HOST), (400,), "MUST be 400"),
    Case("twice, other case", get(fields=EVIL.upper()), (400,), "MUST be 400"),
    Case("NUL", get(b"localhost\x00.evil.example"), (400,), "9110 §5.5"),
    Case("space-colon", b"GET /health HTTP/1.1\r\nHost : ::1\r\n\r\n", (400,), "9112 §5.1"),
    Case("twice, absolute", get(target=b"http://[::1]/health", fields=HOST), (400,), "MUST be 400"),
    Case("missing, absolute", b"GET http://[::1]/health HTTP/1.1\r\n\r\n", (400,), "MUST be 400"),
]
ABSOLUTE = [  # 9112 §3.2.2: the authority of the target counts, the Host field does not
    Case(target.decode(), get(host, target), answers, why)
    for target, host, answers, why in (
        (b"http://localhost:11500/health", b"localhost", (200,), "MUST be accepted"),
        (b"HTTP://LOCALHOST/health", b"localhost", (200,), "schemes and names have no case"),
        (b"http://127.0.0.1/health", b"evil.example", (200,), "Host is ignored"),
        (b"http://evil.example/health", b"127.0.0.1", (403,), "Host is ignored"),
        (b"http://evil.example:11500/health", b"127.0.0.1", (403,), "Host is ignored"),
        (b"http://localhost@evil.example/health", b"localhost", (400, 403), "9110 §4.2.4: no user"),
        (b"http://evil.example@localhost/health", b"localhost", (400, 403), "9110 §4.2.4: no user"),
        (b"http:///health", b"localhost", (400, 403), "9110 §4.2.1: an empty host is invalid"),
        (b"http://:80/health", b"localhost", (400, 403), "9110 §4.2.1: an empty host is invalid"),
        (b"http://evil.example\\@localhost/health", b"localhost", (400, 403), "parsers differ"),
    )
]

# ---- Everything by name, for the fuzz tests ------------------------------------------------------

GROUPS = {
    "refused": REFUSED,
    "served": SERVED,
    "cut": CUT,
    "early": EARLY,
    "host": HOSTS,
    "host fields": BAD_HOST_FIELDS,
    "target": ABSOLUTE,
}
REQUESTS = {f"{group}: {case.name}": case.sent for group, cases in GROUPS.items() for case in cases}
REQUESTS["pipelined"] = get() + whole(b"first") + get()
REQUESTS["expect"] = post(LENGTH + b"Expect: 100-continue\r\n", BODY)
REQUESTS["preflight"] = (
    b"OPTIONS /v1/chat/completions HTTP/1.1\r\n" + HOST + b"Origin: http://localhost:5173\r\n"
    b"Access-Control-Request-Method: POST\r\nAccess-Control-Request-Private-Network: true\r\n"
    b"Access-Control-Request-Headers: authorization,content-type,x-stainless-lang\r\n\r\n"
)
