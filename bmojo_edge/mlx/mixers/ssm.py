"""Which class mixes each kind of state space; each is `mixer(u, state, layout)` and `mixer.step(u, state, step)`."""

from __future__ import annotations

import mlx.core as mx

from bmojo_edge.config import SSM, Config
from bmojo_edge.mlx.mixers.gdn import GDN
from bmojo_edge.mlx.mixers.gka import GKA
from bmojo_edge.mlx.mixers.mamba import Mamba
from bmojo_edge.mlx.mixers.mamba2 import Mamba2

SSM_MIXERS = {"mamba": Mamba, "mamba2": Mamba2, "gdn": GDN, "gka": GKA}


def ssm_mixer(config: Config, ssm: SSM, dtype: mx.Dtype) -> Mamba | Mamba2 | GDN | GKA:
    """The mixer of a concrete `ssm` table."""
    return SSM_MIXERS[ssm.kind](config, ssm, dtype)
