"""Information extraction that goes with a cache (Q-KVComm, methods.md 1.5): a context's facts, as a short text."""

from edge_agent.facts.detect import ContentType, content_type
from edge_agent.facts.extractor import Extractor
from edge_agent.facts.fact import Fact
from edge_agent.facts.rank import merged, ranked, summary, within

__all__ = ["ContentType", "Extractor", "Fact", "content_type", "merged", "ranked", "summary", "within"]
