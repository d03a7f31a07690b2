"""/health says that the process serves; /health/db that it reaches its database. The first never needs the second."""

import logging

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from . import __version__
from .db import reason

log = logging.getLogger(__name__)


def live(request):
    return 200, {"status": "healthy", "version": __version__}


def database(request):
    try:
        with request.engine.connect() as connection:
            connection.execute(text("SELECT 1"))
    except SQLAlchemyError as exc:
        log.error("the database does not answer: %s", reason(exc))
        return 503, {"database": "unavailable"}
    return 200, {"database": "connected"}
