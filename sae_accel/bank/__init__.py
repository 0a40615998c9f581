"""The heads that one run trains. Entries of a recipe come in; planned, built and initialised heads go out."""

from .bank import SaeBank
from .plans import HeadPlan, plan_heads


__all__ = ["HeadPlan", "SaeBank", "plan_heads"]
