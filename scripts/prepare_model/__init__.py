"""Model preparation: from published weights to a bundle that an agent loads."""

from scripts.prepare_model.bundle import Prepared, copy_to, default_bundle, exported_graph, prepare
from scripts.prepare_model.errors import PreparationError

__all__ = ["PreparationError", "Prepared", "copy_to", "default_bundle", "exported_graph", "prepare"]
