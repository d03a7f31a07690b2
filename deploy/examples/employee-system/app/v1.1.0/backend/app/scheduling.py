"""The rules by which shifts are planned."""

import json
from pathlib import Path

RULES_FILE = Path(__file__).resolve().parents[1] / "config" / "scheduling.json"


class RulesUnreadable(Exception):
    pass


def load_rules():
    """Read at each use: a change of the rules needs no restart."""
    try:
        rules = json.loads(RULES_FILE.read_text())
        return {"longest_shift_hours": int(rules["longest_shift_hours"]), "rest_hours": int(rules["rest_hours"])}
    except FileNotFoundError:
        raise RulesUnreadable(f"{RULES_FILE.name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise RulesUnreadable(f"{RULES_FILE.name} is not usable: {type(exc).__name__}") from None


def rules(request):
    return 200, load_rules()
