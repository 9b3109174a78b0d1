"""A table of model functions in every style, and for each what its weights are multiplied with, in plain code.

One module for each kind of function; importing it fills the one table, `CASES`.
"""

from functions import control_flow, embeddings, experts, flax_models, leaves, renamed, stacks  # noqa: F401
from functions.cases import CASES as CASES
from functions.cases import E as E
from functions.cases import Seen as Seen
from functions.cases import normal as normal
