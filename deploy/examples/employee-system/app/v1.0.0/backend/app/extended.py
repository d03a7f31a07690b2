"""/api/employees/{id}/extended: names and values of free choice."""

from sqlalchemy import text

from . import employees
from .http import Problem
from .validate import text as checked

NAME, VALUE = checked(60, required=True), checked(2000)


def get(request, id):
    with request.engine.connect() as connection:
        return 200, _read(connection, id)


def update(request, id):
    """Sets the fields that are named; null takes a field away."""
    given = request.json_object()
    try:
        fields = [{"id": id, "name": NAME(name), "value": VALUE(value)} for name, value in given.items()]
    except ValueError as exc:
        raise Problem(422, f"a name or a value {exc}") from None
    with request.engine.begin() as connection:
        # Answers 404 before the foreign key would answer with a conflict.
        employees.read(connection, id)
        for field in fields:
            if field["value"] is None:
                connection.execute(text("DELETE FROM employee_fields WHERE employee_id = :id AND name = :name"), field)
            else:
                connection.execute(
                    text(
                        "INSERT INTO employee_fields (employee_id, name, value) VALUES (:id, :name, :value)"
                        " ON CONFLICT (employee_id, name) DO UPDATE SET value = excluded.value"
                    ),
                    field,
                )
        return 200, _read(connection, id)


def _read(connection, id):
    employees.read(connection, id)
    sql = "SELECT name, value FROM employee_fields WHERE employee_id = :id ORDER BY name"
    return {name: value for name, value in connection.execute(text(sql), {"id": id})}
