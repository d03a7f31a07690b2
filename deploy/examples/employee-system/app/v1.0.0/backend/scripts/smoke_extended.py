"""Smoke checks of what this release has beyond the first one."""


def extended_fields(smoke):
    made = smoke.create(hired_on="2024-02-29")
    path = f"/api/employees/{made['id']}/extended"
    smoke.expect(200, "PUT", path, body={"phone": "555 0100", "shirt": "M"})
    found = smoke.expect(200, "PUT", path, body={"shirt": None})
    if made["hired_on"] != "2024-02-29" or found != {"phone": "555 0100"}:
        raise ValueError("the stored fields are not what was sent")


EXTENDED_CHECKS = [("Extended Fields", extended_fields)]
