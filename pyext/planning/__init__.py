"""What a step costs on ranks that are not there: traffic, memory and time from shapes, a mesh and a machine's rates."""

from steepest.planning.inventories import Inventory, inventory
from steepest.planning.mesh import Mesh
from steepest.planning.predict import Machine, Prediction, predict

__all__ = ["Inventory", "Machine", "Mesh", "Prediction", "inventory", "predict"]
