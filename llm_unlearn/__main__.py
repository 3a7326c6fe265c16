"""`python -m llm_unlearn` is `llm-unlearn`."""

from llm_unlearn.cli import main

main()
