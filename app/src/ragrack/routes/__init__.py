"""The service's routes, a module for each idea; each has a `router`."""
