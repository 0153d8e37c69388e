"""The only place that names private parts of other libraries: a file each, every name with its reason and version."""
