"""The type checker that tests put over the core: an int is a float to it, as to every type checker that only reads."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
