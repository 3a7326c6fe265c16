"""The HTTP side: OpenAI's addresses, deletions, tokens, limits, an audit log."""
