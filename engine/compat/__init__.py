"""The compatibility rules, and what they say of a list of optimizers. To add a rule: `schema/compatibility.yaml`.

speaking = compat.under(compat.Facts(device="cuda", model=model, batch=2, libraries=compat.installed()))
for finding in speaking.findings(steps):
    ...
"""

from engine.compat.findings import Applicable, Finding, general, refusal, under
from engine.compat.rules import Compatibility, Fact, Rule, Subject, known_params, rules, shipped
from engine.compat.when import CONDITIONS, ROLES, TRAITS, Facts, installed

__all__ = [
    "CONDITIONS",
    "ROLES",
    "TRAITS",
    "Applicable",
    "Compatibility",
    "Fact",
    "Facts",
    "Finding",
    "Rule",
    "Subject",
    "general",
    "installed",
    "known_params",
    "refusal",
    "rules",
    "shipped",
    "under",
]
