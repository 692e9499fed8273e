"""langchain's own tests of a chat model, run on langchain-openai's against the server."""

import os

from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests


class TestServed(ChatModelIntegrationTests):
    @property
    def chat_model_class(self):
        return ChatOpenAI

    @property
    def chat_model_params(self):
        return {
            "model": "demo", "base_url": os.environ["SERVED"] + "/v1", "api_key": "none",
            "temperature": 0, "max_retries": 0, "timeout": 60, "stream_usage": True,
        }  # fmt: skip

    @property
    def supports_image_inputs(self):
        return True

    @property
    def has_tool_calling(self):
        return False

    @property
    def structured_output_kwargs(self):
        return {"method": "json_schema"}

    @property
    def supports_json_mode(self):
        return True
