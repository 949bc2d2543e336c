"""`python -m remotegpu_agent.cli`."""

from remotegpu_agent.cli import main

main()
