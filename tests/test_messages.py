"""Heads and bodies, pure: what is read, what is refused, and that no cut changes either."""

from __future__ import annotations

import random
from itertools import chain, combinations

import pytest

import llmq
from llmq import (
    CHUNKED,
    ERRORS,
    UNTIL_CLOSE,
    BadRequest,
    ChunkedBody,
    CloseBody,
    LengthBody,
    LlmqError,
    Request,
    ResponseHead,
    body_decoder,
    parse_fields,
    parse_host,
    parse_request_head,
    parse_response_head,
    render_chunk,
    request_length,
    response_length,
)


def check_refused(code, read, given):
    """Reading this raises the error with this code; a bad request is one by its class too."""
    with pytest.raises(BadRequest if code == "bad_request" else LlmqError) as caught:
        read(given)
    assert caught.value.code == code
    assert caught.value.status == ERRORS[code].status


# ---- Fields: one table, read in requests and in answers, and rendered again ----------------------

FIELDS = [  # lines as they come, and what they mean; None: refused
    (b"", {}),
    (b"A: b\r\n", {"a": "b"}),
    (b"A:b\r\n", {"a": "b"}),
    (b"A: \t b \t\r\n", {"a": "b"}),
    (b"A:\r\n", {"a": ""}),
    (b"A: \t\r\n", {"a": ""}),
    (b"A: b: c\r\n", {"a": "b: c"}),
    (b"A: b\tc\r\n", {"a": "b\tc"}),
    (b"A: \xe9\xff\x80\r\n", {"a": "\xe9\xff\x80"}),  # obs-text
    (b"A: \xa0b\x85\r\n", {"a": "\xa0b\x85"}),  # which str.strip() would eat
    (b"!#$%&'*+-.^_`|~09azAZ: b\r\n", {"!#$%&'*+-.^_`|~09azaz": "b"}),
    (b"A: b\r\nC: d\r\n", {"a": "b", "c": "d"}),
    (b"A: b\r\na: c\r\n", {"a": "b, c"}),
    (b"A:\r\nA: b\r\n", {"a": ", b"}),
    (b"A\r\n", None),
    (b": b\r\n", None),
    (b"A : b\r\n", None),
    (b"A\t: b\r\n", None),
    (b" A: b\r\n", None),
    (b"A: b\r\n c\r\n", None),  # obs-fold
    (b"A: b\r\n\tc\r\n", None),
    (b"A: b\nC: d\r\n", None),
    (b"A: b\rC: d\r\n", None),
    (b"A: b\r\r\n", None),
    (b"A: b\x00\r\n", None),
    (b"A: b\x0b\r\n", None),
    (b"A: b\x1f\r\n", None),
    (b"A: b\x7f\r\n", None),
    (b"A\x00: b\r\n", None),
    (b"A\xe9: b\r\n", None),
    (b"A(: b\r\n", None),
    (b"A,B: b\r\n", None),
    (b'"A": b\r\n', None),
    (b"A/B: b\r\n", None),
]
IDS = [ascii(lines)[2:-1] or "none" for lines, _ in FIELDS]


@pytest.mark.parametrize(("lines", "meaning"), FIELDS, ids=IDS)
def test_fields_mean_the_same_in_requests_answers_and_trailers(lines, meaning):
    request, answer = b"GET / HTTP/1.1\r\n" + lines, b"HTTP/1.1 200 OK\r\n" + lines
    trailers = b"0\r\n" + lines + b"\r\n"
    if meaning is None:
        with pytest.raises(BadRequest):
            parse_request_head(request + b"\r\n")
        with pytest.raises(ValueError, match="header"):
            parse_response_head(answer + b"\r\n")
        with pytest.raises(ValueError, match=r"header|CRLF"):
            ChunkedBody().feed(trailers)
        return
    assert parse_request_head(request + b"\r\n").headers == meaning
    assert parse_response_head(answer + b"\r\n").headers == meaning
    body = ChunkedBody()
    assert body.feed(trailers) == b""
    assert body.done


