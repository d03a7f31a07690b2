"""The endpoints of this release."""

from . import auth, employees, health, pages

# (method, path, handler, needs a token)
ROUTES = [
    ("GET", "/", pages.index, False),
    ("GET", "/assets/{name}", pages.asset, False),
    ("GET", "/health", health.live, False),
    ("GET", "/health/db", health.database, False),
    ("POST", "/api/auth/login", auth.login, False),
    ("GET", "/api/departments", employees.departments, True),
    ("GET", "/api/employees", employees.list_all, True),
    ("POST", "/api/employees", employees.create, True),
    ("GET", "/api/employees/{id}", employees.get, True),
    ("PUT", "/api/employees/{id}", employees.update, True),
    ("DELETE", "/api/employees/{id}", employees.delete, True),
]
