"""The model runtime beside its peers: every variant in a process of its own, all in turn, compared round by round."""
