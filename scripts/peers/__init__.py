"""What others do to a cache and can be done here without their packages, for the bench and evaluations alike."""
