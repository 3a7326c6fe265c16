"""Every serving policy on the same queries and deletions, before anything is deployed."""
