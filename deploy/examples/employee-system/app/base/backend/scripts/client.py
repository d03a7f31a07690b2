"""The HTTP client that the smoke tests and the benchmark share. Needs no database and no installed package.

The password comes from SMOKE_PASSWORD or a file, never from the command line: every user of a host can read that.
"""

import http.client
import json
import os
from pathlib import Path
from urllib.parse import urlencode, urlsplit


def add_arguments(parser):
    parser.add_argument("--base-url", default=os.environ.get("BASE_URL", "http://127.0.0.1:8000"))
    parser.add_argument("--username", default=os.environ.get("SMOKE_USERNAME", "admin"))
    parser.add_argument("--password-file", type=Path, help="instead of the environment variable SMOKE_PASSWORD")


def password(args):
    if args.password_file:
        return args.password_file.read_text().strip()
    if value := os.environ.get("SMOKE_PASSWORD"):
        return value
    raise SystemExit("neither SMOKE_PASSWORD nor --password-file is given")


class Client:
    def __init__(self, base_url):
        url = urlsplit(base_url)
        kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        self.connection = kind(url.hostname, url.port, timeout=10)
        self.prefix = url.path.rstrip("/")
        self.token = None

    def call(self, method, path, body=None, form=None, token=True):
        """(status, JSON value). One connection for all calls, as a browser would have."""
        headers, content = {}, None
        if body is not None:
            content, headers["Content-Type"] = json.dumps(body), "application/json"
        if form is not None:
            content, headers["Content-Type"] = urlencode(form), "application/x-www-form-urlencoded"
        token = self.token if token is True else token
        if token:
            headers["Authorization"] = f"Bearer {token}"
        self.connection.request(method, self.prefix + path, content, headers)
        response = self.connection.getresponse()
        raw = response.read()
        return response.status, json.loads(raw) if raw else None

    def login(self, username, password):
        status, body = self.call("POST", "/api/auth/login", form={"username": username, "password": password})
        if status == 200:
            self.token = body["access_token"]
        return status
