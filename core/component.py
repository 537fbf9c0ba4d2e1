"""Component: a thing with settings that a configuration chooses by name.

Datasets, models, partitions and the parts of methods are all components: frozen pydantic models whose
fields are the settings and whose methods are the behaviour. In a configuration each is a table
`{use = "name", field = value, …}`, or just the name.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Component(BaseModel):
    """Immutable settings with behaviour; equality, pickling and schema come from the fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @classmethod
    def summary(cls) -> str:
        """First line of the docstring."""
        return (cls.__doc__ or "").strip().partition("\n")[0]
