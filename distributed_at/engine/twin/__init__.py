"""The attack's own view of the network: folded, cast, compiled or captured, and never stale."""
