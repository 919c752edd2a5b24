"""The demo: the main job on one machine, with real processes, a real model, and links shaped to both sides of the
crossover between tokens and cache.
"""
