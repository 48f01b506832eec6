"""Which class mixes each kind of state space; each is `mixer(u, state, layout)` and `mixer.step(u, state, step)`."""

from __future__ import annotations

import torch

from bmojo_edge.config import SSM, Config
from bmojo_edge.torch.mixers.gdn import GDN
from bmojo_edge.torch.mixers.gka import GKA
from bmojo_edge.torch.mixers.mamba import Mamba
from bmojo_edge.torch.mixers.mamba2 import Mamba2

SSM_MIXERS = {"mamba": Mamba, "mamba2": Mamba2, "gdn": GDN, "gka": GKA}


def ssm_mixer(config: Config, ssm: SSM, dtype: torch.dtype) -> Mamba | Mamba2 | GDN | GKA:
    """The mixer of a concrete `ssm` table."""
    return SSM_MIXERS[ssm.kind](config, ssm, dtype)
