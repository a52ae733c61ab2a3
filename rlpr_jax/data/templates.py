"""From a question to the token ids a policy continues: instruction, worked examples, chat template."""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jinja2
from transformers import PreTrainedTokenizerBase

from rlpr_jax.data.sources import Example
from rlpr_jax.errors import InputError

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
_SAID = "what an assistant said"  # a marker in a rendered chat


def build_messages(
  example: Example,
  template: str,
  examples: Sequence[tuple[str, str]] = (),
  instruction: str | None = None,
) -> list[Message]:
  """The chat of one question.

  Args:
    example: the question.
    template: `think` or `answer_only`; chooses the instruction.
    examples: worked examples, each what the user says and how the assistant responds. They become turns before the
      question, the last message of the user.
    instruction: system message instead of the template's; "" for none. A row's own system message goes before either.

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
  if not tokenizer.chat_template:
    raise InputError(f"tokenizer {_name(tokenizer)}: expected a chat template, found none")
  attempts = [list(messages)]
  if messages[0]["role"] == "system":
    attempts.append(_merge_system(messages))
  for attempt in attempts:
    try:
      ids: Any = tokenizer.apply_chat_template(
        attempt, add_generation_prompt=True, tokenize=True, return_dict=False, date_string=DATE
      )
      return ids
    except jinja2.TemplateError as error:
      reason = " ".join(str(error).split())
  raise InputError(f"tokenizer {_name(tokenizer)}: its chat template rejects the messages: {reason}")


class TurnEnd(NamedTuple):
  """How a response ends."""

  eos_ids: tuple[int, ...]  # the tokens after which nothing more is written, ascending
  eos_id: int  # of these the one that the chat template writes behind what an assistant said


def turn_end(tokenizer: PreTrainedTokenizerBase, eos_ids: Collection[int] = ()) -> TurnEnd:
  """Finds the tokens that end a response: the tokenizer's EOS, its chat template's, and those given.

  A published model may end its turns with a token that its tokenizer does not call EOS: Gemma's `<end_of_turn>`.

  Args:
    eos_ids: more of them, say those of generation_config.json.

  Raises:
    InputError: there is none at all.

  >>> from rlpr_jax.data import builtin
  >>> turn_end(builtin.tokenizer())
  TurnEnd(eos_ids=(1,), eos_id=1)
  """
  of_template, eos = _template_end(tokenizer), tokenizer.eos_token_id
  last = eos if of_template is None else of_template
  if last is None:
    raise InputError(f"tokenizer {_name(tokenizer)}: expected an EOS token, found none")
  return TurnEnd(tuple(sorted({last, *eos_ids, *([] if eos is None else [eos])})), last)


def _template_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
  """The control token that the chat template writes behind an assistant's turn; None where it writes none."""
  messages = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": _SAID}]
  try:
    text: Any = tokenizer.apply_chat_template(messages, tokenize=False, date_string=DATE)
  except Exception:  # whatever a template raises; `render` says so where it matters
    return None
  after = text.rpartition(_SAID)[2].lstrip()
  control = {
    token.content: number
    for number, token in tokenizer.added_tokens_decoder.items()
    if token.special and after.startswith(token.content)
  }
  return control[max(control, key=len)] if control else None


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
  return tokenizer.name_or_path or type(tokenizer).__name__


def _merge_system(messages: Sequence[Message]) -> list[Message]:
  """Puts the leading system message before the text of the first user message."""
  system, *rest = (dict(message) for message in messages)
  first = next(message for message in rest if message["role"] == "user")
  first["content"] = f"{system['content']}\n\n{first['content']}"
  return rest
