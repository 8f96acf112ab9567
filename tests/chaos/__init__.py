"""Chaos: real processes, real sockets, a real Redis, and what can happen to them; judged as the simulator judges.

One seed draws the limits, the actors and a script of faults; what the machine makes of it differs each time. Data
flows one way:

    worlds (what is drawn) -> run (one seed) -> books (what clients saw), journal (what Redis took) -> oracle

    worlds    draws the limits, the actors and the faults of a seed
    truth     a real Redis, and what it has taken: read from its append-only file
    child     a subscriber or a publisher in a process of its own
    actors    hubs and these processes: they are killed, stopped and started again
    faults    what can happen to them, to Redis and to the links between them (`tests.support.Proxy`)
    run       runs one seed; `python -m tests.chaos` runs many

Books, journal, troubles, oracle and raw clients are those of `tests.simulation`. What only virtual time can judge
is left to it: clocks that jump, pauses within a callback, limits below what settings allow, worlds without history
(of what is published and not stored Redis keeps nothing by which a client could be judged), that nothing turns in
circles while nothing happens, and that the same seed goes the same way again.
"""
