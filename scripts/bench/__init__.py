"""`make bench`: what this machine does, as ratios within one run; tables and plots under build/bench/."""
