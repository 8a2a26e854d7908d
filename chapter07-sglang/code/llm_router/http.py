"""HTTP/1.1 framing, bytes in and bytes out (RFC 9112): where a message ends, and little else.

What a router does not need it does not parse: a head stays one piece of bytes, of which a few
fields are read and the hop-by-hop ones are cut out. It is strict where two readers of one message
might disagree on its end (request smuggling): that is refused with status 400.
"""

import re
from dataclasses import dataclass

import orjson

MOST_HEAD = 64 * 1024  # bytes
HEAD_END = b"\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"
REQUEST_LINE = re.compile(rb"([A-Z]{1,20}) ([\x21-\x7e]+) HTTP/1\.([01])")
NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
MOST_NAMES = 1000  # of fields are known to be well formed
# Read here: those of one connection, which are not forwarded, and what else is needed.
READ = (
    b"content-length", b"transfer-encoding", b"connection", b"expect", b"x-request-id",
    b"content-type", b"host",
)  # fmt: skip
# accept-encoding too, since compressed events could not be told apart.
DROPPED = (b"keep-alive", b"proxy-connection", b"te", b"trailer", b"upgrade", b"accept-encoding")
REASONS = {
    200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed",
    408: "Request Timeout", 413: "Content Too Large", 429: "Too Many Requests",
    431: "Request Header Fields Too Large", 500: "Internal Server Error", 502: "Bad Gateway",
    503: "Service Unavailable", 504: "Gateway Timeout",
}  # fmt: skip


class HttpError(Exception):
    """A message that cannot be taken; `status` is what a client is told."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


_names: dict[bytes, bytes] = {}  # a field's name as it came: in lower case, or b"" if not ours


def _known_name(name: bytes) -> bytes:
    if not NAME.fullmatch(name):
        raise HttpError(400, "a field's name is malformed")
    lower = name.lower()
    known = lower if lower in READ or lower in DROPPED else b""
    if len(_names) < MOST_NAMES:
        _names[name] = known
    return known


class Fields:
    """What is read of a head's fields; `forwarded` are the lines that go on. `length` is None where
    no content-length stands."""

    __slots__ = (
        "chunked", "close", "content_type", "expect", "forwarded", "hosts", "keep_alive", "length",
        "named", "request_id",
    )  # fmt: skip

    def __init__(self, lines: list[bytes]) -> None:
        """`lines` begin with the request's or the status line, as it is forwarded."""
        self.length: int | None = None
        self.hosts = 0
        self.named: set[bytes] = set()  # fields that belong to this connection, as it says
        self.chunked = self.close = self.keep_alive = self.expect = False
        self.request_id = self.content_type = b""
        self.forwarded = [lines[0]]
        for line in lines[1:]:
            name, colon, value = line.partition(b":")
            known = _names.get(name)
            if known is None:
                known = _known_name(name)
            if not colon:
                raise HttpError(400, "a field has no value")
            if not known or known == b"content-type" or known == b"host":
                self.forwarded.append(line)
            if known:
                self._read(known, value.strip())
        if self.chunked and self.length is not None:
            raise HttpError(400, "a message has a content-length or is chunked, not both")
        if self.named:
            self.forwarded[1:] = [
                line for line in self.forwarded[1:]
                if line.partition(b":")[0].lower() not in self.named
            ]  # fmt: skip

    def _read(self, name: bytes, value: bytes) -> None:
        if name == b"content-length":
            if not value.isdigit() or len(value) > 15 or self.length is not None:
                raise HttpError(400, "content-length is not one number")
            self.length = int(value)
        elif name == b"content-type":
            self.content_type = value.lower()
        elif name == b"x-request-id":
            self.request_id = value[:200]
        elif name == b"transfer-encoding":
            if value.lower() != b"chunked" or self.chunked:
                raise HttpError(400, "no transfer-encoding but chunked is known")
            self.chunked = True
        elif name == b"connection":
            names = {name.strip() for name in value.lower().split(b",")}
            self.close |= b"close" in names
            self.keep_alive |= b"keep-alive" in names
            self.named |= names - {b"close", b"keep-alive", b"host", b"content-type"}
        elif name == b"host":
            self.hosts += 1
        elif name == b"expect":
            self.expect = True


def _lines(head: bytes) -> list[bytes]:
    """Raises where a line ends otherwise than by CR and LF: two readers could disagree."""
    lines = head[:-4].split(b"\r\n")
    if head.count(b"\n") != len(lines) + 1 or head.count(b"\r") != len(lines) + 1 or b"\0" in head:
        raise HttpError(400, "a line of the head is malformed")
    return lines


class RequestHead:
    """Method, path (without the query) and fields of a request; `forward` is the head to send on,
    without its last line's end, its length and what belongs to one connection only."""

    __slots__ = ("fields", "forward", "http11", "method", "path")

    def __init__(self, head: bytes) -> None:
        lines = _lines(head)
        line = REQUEST_LINE.fullmatch(lines[0])
        if line is None:
            raise HttpError(400, "this is no HTTP/1.1 request")
        self.method, target, minor = line.groups()
        if target[:7].lower() == b"http://":  # as a proxy is asked
            _, slash, path = target[7:].partition(b"/")
            target = slash + path or b"/"
        self.path = target.partition(b"?")[0]
        self.http11 = minor == b"1"
        lines[0] = b"%b %b HTTP/1.1" % (self.method, target)
        self.fields = Fields(lines)
        if self.fields.hosts != 1 and (self.http11 or self.fields.hosts):
            raise HttpError(400, "a request of HTTP/1.1 has one host field")
        self.forward = b"\r\n".join(self.fields.forwarded)

    @property
    def keeps_alive(self) -> bool:
        return not self.fields.close if self.http11 else self.fields.keep_alive


