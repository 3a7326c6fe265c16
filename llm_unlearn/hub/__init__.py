"""Publishing on the Hugging Face Hub: push, pull, and purging what was deleted since.

Nothing here needs the network until `client.Hub` is asked something; `state` never does.
"""
