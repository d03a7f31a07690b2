"""A server of the application inside the test process."""

import os
import sys
import threading
import unittest
from pathlib import Path

BACKEND = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(BACKEND / "scripts"))

from client import Client

from app.auth import issue_token
from app.config import Config
from app.server import Server

# Nothing listens on port 1: a database that refuses every connection.
NO_DATABASE = "postgresql://nobody@127.0.0.1:1/none"
SECRET = "a secret for tests, of more than 32 characters"


class ServerCase(unittest.TestCase):
    database_url = NO_DATABASE

    def setUp(self):
        config = Config(self.database_url, SECRET, port=0, cors_origins=frozenset({"https://employees.example.com"}))
        self.server = Server(config)
        thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        self.addCleanup(thread.join)
        self.addCleanup(self.server.stop)
        self.api = Client(f"http://127.0.0.1:{self.server.server_port}")
        self.addCleanup(self.api.connection.close)


@unittest.skipUnless(os.environ.get("TEST_DATABASE_URL"), "TEST_DATABASE_URL is not set")
class DatabaseCase(ServerCase):
    """The API over a real database: TEST_DATABASE_URL names one that is migrated and seeded."""

    database_url = os.environ.get("TEST_DATABASE_URL")

    def setUp(self):
        super().setUp()
        self.api.token = issue_token(SECRET, "admin")

    def create(self, **fields):
        status, made = self.api.call("POST", "/api/employees", body={"first_name": "Unit", "last_name": "Test"} | fields)
        self.assertEqual(status, 201)
        self.addCleanup(self.api.call, "DELETE", f"/api/employees/{made['id']}")
        return made
