"""Tests against the peers' own packages; `make test` runs them in an environment that has all of them."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("sae_lens") else ["*"]