@pytest.mark.parametrize("lines", [lines for lines, meaning in FIELDS if meaning])
def test_what_was_read_and_rendered_again_is_read_the_same(lines):
    once = parse_fields(lines.decode("latin-1"))
    again = "".join(f"{name}: {value}\r\n" for name, value in once.items())
    assert parse_fields(again) == once


def test_no_control_character_gets_into_a_value():
    for code in range(256):
        line = b"A: b" + bytes([code]) + b"c\r\n"
        allowed = code == 9 or (code >= 32 and code != 127)
        if allowed:
            assert parse_fields(line.decode("latin-1")) == {"a": "b" + chr(code) + "c"}
        else:
            with pytest.raises(ValueError, match="header"):
                parse_fields(line.decode("latin-1"))


# ---- Request heads -------------------------------------------------------------------------------

LINES = [  # request line; method, target, minor or the error
    (b"GET / HTTP/1.1", ("GET", "/", 1)),
    (b"POST /v1/chat/completions?a=b HTTP/1.0", ("POST", "/v1/chat/completions?a=b", 0)),
    (b"GET / HTTP/1.2", ("GET", "/", 1)),  # 9110 s.2.5: understood as the highest that is known
    (b"GET / HTTP/1.9", ("GET", "/", 1)),
    (b"FROB-NICATE / HTTP/1.1", ("FROB-NICATE", "/", 1)),  # routing knows the methods
    (b"get / HTTP/1.1", ("get", "/", 1)),
    (b"OPTIONS * HTTP/1.1", ("OPTIONS", "*", 1)),
    (b"CONNECT h:443 HTTP/1.1", ("CONNECT", "h:443", 1)),
    (b"GET http://h/p HTTP/1.1", ("GET", "/p", 1)),
    (b"GET //evil.example/x HTTP/1.1", ("GET", "//evil.example/x", 1)),
    (b"GET / HTTP/2.0", "version_not_supported"),
    (b"GET / HTTP/0.9", "version_not_supported"),
    (b"PRI * HTTP/2.0", "version_not_supported"),
    (b"GET * HTTP/1.1", "bad_request"),
    (b"GET h/p HTTP/1.1", "bad_request"),
    (b"GET ftp://h/p HTTP/1.1", "bad_request"),
    (b"GET ?a=b HTTP/1.1", "bad_request"),
    (b"GET #a HTTP/1.1", "bad_request"),
    (b"GET /", "bad_request"),
    (b"GET  / HTTP/1.1", "bad_request"),
    (b"GET /  HTTP/1.1", "bad_request"),
    (b" GET / HTTP/1.1", "bad_request"),
    (b"GET / HTTP/1.1 ", "bad_request"),
    (b"GET\t/\tHTTP/1.1", "bad_request"),
    (b"GET / http/1.1", "bad_request"),
    (b"GET / HTTP/1.10", "bad_request"),
    (b"GET / HTTP/11", "bad_request"),
    (b"GET / HTTP/1.", "bad_request"),
    (b"GET / HTTP/\xb9.1", "bad_request"),
    (b"GET / HTTP/1.1\x00", "bad_request"),
    (b"GET / HTTP/1.1\rX", "bad_request"),
    (b"GET / HTTP/1.1\nA: b", "bad_request"),
    (b"GET /\x00 HTTP/1.1", "bad_request"),
    (b"GET /\x7f HTTP/1.1", "bad_request"),
    (b"GET /\xe9 HTTP/1.1", "bad_request"),
    (b"GET /a b HTTP/1.1", "bad_request"),
    (b"G(T / HTTP/1.1", "bad_request"),
    (b"G\xe9T / HTTP/1.1", "bad_request"),
    (b"\x16\x03\x01\x02", "bad_request"),  # TLS
]


def target_of(request: Request) -> str:
    return f"{request.path}?{request.query}" if request.query else request.path


