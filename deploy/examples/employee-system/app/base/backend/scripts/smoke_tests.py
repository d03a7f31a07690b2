"""Walks through the running application as a user would, and prints one line per function.

It works on employees that it creates itself, and deletes them again.
Exit code: 0 all pass, 1 not all.  Arguments and environment: see client.py.
"""

import argparse
import http.client
import os
import sys

import client
from smoke_extended import EXTENDED_CHECKS


class Failed(Exception):
    pass


class Smoke:
    def __init__(self, api, username, password):
        self.api, self.username, self.password = api, username, password
        self.created = []

    def expect(self, wanted, method, path, **more):
        status, body = self.api.call(method, path, **more)
        if status != wanted:
            raise Failed(f"{method} {path.partition('?')[0]} answers {status}, not {wanted}")
        return body

    def create(self, **more):
        # The process id tells two runs at the same time apart.
        body = {"first_name": "Smoke", "last_name": f"Test {os.getpid()}", "position": "QA Engineer", **more}
        made = self.expect(201, "POST", "/api/employees", body=body)
        self.created.append(made["id"])
        return made

    def clean_up(self):
        for id in self.created:
            self.api.call("DELETE", f"/api/employees/{id}")


def same(found, wanted, what):
    if found != wanted:
        raise Failed(f"{what} is {found!r}, not {wanted!r}")


def authentication(smoke):
    if smoke.api.login(smoke.username, smoke.password + "x") != 401:
        raise Failed("a wrong password is not refused")
    if smoke.api.login(smoke.username, smoke.password) != 200:
        raise Failed("the login is refused")


def crud(smoke):
    made = smoke.create(department="Testing")
    path = f"/api/employees/{made['id']}"
    same(smoke.expect(200, "PUT", path, body={"position": "Senior QA Engineer"})["position"], "Senior QA Engineer", "position")
    same(smoke.expect(200, "GET", path)["last_name"], made["last_name"], "last_name")
    smoke.expect(204, "DELETE", path)
    smoke.expect(404, "GET", path)
    smoke.created.remove(made["id"])


def search(smoke):
    made = smoke.create(department="Testing")
    name = made["last_name"].replace(" ", "%20")
    found = smoke.expect(200, "GET", f"/api/employees?search={name}&department=Testing")
    same([e["id"] for e in found], [made["id"]], "the search's result")
    same(smoke.expect(200, "GET", f"/api/employees?search={name}&department=Sales"), [], "the filtered result")


def department(smoke):
    made = smoke.create(department="Testing")
    path = f"/api/employees/{made['id']}"
    same(smoke.expect(200, "PUT", path, body={"department": "Support"})["department"], "Support", "department")
    smoke.expect(422, "PUT", path, body={"department": "No such department"})


def authorization(smoke):
    smoke.expect(401, "GET", "/api/employees", token=None)
    smoke.expect(401, "GET", "/api/employees", token=smoke.api.token + "x")
    smoke.expect(401, "POST", "/api/employees", body={}, token=None)


CHECKS = [
    ("Authentication", authentication),
    ("Employee CRUD", crud),
    ("Search/Filter", search),
    ("Department Assignment", department),
    *EXTENDED_CHECKS,
    ("Authorization", authorization),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    client.add_arguments(parser)
    args = parser.parse_args()
    sys.stdout.reconfigure(encoding="utf-8")
    smoke = Smoke(client.Client(args.base_url), args.username, client.password(args))
    passed = True
    try:
        for name, check in CHECKS:
            try:
                check(smoke)
            except (Failed, OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as exc:
                passed = False
                print(f"❌ {name}: FAIL ({type(exc).__name__}: {exc})")
            else:
                print(f"✅ {name}: PASS")
    finally:
        if smoke.api.token:
            try:
                smoke.clean_up()
            except OSError as exc:
                passed = False
                print(f"cannot delete what was created: {exc}", file=sys.stderr)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
