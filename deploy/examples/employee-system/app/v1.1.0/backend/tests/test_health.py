import tempfile
from pathlib import Path
from unittest import mock

from app import __version__, scheduling
from app.auth import issue_token
from tests.support import SECRET, ServerCase


class Health(ServerCase):
    def setUp(self):
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.rules = Path(folder.name, "scheduling.json")
        self.rules.write_text('{"longest_shift_hours": 10, "rest_hours": 11}')
        patch = mock.patch.object(scheduling, "RULES_FILE", self.rules)
        patch.start()
        self.addCleanup(patch.stop)

    def test_health_needs_no_database(self):
        self.assertEqual(self.api.call("GET", "/health"), (200, {"status": "healthy", "version": __version__}))

    def test_the_rules_are_served(self):
        status, rules = self.api.call("GET", "/api/schedule/rules", token=issue_token(SECRET, "admin"))
        self.assertEqual((status, rules["rest_hours"]), (200, 11))

    def test_rules_without_a_number_are_unhealthy(self):
        self.rules.write_text("{}")
        with self.assertLogs("app.health", "ERROR"):
            status, body = self.api.call("GET", "/health")
        self.assertEqual((status, body["status"]), (500, "unhealthy"))

    def test_health_of_the_database_is_told_apart(self):
        with self.assertLogs("app.health", "ERROR"):
            self.assertEqual(self.api.call("GET", "/health/db")[0], 503)
