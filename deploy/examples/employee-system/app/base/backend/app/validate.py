"""Checks on what clients send. Each takes a JSON value and returns the value to store, or raises ValueError."""

import datetime


def text(longest, required=False):
    def check(value):
        if value is None and not required:
            return None
        if not isinstance(value, str) or not value.strip():
            raise ValueError("must be a text that is not empty")
        # PostgreSQL has no text with a NUL in it.
        if len(value) > longest or "\x00" in value:
            raise ValueError(f"must have at most {longest} characters")
        return value.strip()

    return check


def email(value):
    value = text(254)(value)
    if value is not None and value.count("@") != 1:
        raise ValueError("must be an e-mail address")
    return value


def date(value):
    if value is None:
        return None
    try:
        return datetime.date.fromisoformat(value)
    except (TypeError, ValueError):
        raise ValueError("must be a date as YYYY-MM-DD") from None
