"""Continues an assistant's words with a prompt that ends inside the last message.

The method is that of transformers (apply_chat_template with continue_final_message): a tag is
appended to the message, and the rendering is cut at the tag. Some templates know the tag's name.
"""

from __future__ import annotations

from typing import Any

from ..base.errors import ChatTemplateError

TAG = "CONTINUE_FINAL_MESSAGE_TAG "


def to_continue(messages: list[dict[str, Any]]) -> bool:
    """Returns whether a conversation ends with words of the assistant, and no tool calls."""
    return messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls")


def tagged(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the conversation with the tag behind the last text of its last message."""
    *before, last = messages
    content = last["content"]
    if isinstance(content, list):
        part = content[-1]
        content = [*content[:-1], {**part, "text": part["text"] + TAG}]
    else:
        content += TAG
    return [*before, {**last, "content": content}]


def cut(text: str, words: str, name: str, mark: str = "") -> str:
    """Returns a rendering up to the tag.

    words: the last text of the message as the template got it, marks included. If the template
    trims it, the prompt ends without the white space. Raises ChatTemplateError if the template
    drops or rewrites the message.
    """
    tag = TAG.strip()
    end = text.rfind(tag)
    if end < 0 or words.strip() not in text:
        ending = words.replace(mark, "").strip()[-40:]
        raise ChatTemplateError(
            f"chat template {name!r} does not keep the assistant's words that are to be continued: "
            f"expected them at the end of the prompt, found no {ending!r} there"
        )
    kept = text.startswith(TAG, end)
    return text[:end] if kept or not words.strip() else text[:end].rstrip()
