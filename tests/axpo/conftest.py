"""What several files of tests share because it takes seconds to make."""

import pytest
import torch

from axpo.conversation import Conversation
from axpo.paths import model_directory
from axpo.rollout import Agent
from axpo.tools import get_tools
from engine import LLM


@pytest.fixture(scope="session")
def agent() -> Agent:
    """The embedded model with its tool, seed 0, as the recipe mini makes it."""
    llm = LLM(model_directory("mini"), dtype=torch.float32, kv_cache_bytes=1 << 26)
    return Agent(llm, Conversation(llm.processor, get_tools(["image_zoom_in"])), seed=0)
