"""What the CPU under the tests can do."""

import openvino as ov
import pytest

HAS_BF16 = "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
needs_bf16 = pytest.mark.skipif(not HAS_BF16, reason="this CPU has no instructions for bf16")
