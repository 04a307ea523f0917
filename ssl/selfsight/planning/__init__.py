"""What a run needs, before it is started: memory, work, time, traffic."""
