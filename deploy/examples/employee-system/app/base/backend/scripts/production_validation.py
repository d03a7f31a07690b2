"""Holds the configuration against what production asks for. Values are never printed.

Looks at the environment, or with --env-file at a file of KEY=VALUE lines and at who may read it.
Exit code: 0 fit for production, 1 not.
"""

import argparse
import os
import sys
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from app.config import is_true

REQUIRED = ("DATABASE_URL", "SECRET_KEY", "CORS_ORIGINS", "ENVIRONMENT", "LOG_LEVEL")


def checks(env):
    missing = [name for name in REQUIRED if not env.get(name)]
    yield "required variables", f"not set: {', '.join(missing)}" if missing else None
    secret = env.get("SECRET_KEY", "")
    # 32 random bytes as hex are 64 characters; fewer than 32 characters are certainly too few.
    yield "SECRET_KEY length", None if len(secret) >= 32 else "shorter than 32 characters"
    yield "SECRET_KEY variety", None if len(set(secret)) >= 10 else "too few different characters"
    yield "DEBUG", "is on" if is_true(env.get("DEBUG", "")) else None
    yield "ENVIRONMENT", None if env.get("ENVIRONMENT") == "production" else "is not production"
    yield "LOG_LEVEL", "DEBUG is too talkative" if env.get("LOG_LEVEL", "").upper() == "DEBUG" else None
    origins = [origin.strip() for origin in env.get("CORS_ORIGINS", "").split(",") if origin.strip()]
    yield "CORS_ORIGINS", None if all(o.startswith("https://") for o in origins) else "an origin is not https://"
    user = urlsplit(env.get("DATABASE_URL", "")).username
    yield "database role", "is the superuser" if user == "postgres" else None


def read_env_file(path):
    lines = (line.strip() for line in path.read_text().splitlines())
    pairs = (line.partition("=") for line in lines if line and not line.startswith("#"))
    return {name.strip(): value.strip().strip("'\"") for name, _, value in pairs}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env-file", type=Path)
    path = parser.parse_args().env_file
    found = list(checks(read_env_file(path) if path else os.environ))
    if path:
        found.append(("mode of the file", "others may read it" if path.stat().st_mode & 0o077 else None))
    for subject, problem in found:
        print(f"FAIL  {subject}: {problem}" if problem else f"ok    {subject}")
    return 1 if any(problem for _, problem in found) else 0


if __name__ == "__main__":
    sys.exit(main())
