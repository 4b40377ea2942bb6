"""How the inner loop turns a gradient into a change of the fast weights."""

from tttjax.update_rules.rules import RULES, make_rule

__all__ = ["RULES", "make_rule"]
