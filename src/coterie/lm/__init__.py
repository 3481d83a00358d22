"""The base model and its adapters: loading, the adapter bank, prefix trees and the attention over them.

Shared by the in-process engine and the learner, which is why publishing an adapter costs nothing.
"""

import os

# Read by GNU's OpenMP when torch is first imported, so it stands here. Threads that wait for one another spin, by
# default for milliseconds. A pass here is hundreds of short parallel regions; where another process wants a core,
# threads that spin use up the time of those that are waited for: beside one busy process an update of a second took
# over a minute by default, and 1.7 s where threads go to sleep after some ten microseconds.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
