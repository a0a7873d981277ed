"""Vector-Jacobian products: many at once, and of operations that are cheap to differentiate twice."""
