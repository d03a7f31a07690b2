"""Passwords and tokens, with the standard library only."""

import base64
import hashlib
import hmac
import json
import os
import time

from sqlalchemy import text

from .http import Problem

TOKEN_SECONDS = 3600
# About 16 MiB and some 40 ms per attempt: dear for a guesser, bearable for a login.
SCRYPT = {"n": 2**14, "r": 8, "p": 1}


def hash_password(password, salt=None):
    salt = salt or os.urandom(16)
    digest = hashlib.scrypt(password.encode(), salt=salt, **SCRYPT)
    return f"scrypt${salt.hex()}${digest.hex()}"


def password_matches(password, stored):
    kind, salt, _ = stored.split("$")
    return kind == "scrypt" and hmac.compare_digest(hash_password(password, bytes.fromhex(salt)), stored)


# Compared with when the user does not exist, so that the answer takes equally long.
NOBODY = hash_password("", b"\x00" * 16)


def issue_token(secret, user, now=None):
    now = int(now if now is not None else time.time())
    claims = {"sub": user, "iat": now, "exp": now + TOKEN_SECONDS}
    signed = f"{_pack({'alg': 'HS256', 'typ': 'JWT'})}.{_pack(claims)}"
    return f"{signed}.{_sign(secret, signed)}"


def user_of_token(secret, token, now=None):
    """The user a valid token was issued to, else None."""
    signed, _, signature = token.rpartition(".")
    if not hmac.compare_digest(_sign(secret, signed).encode(), signature.encode()):
        return None
    # The signature is ours, so the content is what issue_token wrote.
    claims = json.loads(base64.urlsafe_b64decode(_padded(signed.partition(".")[2])))
    return claims["sub"] if claims["exp"] > (now if now is not None else time.time()) else None


def login(request):
    form = request.form()
    name, password = form.get("username", ""), form.get("password", "")
    with request.engine.connect() as connection:
        stored = connection.execute(
            text("SELECT password_hash FROM users WHERE username = :name AND is_active"), {"name": name}
        ).scalar()
    if not password_matches(password, stored or NOBODY) or stored is None:
        raise Problem(401, "user name or password is wrong")
    token = issue_token(request.config.secret_key, name)
    return 200, {"access_token": token, "token_type": "bearer", "expires_in": TOKEN_SECONDS}


def _sign(secret, signed):
    return _b64(hmac.new(secret.encode(), signed.encode(), hashlib.sha256).digest())


def _pack(value):
    return _b64(json.dumps(value, separators=(",", ":")).encode())


def _b64(raw):
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _padded(value):
    return value + "=" * (-len(value) % 4)
