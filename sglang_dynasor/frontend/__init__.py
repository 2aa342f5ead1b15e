"""For authors of SGLang's frontend programs: declare a reasoning program, fork its branches, read what came of it.

`docs/frontend.md` shows how.
"""

from sglang_dynasor.frontend.branch import Branch
from sglang_dynasor.frontend.endpoint import Endpoint
from sglang_dynasor.frontend.local import LocalEngine
from sglang_dynasor.frontend.reasoning import Reasoning, reason

__all__ = ["Branch", "Endpoint", "LocalEngine", "Reasoning", "reason"]
