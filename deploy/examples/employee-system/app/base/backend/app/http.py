"""What handlers take and give. A handler returns (status, JSON value or File or None), or raises a Problem."""

import json
from dataclasses import dataclass, field
from urllib.parse import parse_qs

from sqlalchemy.engine import Engine

from .config import Config


class Problem(Exception):
    """An answer that is not a success. The detail is meant for the client."""

    def __init__(self, status, detail, **more):
        super().__init__(detail)
        self.status, self.body = status, {"detail": detail, **more}


@dataclass
class File:
    content: bytes
    kind: str
    caching: str


@dataclass
class Request:
    config: Config
    engine: Engine
    headers: object
    query: dict
    body: bytes = field(repr=False)

    def json_object(self):
        try:
            value = json.loads(self.body)
        except ValueError:
            raise Problem(400, "the body is not JSON") from None
        if not isinstance(value, dict):
            raise Problem(422, "the body is not a JSON object")
        return value

    def form(self):
        return parse_pairs(self.body.decode("utf-8", "replace"))

    def number(self, name, default, most):
        value = self.query.get(name, str(default))
        if not (value.isascii() and value.isdigit() and len(value) < 11 and int(value) <= most):
            raise Problem(422, f"{name} is not a number up to {most}")
        return int(value)


def parse_pairs(encoded):
    """The last value of each name. NUL cannot be stored or found in PostgreSQL, so it never gets further than this."""
    return {name: values[-1].replace("\x00", "") for name, values in parse_qs(encoded).items()}
