"""From a question to the token ids a policy continues: instruction, worked examples, chat template."""

import contextlib
import functools
import json
import pathlib
import re
import threading
import types
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

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
_THOUGHT = ("<think>", "</think>")  # tags that are meant, even where they are control tokens
_PRIVATE = 0xF0000  # where the characters begin that Unicode leaves to everybody for himself
# For a base model, which has none: roles as words, and EOS behind what the assistant says.
PLAIN = (
  "{{ bos_token }}{% for message in messages %}{{ message.role | capitalize }}: {{ message.content }}"
  "{{ eos_token if message.role == 'assistant' }}\n\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
_LONGEST = 10  # seconds that a template may take for a short chat
_SAID = "what an assistant said"  # a marker in a rendered chat


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


class Rendering(NamedTuple):
  """What a template is told beside the messages."""

  opens: bool | None = None  # ends with the beginning of what the assistant says; None: unless it goes on
  goes_on: bool | None = None  # with the last message; None: with the assistant's, unless it opens a new one
  variables: Mapping[str, Any] = types.MappingProxyType({})  # of the template's own: `enable_thinking`


def render(
  tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], rendering: Rendering = Rendering()
) -> list[int]:
  """Token ids of the chat, ending where the assistant begins to write, or goes on with the last message if it is its.

  A template that rejects system messages (Gemma 2) gets the system message at the start of the first user message.
  What a message says stays text: a control token that is spelled there, and the thoughts of worked examples, which
  some templates would leave out.

  Raises:
    InputError: the tokenizer has no chat template, or its template rejects the messages.
  """
  return render_all(tokenizer, [messages], rendering=rendering)[0]


def render_all(
  tokenizer: PreTrainedTokenizerBase,
  chats: Sequence[Sequence[Message]],
  origins: Sequence[str] = (),
  rendering: Rendering = Rendering(),
) -> list[list[int]]:
  """Token ids of each chat, as `render` gives them; of many together in a small part of the time.

  Args:
    origins: where each chat comes from, for messages.
  """
  if not tokenizer.chat_template:
    raise InputError(f"tokenizer {_name(tokenizer)}: expected a chat template, found none")
  written = []
  for chat, origin in zip(chats, origins or [""] * len(chats), strict=True):
    with in_field(origin, ": " if origin else ""):
      written.append(_write(tokenizer, chat, rendering))
  return _encode_all(tokenizer, written)


def _write(
  tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], rendering: Rendering
) -> tuple[str, "_Hidden"]:
  """The text of a chat, and what is hidden in it."""
  hidden = _Hidden(_control_tokens(tokenizer))
  attempts = [[message | {"content": hidden.hide(message)} for message in messages]]
  if messages[0]["role"] == "system" and any(message["role"] == "user" for message in messages):
    attempts.append(_merge_system(attempts[0]))
  goes_on = rendering.goes_on
  if goes_on is None:
    goes_on = messages[-1]["role"] == "assistant" and not rendering.opens
  for attempt in attempts:
    try:
      text: Any = tokenizer.apply_chat_template(
        attempt,
        add_generation_prompt=not goes_on if rendering.opens is None else rendering.opens,
        continue_final_message=goes_on,
        tokenize=False,
        **{"date_string": DATE, **rendering.variables},
      )
      return str(text), hidden
    except Exception as error:  # of jinja, or of whatever a template does
      reason = " ".join(str(error).split())
  raise InputError(f"tokenizer {_name(tokenizer)}: its chat template rejects the messages: {reason}")


@functools.lru_cache(maxsize=8)
def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
  """Special tokens and their ids, the longest first."""
  tokens = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
  return dict(sorted(tokens.items(), key=lambda item: -len(item[0])))


@functools.lru_cache(maxsize=8)
def _patterns(controls: tuple[str, ...]) -> tuple[re.Pattern[str], re.Pattern[str]]:
  """Patterns of special tokens, and of these and the tags of a thought."""
  return (
    re.compile("|".join(re.escape(token) for token in controls if token not in _THOUGHT) or "(?!)"),
    re.compile("|".join(map(re.escape, (*controls, *_THOUGHT)))),
  )


