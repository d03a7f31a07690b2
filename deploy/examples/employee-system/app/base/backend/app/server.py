"""HTTP around the handlers: routing, tokens, JSON, access log, and a stop that is quick and clean."""

import datetime
import json
import logging
import re
import socketserver
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from sqlalchemy.exc import IntegrityError, OperationalError

from .auth import user_of_token
from .db import open_engine, reason
from .http import File, Problem, Request, parse_pairs
from .routes import ROUTES

log = logging.getLogger(__name__)

# No request of this API comes near it; it bounds what one client can make the process hold.
MAX_BODY = 1024 * 1024
# How long a stop waits for requests under way. The whole stop stays below one second.
STOP_GRACE = 0.7

# An id is a bigint: 18 digits always fit.
PARTS = {"id": "[0-9]{1,18}", "name": "[A-Za-z0-9_.-]+"}
CONVERT = {"id": int, "name": str}


def _pattern(path):
    return re.compile(re.sub(r"\{(\w+)\}", lambda m: f"(?P<{m[1]}>{PARTS[m[1]]})", path))


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, config):
        self.config = config
        self.engine = open_engine(config.database_url)
        self.routes = [(method, _pattern(path), handler, guarded) for method, path, handler, guarded in ROUTES]
        self._busy, self._idle = 0, threading.Condition()
        super().__init__((config.host, config.port), Handler)

    def server_bind(self):
        # HTTPServer asks the DNS for its own name here, which can take seconds and is used for nothing.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def handle_error(self, request, client_address):
        # A client that went away mid-request. Whatever a handler raises is answered and logged further down.
        log.info("a connection ended early")

    def find(self, method, path):
        """The handler for a request with its path's values, and whether it needs a token."""
        others = set()
        for route_method, pattern, handler, guarded in self.routes:
            if match := pattern.fullmatch(path):
                if route_method == method:
                    return handler, {name: CONVERT[name](value) for name, value in match.groupdict().items()}, guarded
                others.add(route_method)
        raise Problem(405, "this path has other methods") if others else Problem(404, "no such path")

    def begin_request(self):
        with self._idle:
            self._busy += 1

    def end_request(self):
        with self._idle:
            self._busy -= 1
            self._idle.notify_all()

    def stop(self):
        """Takes no new connection and lets requests under way end. Idle keep-alive connections do not count."""
        self.shutdown()
        self.server_close()
        with self._idle:
            self._idle.wait_for(lambda: self._busy == 0, STOP_GRACE)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Head and body leave in one packet; two would wait 40 ms for each other (Nagle against delayed ACK).
    wbufsize, disable_nagle_algorithm = 64 * 1024, True
    timeout = 30

    def serve(self):
        started = time.monotonic()
        self.server.begin_request()
        try:
            url = urlsplit(self.path)
            try:
                status, body = self.answer(url)
            except Problem as problem:
                status, body = problem.status, problem.body
            except IntegrityError as exc:
                log.info("refused by a constraint: %s", type(exc.orig).__name__)
                status, body = 409, {"detail": "this conflicts with what is stored"}
            except OperationalError as exc:
                log.error("the database does not answer: %s", reason(exc))
                status, body = 503, {"detail": "the database is not available"}
            except Exception as exc:
                log.error("%s %s failed: %s", self.command, url.path, reason(exc))
                status, body = 500, {"detail": "the request failed inside the application"}
            self.reply(status, body)
            # The path only: a query may hold a name that is searched for.
            log.info("%s %s %d %.0f ms", self.command, url.path, status, (time.monotonic() - started) * 1000)
        finally:
            self.server.end_request()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_OPTIONS = serve

    def answer(self, url):
        body = self.read_body()
        if self.command == "OPTIONS":
            return 204, None
        method = "GET" if self.command == "HEAD" else self.command
        handler, values, guarded = self.server.find(method, url.path)
        config = self.server.config
        if guarded:
            kind, _, token = self.headers.get("Authorization", "").partition(" ")
            if kind.lower() != "bearer" or user_of_token(config.secret_key, token) is None:
                raise Problem(401, "a valid token is needed")
        return handler(Request(config, self.server.engine, self.headers, parse_pairs(url.query), body), **values)

    def read_body(self):
        length = self.headers.get("Content-Length", "0")
        if not (length.isascii() and length.isdigit()) or "Transfer-Encoding" in self.headers:
            self.close_connection = True
            raise Problem(411, "a request states its length")
        if len(length) > 9 or int(length) > MAX_BODY:
            self.close_connection = True
            raise Problem(413, "the body is too large")
        return self.rfile.read(int(length))

    def reply(self, status, body):
        caching = "no-store"
        if isinstance(body, File):
            content, kind, caching = body.content, body.kind, body.caching
        else:
            content, kind = json.dumps(body, default=_plain).encode(), "application/json"
        self.send_response(status)
        if status != 204:
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
        if status == 401:
            self.send_header("WWW-Authenticate", "Bearer")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.send_header("Cache-Control", caching)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.send_header("Content-Security-Policy", "default-src 'self'")
        origin = self.headers.get("Origin")
        if origin in self.server.config.cors_origins:
            self.send_header("Access-Control-Allow-Origin", origin)
            self.send_header("Access-Control-Allow-Headers", "Authorization, Content-Type")
            self.send_header("Access-Control-Allow-Methods", "GET, POST, PUT, DELETE")
            self.send_header("Vary", "Origin")
        self.end_headers()
        if status != 204 and self.command != "HEAD":
            self.wfile.write(content)

    def send_error(self, code, message=None, explain=None):
        """Requests so broken that no handler sees them. The base class would answer with a page of HTML."""
        self.close_connection = True
        content = json.dumps({"detail": message or "the request cannot be read"}).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)

    def version_string(self):
        return "employee-system"

    def log_message(self, format, *args):
        """serve() writes the access log; this one would put whole request lines on stderr."""


def _plain(value):
    if isinstance(value, (datetime.date, datetime.datetime)):
        return value.isoformat()
    raise TypeError(type(value).__name__)