@pytest.mark.parametrize(("line", "meaning"), LINES, ids=[ascii(line)[2:-1] for line, _ in LINES])
def test_request_line(line, meaning):
    head = line + b"\r\nHost: h\r\n\r\n"
    if isinstance(meaning, str):
        check_refused(meaning, parse_request_head, head)
    else:
        request = parse_request_head(head)
        assert (request.method, target_of(request), request.minor) == meaning


def test_empty_lines_before_a_request_are_skipped():
    assert parse_request_head(b"\r\n\r\nGET /x HTTP/1.1\r\n\r\n").path == "/x"


def test_head_up_to_each_limit_passes_and_one_more_does_not():
    def head(path: int = 0, fields: int = 0, value: int = 0) -> bytes:
        many = b"".join(b"X%d: y\r\n" % number for number in range(fields))
        one = b"Y: " + b"v" * (value - 3) + b"\r\n" if value else b""
        return b"GET /" + b"p" * path + b" HTTP/1.1\r\n" + many + one + b"\r\n"

    rest = len(b"GET / HTTP/1.1")
    assert len(parse_request_head(head(path=8192 - rest)).path) == 8192 - rest + 1
    check_refused("uri_too_long", parse_request_head, head(path=8192 - rest + 1))
    assert len(parse_request_head(head(fields=100)).headers) == 100
    check_refused("headers_too_large", parse_request_head, head(fields=101))
    assert len(parse_request_head(head(value=16 * 1024)).headers["y"]) == 16 * 1024 - 3
    check_refused("headers_too_large", parse_request_head, head(value=16 * 1024 + 1))


# ---- Targets and hosts ---------------------------------------------------------------------------

TARGETS = [  # of a request with `Host: field`; path, query, host that counts
    ("/", "/", "", "field"),
    ("/a?b=c", "/a", "b=c", "field"),
    ("/a?b?c", "/a", "b?c", "field"),
    ("/?", "/", "", "field"),
    ("/a#b", "/a#b", "", "field"),
    ("//other/a", "//other/a", "", "field"),
    ("/http://other/", "/http://other/", "", "field"),
    ("http://other/a?b", "/a", "b", "other"),
    ("HTTPS://Other:80/a", "/a", "", "Other:80"),
    ("http://other", "/", "", "other"),
    ("http://other?b", "/", "b", "other"),
    ("http://other/a?http://x/y", "/a", "http://x/y", "other"),
    ("http://[::1]:80/a", "/a", "", "[::1]:80"),
    ("http://user@other/a", "/a", "", "user@other"),
    ("http:///a", "/a", "", ""),
    ("http://other?b/c", "/", "b/c", "other"),  # 3986 s.3.2: the first of / ? # ends the authority
]


@pytest.mark.parametrize(("target", "path", "query", "host"), TARGETS, ids=[t[0] for t in TARGETS])
def test_target_says_the_path_and_in_absolute_form_the_host(target, path, query, host):
    request = parse_request_head(f"GET {target} HTTP/1.1\r\nHost: field\r\n\r\n".encode())
    assert (request.path, request.query, request.headers["host"]) == (path, query, host)


def test_absolute_target_makes_up_for_no_bad_host_field():
    for fields in (b"Host: a\r\nHost: b\r\n", b"Host: a b\r\n"):
        with pytest.raises(BadRequest):
            parse_request_head(b"GET http://127.0.0.1/ HTTP/1.1\r\n" + fields + b"\r\n")
    assert "host" not in parse_request_head(b"GET http://h/ HTTP/1.1\r\n\r\n").headers


GOOD_HOSTS = {
    "localhost": "localhost",
    "LocalHost:80": "localhost",
    "127.0.0.1:11500": "127.0.0.1",
    "[::1]": "[::1]",
    "[FE80::1]:80": "[fe80::1]",
    "a_b-c.d~e": "a_b-c.d~e",
    "h:": "h",
    "": "",
    ":80": "",
}
BAD_HOSTS = [
    "a b",
    "a, b",
    "a@b",
    "a/b",
    "a?b",
    "a#b",
    "a\\b",
    "a%62",
    "a:b",
    "a:-1",
    "a:+80",
    "a:80:80",
    "a:123456",
    "a:\xb9",
    "::1",
    "[::1",
    "::1]",
    "[a]",
    "[127.0.0.1]",
    "[]",
    "[::1]x",
    "[::1%lo]",
    "h\xe9",
    "h\x00",
    "h\n",
    "*",
]


