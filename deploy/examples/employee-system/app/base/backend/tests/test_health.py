from app import __version__
from tests.support import ServerCase


class Health(ServerCase):
    def test_health_needs_no_database(self):
        self.assertEqual(self.api.call("GET", "/health"), (200, {"status": "healthy", "version": __version__}))

    def test_health_of_the_database_is_told_apart(self):
        with self.assertLogs("app.health", "ERROR"):
            self.assertEqual(self.api.call("GET", "/health/db")[0], 503)
