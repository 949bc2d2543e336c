"""`python -m remotegpu_agent.cli`."""

from remotegpu_agent.cli.app import main

main()
