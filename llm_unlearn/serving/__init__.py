"""Serving while deletions are pending: an HTTP server whose answers say what they can depend on."""