class _Hidden:
  """Parts of messages that a template or tokenizer is not to see, each behind a character that nobody writes."""

  def __init__(self, controls: Collection[str]):
    """`controls`: special tokens, the longest first."""
    self._pattern, self._thoughts = _patterns(tuple(controls))
    self._parts: list[str] = []

  def __bool__(self) -> bool:
    return bool(self._parts)

  def hide(self, message: Message) -> str:
    """The message's text, with a character in the place of each such part."""
    pattern = self._thoughts if message["role"] == "assistant" else self._pattern

    def put_away(match: re.Match[str]) -> str:
      self._parts.append(match[0])
      return chr(_PRIVATE + len(self._parts) - 1)

    return pattern.sub(put_away, message["content"])

  def encode(self, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text with the parts in their places again: thoughts as they are, control tokens spelled out."""
    for number, part in enumerate(self._parts):
      if part in _THOUGHT:
        text = text.replace(chr(_PRIVATE + number), part)
    ids: list[int] = []
    for piece in re.split(f"([{chr(_PRIVATE)}-{chr(_PRIVATE + len(self._parts) - 1)}])", text):
      spelled = len(piece) == 1 and ord(piece) >= _PRIVATE
      written = self._parts[ord(piece) - _PRIVATE] if spelled else piece
      ids += tokenizer(written, add_special_tokens=False, split_special_tokens=spelled)["input_ids"]
    return ids


def _encode_all(tokenizer: PreTrainedTokenizerBase, written: Sequence[tuple[str, _Hidden]]) -> list[list[int]]:
  """The ids of texts, each with what is hidden in it; those with nothing hidden go through the tokenizer together."""
  plain = [text for text, hidden in written if not hidden]
  found = tokenizer(plain, add_special_tokens=False, return_attention_mask=False)["input_ids"] if plain else []
  together = iter(found)
  return [hidden.encode(tokenizer, text) if hidden else next(together) for text, hidden in written]


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
  """Token ids of what somebody says: a control token that is spelled there stays text.

  >>> from rlpr_jax.data import builtin
  >>> tokenizer = builtin.tokenizer()
  >>> tokenizer.decode(encode_texts(tokenizer, ["<answer>7</answer>"])[0])
  '<answer>7</answer>'
  """
  written = []
  for text in texts:
    hidden = _Hidden(_control_tokens(tokenizer))
    written.append((hidden.hide({"role": "user", "content": text}), hidden))
  return _encode_all(tokenizer, written)


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
  return next((number for token, number in _control_tokens(tokenizer).items() if after.startswith(token)), None)


def own_system_message(tokenizer: PreTrainedTokenizerBase) -> str:
  """Finds what a chat template writes before the first user message if no system message is given.

  Returns:
    its text if there is a system message in it, as in Qwen2.5's ("You are Qwen ..."), else "".
  """
  text: Any = tokenizer.apply_chat_template([{"role": "user", "content": _SAID}], tokenize=False, date_string=DATE)
  before = str(text).partition(_SAID)[0]
  return " ".join(before.split()) if "system" in before else ""


def choose_template(tokenizer: PreTrainedTokenizerBase, choice: str, variables: Mapping[str, Any]) -> None:
  """Gives a tokenizer the chat template of a run, which is saved with it, and sees that it comes to an end.

  Args:
    choice: a file, `plain`, or the name of one of the tokenizer's own; "" for its own.
    variables: what the template knows beside the messages, unless the caller says otherwise: `enable_thinking`.

  Raises:
    InputError: there is no such template, it is no text, or rendering a short chat takes longer than a few seconds.
  """
  own = tokenizer.chat_template
  named = own if isinstance(own, dict) else {}
  if choice == "plain":
    template: Any = PLAIN
  elif choice in named:
    template = named[choice]
  elif choice:
    try:
      template = pathlib.Path(choice).read_text()
    except (OSError, UnicodeDecodeError) as error:
      expected = ", ".join(["a file", "plain", *named])
      raise InputError(f"{choice}: no chat template ({error}), expected {expected}") from None
  elif named and "default" not in named:
    raise InputError(
      f"tokenizer {_name(tokenizer)}: has the chat templates {', '.join(named)}, expected one to be chosen"
    )
  else:
    template = named.get("default", own)
  if template is None:
    return
  if not isinstance(template, str):
    raise InputError(f"tokenizer {_name(tokenizer)}: its chat template is {template!r}, expected text")
  for name, value in variables.items():
    template = f"{{% set {name} = {name} if {name} is defined else {_jinja(value)} %}}{template}"
  tokenizer.chat_template = template
  _check_end(tokenizer)


def _jinja(value: Any) -> str:
  """A value of JSON as Jinja spells it."""
  return "none" if value is None else json.dumps(value)


def _check_end(tokenizer: PreTrainedTokenizerBase) -> None:
  """Refuses a template that loops for ever, by a short chat."""
  turns = [("system", "Be brief."), ("user", "1 + 1?"), ("assistant", "2"), ("user", "2 + 2?")]

  def probe() -> None:
    with contextlib.suppress(InputError):  # which `render` will say again, where it matters
      render(tokenizer, [{"role": role, "content": content} for role, content in turns])

  thread = threading.Thread(target=probe, daemon=True)  # left behind if it does not end: nothing can stop it
  thread.start()
  thread.join(_LONGEST)
  if thread.is_alive():
    raise InputError(f"tokenizer {_name(tokenizer)}: its chat template was not done with a short chat in {_LONGEST} s")


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
  return tokenizer.name_or_path or type(tokenizer).__name__


def _merge_system(messages: Sequence[Message]) -> list[Message]:
  """Puts the leading system message before the text of the first user message."""
  system, *rest = (dict(message) for message in messages)
  first = next(message for message in rest if message["role"] == "user")
  first["content"] = f"{system['content']}\n\n{first['content']}"
  return rest
