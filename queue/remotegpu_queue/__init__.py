"""What to run when; owns the database. Knows nothing of processes, HTTP or the control plane."""
