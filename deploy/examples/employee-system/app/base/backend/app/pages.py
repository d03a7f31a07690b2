"""The built frontend."""

import mimetypes
from pathlib import Path

from .http import File, Problem

DIST = Path(__file__).resolve().parents[2] / "frontend" / "dist"


def index(request):
    if not (DIST / "index.html").is_file():
        raise Problem(503, "the frontend is not built")
    # The page names its assets by their hash, so it is the one file that must not be cached.
    return 200, File((DIST / "index.html").read_bytes(), "text/html; charset=utf-8", "no-cache")


def asset(request, name):
    path = DIST / "assets" / name
    if not path.is_file():
        raise Problem(404, "no such asset")
    kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
    return 200, File(path.read_bytes(), kind, "public, max-age=31536000, immutable")
