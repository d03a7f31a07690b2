"""/api/employees and /api/departments."""

from sqlalchemy import text

from .http import Problem
from .schema import EMPLOYEE_FIELDS

# The names come from the code of this release, never from a request, so they may be pasted into SQL.
SELECT = (
    "SELECT e.id, d.name AS department, e.created_at, e.updated_at, "
    + ", ".join(f"e.{name}" for name in EMPLOYEE_FIELDS)
    + " FROM employees e LEFT JOIN departments d ON d.id = e.department_id"
)


def list_all(request):
    where, values = ["true"], {}
    if search := request.query.get("search"):
        # strpos and not LIKE: a `%` that is searched for is a percent sign.
        where.append(
            "strpos(lower(concat_ws(' ', e.first_name, e.last_name, e.email, e.position)), lower(:search)) > 0"
        )
        values["search"] = search
    if department := request.query.get("department"):
        where.append("d.name = :department")
        values["department"] = department
    values["limit"] = request.number("limit", 500, 1000)
    values["offset"] = request.number("offset", 0, 10**9)
    sql = f"{SELECT} WHERE {' AND '.join(where)} ORDER BY e.last_name, e.first_name, e.id LIMIT :limit OFFSET :offset"
    with request.engine.connect() as connection:
        return 200, [dict(row) for row in connection.execute(text(sql), values).mappings()]


def get(request, id):
    with request.engine.connect() as connection:
        return 200, read(connection, id)


def create(request):
    given = request.json_object()
    with request.engine.begin() as connection:
        # A missing field is checked as null, so that the required ones are asked for.
        values = _columns(connection, {name: None for name in EMPLOYEE_FIELDS} | given)
        names = ", ".join(values)
        holders = ", ".join(f":{name}" for name in values)
        id = connection.execute(text(f"INSERT INTO employees ({names}) VALUES ({holders}) RETURNING id"), values).scalar()
        return 201, read(connection, id)


def update(request, id):
    given = request.json_object()
    with request.engine.begin() as connection:
        values = _columns(connection, given)
        assignments = ", ".join([f"{name} = :{name}" for name in values] + ["updated_at = now()"])
        connection.execute(text(f"UPDATE employees SET {assignments} WHERE id = :id"), values | {"id": id})
        return 200, read(connection, id)


def delete(request, id):
    with request.engine.begin() as connection:
        if not connection.execute(text("DELETE FROM employees WHERE id = :id"), {"id": id}).rowcount:
            raise Problem(404, "no such employee")
    return 204, None


def departments(request):
    with request.engine.connect() as connection:
        return 200, [dict(row) for row in connection.execute(text("SELECT id, name FROM departments ORDER BY name")).mappings()]


def read(connection, id):
    row = connection.execute(text(f"{SELECT} WHERE e.id = :id"), {"id": id}).mappings().first()
    if row is None:
        raise Problem(404, "no such employee")
    return dict(row)


def _columns(connection, given):
    """What a client sent, as columns and values that are fit to store."""
    values, problems = {}, {}
    for name, value in given.items():
        try:
            if name == "department":
                values["department_id"] = _department_id(connection, value)
            elif name in EMPLOYEE_FIELDS:
                values[name] = EMPLOYEE_FIELDS[name](value)
            else:
                raise ValueError("is not a known field")
        except ValueError as exc:
            problems[name] = str(exc)
    if problems:
        raise Problem(422, "some fields cannot be accepted", fields=problems)
    return values


def _department_id(connection, name):
    if name is None:
        return None
    id = None
    if isinstance(name, str) and "\x00" not in name:
        id = connection.execute(text("SELECT id FROM departments WHERE name = :name"), {"name": name}).scalar()
    if id is None:
        raise ValueError("is not a known department")
    return id
