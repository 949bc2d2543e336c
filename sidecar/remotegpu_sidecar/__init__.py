"""What runs beside the agent: the spawner, the shims that own the processes, and the agent's client of both."""
