"""From the optimum export to the graph an agent runs: one GroupQueryAttention a layer over a buffer it shares, explicit
positions, logits of chosen rows only, weights in fp32, int8 or int4.
"""

from scripts.prepare_model.graph.errors import GraphNotUnderstood

__all__ = ["GraphNotUnderstood"]
