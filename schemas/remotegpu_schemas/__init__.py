"""The words of the system: states, tasks, attempts, wire and API messages, errors and limits.

Imports nothing of ours; every other package imports it.
"""
