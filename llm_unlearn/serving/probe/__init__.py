"""Is anything left of what was deleted?"""
