"""`python -m app` in the backend directory."""

import datetime
import logging
import logging.handlers
import os
import signal
import sys
import threading
import time

from . import __version__
from .config import Config, ConfigError
from .ledger import append_line
from .server import Server

log = logging.getLogger("app")


def main():
    try:
        config = Config.from_env()
    except ConfigError as exc:
        print(f"employee-system: {exc}", file=sys.stderr)
        return 2
    start_logging(config)

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())

    # Before the port is bound: a second start that then fails on the port is a start all the same.
    note(config, "start")
    log.info("employee-system %s starts, environment %s", __version__, config.environment)
    try:
        server = Server(config)
    except OSError as exc:
        log.error("cannot listen on %s:%d: %s", config.host, config.port, exc.strerror)
        return 1
    serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1})
    serving.start()
    log.info("listening on %s:%d", config.host, server.server_port)

    stop.wait()
    log.info("stopping")
    server.stop()
    serving.join()
    note(config, "stop")
    log.info("stopped")
    return 0


def note(config, kind):
    if config.effects_file:
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        append_line(config.effects_file, kind, __version__, str(os.getpid()), now)


def start_logging(config):
    # The watched handler opens its file anew after a rotation.
    handler = logging.handlers.WatchedFileHandler(config.log_file) if config.log_file else logging.StreamHandler()
    formatter = logging.Formatter("%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    logging.basicConfig(level=config.log_level, handlers=[handler])
    # At DEBUG the driver and SQLAlchemy would write statements with their values.
    for name in ("sqlalchemy", "psycopg"):
        logging.getLogger(name).setLevel(logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
