"""Measures the running application and holds it against limits. Prints JSON.

The figure held against a limit is the 95th percentile of the samples. What it creates, it deletes.
Exit code: 0 within all limits, 1 not.  Further arguments and environment: see client.py.
"""

import argparse
import json
import os
import statistics
import sys
import time

import client

# Limits of the runbook, in milliseconds.
LIMITS = {"list": 100.0, "search": 150.0, "create": 50.0, "update": 50.0}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    client.add_arguments(parser)
    parser.add_argument("--samples", type=int, default=30)
    for name, limit in LIMITS.items():
        parser.add_argument(f"--{name}-ms", type=float, default=limit)
    args = parser.parse_args()
    if args.samples < 2:
        parser.error("--samples is at least 2")

    api = client.Client(args.base_url)
    if api.login(args.username, client.password(args)) != 200:
        sys.exit("the login is refused")
    created = []
    try:
        results = {
            "list": measure(args.samples, lambda n: want(200, api.call("GET", "/api/employees"))),
            "search": measure(args.samples, lambda n: want(200, api.call("GET", "/api/employees?search=keller"))),
            "create": measure(args.samples, lambda n: created.append(create(api, n))),
            "update": measure(args.samples, lambda n: update(api, created, n)),
        }
    finally:
        for id in created:
            api.call("DELETE", f"/api/employees/{id}")

    operations = []
    for name, samples in results.items():
        limit, p95 = getattr(args, f"{name}_ms"), statistics.quantiles(samples, n=20, method="inclusive")[-1]
        operations.append(
            {
                "name": name,
                "median_ms": round(statistics.median(samples), 2),
                "p95_ms": round(p95, 2),
                "limit_ms": limit,
                "within": p95 <= limit,
            }
        )
    passed = all(operation["within"] for operation in operations)
    print(json.dumps({"passed": passed, "samples": args.samples, "operations": operations}, indent=2))
    return 0 if passed else 1


def measure(samples, operation):
    """Milliseconds per call. The first call is not counted: it pays for connections and caches."""
    times = []
    for number in range(samples + 1):
        started = time.perf_counter()
        operation(number)
        times.append((time.perf_counter() - started) * 1000)
    return times[1:]


def want(status, answer):
    if answer[0] != status:
        raise SystemExit(f"an operation answers {answer[0]}, not {status}")
    return answer[1]


def create(api, number):
    body = {"first_name": "Benchmark", "last_name": f"Run {os.getpid()}.{number}", "department": "Testing"}
    return want(201, api.call("POST", "/api/employees", body=body))["id"]


def update(api, created, number):
    want(200, api.call("PUT", f"/api/employees/{created[number]}", body={"position": f"Position {number}"}))


if __name__ == "__main__":
    sys.exit(main())
