"""The one callback, once for each of the two Lightning packages: each has a base class of its own."""
