"""What happens when an operator is first used: Inductor learns the revision and what stays opaque, DTensor its rules.

They belong to modules that altgrad does not import. Fakes call :func:`prepare`, because compilers and DTensor run them
before they compute the key of a cache or look for a rule; whoever has imported none of them needs none.
"""

import os
import sys
from typing import Any

from . import sharding
from .operators import OPERATORS

# Raised by every change of a result or of a gradient. Compiled code is cached on disk under the operator's name and
# arguments only; with this in the key, new numerics never meet old compiled code.
NUMERICS_REVISION = "1"


def prepare() -> None:
    """Stamps Inductor's caches, allows opaque nodes and registers the sharding rules, each where it is missing."""
    config: Any = sys.modules.get("torch._inductor.config")
    if config is not None:
        # The caches' keys cover all of Inductor's configuration.
        marks = config.unsafe_marked_cacheable_functions
        if marks.get("torch.ops.altgrad") != NUMERICS_REVISION:
            config.unsafe_marked_cacheable_functions = {**marks, "torch.ops.altgrad": NUMERICS_REVISION}
    lowering: Any = sys.modules.get("torch._inductor.lowering")
    if lowering is not None and os.environ.get("CI"):
        # There Inductor refuses a node that has a decomposition, as operators have for ONNX and DTensor.
        lowering.FALLBACK_ALLOW_LIST.update(f"altgrad::{name}" for name in OPERATORS)
    if "torch.distributed.tensor" in sys.modules:
        sharding.register()
