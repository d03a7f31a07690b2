import os
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

from app import __version__
from app.auth import issue_token
from app.config import Config, ConfigError
from tests.support import BACKEND, NO_DATABASE, SECRET, ServerCase


class Answers(ServerCase):
    def test_the_api_asks_for_a_token(self):
        for method, path in (("GET", "/api/employees"), ("PUT", "/api/employees/1"), ("DELETE", "/api/employees/1")):
            self.assertEqual(self.api.call(method, path)[0], 401)
            self.assertEqual(self.api.call(method, path, token="x.y.z")[0], 401)

    def test_unknown_paths_and_methods_are_told_apart(self):
        self.assertEqual(self.api.call("GET", "/nothing")[0], 404)
        self.assertEqual(self.api.call("DELETE", "/health")[0], 405)

    def test_a_body_that_is_no_object_is_refused(self):
        token = issue_token(SECRET, "admin")
        self.assertEqual(self.api.call("POST", "/api/employees", form={"a": "b"}, token=token)[0], 400)
        self.assertEqual(self.api.call("POST", "/api/employees", body=[1], token=token)[0], 422)

    def test_a_database_that_is_away_is_a_503(self):
        with self.assertLogs("app.server", "ERROR") as logs:
            status, _ = self.api.call("GET", "/api/employees", token=issue_token(SECRET, "admin"))
        self.assertEqual(status, 503)
        self.assertNotIn("\n", logs.records[0].getMessage())


class Configuration(unittest.TestCase):
    def test_every_problem_is_named_and_no_value(self):
        with self.assertRaises(ConfigError) as raised:
            Config.from_env({"DATABASE_URL": NO_DATABASE, "BIND": "hidden"})
        self.assertEqual(str(raised.exception), "SECRET_KEY is not set; BIND is not host:port")

    def test_secrets_are_not_in_the_repr(self):
        self.assertNotIn(SECRET, repr(Config(NO_DATABASE, SECRET)))


class Process(unittest.TestCase):
    def test_sigterm_stops_it_within_a_second_and_both_are_in_the_ledger(self):
        with tempfile.TemporaryDirectory() as folder:
            log_file, effects = Path(folder, "app.log"), Path(folder, "effects")
            env = {
                "PATH": os.environ["PATH"],
                "DATABASE_URL": NO_DATABASE,
                "SECRET_KEY": SECRET,
                "BIND": "127.0.0.1:0",
                "LOG_FILE": str(log_file),
                "EFFECTS_FILE": str(effects),
            }
            process = subprocess.Popen([sys.executable, "-m", "app"], cwd=BACKEND, env=env)
            try:
                deadline = time.monotonic() + 20
                while not (log_file.exists() and "listening" in log_file.read_text()):
                    self.assertLess(time.monotonic(), deadline, "it does not start")
                    time.sleep(0.05)
                process.send_signal(signal.SIGTERM)
                self.assertEqual(process.wait(10), 0)
            finally:
                process.kill()
                process.wait()
            lines = [line.split()[:3] for line in effects.read_text().splitlines()]
            self.assertEqual(lines, [[kind, __version__, str(process.pid)] for kind in ("start", "stop")])
            self.assertNotIn("error", log_file.read_text().lower())
            self.assertNotIn(SECRET, log_file.read_text())
