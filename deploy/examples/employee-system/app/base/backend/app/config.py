"""Configuration. The environment is the only source."""

import os
from dataclasses import dataclass, field


class ConfigError(Exception):
    """The environment cannot be used; the message names every problem and no value."""


@dataclass(frozen=True)
class Config:
    # Secrets stay out of repr(), and so out of any log line that prints a Config.
    database_url: str = field(repr=False)
    secret_key: str = field(repr=False)
    cors_origins: frozenset = frozenset()
    environment: str = "development"
    debug: bool = False
    log_level: str = "INFO"
    log_file: str = ""
    host: str = "127.0.0.1"
    port: int = 8000
    effects_file: str = ""

    @classmethod
    def from_env(cls, env=os.environ):
        problems = [f"{name} is not set" for name in ("DATABASE_URL", "SECRET_KEY") if not env.get(name)]
        host, _, port = env.get("BIND", "127.0.0.1:8000").rpartition(":")
        if not host or not port.isdigit() or int(port) > 65535:
            problems.append("BIND is not host:port")
        level = env.get("LOG_LEVEL", "INFO").upper()
        if level not in ("DEBUG", "INFO", "WARNING", "ERROR"):
            problems.append("LOG_LEVEL is not one of DEBUG, INFO, WARNING, ERROR")
        if problems:
            raise ConfigError("; ".join(problems))
        return cls(
            database_url=env["DATABASE_URL"],
            secret_key=env["SECRET_KEY"],
            cors_origins=frozenset(o.strip() for o in env.get("CORS_ORIGINS", "").split(",") if o.strip()),
            environment=env.get("ENVIRONMENT", "development"),
            debug=is_true(env.get("DEBUG", "")),
            log_level=level,
            log_file=env.get("LOG_FILE", ""),
            host=host.strip("[]"),
            port=int(port),
            effects_file=env.get("EFFECTS_FILE", ""),
        )


def is_true(value):
    return value.strip().lower() in ("1", "true", "yes", "on")
