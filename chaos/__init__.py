"""The chaos test: faults at random from a seed, a log of all that happens, and a suspicious checker.

    trial       one run: servers, two instances, load, faults, quiet, verdict
    requests    what the upstream sends; programs, amqp: upstreams, consumers and people, and how they connect
    schedule    which fault when, from the seed; stage, faults, nemesis: what is broken, how, and healed
    proxy       what an instance's links go through; links, link_faults: how one instance is cut off
    moment      when a blow hurts most; horizon: an old transaction that hurts slowly
    oplog       who did what when; history, operations, reading: the same, typed, with logs and tables
    checker     the verdict; safety, duplicates, conduct: the invariants; finding, report: how they are told
    teeth       the same against broken builds; breaks, launcher: how each of them is broken

Knows the service from outside: its contract, its log, its pages and its tables. Only `breaks` reaches inside.
"""
