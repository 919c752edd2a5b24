"""What the coordinator's policies are worth, by the coordinator's own model: figures, regions, simulation, scale."""