@pytest.mark.parametrize("value", GOOD_HOSTS)
def test_host_is_a_name_in_lower_case_without_its_port(value):
    assert parse_host(value) == GOOD_HOSTS[value]


@pytest.mark.parametrize("value", BAD_HOSTS, ids=ascii)
def test_malformed_host_is_refused(value):
    with pytest.raises(BadRequest):
        parse_host(value)


# ---- Answers' heads ------------------------------------------------------------------------------

STATUS_LINES = [
    (b"HTTP/1.1 200 OK", (200, 1)),
    (b"HTTP/1.0 404 Not Found", (404, 0)),
    (b"HTTP/1.1 200 ", (200, 1)),
    (b"HTTP/1.1 200", (200, 1)),  # which some servers send
    (b"HTTP/1.1 599 \xe9t\xe9", (599, 1)),
    (b"HTTP/1.1 100 Continue", (100, 1)),
    (b"HTTP/1.2 200 OK", None),
    (b"HTTP/2 200", None),
    (b"HTTP/2.0 200 OK", None),
    (b"HTTP/0.9 200 OK", None),
    (b"http/1.1 200 OK", None),
    (b"HTTP/1.1  200 OK", None),
    (b"HTTP/1.1 2000 OK", None),
    (b"HTTP/1.1 20 OK", None),
    (b"HTTP/1.1 099 OK", None),
    (b"HTTP/1.1 600 OK", None),
    (b"HTTP/1.1 \xb2\xb9\xb9 OK", None),
    (b"HTTP/1.1 -20 OK", None),
    (b"HTTP/1.1 200OK", None),
    (b"HTTP/1.1 200 O\x00K", None),
    (b"HTTP/1.1 200 OK\rX: y", None),
    (b"ICY 200 OK", None),
    (b"<html>", None),
    (b"", None),
]


@pytest.mark.parametrize(
    ("line", "meaning"), STATUS_LINES, ids=[ascii(line)[2:-1] or "none" for line, _ in STATUS_LINES]
)
def test_status_line(line, meaning):
    head = line + b"\r\nA: b\r\n\r\n"
    if meaning is None:
        with pytest.raises(ValueError, match="status line"):
            parse_response_head(head)
    else:
        assert parse_response_head(head) == ResponseHead(*meaning, {"a": "b"})


# ---- Framing -------------------------------------------------------------------------------------

TE, CL = "transfer-encoding", "content-length"
REQUEST_LENGTHS = [
    ({}, 0),
    ({CL: "0"}, 0),
    ({CL: "60"}, 60),
    ({CL: "000000000000000060"}, 60),
    ({CL: "9" * 18}, 10**18 - 1),
    ({TE: "chunked"}, CHUNKED),
    ({TE: "ChUnKeD"}, CHUNKED),
    ({CL: "1" * 19}, "body_too_large"),
    ({CL: "9" * 5000}, "body_too_large"),
    *(
        ({CL: bad}, "bad_request")
        for bad in ("", "+1", "-1", "1_0", "1.0", "0x1", "1e1", "1 1", "1, 1", "1,", "\xb2", "\n1")
    ),
    *(({CL: bad}, "bad_request") for bad in ("\uff11", "\u0661", "1\n", "\xa01", "1\x85", "many")),
    ({TE: "chunked", CL: "60"}, "bad_request"),
    ({TE: "gzip", CL: "60"}, "bad_request"),
    ({TE: "", CL: "60"}, "bad_request"),
    *(
        ({TE: bad}, "not_implemented")
        for bad in ("", "gzip", "identity", "gzip, chunked", "chunked, gzip", "chunked, chunked")
    ),
    *(({TE: bad}, "not_implemented") for bad in ("xchunked", "chunked;q=1", "chunke")),
]
RESPONSE_LENGTHS = [
    (200, {}, UNTIL_CLOSE),
    (200, {CL: "0"}, 0),
    (200, {CL: "60"}, 60),
    (200, {TE: "chunked"}, CHUNKED),
    (500, {TE: "Chunked"}, CHUNKED),
    (204, {}, 0),
    (304, {}, 0),
    (204, {CL: "60"}, 0),
    (304, {CL: "60"}, 0),
    (304, {TE: "chunked"}, 0),  # 9112 s.6.3: never a body, whatever the fields say
    *((200, {CL: bad}, None) for bad in ("", "+1", "-1", "1_0", "60, 60", "60, 0", "0x1", "\xb2")),
    *((200, {CL: bad}, None) for bad in ("1" * 19, "9" * 5000, "\uff11", "1\n")),
    *((200, {TE: bad}, None) for bad in ("", "gzip", "identity", "chunked, chunked", "xchunked")),
    (200, {TE: "chunked", CL: "60"}, None),
    (200, {TE: "identity", CL: "60"}, None),
]


