"""Plans as text."""

from typing import Any

from rlpr_jax.planning.hardware import GIB

_ROOFLINE = "Times are rooflines: estimates, from published rates and assumed lengths, of a step that loses nothing."


def of_one(plan: dict[str, Any], steps: int) -> str:
  """A step's cost on one slice."""
  mesh = ", ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if axis != "process")
  lines = [
    f"{plan['topology']}: {plan['chips']} chips, {plan['processes']} processes, mesh {mesh or 'of one device'};"
    f" {plan['slots']} slots, micro-batches of {plan['micro_batch_rows']} rows",
    "",
    f"| GiB a device, of {plan['granted'] / GIB:.2f} | {' | '.join(_parts(plan))} | temporaries | peak | |",
    "|---" * (len(_parts(plan)) + 4) + "|",
  ]
  for name, program in plan["programs"].items():
    sizes = [f"{program['parts'].get(part, 0) / GIB:.2f}" for part in _parts(plan)]
    peak = f"{program['peak'] / GIB:.2f}" if program["peak"] else "-"
    verdict = "fits" if program["fits"] else f"does not fit {program['refused']}".strip()
    lines.append(f"| {name} | {' | '.join(sizes)} | {program['temporary'] / GIB:.2f} | {peak} | {verdict} |")
  lines += [
    "",
    "| of a call, on each device | attention | TFLOP | GiB received from others (number) |",
    "|---|---|---|---|",
  ]
  for name, program in plan["programs"].items():
    kinds = [
      f"{kind} {traffic['received'] / GIB:.3f} ({traffic['runs']:.0f})"
      for kind, traffic in sorted(program["collectives"].items())
    ]
    operations = program["operations"] / program["devices"] / 1e12
    lines.append(f"| {name} | {program['attention'] or '-'} | {operations:.2f} | {', '.join(kinds) or 'none'} |")
  if plan["step"]:
    lines += ["", *_step(plan["step"], plan["lengths"], steps)]
  if "best" in plan:
    lines += ["", best(plan, steps)]
  return "\n".join(lines)


def _parts(plan: dict[str, Any]) -> list[str]:
  """Names of what is held, of any program."""
  names = dict.fromkeys(part for program in plan["programs"].values() for part in program["parts"])
  return [name for name in names if any(program["parts"].get(name) for program in plan["programs"].values())]


def _step(step: dict[str, Any], lengths: dict[str, float], steps: int) -> list[str]:
  lines = ["| estimated seconds a step | operations | memory | links | together |", "|---|---|---|---|---|"]
  for name, part in step["parts"].items():
    numbers = [f"{part[field]:.2f}" for field in ("operations", "memory", "links", "seconds")]
    lines.append(f"| {name} | {' | '.join(numbers)} |")
  return [
    *lines,
    "",
    f"A step: {step['seconds']:.1f} s; {steps} steps: {step['device_hours']:.0f} chip-hours. {_ROOFLINE}",
    f"Assumed: prompts of {lengths['prompt']} and responses of {lengths['response']} tokens on average,"
    f" references of {lengths['reference']}, {lengths['draws']:g} draws of prompts a step. With responses of log-normal"
    f" length (spread {lengths['spread']:g}) {step['occupancy']:.0%} of the slots are busy.",
  ]


def best(plan: dict[str, Any], steps: int) -> str:
  """Settings to take.

  >>> best({"best": {"slots": 64, "micro_batch_rows": 8}}, steps=100)
  'Best of what fits: --config.rollout.slots=64 --config.training.micro_batch_rows=8'
  """
  chosen = plan["best"]
  if not chosen["slots"] or not chosen["micro_batch_rows"]:
    names = {"slots": "a single slot for each part of the mesh", "micro_batch_rows": "one row at a time"}
    missing = [name for field, name in names.items() if not chosen[field]]
    return (
      f"Does not fit with {' nor with '.join(missing)}: take more chips, config.model.remat=full, a smaller"
      " config.data.prompt_limit or rollout.max_response_length, more config.mesh.tensor, or"
      " config.rollout.gather_params=False."
    )
  time = f"; a step then: {chosen['step']['seconds']:.1f} s" if chosen.get("step") else ""
  return (
    "Best of what fits: "
    f"--config.rollout.slots={chosen['slots']} --config.training.micro_batch_rows={chosen['micro_batch_rows']}{time}"
  )


def comparison(plans: list[dict[str, Any]], steps: int) -> str:
  """Several slices in one table.

  >>> lines = comparison([{"topology": "v5e:1x1", "chips": 1, "error": "no compiler"}], steps=100).splitlines()
  >>> lines[2]
  '| v5e:1x1 | 1 | no compiler | no | | | | |'
  """
  lines = [
    f"| slice | chips | largest peak of granted, GiB | fits | best slots | best micro-batch |"
    f" s a step (estimate) | chip-hours of {steps} steps (estimate) |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for plan in plans:
    if "error" in plan:
      lines.append(f"| {plan['topology']} | {plan['chips']} | {plan['error']} | no | | | | |")
      continue
    peak = max(program["peak"] for program in plan["programs"].values())
    chosen = plan.get("best", {})
    step = (chosen.get("step") if chosen else plan["step"]) or {}
    lines.append(
      f"| {plan['topology']} | {plan['chips']} | {peak / GIB:.1f} of {plan['granted'] / GIB:.1f} |"
      f" {'yes' if plan['fits'] else 'no'} | {chosen.get('slots', '')} | {chosen.get('micro_batch_rows', '')} |"
      f" {_number(step.get('seconds'), 1)} | {_number(step.get('device_hours'), 0)} |"
    )
  return "\n".join([*lines, "", _ROOFLINE])


def _number(value: float | None, digits: int) -> str:
  return "-" if value is None else f"{value:.{digits}f}"
