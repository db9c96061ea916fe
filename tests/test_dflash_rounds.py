"""DFlash heads through ``spec_compile``."""

from __future__ import annotations

import pytest
from tiny import tiny_model

from spec_compile import spec_compile
from spec_compile.errors import DraftError
from spec_compile.hf_integration.dflash import random_dflash_head


def test_a_dflash_head_is_refused_in_words():
    model = tiny_model("llama")
    with pytest.raises(DraftError, match="DFlash"):
        spec_compile(model, draft=random_dflash_head(model), compile="none")
