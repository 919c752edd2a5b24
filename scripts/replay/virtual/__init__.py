"""Agents in virtual time: an agent's own rules, with seconds and bits where it would compute, code and send."""
