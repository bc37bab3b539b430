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
from .objectives.dispatch import quota_share_EG
from .scoring.score import Score, score
from .solving.elastic import Migration, Transfer, migrate_checked
from .solving.solve import solve
from .solving.solvers import SOLVERS

__all__ = [
    "OBJECTIVES",
    "SOLVERS",
    "Bound",
    "Certificate",
    "Cluster",
    "Migration",
    "Objective",
    "Plan",
    "Problem",
    "Scenario",
    "Score",
    "Transfer",
    "eplb",
    "eplb_layer_reference",
    "evaluate",
    "generate_loads",
    "generate_trace",
    "load_cluster",
    "migrate_checked",
    "quota_share_EG",
    "read_loads",
    "score",
    "solve",
    "weighted",
]
