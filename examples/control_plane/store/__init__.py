"""The plane's database: the only package that imports SQLAlchemy. Knows no HTTP and no dialect.

Everything but `database` is units of work: functions of a connection inside one transaction, with the time and new
ids passed in. A unit may be run again from its beginning, so it has no other effect.
"""
