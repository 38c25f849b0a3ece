"""A pytest plugin: a process that lives months later, for what must not depend on the time."""

import time

now = time.time
time.time = lambda: now() + 1e7