@pytest.mark.parametrize(("headers", "length"), REQUEST_LENGTHS, ids=ascii)
def test_length_of_a_request_is_told_by_one_field_or_refused(headers, length):
    request = Request("POST", "/", 1, dict(headers))
    if isinstance(length, int):
        assert request_length(request) == length
    else:
        check_refused(length, request_length, request)


def test_http_1_0_has_no_transfer_codings():
    with pytest.raises(BadRequest):
        request_length(Request("POST", "/", 0, {TE: "chunked"}))
    assert request_length(Request("POST", "/", 0, {CL: "5"})) == 5


@pytest.mark.parametrize(("status", "headers", "length"), RESPONSE_LENGTHS, ids=ascii)
def test_length_of_an_answer_is_told_or_ends_with_the_connection(status, headers, length):
    head = ResponseHead(status, 1, headers)
    if length is not None:
        assert response_length(head) == length
    else:
        with pytest.raises(ValueError):  # noqa: PT011 - upstream says it is no HTTP
            response_length(head)


@pytest.mark.parametrize(
    ("minor", "connection", "keep"),
    [
        (1, None, True),
        (1, "close", False),
        (1, "Close", False),
        (1, "keep-alive, close", False),
        (1, "x,close\t, y", False),
        (1, "closed", True),
        (1, "upgrade", True),
        (0, None, False),
        (0, "keep-alive", True),
        (0, "Keep-Alive, x", True),
        (0, "keep-alive, close", False),
    ],
)
def test_connection_goes_on_as_the_version_and_the_options_say(minor, connection, keep):
    headers = {} if connection is None else {"connection": connection}
    assert Request("GET", "/", minor, headers).keep_alive is keep


# ---- Chunk lines ---------------------------------------------------------------------------------

CHUNK_LINES = {
    b"0": 0,
    b"3c": 60,
    b"3C": 60,
    b"000": 0,
    b"00000000000003C": 60,
    b"F" * 16: 2**64 - 1,
    b"3c;a": 60,
    b"3c;": 60,
    b"3c ;a": 60,  # 9112 s.7.1.1: bad white space, before an extension alone
    b"3c\t ; a = b": 60,
    b'3c;a="x;\\"y";b=\xe9\t': 60,
}
BAD_CHUNK_LINES = [
    b"",
    b";a",
    b" ;a",
    b" 3c",
    b"3c ",
    b"3c\t",
    b"+3c",
    b"-3c",
    b"0x3c",
    b"3_c",
    b"3c.0",
    b"3g",
    b"3c 0",
    b"3c,",
    b"\xb2",
    b"\xef\xbc\x93",
    b"3c\x00",
    b"3c\r",
    b"3c\n",
    b"3c\x0b;a",
    b"3c;a\x00",
    b"3c;a\r",
    b"3c;a\nb",
    b"3c;a\x7f",
    b"F" * 17,
    b"0" * 17,
]


