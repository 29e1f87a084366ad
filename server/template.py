"""The chat template as the routes use it: what it refuses is an ApiError."""

from collections.abc import Mapping, Sequence
from typing import Any

from eaglerun import chat_template
from eaglerun.errors import RequestError
from eaglerun.server.failures import refuse


class ChatTemplate(chat_template.ChatTemplate):
    """See eaglerun.chat_template."""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        max_chars: int,
        *,
        add_generation_prompt: bool,
        **values: object,
    ) -> str:
        """The prompt. ApiError if the template will not render these messages."""
        try:
            return super().render(
                messages,
                tools,
                max_chars,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=False,
                **values,
            )
        except RequestError as error:
            raise refuse(error.field, error.message) from error
