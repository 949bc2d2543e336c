"""`doctor`: what is wrong with this host, the config or the connection, without needing a running agent."""

from __future__ import annotations

from remotegpu_agent.cli.context import Globals, say
from remotegpu_agent.cli.exits import Exit


def doctor(options: Globals) -> int:
    """Check the host, the config, the control plane and the agent; each line says what to do. Exit code 1: a problem.

    Example: remotegpu-agent --config agent.yaml doctor
    """
    from remotegpu_agent.cli import output
    from remotegpu_agent.cli.checks import Level, all_checks

    found = []
    for check in all_checks(options):
        found.append(check)
        if not options.is_json:
            text = f"{check.subject}: {check.text}" + (f"\n{check.mend}" if check.mend else "")
            output.print_record([(f"{check.level:<7}", text)], options)
    problems = sum(check.level is Level.PROBLEM for check in found)
    warnings = sum(check.level is Level.WARNING for check in found)
    if options.is_json:
        checks = [
            {"subject": check.subject, "level": check.level, "text": check.text, "mend": check.mend} for check in found
        ]
        output.print_json({"checks": checks, "problems": problems, "warnings": warnings})
    else:
        say(f"{problems} problem{'' if problems == 1 else 's'}, {warnings} warning{'' if warnings == 1 else 's'}.")
    return Exit.FAILED if problems else Exit.DONE