@pytest.mark.parametrize("line", CHUNK_LINES, ids=ascii)
def test_chunk_line_tells_the_size(line):
    body, size = ChunkedBody(), CHUNK_LINES[line]
    assert body.feed(line + b"\r\n") == b""
    assert body.wants == (size + 2 if size else 0)


@pytest.mark.parametrize("line", BAD_CHUNK_LINES, ids=ascii)
def test_malformed_chunk_line_is_refused(line):
    with pytest.raises(ValueError, match=r"chunk size|CRLF"):
        ChunkedBody().feed(line + b"\r\n")


# ---- Bodies: however the bytes are cut -----------------------------------------------------------

BEHIND = b"GET /next HTTP/1.1\r\n"
CHUNKS = b"5;x=y\r\nhello\r\n1\r\n,\r\n6\r\n world\r\n0\r\n"
BODIES = {  # length, bytes, what is in them and whether more is wanted; None: refused
    "empty": (0, BEHIND, (b"", True, BEHIND)),
    "length": (12, b"hello, world" + BEHIND, (b"hello, world", True, BEHIND)),
    "length, more to come": (20, b"hello, world", (b"hello, world", False, b"")),
    "until close": (UNTIL_CLOSE, b"hello, world", (b"hello, world", False, b"")),
    "chunks": (CHUNKED, CHUNKS + b"\r\n" + BEHIND, (b"hello, world", True, BEHIND)),
    "trailers": (CHUNKED, CHUNKS + b"A: b\r\nC:\r\n\r\n" + BEHIND, (b"hello, world", True, BEHIND)),
    "most trailers": (CHUNKED, b"0\r\nA: " + b"b" * 8185 + b"\r\n\r\n", (b"", True, b"")),
    "longest line": (CHUNKED, b"1;" + b"a" * 252 + b"\r\nx\r\n0\r\n\r\n", (b"x", True, b"")),
    "no last chunk yet": (CHUNKED, CHUNKS[:-3], (b"hello, world", False, b"")),
    "last chunk without its end": (CHUNKED, CHUNKS, (b"hello, world", False, b"")),
    "half a chunk": (CHUNKED, b"5\r\nhel", (b"hel", False, b"")),
    "half an end": (CHUNKED, b"5\r\nhello\r", (b"hello", False, b"")),
    "CRs and LFs inside": (CHUNKED, b"6\r\n\r\n0\r\n\r\r\n0\r\n\r\n", (b"\r\n0\r\n\r", True, b"")),
    "no size": (CHUNKED, b"\r\n", None),
    "signed": (CHUNKED, b"+5\r\nhello\r\n0\r\n\r\n", None),
    "LF ends the line": (CHUNKED, b"5\nhello\r\n0\r\n\r\n", None),
    "LF ends the last": (CHUNKED, b"0\n\n", None),
    "LF ends the trailers": (CHUNKED, b"0\r\n\n", None),
    "LF ends the chunk": (CHUNKED, b"5\r\nhello\n0\r\n\r\n", None),
    "nothing ends the chunk": (CHUNKED, b"5\r\nhello0\r\n\r\n", None),
    "any two bytes end the chunk": (CHUNKED, b"5\r\nhelloXX0\r\n\r\n", None),
    "CR CR ends the chunk": (CHUNKED, b"5\r\nhello\r\r0\r\n\r\n", None),
    "longer than said": (CHUNKED, b"4\r\nhello\r\n0\r\n\r\n", None),
    "bad size of a later chunk": (CHUNKED, b"1\r\nx\r\nq\r\n", None),
    "LF in an extension": (CHUNKED, b"5;a\nb\r\nhello\r\n0\r\n\r\n", None),
    "one byte over the line": (CHUNKED, b"1;" + b"a" * 253 + b"\r\nx\r\n0\r\n\r\n", None),
    "endless line": (CHUNKED, b"1;" + b"a" * 2000, None),
    "no trailer": (CHUNKED, b"0\r\njunk\r\n\r\n", None),
    "bad trailer": (CHUNKED, b"0\r\nA : b\r\n\r\n", None),
    "too many trailers": (CHUNKED, b"0\r\n" + b"A: b\r\n" * 1366, None),
    "one endless trailer": (CHUNKED, b"0\r\nA: " + b"b" * 9000, None),
}


