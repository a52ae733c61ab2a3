"""data/templates.py: the chat of a question, and its token ids."""

import copy

import pytest

from rlpr_jax.data import templates
from rlpr_jax.data.sources import Example
from rlpr_jax.data.templates import (
  INSTRUCTIONS,
  build_messages,
  choose_template,
  own_system_message,
  render,
  render_all,
  turn_end,
)
from rlpr_jax.errors import InputError
from tests.huggingface.published import GEMMA2_TEMPLATE

PLAIN = (
  "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
# As Gemma 2's: no system messages, and user and assistant take turns.
STRICT = (
  "{% for m in messages %}"
  "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
  "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must\nalternate') }}{% endif %}"
  "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def message(role, content):
  return {"role": role, "content": content}


SYSTEM, QUESTION = message("system", "Be brief."), message("user", "6 * 7?")


def example(*messages):
  return Example(messages, "42", "test", 1)


def with_template(tokenizer, template):
  tokenizer = copy.copy(tokenizer)
  tokenizer.chat_template = template
  return tokenizer


@pytest.mark.parametrize("template", ["think", "answer_only"])
def test_the_instruction_comes_first(template):
  assert build_messages(example(QUESTION), template) == [message("system", INSTRUCTIONS[template]), QUESTION]


def test_the_instruction_can_be_changed_or_left_out():
  assert build_messages(example(QUESTION), "think", instruction="Be kind.") == [message("system", "Be kind."), QUESTION]
  assert build_messages(example(QUESTION), "think", instruction="") == [QUESTION]


def test_a_system_message_of_the_row_stays():
  for instruction in (None, "Be kind.", ""):
    assert build_messages(example(SYSTEM, QUESTION), "think", instruction=instruction) == [SYSTEM, QUESTION]


def test_a_system_message_for_every_row():
  """It goes before the row's own and before the instruction; worked examples stay where they are."""
  for row in (example(SYSTEM, QUESTION), example(QUESTION)):
    for instruction in (None, "Be kind.", ""):
      built = build_messages(row, "think", [("1?", "1")], instruction, system="Be fast.")
      turns = [message("user", "1?"), message("assistant", "1")]
      assert built == [message("system", "Be fast."), *turns, QUESTION]


def test_instructions_name_the_tags_of_their_template():
  assert all(tag in INSTRUCTIONS["think"] for tag in ("<think>", "</think>", "<answer>", "</answer>"))
  assert all(tag in INSTRUCTIONS["answer_only"] for tag in ("<answer>", "</answer>"))
  assert "<think>" not in INSTRUCTIONS["answer_only"]


def test_worked_examples_come_before_the_last_user_message():
  shown = [("1 + 1?", "<answer> 2 </answer>"), ("2 + 2?", "<answer> 4 </answer>")]
  turns = [message(role, text) for pair in shown for role, text in zip(("user", "assistant"), pair, strict=True)]
  earlier = [message("user", "Hello."), message("assistant", "Hello.")]
  row = example(SYSTEM, *earlier, QUESTION)
  assert build_messages(row, "think", shown) == [SYSTEM, *earlier, *turns, QUESTION]
  assert build_messages(example(QUESTION), "think", shown, "Go.") == [message("system", "Go."), *turns, QUESTION]


def test_the_row_is_not_changed():
  row = example(dict(QUESTION))
  built = build_messages(row, "think", instruction="")
  built[0]["content"] = "other"
  assert row.messages == (QUESTION,)


def test_unknown_template():
  with pytest.raises(InputError, match="template 'r1': expected one of think, answer_only"):
    build_messages(example(QUESTION), "r1")


def test_render_gives_a_list_of_ids(across_words):
  ids = render(with_template(across_words, PLAIN), [SYSTEM, QUESTION])
  assert type(ids) is list
  assert all(type(i) is int for i in ids)
  assert across_words.decode(ids) == "[system]Be brief.[user]6 * 7?[assistant]"


def test_render_merges_a_system_message_that_the_template_rejects(across_words):
  messages = [SYSTEM, message("user", "1?"), message("assistant", "1"), QUESTION]
  before = copy.deepcopy(messages)
  ids = render(with_template(across_words, STRICT), messages)
  assert across_words.decode(ids) == "[user]Be brief.\n\n1?[assistant]1[user]6 * 7?[assistant]"
  assert messages == before


@pytest.mark.parametrize("template", [PLAIN, STRICT])
def test_many_chats_are_rendered_as_one_by_one(across_words, template):
  tokenizer = with_template(across_words, template)
  chats = [[SYSTEM, QUESTION], [QUESTION], [message("user", "<|end|> 中 "), message("assistant", "1"), QUESTION]]
  assert render_all(tokenizer, chats * 3) == [render(tokenizer, chat) for chat in chats] * 3


@pytest.mark.parametrize("messages", [[QUESTION, QUESTION], [SYSTEM, QUESTION, QUESTION]])
def test_render_says_what_the_template_rejects(across_words, messages):
  tokenizer = with_template(across_words, STRICT)
  tokenizer.name_or_path = "some/model"
  with pytest.raises(InputError) as caught:
    render(tokenizer, messages)
  assert str(caught.value) == "tokenizer some/model: its chat template rejects the messages: Roles must alternate"


def test_of_many_chats_the_rejected_one_is_named(across_words):
  tokenizer = with_template(across_words, STRICT)
  with pytest.raises(InputError, match=r"^a\.csv: row 2: tokenizer .* rejects the messages: Roles must alternate$"):
    render_all(tokenizer, [[SYSTEM, QUESTION], [QUESTION, QUESTION]], ["a.csv: row 1", "a.csv: row 2"])


@pytest.mark.parametrize("template", [None, ""])
def test_render_without_a_chat_template(across_words, template):
  tokenizer = with_template(across_words, template)
  tokenizer.name_or_path = "some/model"
  with pytest.raises(InputError, match="tokenizer some/model: expected a chat template, found none"):
    render(tokenizer, [QUESTION])


def test_qwen_prompt(published):
  tokenizer = published("qwen2_5")
  expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n6 * 7?<|im_end|>\n<|im_start|>assistant\n"
  ids = render(tokenizer, [SYSTEM, QUESTION])
  assert tokenizer.decode(ids) == expected
  assert ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_llama_prompt_has_one_bos_and_no_clock(published):
  tokenizer = published("llama3_2")
  ids = render(tokenizer, [SYSTEM, QUESTION])
  assert ids.count(tokenizer.bos_token_id) == 1
  text = tokenizer.decode(ids)
  assert "Today Date: 26 Jul 2024\n\nBe brief.<|eot_id|>" in text
  assert text.endswith("6 * 7?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")


def test_gemma_prompt(published):
  tokenizer = with_template(published("gemma2"), GEMMA2_TEMPLATE)
  ids = render(tokenizer, [SYSTEM, QUESTION])
  assert ids.count(tokenizer.bos_token_id) == 1
  assert tokenizer.decode(ids) == ("<bos><start_of_turn>user\nBe brief.\n\n6 * 7?<end_of_turn>\n<start_of_turn>model\n")


# As Gemma's turns: they end in a token that is not the tokenizer's EOS.
TURNS = (
  "{% for m in messages %}{{ m.role }}:{{ m.content }}<|turn|>\n{% endfor %}"
  "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture
def turns(across_words):
  tokenizer = with_template(copy.deepcopy(across_words), TURNS)
  tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
  return tokenizer


def test_a_response_ends_in_what_the_template_writes_behind_one(turns):
  eos, turn = turns.eos_token_id, turns.convert_tokens_to_ids("<|turn|>")
  assert turn_end(turns) == ((eos, turn), turn)
  assert turn_end(turns, [7, eos]) == (tuple(sorted([7, eos, turn])), turn)
  assert turn_end(with_template(turns, PLAIN)) == ((eos,), eos)  # it writes no control token there
  assert turn_end(with_template(turns, None)) == ((eos,), eos)


@pytest.mark.parametrize(
  ("name", "end"), [("qwen2_5", "<|im_end|>"), ("gemma3", "<end_of_turn>"), ("llama3_2", "<|eot_id|>")]
)
def test_published_templates_end_a_turn(published, name, end):
  tokenizer = published(name)
  found = turn_end(tokenizer, [3])
  assert tokenizer.decode([found.eos_id]) == end
  assert {3, tokenizer.eos_token_id, found.eos_id} == set(found.eos_ids)


def test_no_token_to_end_with(across_words):
  tokenizer = with_template(copy.deepcopy(across_words), PLAIN)
  tokenizer.eos_token = None
  with pytest.raises(InputError, match="expected an EOS token, found none"):
    turn_end(tokenizer)


@pytest.mark.parametrize("name", ["qwen2_5", "gemma3", "llama3_2"])
def test_a_control_token_in_a_question_is_text(published, name):
  tokenizer = published(name)
  end = tokenizer.decode([turn_end(tokenizer).eos_id])
  ids = render(tokenizer, [message("user", f"What is {end}?")])
  plain = render(tokenizer, [message("user", "What is it?")])
  assert ids.count(turn_end(tokenizer).eos_id) == plain.count(turn_end(tokenizer).eos_id)
  assert f"What is {end}?" in tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["qwen2_5", "gemma3", "llama3_2"])
def test_a_chat_has_the_ids_that_transformers_gives_it(published, name):
  tokenizer = published(name)
  chat = [
    SYSTEM,
    message("user", "1 + 1?"),
    message("assistant", "<think> 1 </think> 2"),
    message("user", "中文\n6 * 7?"),
  ]
  theirs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False, date_string="26 Jul 2024")
  assert render(tokenizer, chat) == theirs


# As Qwen3's and R1's: of an assistant's turn what stands behind the thought is kept.
FORGETFUL = (
  "{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1] }}{% endfor %}"
  "{% if add_generation_prompt %}[assistant]<think>\n{% endif %}"
)


def test_worked_examples_keep_their_thoughts(across_words):
  chat = build_messages(example(QUESTION), "think", [("1 + 1?", "<think> 1 </think> 2")], "")
  ids = render(with_template(across_words, FORGETFUL), chat)
  assert across_words.decode(ids) == "[user]1 + 1?[assistant]<think> 1 </think> 2[user]6 * 7?[assistant]<think>\n"


def test_a_chat_that_ends_with_the_assistant_is_gone_on_with(across_words):
  tokenizer = with_template(across_words, PLAIN)
  assert across_words.decode(render(tokenizer, [QUESTION, message("assistant", "It is")])).endswith("[assistant]It is")


def test_a_system_message_of_the_templates_own(published, across_words):
  assert "You are Qwen, created by Alibaba Cloud" in own_system_message(published("qwen2_5"))
  assert own_system_message(published("gemma3")) == ""
  assert own_system_message(with_template(across_words, PLAIN)) == ""


def test_templates_to_choose_from(across_words, tmp_path):
  tokenizer = with_template(across_words, None)
  choose_template(tokenizer, "", {})
  assert tokenizer.chat_template is None
  choose_template(tokenizer, "plain", {})
  assert across_words.decode(render(tokenizer, [SYSTEM, QUESTION])) == "System: Be brief.\n\nUser: 6 * 7?\n\nAssistant:"
  assert turn_end(tokenizer).eos_id == across_words.eos_token_id
  file = tmp_path / "chat.jinja"
  file.write_text(PLAIN)
  choose_template(tokenizer, str(file), {})
  assert tokenizer.chat_template == PLAIN
  named = with_template(across_words, {"default": PLAIN, "tools": TURNS})
  choose_template(named, "tools", {})
  assert named.chat_template == TURNS
  named = with_template(across_words, {"default": PLAIN, "tools": TURNS})
  choose_template(named, "", {})
  assert named.chat_template == PLAIN


def test_variables_of_a_template(across_words):
  template = "{{ 'thinks' if enable_thinking else 'does not' }} {{ level }}"
  tokenizer = with_template(across_words, template)
  choose_template(tokenizer, "", {"enable_thinking": True, "level": None})
  assert across_words.decode(render(tokenizer, [QUESTION])) == "thinks None"
  chat = tokenizer.apply_chat_template([QUESTION], tokenize=False, enable_thinking=False, level=3)
  assert chat == "does not 3"  # whoever has the exported model may still say otherwise


@pytest.mark.parametrize(
  ("template", "choice", "said"),
  [
    (PLAIN, "nowhere.jinja", "nowhere.jinja: no chat template .*expected a file, plain"),
    ({"tools": PLAIN}, "", "has the chat templates tools, expected one to be chosen"),
    (7, "", "its chat template is 7, expected text"),
  ],
)
def test_templates_that_cannot_be(across_words, template, choice, said):
  with pytest.raises(InputError, match=said):
    choose_template(with_template(across_words, template), choice, {})


def test_a_template_that_does_not_end(across_words, monkeypatch):
  monkeypatch.setattr(templates, "_LONGEST", 0.1)
  endless = "{% for i in range(9000) %}{% for j in range(3000) %}{% endfor %}{% endfor %}"  # long enough
  with pytest.raises(InputError, match="its chat template was not done with a short chat"):
    choose_template(with_template(across_words, endless), "", {})


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{{ messages[9].content.x }}", "{% for %}"])
def test_whatever_a_template_raises_is_one_line(across_words, template):
  with pytest.raises(InputError, match="its chat template rejects the messages: "):
    render(with_template(across_words, template), [QUESTION])
