"""What every test shares: repeatable, offline, and without waiting for a compiler."""

import os
import signal

from hypothesis import settings

# Set before MLX or the hub's client is imported. Tests of `mx.compile` turn it on again themselves.
os.environ.setdefault("MLX_DISABLE_COMPILE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")

# A shell without job control starts background jobs deaf to Ctrl-C, and children inherit that; some tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