def decode(length, pieces):
    """What is in these bytes, whether it is complete and what follows; None when refused."""
    body = body_decoder(length)
    payload, rest = [], b""
    try:
        for piece in pieces:
            if body.done:
                rest += piece
                continue
            payload.append(body.feed(piece))
            rest = body.surplus
            assert body.done or not rest
    except ValueError:
        return None
    return b"".join(payload), body.done, rest


def cut_at(data, places):
    edges = [0, *sorted(places), len(data)]
    return [data[start:end] for start, end in zip(edges, edges[1:]) if end > start]


@pytest.mark.untraced
@pytest.mark.parametrize("name", BODIES)
def test_body_is_the_same_whole_byte_by_byte_and_cut_anywhere(name):
    length, data, meaning = BODIES[name]
    assert decode(length, [data]) == meaning
    assert decode(length, cut_at(data, range(1, len(data)))) == meaning
    chance = random.Random(name)
    pairs = [chance.sample(range(len(data)), min(len(data), 2)) for _ in range(200)]
    few = len(data) < 60  # then every pair of cuts
    for places in chain(combinations(range(1, len(data)), 2) if few else pairs, [[len(data) // 2]]):
        assert decode(length, cut_at(data, places)) == meaning, places


@pytest.mark.parametrize("name", [name for name, (_, _, what) in BODIES.items() if what])
def test_end_of_the_connection_ends_only_the_body_that_it_may_end(name):
    length, data, (_, complete, _) = BODIES[name]
    body = body_decoder(length)
    if data and not body.done:
        body.feed(data)
    if complete:
        assert body.done
    elif length == UNTIL_CLOSE:
        assert body.feed(b"") == b""
        assert body.done
    else:
        with pytest.raises(ValueError, match="ends before"):
            body.feed(b"")
        assert not body.done


def test_length_tells_the_decoder():
    assert isinstance(body_decoder(CHUNKED), ChunkedBody)
    assert isinstance(body_decoder(UNTIL_CLOSE), CloseBody)
    assert isinstance(body_decoder(5), LengthBody)
    assert body_decoder(0).done


def test_rendered_chunks_are_read_as_what_they_were():
    chance = random.Random(5)
    for _ in range(50):
        sizes = [
            chance.choice([1, 2, 15, 16, 255, 256, 70_000]) for _ in range(chance.randrange(5))
        ]
        payloads = [chance.getrandbits(8 * size).to_bytes(size, "big") for size in sizes]
        data = b"".join(map(render_chunk, payloads)) + llmq.LAST_CHUNK
        assert decode(CHUNKED, [data]) == (b"".join(payloads), True, b"")


def test_what_the_chunked_decoder_wants_next_never_reaches_past_the_body():
    """A reader that takes no more than it is told leaves the next request alone."""
    for data in (CHUNKS + b"\r\n", CHUNKS + b"A: b\r\n\r\n"):
        body, at = ChunkedBody(), 0
        while not body.done:
            end = at + body.wants if body.wants else data.index(b"\n", at) + 1
            body.feed(data[at:end])
            at = end
        assert at == len(data)
        assert not body.surplus


def test_huge_chunk_is_no_huge_memory():
    body = ChunkedBody()
    assert body.feed(b"FFFFFFFFFFFFFFFF\r\nabc") == b"abc"
    assert body.wants == 2**64 - 1 - 3 + 2


def test_every_error_of_a_head_is_one_that_a_client_can_be_told():
    for line, meaning in LINES:
        if isinstance(meaning, str):
            assert 400 <= LlmqError("", meaning).status < 600, line
