"""The store of contexts: text always; KV caches in memory under a budget, tightened, then on disk, as memory fills."""

from edge_agent.memory.budget import Budget
from edge_agent.memory.shelf import Form, Shelf, rung_of
from edge_agent.memory.spill import Spill
from edge_agent.memory.store import ContextStore, Held

__all__ = ["Budget", "ContextStore", "Form", "Held", "Shelf", "Spill", "rung_of"]
