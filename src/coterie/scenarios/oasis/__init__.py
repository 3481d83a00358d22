"""What the scenario `oasis` is made of (`coterie.scenarios.adapters.oasis`).

actions    what an agent sees of its feed, and the actions it may choose among; needs no OASIS
tables     what happened, read from the platform's tables; needs no OASIS
campaign   groups, who publishes what when, and the figures of each group; needs no OASIS
loading    whether OASIS is there, and importing it without what it leaves behind
platform   one simulation: platform, channel, agents that act as they are told
agents     CAMEL's chat agents as users of the platform
"""
