"""The ranks of a machine as processes: started, watched, ended together, and started again."""
