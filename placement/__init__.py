"""Where experts live: problems, objectives, solvers, certificates and the files that serving engines load.

NumPy and SciPy only; PuLP is imported by `placement.ilp` when an integer programme is solved.
"""

from .contract.certificate import Bound, Certificate
from .contract.cluster import Cluster, load_cluster
from .contract.plan import Plan
from .contract.problem import Problem, Scenario
from .data.generators import generate_loads, generate_trace
from .data.loads import read_loads
from .heuristics.eplb import eplb
from .heuristics.eplb_reference import eplb_layer_reference
from .objectives import OBJECTIVES, Objective, evaluate, weighted
from .scoring.score import Score, score
from .solving.solve import solve
from .solving.solvers import SOLVERS

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
