"""From a question to the token ids a policy continues: instruction, worked examples, chat template."""

from collections.abc import Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from rlpr_jax.data.sources import Example
from rlpr_jax.errors import InputError, in_field

Message = dict[str, str]  # {role: system | user | assistant, content}

# The system message of a row that brings none. The formats are DeepSeek-R1's (think) and RLPR's for Gemma and Llama.
INSTRUCTIONS = {
  "think": (
    "Think the question through before you answer it. Write your reasoning between <think> and </think>, then your "
    "final answer, and nothing else, between <answer> and </answer>, like this: "
    "<think> your reasoning </think> <answer> your final answer </answer>"
  ),
  "answer_only": (
    "Work through the question step by step. End with your final answer, and nothing else, between <answer> and "
    "</answer>, like this: your reasoning <answer> your final answer </answer>"
  ),
}

# Llama 3's templates print today's date unless told one. This is the one they fall back on: a prompt stays the same
# from day to day, and so does what was computed for it.
DATE = "26 Jul 2024"


def build_messages(
  example: Example,
  template: str,
  examples: Sequence[tuple[str, str]] = (),
  instruction: str | None = None,
  system: str = "",
) -> list[Message]:
  """The chat of one question.

  Args:
    example: the question.
    template: `think` or `answer_only`; chooses the instruction.
    examples: worked examples, each what the user says and how the assistant responds. They become turns before the
      question, the last message of the user.
    instruction: system message instead of the template's; "" for none. A row's own system message goes before either.
    system: system message instead of the row's own and of these; "" leaves them.

  >>> example = Example(({"role": "user", "content": "6 * 7?"},), "42", "", 0)
  >>> build_messages(example, "think", instruction="Be brief.")
  [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': '6 * 7?'}]
  """
  if template not in INSTRUCTIONS:
    raise InputError(f"template {template!r}: expected one of {', '.join(INSTRUCTIONS)}")
  messages = [dict(message) for message in example.messages]
  question = max(i for i, message in enumerate(messages) if message["role"] == "user")
  turns = [
    {"role": role, "content": content}
    for pair in examples
    for role, content in zip(("user", "assistant"), pair, strict=True)
  ]
  messages[question:question] = turns
  if system:
    messages = [{"role": "system", "content": system}, *(one for one in messages if one["role"] != "system")]
  instruction = INSTRUCTIONS[template] if instruction is None else instruction
  if instruction and all(message["role"] != "system" for message in messages):
    messages.insert(0, {"role": "system", "content": instruction})
  return messages


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
  """Token ids of the chat, ending where the assistant begins to write.

  A template that rejects system messages (Gemma 2) gets the system message at the start of the first user message.

  Raises:
    InputError: the tokenizer has no chat template, or its template rejects the messages.
  """
  return render_all(tokenizer, [messages])[0]


def render_all(
  tokenizer: PreTrainedTokenizerBase, chats: Sequence[Sequence[Message]], origins: Sequence[str] = ()
) -> list[list[int]]:
  """Token ids of each chat, as `render` gives them; of many together in a small part of the time.

  Args:
    origins: where each chat comes from, for messages.
  """
  if not tokenizer.chat_template:
    raise InputError(f"tokenizer {_name(tokenizer)}: expected a chat template, found none")
  try:
    return _apply(tokenizer, chats)
  except jinja2.TemplateError:  # of one of them, which does not say how the others are to be written
    accepted = []
    for chat, origin in zip(chats, origins or [""] * len(chats), strict=True):
      with in_field(origin, ": " if origin else ""):
        accepted.append(_accepted(tokenizer, chat))
    return _apply(tokenizer, accepted)


def _apply(tokenizer: PreTrainedTokenizerBase, chats: Sequence[Sequence[Message]], tokenize: bool = True) -> Any:
  return tokenizer.apply_chat_template(
    [list(chat) for chat in chats], add_generation_prompt=True, tokenize=tokenize, return_dict=False, date_string=DATE
  )


def _accepted(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> Sequence[Message]:
  """The messages as the tokenizer's template takes them: as they are, or else without a system message."""
  attempts = [messages]
  if messages[0]["role"] == "system":
    attempts.append(_merge_system(messages))
  for attempt in attempts:
    try:
      _apply(tokenizer, [attempt], tokenize=False)
      return attempt
    except jinja2.TemplateError as error:
      reason = " ".join(str(error).split())
  raise InputError(f"tokenizer {_name(tokenizer)}: its chat template rejects the messages: {reason}")


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
  return tokenizer.name_or_path or type(tokenizer).__name__


def _merge_system(messages: Sequence[Message]) -> list[Message]:
  """Puts the leading system message before the text of the first user message."""
  system, *rest = (dict(message) for message in messages)
  first = next(message for message in rest if message["role"] == "user")
  first["content"] = f"{system['content']}\n\n{first['content']}"
  return rest
