"""The base class of a method that is nothing but a declaration."""

from __future__ import annotations

from dataclasses import field, make_dataclass, replace
from typing import Any

from jdm.errors import UsageError
from jdm.loading import Loaded
from jdm.methods.engine import Distillation
from jdm.run import Needs, Product, Run, Task
from jdm.terms import Term


class Declared:
    """A method whose `distillation` declares all of it; its class is a frozen dataclass of nested settings."""

    def distillation(self) -> Distillation:
        """The declaration of these settings."""
        raise UsageError(f"{type(self).__name__} does not declare a distillation")

    def plus(self, **terms: Term) -> Any:
        """These settings with further terms, which are summed, logged and set by flags under their names.

        Raises:
            UsageError: a name is that of a field already.
        """
        kind: Any = type(self)
        if taken := terms.keys() & vars(self).keys():
            raise UsageError(f"{kind.__name__} has a field `{min(taken)}` already; give the term another name")
        made = [(name, type(term), field(default=term)) for name, term in terms.items()]

        def distillation(self: Any) -> Distillation:
            declared = kind.distillation(self)
            return replace(declared, terms={**declared.terms, **{name: getattr(self, name) for name in terms}})

        texts = "".join(f"\n        {name}: a further term." for name in terms)
        text = f"{kind.__name__} with further terms.\n\n    Attributes:{texts}"
        body = {"distillation": distillation, "__doc__": text}
        return make_dataclass(kind.__name__, made, bases=(kind,), namespace=body, frozen=True)(**vars(self))

    def needs(self, run: Run) -> Needs:
        return self.distillation().needs(run)

    def product(self, loaded: Loaded) -> Product:
        return self.distillation().product(loaded)

    def task(self, loaded: Loaded) -> Task:
        return self.distillation().task(loaded)
