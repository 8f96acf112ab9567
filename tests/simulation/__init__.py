"""A deterministic simulator: the real hub, `Subscriber` and `Publisher` in one thread, on virtual time.

One seed is one history: all that chance, time, the network and Redis do is drawn from it. Data flows one way:

    worlds (what is drawn) -> run (one seed) -> books (what clients saw), journal (what Redis took) -> oracle

    process   a process that can be killed and stopped, all in one thread
    loop      the event loop with virtual time, and what is patched so that nothing else has a clock or chance
    network   connections between processes, and what can happen to them
    lua       the scripts of Redis in Lua 5.1
    memory    the keys of a Redis, and its commands
    redis     a Redis: memory, Pub/Sub and scripts behind RESP
    clients   raw WebSocket clients, which share no code with the product
    books     what one client was given and told
    oracle    judges the books by the journal
    worlds    draws the limits, the actors and the faults of a seed
    actors    hubs, publishers and subscribers, each a process that dies and comes back
    faults    what can happen to them, and to Redis and the network
    run       runs one seed; `python -m tests.simulation` runs many, and `shrink` makes small what fails
"""
