"""Smoke checks of what this release has beyond the first one."""

EXTENDED_CHECKS = []
