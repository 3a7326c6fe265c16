"""Which records a model has memorised: proxies, a reference to validate them, and refinement (RUM)."""
