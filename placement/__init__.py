"""Where experts live: problems, objectives, solvers, certificates and the files that serving engines load.

NumPy and SciPy only; PuLP is imported by `placement.ilp` when an integer programme is solved.
"""

from .certificate import Bound, Certificate
from .cluster import Cluster, load_cluster
from .eplb import eplb
from .eplb_reference import eplb_layer_reference
from .generators import generate_loads, generate_trace
from .loads import read_loads
from .objectives import OBJECTIVES, Objective, evaluate, weighted
from .plan import Plan
from .problem import Problem, Scenario
from .scoring import Score, score
from .solvers import SOLVERS, solve

__all__ = [
    "OBJECTIVES",
    "SOLVERS",
    "Bound",
    "Certificate",
    "Cluster",
    "Objective",
    "Plan",
    "Problem",
    "Scenario",
    "Score",
    "eplb",
    "eplb_layer_reference",
    "evaluate",
    "generate_loads",
    "generate_trace",
    "load_cluster",
    "read_loads",
    "score",
    "solve",
    "weighted",
]
