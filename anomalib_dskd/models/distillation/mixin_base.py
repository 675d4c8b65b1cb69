"""Base of the mixins that make up a model."""

from typing import TYPE_CHECKING

from anomalib.models.components import AnomalibModule

__all__ = ["ModuleMixin"]

if TYPE_CHECKING:
    ModuleMixin = AnomalibModule
else:  # anomalib finds models among the direct subclasses of AnomalibModule, which a mixin must not be
    ModuleMixin = object
