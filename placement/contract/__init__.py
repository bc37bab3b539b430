"""Problem, plan, cluster and certificate; other packages may read these."""
