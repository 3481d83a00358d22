"""The base model and its adapters: loading, the adapter bank, prefix trees and the attention over them.

Shared by the in-process engine and the learner, which is why publishing an adapter costs nothing.
"""

import os

# Read by GNU's OpenMP when torch is first imported, so it stands here. Threads that wait for one another spin, by
# default for some 20 ms, and that is quickest as long as every thread has a core. Where another process wants one,
# those that spin use up the time of those that are waited for: beside one busy process an update of a second took over
# a minute, and 1.7 s where threads go to sleep soon. So they do where the machine is busy already.
if (
    "OMP_WAIT_POLICY" not in os.environ
    and hasattr(os, "getloadavg")
    and os.getloadavg()[0] > 0.5 * (os.cpu_count() or 1)
):
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