class ResponseHead:
    """Status and fields of a response; `forward` as a request's."""

    __slots__ = ("fields", "forward", "status")

    def __init__(self, head: bytes) -> None:
        if head[:7] != b"HTTP/1." or not head[9:12].isdigit() or head[8:9] != b" ":
            raise HttpError(502, "the worker's answer is no HTTP/1.1")
        self.status = int(head[9:12])
        lines = _lines(head)
        lines[0] = b"HTTP/1.1" + lines[0][8:]
        self.fields = Fields(lines)
        self.fields.close |= head[7:8] == b"0"  # it may be kept, but seldom is
        self.forward = b"\r\n".join(self.fields.forwarded)

    @property
    def has_body(self) -> bool:
        return self.status >= 200 and self.status not in (204, 304)


class ChunkedBody:
    """Takes a chunked body apart; `done` after the last chunk, `rest` is what follows it."""

    def __init__(self) -> None:
        self._buffer = b""
        self._parts: list[bytes] = []  # of a chunk that has not come to its end
        self._missing = 0  # bytes until it has
        self.held = 0  # bytes that wait
        self.done = False

    @property
    def rest(self) -> bytes:
        return self._buffer

    def feed(self, data: bytes) -> bytes:
        """The payload that is complete with `data`. Raises `HttpError` where it is no such body."""
        if self._missing > len(data):
            self._parts.append(data)
            self._missing -= len(data)
            self.held += len(data)
            return b""
        buffer = b"".join((self._buffer, *self._parts, data)) if self._buffer else data
        self._parts, self._missing = [], 0
        pieces, at = [], 0
        while not self.done:
            line_end = buffer.find(b"\r\n", at)
            if line_end < 0:
                if len(buffer) - at > 256:
                    raise HttpError(400, "a chunk's size takes no end")
                break
            size = chunk_size(buffer[at:line_end])
            end = line_end + 2 + size
            if size == 0:
                last = buffer.find(HEAD_END, line_end)  # after trailers, which nobody needs
                if last < 0:
                    if len(buffer) - line_end > MOST_HEAD:
                        raise HttpError(400, "the trailers take no end")
                    break
                end = last + 2
                self.done = True
            elif len(buffer) < end + 2:
                self._missing = end + 2 - len(buffer)
                break
            elif buffer[end : end + 2] != b"\r\n":
                raise HttpError(400, "a chunk is longer than its size")
            else:
                pieces.append(buffer[line_end + 2 : end])
            at = end + 2
        self._buffer = buffer[at:]
        self.held = len(self._buffer)
        return b"".join(pieces)


def chunk_size(line: bytes) -> int:
    digits = line.partition(b";")[0].strip()
    if not 0 < len(digits) <= 8 or not digits.isalnum():
        raise HttpError(400, "a chunk has no size")
    try:
        return int(digits, 16)
    except ValueError:
        raise HttpError(400, "a chunk has no size") from None


def ends_with_a_chunk(data: bytes) -> bool:
    """Whether `data`, which begins with a chunk, is whole chunks, none of them the last."""
    at, length = 0, len(data)
    while at < length:
        line_end = data.find(b"\r\n", at, at + 10)
        try:
            size = int(data[at:line_end], 16)
        except ValueError:  # the slow way will say what is wrong
            return False
        if size <= 0:
            return False
        at = line_end + 4 + size
    return at == length


def chunk(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer of the router's own."""

    status: int
    body: bytes
    content_type: str = "application/json"
    retry_after: int | None = None

    def wire(
        self, request_id: bytes = b"", connection: bytes = b"", head_only: bool = False
    ) -> bytes:
        """`connection` is that field, as a line."""
        lines = [f"HTTP/1.1 {self.status} {REASONS.get(self.status, 'Unknown')}"]
        lines += [f"content-type: {self.content_type}", f"content-length: {len(self.body)}"]
        if self.retry_after is not None:
            lines.append(f"retry-after: {self.retry_after}")
        if self.status == 405:
            lines.append("allow: GET, HEAD")
        head = "\r\n".join(lines).encode() + b"\r\n" + connection
        if request_id:
            head += b"x-request-id: " + request_id + b"\r\n"
        return head + b"\r\n" + (b"" if head_only else self.body)


KINDS = {400: "invalid_request_error", 404: "not_found_error", 429: "rate_limit_error"}


def error(status: int, message: str, retry_after: int | None = None) -> Reply:
    """An error in the OpenAI API's shape."""
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "service_unavailable")
    body = {"error": {"message": message, "type": kind, "param": None, "code": status}}
    return Reply(status, orjson.dumps(body), retry_after=retry_after)
