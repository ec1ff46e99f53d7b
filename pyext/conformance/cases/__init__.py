"""One file per op: its cases, backends, bound and costs, registered with steepest.conformance.registry."""
