from tests.support import DatabaseCase


class Employees(DatabaseCase):
    def test_a_percent_sign_is_searched_for_as_such(self):
        made = self.create(position="100% remote")
        self.assertEqual([e["id"] for e in self.api.call("GET", "/api/employees?search=100%25")[1]], [made["id"]])
        self.assertEqual(self.api.call("GET", "/api/employees?search=0%25%20x")[1], [])

    def test_every_bad_field_is_named(self):
        body = {"first_name": "", "email": "nobody", "salary": 1, "department": "Nowhere"}
        status, answer = self.api.call("POST", "/api/employees", body=body)
        self.assertEqual(status, 422)
        self.assertEqual(set(answer["fields"]), {"first_name", "last_name", "email", "salary", "department"})

    def test_a_second_use_of_an_address_is_a_conflict(self):
        self.create(email="unit@example.com")
        body = {"first_name": "A", "last_name": "B", "email": "unit@example.com"}
        self.assertEqual(self.api.call("POST", "/api/employees", body=body)[0], 409)

    def test_what_is_not_there_is_a_404(self):
        for method in ("GET", "PUT", "DELETE"):
            self.assertEqual(self.api.call(method, "/api/employees/999999999999", body={})[0], 404)

    def test_an_update_touches_only_what_it_names(self):
        made = self.create(department="Sales", position="Planner")
        changed = self.api.call("PUT", f"/api/employees/{made['id']}", body={"position": None})[1]
        self.assertEqual((changed["position"], changed["department"], changed["last_name"]), (None, "Sales", "Test"))
