"""`coterie doctor`: what is wrong with this machine, its packages, the servers and a run, and how to mend it.

    checks (one file per area) -> Finding -> report (text or JSON) -> exit code

    machine.py    cores, threads, memory, how fast which data type is, disk, base model
    packages.py   Python, what is installed, the packaging traps people fall into
    servers.py    every server: health, models, log-probabilities, adapters, context
    runs.py       a run's config, checkpoint and adapters

A check looks, and changes nothing. It imports nothing heavy: packages are read from their metadata, adapters from
their headers. What it cannot find out is a finding too, never a crash.
"""
