"""Whether a layout trains as one process does, found out on the user's own module and data, on a CPU."""
