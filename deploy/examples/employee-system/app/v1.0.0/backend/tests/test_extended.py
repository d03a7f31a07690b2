from tests.support import DatabaseCase


class Extended(DatabaseCase):
    def test_a_field_is_set_changed_and_taken_away(self):
        path = f"/api/employees/{self.create()['id']}/extended"
        self.assertEqual(self.api.call("PUT", path, body={"phone": "1", "room": "2"}), (200, {"phone": "1", "room": "2"}))
        self.assertEqual(self.api.call("PUT", path, body={"phone": "3", "room": None}), (200, {"phone": "3"}))

    def test_an_employee_goes_with_the_extended_fields(self):
        path = f"/api/employees/{self.create()['id']}"
        self.api.call("PUT", f"{path}/extended", body={"phone": "1"})
        self.assertEqual(self.api.call("DELETE", path)[0], 204)
        self.assertEqual(self.api.call("GET", f"{path}/extended")[0], 404)

    def test_the_date_of_hiring_is_a_date(self):
        self.assertEqual(self.create(hired_on="2024-02-29")["hired_on"], "2024-02-29")
        body = {"first_name": "A", "last_name": "B", "hired_on": "2023-02-29"}
        self.assertEqual(self.api.call("POST", "/api/employees", body=body)[0], 422)
