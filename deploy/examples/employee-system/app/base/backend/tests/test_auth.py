import unittest

from app.auth import TOKEN_SECONDS, hash_password, issue_token, password_matches, user_of_token
from tests.support import SECRET


class Passwords(unittest.TestCase):
    def test_a_password_matches_its_hash_only(self):
        stored = hash_password("correct horse")
        self.assertTrue(password_matches("correct horse", stored))
        self.assertFalse(password_matches("correct hors", stored))

    def test_two_hashes_of_one_password_differ(self):
        self.assertNotEqual(hash_password("same"), hash_password("same"))


class Tokens(unittest.TestCase):
    def test_a_token_names_its_user_until_it_expires(self):
        token = issue_token(SECRET, "admin", now=1000)
        self.assertEqual(user_of_token(SECRET, token, now=1000), "admin")
        self.assertIsNone(user_of_token(SECRET, token, now=1000 + TOKEN_SECONDS))

    def test_a_changed_or_foreign_token_is_refused(self):
        token = issue_token(SECRET, "admin")
        for wrong in (token + "x", "x" + token, token.replace(".", "", 1), "", "..", "é.é.é"):
            self.assertIsNone(user_of_token(SECRET, wrong))
        self.assertIsNone(user_of_token(SECRET + "x", token))
