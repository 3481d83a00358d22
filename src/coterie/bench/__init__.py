"""How fast a run is on this machine, what bounds it, and where the time goes.

    some updates, timed                       -> seconds of rollout and learning
    the turns and advantages of each update   -> the least that must be computed for them (`coterie.lm.cost`)
    matrix products, timed between updates    -> the seconds that takes at best: the limit
    one more update under torch's profiler    -> shares of matrix products, adapters, attention, sampling, Python, …

`meter` does this for one environment and is what the repository's benchmarks use too; `report` is what `coterie bench`
says.
"""
