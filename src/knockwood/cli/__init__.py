"""The command line."""

import gc
import os

# A command's start makes a few hundred thousand objects that live to its end: to look through them for
# rubbish after every 700 takes a tenth of the start.
gc.set_threshold(50_000, 20, 20)
# numpy would start a thread per core for linear algebra, which nobody does here.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
